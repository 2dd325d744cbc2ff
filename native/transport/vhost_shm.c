#define _GNU_SOURCE /* memfd_create, file seals */
#include "transport/vhost_shm.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/guard.h"

int shm_map(struct shm *m, int fd, uint64_t offset, uint64_t len)
{
    *m = SHM_NONE;
    struct stat st;
    int rc = 0;
    uint64_t end;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        rc = -EBADF;
    } else if (len == 0 || __builtin_add_overflow(offset, len, &end) || st.st_size < 0 || end > (uint64_t)st.st_size) {
        rc = -ERANGE;
    } else {
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK); /* refused by files that cannot be sealed: then the handler guards */
        /* Huge pages (hugetlbfs says so in st_blksize) want aligned offsets and lengths. */
        uint64_t page = st.st_blksize > 4096 && (st.st_blksize & (st.st_blksize - 1)) == 0 ? st.st_blksize : 4096;
        uint64_t from = offset & ~(page - 1), map_len = (end - from + page - 1) & ~(page - 1);
        void *p = map_len < len ? MAP_FAILED :
                  mmap(NULL, map_len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)from);
        if (p == MAP_FAILED) {
            rc = map_len < len ? -ERANGE : -errno;
        } else {
            *m = (struct shm){.base = (uint8_t *)p + (offset - from), .len = len, .map = p, .map_len = map_len,
                              .file_offset = (off_t)from, .fd = fd};
            m->guard = guard_region_new(m->map, map_len);
            if (!m->guard) {
                munmap(p, map_len);
                *m = SHM_NONE;
                rc = -ENOMEM;
            } else {
                madvise(p, map_len, MADV_DONTDUMP); /* guests' memory stays out of our core files */
            }
        }
    }
    if (rc)
        close(fd);
    return rc;
}

void shm_unmap(struct shm *m)
{
    if (m->fd < 0)
        return;
    guard_region_free(m->guard);
    munmap(m->map, m->map_len);
    close(m->fd);
    *m = SHM_NONE;
}

bool shm_lost(const struct shm *m)
{
    return m->fd >= 0 && guard_region_lost(m->guard);
}

unsigned shm_losses(void)
{
    return guard_losses();
}

void shm_detach(struct shm *m)
{
    if (m->fd < 0 || shm_lost(m))
        return;
    mmap(m->map, m->map_len, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_NORESERVE, m->fd, m->file_offset);
}

int shm_create(const char *name, uint64_t len)
{
    int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0)
        return -errno;
    if (ftruncate(fd, (off_t)len) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) {
        int rc = -errno;
        close(fd);
        return rc;
    }
    return fd;
}
