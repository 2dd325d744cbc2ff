#include "transport/guest_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

int guest_region_map(uint64_t guest, uint64_t user, uint64_t size, uint64_t offset, int fd, struct guest_region **out)
{
    uint64_t end;
    if (size == 0 || __builtin_add_overflow(guest, size, &end) || __builtin_add_overflow(user, size, &end)) {
        close(fd);
        return -EINVAL;
    }
    struct guest_region *r = calloc(1, sizeof *r);
    if (!r) {
        close(fd);
        return -ENOMEM;
    }
    r->refs = 1;
    r->guest = guest;
    r->user = user;
    r->size = size;
    int rc = shm_map(&r->shm, fd, offset, size);
    if (rc) {
        free(r);
        return rc;
    }
    *out = r;
    return 0;
}

void guest_region_put(struct guest_region *r)
{
    if (!r || atomic_fetch_sub(&r->refs, 1) != 1)
        return;
    shm_unmap(&r->shm);
    free(r);
}

static int by_guest(const void *a, const void *b)
{
    const struct guest_range *x = a, *y = b;
    return x->guest < y->guest ? -1 : x->guest > y->guest;
}

static int by_user(const void *a, const void *b)
{
    const struct guest_region *x = *(struct guest_region *const *)a, *y = *(struct guest_region *const *)b;
    return x->user < y->user ? -1 : x->user > y->user;
}

static bool users_overlap(struct guest_region **sorted, unsigned count)
{
    for (unsigned n = 1; n < count; n++)
        if (sorted[n]->user - sorted[n - 1]->user < sorted[n - 1]->size)
            return true;
    return false;
}

struct guest_memory *guest_memory_new(struct guest_region **regions, unsigned count, int *err)
{
    struct guest_memory *m = calloc(1, sizeof *m + count * sizeof m->ranges[0]);
    struct guest_region **sorted = calloc(count + 1, sizeof *sorted);
    if (!m || !sorted) {
        free(m);
        free(sorted);
        *err = -ENOMEM;
        return NULL;
    }
    m->refs = 1;
    m->count = count;
    for (unsigned n = 0; n < count; n++) {
        struct guest_region *r = sorted[n] = regions[n];
        m->ranges[n] = (struct guest_range){r->guest, r->size, r->shm.base, r};
    }
    qsort(m->ranges, count, sizeof m->ranges[0], by_guest);
    qsort(sorted, count, sizeof *sorted, by_user);
    bool overlap = users_overlap(sorted, count);
    for (unsigned n = 1; n < count; n++)
        if (m->ranges[n].guest - m->ranges[n - 1].guest < m->ranges[n - 1].size)
            overlap = true;
    free(sorted);
    if (overlap) {
        free(m);
        *err = -EEXIST;
        return NULL;
    }
    for (unsigned n = 0; n < count; n++)
        atomic_fetch_add(&m->ranges[n].region->refs, 1);
    *err = 0;
    return m;
}

void guest_memory_get(struct guest_memory *m)
{
    atomic_fetch_add_explicit(&m->refs, 1, memory_order_relaxed);
}

void guest_memory_put(struct guest_memory *m)
{
    if (!m || atomic_fetch_sub(&m->refs, 1) != 1)
        return;
    for (unsigned n = 0; n < m->count; n++)
        guest_region_put(m->ranges[n].region);
    free(m);
}

bool guest_memory_lost(const struct guest_memory *m)
{
    for (unsigned n = 0; n < m->count; n++)
        if (shm_lost(&m->ranges[n].region->shm))
            return true;
    return false;
}

void guest_memory_detach(struct guest_memory *m)
{
    for (unsigned n = 0; n < m->count; n++)
        shm_detach(&m->ranges[n].region->shm);
}

const struct guest_range *guest_range_find(const struct guest_memory *m, uint64_t addr)
{
    unsigned low = 0, high = m->count;
    while (low < high) {
        unsigned mid = low + (high - low) / 2;
        if (m->ranges[mid].guest <= addr)
            low = mid + 1;
        else
            high = mid;
    }
    if (low == 0 || addr - m->ranges[low - 1].guest >= m->ranges[low - 1].size)
        return NULL;
    return &m->ranges[low - 1];
}

void *guest_memory_user(const struct guest_memory *m, uint64_t user, uint64_t len)
{
    for (unsigned n = 0; n < m->count; n++) {
        const struct guest_region *r = m->ranges[n].region;
        if (user - r->user < r->size)
            return len > r->size - (user - r->user) ? NULL : r->shm.base + (user - r->user);
    }
    return NULL;
}

bool guest_memory_where(const struct guest_memory *m, const void *host, uint64_t *guest, uint64_t *left)
{
    for (unsigned n = 0; n < m->count; n++) {
        uint64_t at = (const uint8_t *)host - m->ranges[n].host;
        if (at < m->ranges[n].size) {
            *guest = m->ranges[n].guest + at;
            *left = m->ranges[n].size - at;
            return true;
        }
    }
    return false;
}

uint64_t guest_memory_end(const struct guest_memory *m)
{
    return m->count ? m->ranges[m->count - 1].guest + m->ranges[m->count - 1].size : 0;
}
