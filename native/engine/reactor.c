/* Reactors: see reactor.h.
 *
 * Posts: a lock-free stack that the reactor takes whole and reverses. The eventfd is written only for a reactor that
 * sleeps or is about to: it announces `sleeping`, then looks at the stack once more before it blocks.
 *
 * Spinning: a wake-up across cores costs some 25 us, more than most requests. So after work was done the reactor looks
 * again for up to spin_ns before it blocks - but only when recent waits were short enough that looking would have
 * caught them, never longer than SPIN_MAX_NS, and not at all after a spin that found nothing, until `credit` shows that
 * waits are short again. A spin in which another thread took our core is worse than none: it costs the most credit.
 */
#define _GNU_SOURCE /* CPU_COUNT */
#include "engine/reactor.h"

#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/threads.h"
#include "ffi/api_engine.h"

#define REACTORS_MAX 64
#define BATCH 64                 /* epoll events taken at once */
#define SPIN_MAX_NS 50000
#define SPIN_MIN_NS 8000
#define SHORT_WAIT_NS 75000      /* a blocking wait as measured contains our own wake-up (25 us, twice that when slow) */
#define PREEMPTED_NS 200000      /* one turn of the spin loop took so long: somebody else ran on our core */
#define LOOK_NS 5000             /* pollers may keep other files waiting so long while the loop spins */
#define CREDIT_MAX 64            /* short waits in a row asked for, at most, before spinning is tried again */

struct reactor {
    int epoll, wake; /* wake: eventfd */
    pthread_t thread;
    _Atomic(struct post *) posts;
    _Atomic bool sleeping;
    unsigned load; /* users; start_lock */
    /* from here on: this thread only */
    struct poller *pollers, *next_poller; /* next_poller: where a walk goes on, kept right by removal */
    struct epoll_event events[BATCH];
    int event_at, event_count;
    uint64_t spin_ns;     /* 0: do not */
    uint64_t looked;      /* monotonic ns: spin() asked epoll */
    unsigned short_waits; /* in a row */
    unsigned credit;      /* short_waits needed before spinning starts */
};

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static struct reactor *reactors[REACTORS_MAX];
static _Atomic unsigned started;
static __thread struct reactor *current;

static bool run_posts(struct reactor *r)
{
    if (!atomic_load_explicit(&r->posts, memory_order_relaxed))
        return false;
    struct post *p = atomic_exchange_explicit(&r->posts, NULL, memory_order_acquire), *in_order = NULL;
    while (p) {
        struct post *next = p->next;
        p->next = in_order;
        in_order = p;
        p = next;
    }
    while (in_order) {
        p = in_order;
        in_order = p->next;
        atomic_store_explicit(&p->queued, false, memory_order_seq_cst); /* from here it may be posted again */
        p->run(p);
    }
    return true;
}

static void take_events(struct reactor *r, int timeout_ms)
{
    int n = epoll_wait(r->epoll, r->events, BATCH, timeout_ms);
    r->event_at = 0;
    r->event_count = n < 0 ? 0 : n;
}

static bool run_events(struct reactor *r)
{
    bool worked = false;
    for (; r->event_at < r->event_count; r->event_at++) {
        struct epoll_event *e = &r->events[r->event_at];
        struct fd_watch *w = e->data.ptr;
        if (e->data.ptr == r) {
            uint64_t count;
            ssize_t rc = read(r->wake, &count, sizeof count);
            (void)rc; /* nonblocking: EAGAIN is as good */
        } else if (w) {
            w->ready(w, e->events);
            worked = true;
        }
    }
    r->event_count = 0;
    return worked;
}

static bool run_pollers(struct reactor *r)
{
    bool worked = false;
    for (struct poller *p = r->pollers; p; p = r->next_poller) {
        r->next_poller = p->next;
        worked |= p->poll(p);
    }
    return worked;
}

/* What waits already; for turns of the loop that do not block. Work that never ends must not starve other files. */
static void look(struct reactor *r)
{
    take_events(r, 0);
    run_events(r);
}

/* Before blocking. True: somebody found work. */
static bool pollers_sleep(struct reactor *r)
{
    bool worked = false;
    for (struct poller *p = r->pollers; p; p = r->next_poller) {
        r->next_poller = p->next;
        if (p->sleep)
            worked |= p->sleep(p);
    }
    return worked;
}

static void spin_lost(struct reactor *r, bool preempted)
{
    r->spin_ns = 0;
    r->short_waits = 0;
    r->credit = preempted ? CREDIT_MAX : r->credit * 2 < CREDIT_MAX ? r->credit * 2 : CREDIT_MAX;
}

/* True: found work. */
static bool spin(struct reactor *r)
{
    uint64_t begin = now_ns(), last = begin;
    for (;;) {
        /* A system call for each turn would cost as much as the requests that pollers find. */
        if (!r->pollers || last - r->looked > LOOK_NS) {
            take_events(r, 0);
            r->looked = last;
        }
        if (run_posts(r) | run_pollers(r) | run_events(r)) {
            if (r->credit > 4)
                r->credit--;
            return true;
        }
        uint64_t now = now_ns();
        bool preempted = now - last > PREEMPTED_NS;
        if (preempted || now - begin > r->spin_ns) {
            spin_lost(r, preempted);
            return false;
        }
        last = now;
        __builtin_ia32_pause();
    }
}

