#define _GNU_SOURCE /* memfd_create, file seals */
#include "transport/vhost_shm.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* One node per mapping. Nodes are reused but never freed, so the signal handler may walk the list at any time. */
struct shm_guard {
    struct shm_guard *next;       /* set before the node is linked, never changed */
    _Atomic uintptr_t start;      /* 0 = free or being changed; published last, withdrawn first */
    _Atomic size_t len;
    _Atomic bool lost;
    bool used;                    /* guard_lock */
};

static _Atomic(struct shm_guard *) guards;
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t handler_once = PTHREAD_ONCE_INIT;
static _Atomic unsigned losses;
static struct sigaction previous; /* set once, before the handler can run for us */

static void pass_on(int sig, siginfo_t *info, void *context)
{
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(sig, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(sig);
    } else {
        signal(sig, SIG_DFL); /* the access is tried again and kills the process, as without us */
    }
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
    int saved = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (struct shm_guard *g = atomic_load_explicit(&guards, memory_order_acquire); g; g = g->next) {
        uintptr_t start = atomic_load_explicit(&g->start, memory_order_acquire);
        size_t len = atomic_load_explicit(&g->len, memory_order_acquire);
        if (!start || at < start || at - start >= len)
            continue;
        /* The faulting mapping is in use, so its node does not change: start and len belong together. */
        void *p = mmap((void *)start, len, PROT_READ | PROT_WRITE,
                       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            break;
        atomic_store_explicit(&g->lost, true, memory_order_release);
        atomic_fetch_add_explicit(&losses, 1, memory_order_release);
        errno = saved;
        return;
    }
    pass_on(sig, info, context);
    errno = saved;
}

static void install(void)
{
    struct sigaction sa = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sa.sa_sigaction = on_sigbus;
    sigemptyset(&sa.sa_mask);
    sigaction(SIGBUS, NULL, &previous);
    sigaction(SIGBUS, &sa, NULL);
}

static struct shm_guard *guard_new(uint8_t *map, size_t len)
{
    pthread_once(&handler_once, install);
    pthread_mutex_lock(&guard_lock);
    struct shm_guard *g = atomic_load_explicit(&guards, memory_order_relaxed);
    while (g && g->used)
        g = g->next;
    if (!g && (g = calloc(1, sizeof *g))) {
        g->next = atomic_load_explicit(&guards, memory_order_relaxed);
        atomic_store_explicit(&guards, g, memory_order_release);
    }
    if (g) {
        g->used = true;
        atomic_store_explicit(&g->lost, false, memory_order_relaxed);
        atomic_store_explicit(&g->len, len, memory_order_relaxed);
        atomic_store_explicit(&g->start, (uintptr_t)map, memory_order_release);
    }
    pthread_mutex_unlock(&guard_lock);
    return g;
}

static void guard_free(struct shm_guard *g)
{
    pthread_mutex_lock(&guard_lock);
    atomic_store_explicit(&g->start, 0, memory_order_release);
    g->used = false;
    pthread_mutex_unlock(&guard_lock);
}

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
            m->guard = guard_new(m->map, map_len);
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
    guard_free(m->guard);
    munmap(m->map, m->map_len);
    close(m->fd);
    *m = SHM_NONE;
}

bool shm_lost(const struct shm *m)
{
    return m->fd >= 0 && atomic_load_explicit(&m->guard->lost, memory_order_acquire);
}

unsigned shm_losses(void)
{
    return atomic_load_explicit(&losses, memory_order_acquire);
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
