/* Memory shared with a front end that may truncate the file under us.
 *
 * Three lines of defence, because guests' memory need not be a sealable memfd: the size is checked with fstat when
 * mapping; F_SEAL_SHRINK is added where the file allows it; and where it does not, store/guard.h replaces the whole mapping
 * with anonymous memory and notes the loss. The thread goes on with harmless zeroes; a queue that sees the count of
 * losses change asks its session, which looks at shm_lost() and ends the connection. (The kernel's own accesses, pread into such memory, fail
 * with EFAULT: an error of that one request.)
 */
#ifndef RBDN_VHOST_SHM_H
#define RBDN_VHOST_SHM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

struct guard_region;

struct shm {
    uint8_t *base; /* of `offset`; NULL = not mapped */
    size_t len;
    uint8_t *map; /* what mmap returned, page (or huge page) aligned */
    size_t map_len;
    off_t file_offset; /* of map */
    int fd; /* ours; -1 = not mapped */
    struct guard_region *guard;
};
#define SHM_NONE ((struct shm){.fd = -1})

/* Maps [offset, offset+len) of a regular file for reading and writing; takes fd over, also on failure.
 * -EBADF not a regular file (memfd, tmpfs, hugetlbfs), -ERANGE beyond its end, or mmap's error. */
int shm_map(struct shm *, int fd, uint64_t offset, uint64_t len);
void shm_unmap(struct shm *);
bool shm_lost(const struct shm *);
unsigned shm_losses(void); /* how many mappings were ever lost in this process: cheap to watch */
/* From now on stores go to private copies: late I/O of requests nobody waits for leaves the peer's memory alone,
 * while loads still see what the peer has there. */
void shm_detach(struct shm *);

/* A new sealed memfd of that size, zeroed; the fd or -errno. */
int shm_create(const char *name, uint64_t len);

#endif
