/* The pool of threads that may block: see reactor.h. FIFO; a thread is started when a job finds none idle, and ends
 * after IDLE_S without work, except the last one: pool_run must not fail later for want of a thread. */
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <time.h>

#include "engine/reactor.h"
#include "engine/threads.h"

#define POOL_MAX 16
#define IDLE_S 5

static struct {
    pthread_mutex_t lock; /* guards everything here */
    pthread_cond_t wake;
    struct job *first, **last;
    unsigned threads, idle, waiting; /* waiting: jobs in the queue */
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .last = &pool.first};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void pool_init(void)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&pool.wake, &attr);
    pthread_condattr_destroy(&attr);
}

int thread_start(pthread_t *thread, void *(*main)(void *), void *arg)
{
    sigset_t all, before;
    sigfillset(&all);
    /* Faults belong to the thread that commits them: blocked, they kill the process past any handler. */
    const int faults[] = {SIGBUS, SIGSEGV, SIGFPE, SIGILL};
    for (unsigned n = 0; n < sizeof faults / sizeof faults[0]; n++)
        sigdelset(&all, faults[n]);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int rc = pthread_create(thread, NULL, main, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

/* Locked. False: idle for long and not the last thread. */
static bool wait_for_work(void)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_S;
    bool late = false;
    pool.idle++;
    while (!pool.first && !(late && pool.threads > 1)) {
        if (pool.threads == 1)
            pthread_cond_wait(&pool.wake, &pool.lock);
        else
            late = pthread_cond_timedwait(&pool.wake, &pool.lock, &until) != 0;
    }
    pool.idle--;
    return pool.first != NULL;
}

static void *pool_main(void *arg)
{
    pthread_mutex_lock(&pool.lock);
    while (pool.first || wait_for_work()) {
        struct job *j = pool.first;
        pool.first = j->next;
        if (!pool.first)
            pool.last = &pool.first;
        pool.waiting--;
        pthread_mutex_unlock(&pool.lock);
        j->run(j);
        pthread_mutex_lock(&pool.lock);
    }
    pool.threads--;
    pthread_mutex_unlock(&pool.lock);
    return NULL;
}

void pool_run(struct job *j)
{
    pthread_once(&once, pool_init);
    pthread_mutex_lock(&pool.lock);
    j->next = NULL;
    *pool.last = j;
    pool.last = &j->next;
    pool.waiting++;
    bool alone = false;
    if (pool.waiting > pool.idle && pool.threads < POOL_MAX) {
        pthread_t thread;
        pool.threads++;
        if (thread_start(&thread, pool_main, NULL) == 0) {
            pthread_detach(thread);
        } else {
            pool.threads--;
            alone = pool.threads == 0;
        }
    }
    if (pool.idle)
        pthread_cond_signal(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    if (alone) {
        /* Not one thread in the process's limits: late is better than never. The caller becomes the worker. */
        pthread_mutex_lock(&pool.lock);
        while (pool.first && pool.threads == 0) {
            struct job *first = pool.first;
            pool.first = first->next;
            if (!pool.first)
                pool.last = &pool.first;
            pool.waiting--;
            pthread_mutex_unlock(&pool.lock);
            first->run(first);
            pthread_mutex_lock(&pool.lock);
        }
        pthread_mutex_unlock(&pool.lock);
    }
}
