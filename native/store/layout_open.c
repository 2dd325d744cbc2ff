/* Opening, closing and owning a layout. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

struct layout *layout_of(struct store *s)
{
    while (s && s->ops != &layout_store_ops)
        s = fault_inner(s);
    return (struct layout *)s;
}

static int lock_file(int fd, int how)
{
    while (flock(fd, how) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

/* Makes folder, HEAD and index; the index last, so its presence says that the rest is there. The folder is locked. */
static int layout_create(int dir, unsigned order)
{
    struct stat st;
    if (fstatat(dir, "index", &st, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    if (order < 12 || order > 25)
        return -EINVAL;
    int head = file_open(dir, "head.0", true);
    if (head < 0)
        return head;
    close(head);
    return index_create(dir, order);
}

static int open_folder(const char *path, bool create)
{
    bool made = create && mkdir(path, 0700) == 0;
    if (create && !made && errno != EEXIST)
        return -errno;
    int dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0)
        return -errno;
    if (made) {
        int parent = openat(dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        int r = parent < 0 || fsync(parent) < 0 ? -errno : 0;
        if (parent >= 0)
            close(parent);
        if (r < 0) {
            close(dir);
            return r;
        }
    }
    return dir;
}

/* From now on in use. A dirty layout that nobody else uses is repaired first. The folder's lock keeps other openers
 * away meanwhile; a layout that stays dirty and locked through all tries is in use by somebody who has been here. */
static int join(struct layout *l)
{
    int r = lock_file(l->index, LOCK_SH);
    for (int tries = 0; r == 0 && tries < 4 && atomic_load(&layout_header(l)->dirty); tries++) {
        bool alone = flock(l->index, LOCK_EX | LOCK_NB) == 0;
        if (alone && atomic_load(&layout_header(l)->dirty)) {
            r = layout_recover(l);
            if (r == 0) {
                atomic_store(&layout_header(l)->dirty, 1);
                atomic_store(&layout_header(l)->users, 0);
            }
        }
        int again = lock_file(l->index, LOCK_SH); /* a failed try for the exclusive lock loses the shared one */
        if (alone || r < 0 || again < 0)
            return r < 0 ? r : again;
    }
    return r;
}

static void destroy(struct layout *l)
{
    clones_free(l);
    windows_free(l);
    index_unmap(l);
    for (uint32_t i = 0; i < l->head_count; i++) {
        int fd = atomic_load(&l->heads[i].fd_plus1) - 1;
        if (fd >= 0)
            close(fd);
        if (atomic_load(&l->heads[i].direct_plus1))
            close(atomic_load(&l->heads[i].direct_plus1) - 1);
    }
    if (l->index >= 0)
        close(l->index);
    for (uint32_t i = 0; i < LAYOUT_STRIPES; i++)
        pthread_rwlock_destroy(&l->stripe[i].lock);
    pthread_rwlock_destroy(&l->clones_lock);
    pthread_mutex_destroy(&l->copying_lock);
    pthread_mutex_destroy(&l->lock);
    rounds_destroy(&l->data_sync);
    rounds_destroy(&l->flush);
    close(l->dir);
    free(l);
}

/* Memory and locks. None of the initialisers allocates in glibc, so none fails. Takes over `dir`. */
static struct layout *layout_new(int dir, int index, unsigned order)
{
    uint64_t heads = LAYOUT_MAX_OBJECTS >> (LAYOUT_SEG_SHIFT - order);
    struct layout *l;
    size_t size = sizeof *l + (heads + 1) * sizeof l->heads[0];
    if (posix_memalign((void **)&l, 64, (size + 63) / 64 * 64) != 0)
        return NULL;
    __builtin_memset((void *)l, 0, size);
    l->store.ops = &layout_store_ops;
    l->dir = dir;
    l->index = index;
    l->head_count = (uint32_t)heads + 1;
    l->clone_gen = UINT64_MAX;
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    /* Or a stream of in-place writes would keep a copy-on-write waiting for ever. */
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    for (uint32_t i = 0; i < LAYOUT_STRIPES; i++)
        pthread_rwlock_init(&l->stripe[i].lock, &attr);
    pthread_rwlock_init(&l->clones_lock, &attr);
    pthread_rwlockattr_destroy(&attr);
    pthread_mutex_init(&l->lock, NULL);
    pthread_mutex_init(&l->copying_lock, NULL);
    rounds_init(&l->data_sync);
    rounds_init(&l->flush);
    return l;
}

rbdn_store *rbdn_layout_open(const char *path, unsigned order, int create, int *err)
{
    struct layout *l = NULL;
    int dir = open_folder(path, create), index = -1, r = dir;
    if (dir >= 0) {
        r = lock_file(dir, LOCK_EX);
        if (r == 0 && create)
            r = layout_create(dir, order);
        if (r == 0)
            r = index = file_open(dir, "index", false);
        unsigned found = 0;
        if (index >= 0)
            r = index_order(index, &found);
        if (r == 0 && order && order != found)
            r = -EINVAL;
        if (r == 0 && !(l = layout_new(dir, index, found)))
            r = -ENOMEM;
        if (r == 0 && (r = index_map(l, found)) == 0)
            r = head_open(l, 0, false);
        if (r >= 0 && l)
            r = join(l);
        else if (r == -ENOENT && l)
            r = -EIO; /* a layout has its first segment from the start */
        if (r == 0)
            atomic_fetch_add(&layout_header(l)->users, 1);
        if (l)
            flock(dir, LOCK_UN);
    }
    if (r < 0 && l) {
        destroy(l);
        l = NULL;
    } else if (r < 0) {
        if (index >= 0)
            close(index);
        if (dir >= 0)
            close(dir);
    }
    if (err)
        *err = r;
    return l ? &l->store : NULL;
}

/* The last one to leave makes everything durable and takes the dirty mark away. Not after a failed sync or when
 * somebody was killed, in this process or another: then the next to open must look at every object. */
void layout_close(struct store *s)
{
    struct layout *l = (struct layout *)s;
    struct index_header *h = layout_header(l);
    if (atomic_load(&l->untidy))
        atomic_store(&h->dirty, 2);
    if (atomic_fetch_sub(&h->users, 1) == 1 && atomic_load(&h->dirty) == 1 && !atomic_load(&l->failed) &&
        flock(l->index, LOCK_EX | LOCK_NB) == 0 && atomic_load(&h->dirty) == 1 && layout_sync_all(l) == 0) {
        atomic_store(&h->dirty, 0);
        layout_fdatasync(l, l->index);
    }
    destroy(l);
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

int rbdn_layout_own(rbdn_store *s, int timeout_ms)
{
    struct layout *l = layout_of(s);
    uint64_t end = now_ms() + (timeout_ms > 0 ? (uint64_t)timeout_ms : 0);
    if (!l)
        return -EOPNOTSUPP;
    int fd = head_open(l, 0, false);
    if (fd < 0)
        return fd;
    for (long wait_ms = 1;; wait_ms = wait_ms < 16 ? wait_ms * 2 : 20) {
        pthread_mutex_lock(&l->lock);
        int r = l->owned || flock(fd, LOCK_EX | LOCK_NB) == 0 ? 0 : -errno;
        if (r == 0)
            l->owned++;
        pthread_mutex_unlock(&l->lock);
        if (r == 0 || (r != -EWOULDBLOCK && r != -EINTR))
            return r;
        if (now_ms() >= end)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){0, wait_ms * 1000000}, NULL);
    }
}

int rbdn_layout_disown(rbdn_store *s)
{
    struct layout *l = layout_of(s);
    if (!l)
        return -EOPNOTSUPP;
    int fd = head_open(l, 0, false), r = 0;
    if (fd < 0)
        return fd;
    pthread_mutex_lock(&l->lock);
    if (l->owned == 0)
        r = -ENOLCK;
    else if (--l->owned == 0)
        r = lock_file(fd, LOCK_UN);
    pthread_mutex_unlock(&l->lock);
    return r;
}
