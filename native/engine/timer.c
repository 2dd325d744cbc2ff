/* One thread for all timers: see threads.h. Few are ever set (a throttled image has one), so a sorted list will do. */
#define _GNU_SOURCE /* syscall */
#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine/threads.h"

#define IDLE_S 5

static struct {
    pthread_mutex_t lock; /* guards everything here */
    pthread_cond_t wake;
    bool running; /* the thread, or the pool's job in its place */
    struct timer *first, *busy; /* busy: its run() is running */
    struct job job;
} timers = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void timers_init(void)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&timers.wake, &attr);
    pthread_condattr_destroy(&attr);
}

void flag_set(struct flag *f)
{
    atomic_store_explicit(&f->set, 1, memory_order_release);
    syscall(SYS_futex, &f->set, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); /* f may be gone: then nobody is woken */
}

void flag_wait(struct flag *f)
{
    while (!atomic_load_explicit(&f->set, memory_order_acquire))
        syscall(SYS_futex, &f->set, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
}

static void *timer_main(void *arg)
{
    pthread_mutex_lock(&timers.lock);
    bool late = false;
    while (timers.first || !late) {
        uint64_t now = now_ns();
        struct timer *t = timers.first;
        if (t && t->due_ns <= now) {
            timers.first = t->next;
            timers.busy = t;
            pthread_mutex_unlock(&timers.lock);
            t->run(t);
            pthread_mutex_lock(&timers.lock);
            timers.busy = NULL;
            pthread_cond_broadcast(&timers.wake);
            continue;
        }
        uint64_t until = t ? t->due_ns : now + IDLE_S * 1000000000ULL;
        struct timespec at = {.tv_sec = until / 1000000000u, .tv_nsec = until % 1000000000u};
        late = pthread_cond_timedwait(&timers.wake, &timers.lock, &at) != 0;
    }
    timers.running = false;
    pthread_mutex_unlock(&timers.lock);
    return NULL;
}

static void timer_job(struct job *j)
{
    timer_main(NULL);
}

static void unlink_timer(struct timer *t)
{
    struct timer **link = &timers.first;
    while (*link && *link != t)
        link = &(*link)->next;
    if (*link)
        *link = t->next;
}

void timer_set(struct timer *t, uint64_t due_ns)
{
    pthread_once(&once, timers_init);
    pthread_mutex_lock(&timers.lock);
    unlink_timer(t);
    t->due_ns = due_ns;
    struct timer **link = &timers.first;
    while (*link && (*link)->due_ns <= due_ns)
        link = &(*link)->next;
    t->next = *link;
    *link = t;
    bool start = !timers.running;
    timers.running = true;
    pthread_cond_broadcast(&timers.wake);
    pthread_mutex_unlock(&timers.lock);
    if (!start)
        return;
    pthread_t thread;
    if (thread_start(&thread, timer_main, NULL) == 0) {
        pthread_detach(thread);
    } else {
        timers.job.run = timer_job;
        pool_run(&timers.job); /* no thread to be had: borrow one of the pool's */
    }
}

void timer_cancel(struct timer *t)
{
    pthread_once(&once, timers_init);
    pthread_mutex_lock(&timers.lock);
    unlink_timer(t);
    while (timers.busy == t)
        pthread_cond_wait(&timers.wake, &timers.lock);
    pthread_mutex_unlock(&timers.lock);
}
