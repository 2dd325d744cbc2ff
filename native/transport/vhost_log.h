/* The dirty log of a live migration: one bit per 4 KiB page of guest-physical memory we wrote to. */
#ifndef RBDN_VHOST_LOG_H
#define RBDN_VHOST_LOG_H

#include <stdatomic.h>
#include <stdint.h>

#include "transport/guest_memory.h"

#define DIRTY_PAGE 4096

struct dirty_log {
    _Atomic unsigned refs;
    struct shm shm;
    _Atomic uint64_t *marked; /* pages that changed from clean to dirty; for statistics */
};

/* Takes fd over, also on failure; errors as shm_map. */
int dirty_log_map(int fd, uint64_t offset, uint64_t len, _Atomic uint64_t *marked, struct dirty_log **out);
void dirty_log_put(struct dirty_log *); /* NULL is fine */
/* After the write to memory, before the peer can learn of it. Pages the log has no bit for are left out: its size
 * was checked against the memory when it was set, so they can only be addresses a hostile front end made up. */
void dirty_log_mark(struct dirty_log *, uint64_t guest, uint64_t len);
void dirty_log_mark_host(struct dirty_log *, const struct guest_memory *, const void *host, uint64_t len);
void dirty_log_mark_all(struct dirty_log *, const struct guest_memory *); /* NULL memory: nothing */
static inline bool dirty_log_covers(const struct dirty_log *l, uint64_t guest_end)
{
    return guest_end == 0 || (guest_end - 1) / DIRTY_PAGE / 8 < l->shm.len;
}

#endif
