#include "transport/vhost_log.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

int dirty_log_map(int fd, uint64_t offset, uint64_t len, _Atomic uint64_t *marked, struct dirty_log **out)
{
    struct dirty_log *l = calloc(1, sizeof *l);
    if (!l) {
        close(fd);
        return -ENOMEM;
    }
    int rc = shm_map(&l->shm, fd, offset, len);
    if (rc) {
        free(l);
        return rc;
    }
    l->refs = 1;
    l->marked = marked;
    *out = l;
    return 0;
}

void dirty_log_put(struct dirty_log *l)
{
    if (!l || atomic_fetch_sub(&l->refs, 1) != 1)
        return;
    shm_unmap(&l->shm);
    free(l);
}

void dirty_log_mark(struct dirty_log *l, uint64_t guest, uint64_t len)
{
    if (len == 0)
        return;
    uint64_t last = guest + (len - 1) < guest ? UINT64_MAX : guest + (len - 1);
    uint64_t end = l->shm.len * 8 < l->shm.len ? UINT64_MAX : l->shm.len * 8; /* first page without a bit */
    uint64_t fresh = 0;
    for (uint64_t page = guest / DIRTY_PAGE; page <= last / DIRTY_PAGE && page < end; page++) {
        _Atomic uint8_t *byte = (_Atomic uint8_t *)l->shm.base + page / 8;
        uint8_t bit = 1u << page % 8;
        fresh += !(atomic_fetch_or_explicit(byte, bit, memory_order_release) & bit);
    }
    if (fresh)
        atomic_fetch_add_explicit(l->marked, fresh, memory_order_relaxed);
}

void dirty_log_mark_host(struct dirty_log *l, const struct guest_memory *m, const void *host, uint64_t len)
{
    uint64_t guest, left;
    while (len && guest_memory_where(m, host, &guest, &left)) {
        uint64_t part = len < left ? len : left;
        dirty_log_mark(l, guest, part);
        host = (const uint8_t *)host + part;
        len -= part;
    }
}

void dirty_log_mark_all(struct dirty_log *l, const struct guest_memory *m)
{
    for (unsigned n = 0; m && n < m->count; n++) {
        uint64_t page = m->ranges[n].guest / DIRTY_PAGE, end = (m->ranges[n].guest + m->ranges[n].size - 1) / DIRTY_PAGE + 1;
        for (; page < end && page % 8; page++)
            dirty_log_mark(l, page * DIRTY_PAGE, 1);
        for (; end - page >= 8 && page / 8 < l->shm.len; page += 8) /* a terabyte has 32 MiB of them */
            atomic_store_explicit((_Atomic uint8_t *)l->shm.base + page / 8, 0xff, memory_order_release);
        for (; page < end; page++)
            dirty_log_mark(l, page * DIRTY_PAGE, 1);
    }
}
