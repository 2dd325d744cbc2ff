/* The guest's memory as a vhost-user front end describes it: an immutable, counted table of regions.
 *
 * A change of the memory makes a new table that shares the regions which stay. Requests in flight keep the table they
 * were started with. Addresses: "guest" = guest-physical (in descriptors), "user" = the front end's own (of rings).
 */
#ifndef RBDN_GUEST_MEMORY_H
#define RBDN_GUEST_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "transport/vhost_shm.h"

#define GUEST_REGIONS_MAX 509 /* what QEMU's own back ends offer */

struct guest_region {
    _Atomic unsigned refs;
    uint64_t guest, user, size; /* addresses and bytes; guest + size and user + size do not wrap */
    struct shm shm;
};

/* Takes fd over, also on failure. -EINVAL for a size of 0 or ranges that wrap, else as shm_map. */
int guest_region_map(uint64_t guest, uint64_t user, uint64_t size, uint64_t offset, int fd, struct guest_region **out);
void guest_region_put(struct guest_region *);

struct guest_memory {
    _Atomic unsigned refs;
    unsigned count;
    struct guest_range {
        uint64_t guest, size;
        uint8_t *host;
        struct guest_region *region;
    } ranges[]; /* by guest address */
};

/* Takes its own references. NULL and *err: -EEXIST regions overlap (guest or user addresses), -ENOMEM. */
struct guest_memory *guest_memory_new(struct guest_region **regions, unsigned count, int *err);
void guest_memory_get(struct guest_memory *);
void guest_memory_put(struct guest_memory *); /* NULL is fine */
bool guest_memory_lost(const struct guest_memory *); /* a file was truncated under us */
void guest_memory_detach(struct guest_memory *);     /* shm_detach for every region */

const struct guest_range *guest_range_find(const struct guest_memory *, uint64_t addr);

/* The range that holds addr, or NULL. *hint = index of the last hit, any value. */
static inline const struct guest_range *guest_range_at(const struct guest_memory *m, unsigned *hint, uint64_t addr)
{
    if (*hint < m->count) {
        const struct guest_range *r = &m->ranges[*hint];
        if (addr - r->guest < r->size) /* wraps to a large number below the start */
            return r;
    }
    const struct guest_range *r = guest_range_find(m, addr);
    if (r)
        *hint = r - m->ranges;
    return r;
}

/* Host address of [addr, addr+len), in one region, or NULL. */
static inline void *guest_memory_at(const struct guest_memory *m, unsigned *hint, uint64_t addr, uint64_t len)
{
    const struct guest_range *r = guest_range_at(m, hint, addr);
    if (!r || len > r->size - (addr - r->guest))
        return NULL;
    return r->host + (addr - r->guest);
}

/* The same for a user address (rings). */
void *guest_memory_user(const struct guest_memory *, uint64_t user, uint64_t len);
/* Guest address of memory this table maps; false if it does not. */
bool guest_memory_where(const struct guest_memory *, const void *host, uint64_t *guest, uint64_t *left);
uint64_t guest_memory_end(const struct guest_memory *); /* first guest address above all regions */

#endif