static void waited(struct reactor *r, uint64_t ns)
{
    if (ns > SHORT_WAIT_NS) {
        r->short_waits = 0;
        r->spin_ns = 0;
        return;
    }
    if (++r->short_waits < r->credit)
        return;
    r->spin_ns = ns + SPIN_MIN_NS < SPIN_MAX_NS ? ns + SPIN_MIN_NS : SPIN_MAX_NS;
}

static void *reactor_main(void *arg)
{
    struct reactor *r = arg;
    current = r;
    for (;;) {
        run_posts(r);
        if (r->spin_ns && spin(r))
            continue;
        if (r->pollers && pollers_sleep(r)) {
            look(r);
            continue;
        }
        atomic_store_explicit(&r->sleeping, true, memory_order_seq_cst);
        if (atomic_load_explicit(&r->posts, memory_order_seq_cst)) {
            atomic_store_explicit(&r->sleeping, false, memory_order_relaxed);
            look(r);
            continue;
        }
        uint64_t begin = now_ns();
        take_events(r, -1);
        atomic_store_explicit(&r->sleeping, false, memory_order_relaxed);
        waited(r, now_ns() - begin);
        run_events(r);
    }
    return NULL;
}

static struct reactor *reactor_new(void)
{
    struct reactor *r = aligned_alloc(64, (sizeof *r + 63) & ~63UL);
    if (!r)
        return NULL;
    memset(r, 0, sizeof *r);
    r->credit = 4;
    r->epoll = epoll_create1(EPOLL_CLOEXEC);
    r->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = r};
    if (r->epoll >= 0 && r->wake >= 0 && epoll_ctl(r->epoll, EPOLL_CTL_ADD, r->wake, &e) == 0 &&
        thread_start(&r->thread, reactor_main, r) == 0)
        return r;
    if (r->epoll >= 0)
        close(r->epoll);
    if (r->wake >= 0)
        close(r->wake);
    free(r);
    return NULL;
}

int reactors_start(unsigned count)
{
    if (count == 0) {
        cpu_set_t cpus;
        count = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
    }
    if (count > REACTORS_MAX)
        count = REACTORS_MAX;
    pthread_mutex_lock(&start_lock);
    unsigned n = atomic_load(&started);
    int rc = 0;
    if (n == 0) { /* the first call decides how many */
        while (n < count && (reactors[n] = reactor_new()))
            n++;
        rc = n ? 0 : -EAGAIN;
        atomic_store(&started, n);
    }
    pthread_mutex_unlock(&start_lock);
    return rc;
}

int rbdn_runtime_start(unsigned count)
{
    return reactors_start(count);
}

unsigned reactors_count(void)
{
    return atomic_load(&started);
}

struct reactor *reactor_pick(void)
{
    pthread_mutex_lock(&start_lock);
    struct reactor *best = NULL;
    for (unsigned n = atomic_load(&started); n-- > 0;)
        if (!best || reactors[n]->load <= best->load)
            best = reactors[n];
    if (best)
        best->load++;
    pthread_mutex_unlock(&start_lock);
    return best;
}

void reactor_release(struct reactor *r)
{
    pthread_mutex_lock(&start_lock);
    r->load--;
    pthread_mutex_unlock(&start_lock);
}

bool reactor_here(struct reactor *r)
{
    return current == r;
}

int reactor_watch(struct reactor *r, struct fd_watch *w, uint32_t epoll_events)
{
    w->reactor = r;
    struct epoll_event e = {.events = epoll_events, .data.ptr = w};
    return epoll_ctl(r->epoll, EPOLL_CTL_ADD, w->fd, &e) ? -errno : 0;
}

int reactor_rearm(struct fd_watch *w, uint32_t epoll_events)
{
    struct epoll_event e = {.events = epoll_events, .data.ptr = w};
    return epoll_ctl(w->reactor->epoll, EPOLL_CTL_MOD, w->fd, &e) ? -errno : 0;
}

void reactor_unwatch(struct fd_watch *w)
{
    struct reactor *r = w->reactor;
    epoll_ctl(r->epoll, EPOLL_CTL_DEL, w->fd, NULL);
    for (int n = r->event_at; n < r->event_count; n++) /* taken from the kernel, not handled yet */
        if (r->events[n].data.ptr == w)
            r->events[n].data.ptr = NULL;
}

void reactor_post(struct reactor *r, struct post *p)
{
    if (atomic_exchange_explicit(&p->queued, true, memory_order_seq_cst))
        return;
    struct post *head = atomic_load_explicit(&r->posts, memory_order_relaxed);
    do
        p->next = head;
    while (!atomic_compare_exchange_weak_explicit(&r->posts, &head, p, memory_order_seq_cst, memory_order_relaxed));
    if (current != r && atomic_load_explicit(&r->sleeping, memory_order_seq_cst) &&
        atomic_exchange_explicit(&r->sleeping, false, memory_order_seq_cst)) {
        uint64_t one = 1;
        while (write(r->wake, &one, sizeof one) < 0 && errno == EINTR)
            ;
    }
}

void reactor_add_poller(struct reactor *r, struct poller *p)
{
    p->next = r->pollers;
    r->pollers = p;
}

void reactor_remove_poller(struct reactor *r, struct poller *p)
{
    struct poller **link = &r->pollers;
    while (*link && *link != p)
        link = &(*link)->next;
    if (!*link)
        return;
    *link = p->next;
    if (r->next_poller == p)
        r->next_poller = p->next;
}
