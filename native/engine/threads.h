/* Helpers of the engine's own threads; not for transports. */
#ifndef RBDN_THREADS_H
#define RBDN_THREADS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#include "engine/reactor.h"

/* pthread_create with every signal but faults blocked: signals belong to Python's threads. 0 or -errno. */
int thread_start(pthread_t *, void *(*main)(void *), void *arg);

/* One thread for all timers, started when needed, ended when none is set. run() must be short and must not block. */
struct timer {
    struct timer *next;
    uint64_t due_ns; /* CLOCK_MONOTONIC */
    void (*run)(struct timer *);
    void *owner;
};
/* Runs once, on any thread, at or after due_ns. Setting a timer that is set moves it; run() may set it again. */
void timer_set(struct timer *, uint64_t due_ns);
void timer_cancel(struct timer *); /* afterwards it does not run; waits for a run in progress, so not from run() */

/* A thread waits for one event; the flag may vanish as soon as the waiter has seen it. */
struct flag {
    _Atomic uint32_t set;
};
void flag_set(struct flag *);
void flag_wait(struct flag *);

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
