/* See guard.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "store/guard.h"

/* The copy this thread is in. Read by the handler, in the same thread. */
static __thread sigjmp_buf *volatile copying __attribute__((tls_model("initial-exec")));
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int installed;

/* Nodes are used again but never freed, so that the handler may walk the list at any time. */
struct guard_region {
    struct guard_region *next; /* set before the node is linked, never changed */
    _Atomic uintptr_t start;   /* 0 = free or being changed; published last, withdrawn first */
    _Atomic size_t len;        /* bytes */
    _Atomic bool lost;
    bool used; /* regions_lock */
};
static _Atomic(struct guard_region *) regions;
static pthread_mutex_t regions_lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic unsigned losses;

/* In the handler. Two threads may do it at once: then zeroes are replaced by zeroes. */
static bool region_faulted(uintptr_t at)
{
    for (struct guard_region *g = atomic_load_explicit(&regions, memory_order_acquire); g; g = g->next) {
        uintptr_t start = atomic_load_explicit(&g->start, memory_order_acquire);
        size_t len = atomic_load_explicit(&g->len, memory_order_acquire);
        if (!start || at < start || at - start >= len)
            continue;
        /* The region is in use, so its node does not change: start and len belong together. */
        void *p = mmap((void *)start, len, PROT_READ | PROT_WRITE,
                       MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED)
            return false;
        atomic_store_explicit(&g->lost, true, memory_order_release);
        atomic_fetch_add_explicit(&losses, 1, memory_order_release);
        return true;
    }
    return false;
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    if (info->si_code > 0 && region_faulted((uintptr_t)info->si_addr)) {
        errno = saved;
        return;
    }
    sigjmp_buf *here = copying;
    if (here && info->si_code > 0) { /* not one that somebody sent */
        copying = NULL;
        siglongjmp(*here, 1);
    }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        sigaction(number, &before, NULL); /* the access is made again and ends the process, as it would have */
        if (info->si_code <= 0)
            raise(number);
    } else {
        before.sa_handler(number);
    }
}

static void install(void)
{
    /* SA_NODEFER: the handler is left by a jump, which does not give the signal mask back. */
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    installed = sigaction(SIGBUS, &action, &before) < 0 ? -errno : 0;
}

int guard_install(void)
{
    pthread_once(&once, install);
    return installed;
}

struct guard_region *guard_region_new(void *start, size_t len)
{
    if (guard_install() < 0)
        return NULL;
    pthread_mutex_lock(&regions_lock);
    struct guard_region *g = atomic_load_explicit(&regions, memory_order_relaxed);
    while (g && g->used)
        g = g->next;
    if (!g && (g = calloc(1, sizeof *g))) {
        g->next = atomic_load_explicit(&regions, memory_order_relaxed);
        atomic_store_explicit(&regions, g, memory_order_release);
    }
    if (g) {
        g->used = true;
        atomic_store_explicit(&g->lost, false, memory_order_relaxed);
        atomic_store_explicit(&g->len, len, memory_order_relaxed);
        atomic_store_explicit(&g->start, (uintptr_t)start, memory_order_release);
    }
    pthread_mutex_unlock(&regions_lock);
    return g;
}

void guard_region_free(struct guard_region *g)
{
    if (!g)
        return;
    pthread_mutex_lock(&regions_lock);
    atomic_store_explicit(&g->start, 0, memory_order_release);
    g->used = false;
    pthread_mutex_unlock(&regions_lock);
}

bool guard_region_lost(const struct guard_region *g)
{
    return atomic_load_explicit(&g->lost, memory_order_acquire);
}

unsigned guard_losses(void)
{
    return atomic_load_explicit(&losses, memory_order_acquire);
}

#if defined(__SANITIZE_THREAD__)
/* Requests that overlap may run at the same time: which bytes they leave is theirs to order, as on any disk. */
#define SAVE_MASK 1 /* its own handler blocks every signal, whatever was asked for */
__attribute__((no_sanitize("thread"))) static void copy(void *to, const void *from, size_t len)
{
    for (size_t i = 0; i < len; i++)
        ((volatile uint8_t *)to)[i] = ((const volatile uint8_t *)from)[i];
}
#else
#define SAVE_MASK 0
#define copy memcpy
#endif

__attribute__((noinline)) bool guarded_copy(void *to, const void *from, size_t len)
{
    sigjmp_buf here;
    if (sigsetjmp(here, SAVE_MASK) != 0)
        return false;
    copying = &here;
    copy(to, from, len);
    copying = NULL;
    return true;
}
