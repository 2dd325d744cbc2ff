/* Reactors, pool, timers and events: nothing posted is lost or run twice, order per sender holds, a removed watch or
 * poller is never called, unread events merge. */
#undef NDEBUG
#include <assert.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/event.h"
#include "engine/reactor.h"
#include "engine/threads.h"
#include "ffi/api_engine.h"

#define SENDERS 3
#define ROUNDS 3000

static sem_t finished;

static void wait_finished(void)
{
    while (sem_wait(&finished))
        ;
}

/* --- posts ------------------------------------------------------------------------------------------------------ */

struct counter {
    struct post post;
    struct reactor *reactor;
    _Atomic uint64_t asked, seen;
};

static void count_run(struct post *p)
{
    struct counter *c = p->owner;
    assert(reactor_here(c->reactor));
    /* A post may merge with a waiting one, but a run comes after every post made before it. */
    uint64_t asked = atomic_load(&c->asked);
    atomic_store(&c->seen, asked);
}

static void *sender(void *arg)
{
    struct counter *c = arg;
    for (int n = 1; n <= ROUNDS; n++) {
        atomic_store(&c->asked, n);
        reactor_post(c->reactor, &c->post);
        if (n % 16 == 0) /* let it fall asleep: the hand-shake of sleeping and waking is what can go wrong */
            while (n < ROUNDS && atomic_load(&c->seen) < (uint64_t)n)
                usleep(1);
    }
    return NULL;
}

static void posts_from_many_threads_all_arrive(void)
{
    struct reactor *r = reactor_pick();
    static struct counter counters[SENDERS];
    pthread_t threads[SENDERS];
    for (int n = 0; n < SENDERS; n++) {
        counters[n].reactor = r;
        counters[n].post.run = count_run;
        counters[n].post.owner = &counters[n];
        pthread_create(&threads[n], NULL, sender, &counters[n]);
    }
    for (int n = 0; n < SENDERS; n++)
        pthread_join(threads[n], NULL);
    for (int n = 0; n < SENDERS; n++)
        while (atomic_load(&counters[n].seen) != ROUNDS) /* a lost post hangs here; the runner has a deadline */
            usleep(1);
    reactor_release(r);
}

static struct reactor *chain_reactor;
static int chain_next;
static struct post chain_posts[10];

static void chain_run(struct post *p)
{
    assert(p == &chain_posts[chain_next++]);
    if (chain_next == 10)
        sem_post(&finished);
}

static void chain_start(struct post *p)
{
    for (int n = 0; n < 10; n++) {
        chain_posts[n].run = chain_run;
        reactor_post(chain_reactor, &chain_posts[n]);
    }
}

static void posts_of_one_sender_run_in_order(void)
{
    static struct post start = {.run = chain_start};
    chain_reactor = reactor_pick();
    reactor_post(chain_reactor, &start);
    wait_finished();
    assert(chain_next == 10);
    reactor_release(chain_reactor);
}

/* --- watches and pollers ------------------------------------------------------------------------------------------ */

static struct fd_watch pair[2];
static int pair_calls;
static struct poller poller;
static _Atomic int polls, sleeps;

static void pair_ready(struct fd_watch *w, uint32_t events)
{
    assert(events & EPOLLIN);
    pair_calls++;
    /* Both are ready in the same batch; the first one called removes both. */
    reactor_unwatch(&pair[0]);
    reactor_unwatch(&pair[1]);
    sem_post(&finished);
}

static bool poll_once(struct poller *p)
{
    atomic_fetch_add(&polls, 1);
    return false;
}

static bool poll_sleep(struct poller *p)
{
    if (atomic_fetch_add(&sleeps, 1) == 0)
        return true; /* "found work": the reactor must come round once more */
    reactor_remove_poller(chain_reactor, p);
    sem_post(&finished);
    return false;
}

static void pair_start(struct post *p)
{
    for (int n = 0; n < 2; n++) {
        pair[n].fd = eventfd(1, EFD_CLOEXEC);
        pair[n].ready = pair_ready;
        assert(reactor_watch(chain_reactor, &pair[n], EPOLLIN) == 0);
    }
}

static void poller_start(struct post *p)
{
    poller.poll = poll_once;
    poller.sleep = poll_sleep;
    reactor_add_poller(chain_reactor, &poller);
}

static void removed_watches_and_pollers_are_not_called(void)
{
    static struct post watches = {.run = pair_start}, pollers = {.run = poller_start};
    chain_reactor = reactor_pick();
    reactor_post(chain_reactor, &watches);
    wait_finished();
    reactor_post(chain_reactor, &pollers);
    wait_finished();
    assert(pair_calls == 1 && sleeps == 2);
    close(pair[0].fd);
    close(pair[1].fd);
    reactor_release(chain_reactor);
}

/* --- two reactors play ping-pong over eventfds: short waits, so spinning starts ------------------------------------ */

static struct fd_watch ball[2];
static int exchanges;

static void ball_ready(struct fd_watch *w, uint32_t events)
{
    uint64_t value;
    assert(read(w->fd, &value, sizeof value) == sizeof value);
    struct fd_watch *other = w == &ball[0] ? &ball[1] : &ball[0];
    if (w == &ball[0] && ++exchanges == 20000) {
        sem_post(&finished);
        return;
    }
    assert(write(other->fd, &value, sizeof value) == sizeof value);
}

static void ping_pong_survives_spinning(void)
{
    struct reactor *r[2] = {reactor_pick(), reactor_pick()};
    assert(r[0] != r[1]);
    for (int n = 0; n < 2; n++) {
        ball[n].fd = eventfd(0, EFD_CLOEXEC);
        ball[n].ready = ball_ready;
        assert(reactor_watch(r[n], &ball[n], EPOLLIN) == 0);
    }
    uint64_t one = 1, begin = now_ns();
    assert(write(ball[0].fd, &one, sizeof one) == sizeof one);
    wait_finished();
    printf("ping-pong round trip: %.2f us\n", (now_ns() - begin) / 20000 / 1e3);
    reactor_release(r[0]);
    reactor_release(r[1]);
}

/* --- pool, timers ------------------------------------------------------------------------------------------------- */

static _Atomic int jobs_run, timers_run, together, most;

static void job_run(struct job *j)
{
    int now = atomic_fetch_add(&together, 1) + 1, seen = atomic_load(&most);
    while (now > seen && !atomic_compare_exchange_weak(&most, &seen, now))
        ;
    usleep(200);
    atomic_fetch_sub(&together, 1);
    if (atomic_fetch_add(&jobs_run, 1) + 1 == 500)
        sem_post(&finished);
}

static void pool_runs_every_job_once_on_few_threads(void)
{
    static struct job jobs[500];
    for (int n = 0; n < 500; n++) {
        jobs[n].run = job_run;
        pool_run(&jobs[n]);
    }
    wait_finished();
    assert(jobs_run == 500 && most <= 16 && most > 1);
}

static uint64_t timer_order[3];

static void timer_run(struct timer *t)
{
    assert(now_ns() >= t->due_ns);
    timer_order[timers_run++] = (uint64_t)(uintptr_t)t->owner;
    if (timers_run == 3)
        sem_post(&finished);
}

static void timers_run_in_order_of_time(void)
{
    static struct timer timers[3];
    uint64_t now = now_ns();
    for (int n = 0; n < 3; n++) {
        timers[n].run = timer_run;
        timers[n].owner = (void *)(uintptr_t)n;
        timer_set(&timers[n], now + (3 - n) * 5000000ULL);
    }
    wait_finished();
    assert(timer_order[0] == 2 && timer_order[1] == 1 && timer_order[2] == 0);
}

/* --- events ------------------------------------------------------------------------------------------------------- */

static bool readable(int fd)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    return poll(&p, 1, 0) == 1;
}

static void events_merge_and_keep_order(void)
{
    rbdn_event e;
    event_post(EVENT_LOCK_NEEDED, 7, 0); /* before anybody asked for the descriptor */
    int fd = rbdn_event_fd();
    assert(fd >= 0 && readable(fd));
    event_post(EVENT_IO_ERROR, 7, -5);
    event_post(EVENT_LOCK_NEEDED, 8, 0);
    event_post(EVENT_IO_ERROR, 7, -28);
    event_post(EVENT_EXPORT_CONNECTED, 1, 1);
    event_post(EVENT_EXPORT_DISCONNECTED, 1, 0);
    event_post(EVENT_EXPORT_CONNECTED, 1, 2);
    static const rbdn_event want[] = {{1, 7, 0}, {1, 8, 0}, {2, 7, -5}, {4, 1, 0}, {3, 1, 2}};
    for (int n = 0; n < 5; n++) {
        assert(rbdn_event_next(&e) == 1);
        assert(e.type == want[n].type && e.source == want[n].source && e.value == want[n].value);
        assert(readable(fd));
    }
    assert(rbdn_event_next(&e) == 0 && !readable(fd));
    for (int round = 0; round < 3; round++) {
        for (uint64_t n = 0; n < 9000; n++)
            event_post(EVENT_LOCK_NEEDED, n, n);
        int found = 0;
        for (; rbdn_event_next(&e) == 1 && e.type == EVENT_LOCK_NEEDED; found++)
            assert(e.source == (uint64_t)found && e.value == found);
        assert(found == 8192 && e.type == EVENT_LOST);
        assert(rbdn_event_next(&e) == 0 && !readable(fd));
    }
}

int main(void)
{
    sem_init(&finished, 0, 0);
    assert(reactor_pick() == NULL);
    assert(rbdn_runtime_start(2) == 0 && rbdn_runtime_start(0) == 0 && reactors_count() == 2);
    posts_of_one_sender_run_in_order();
    posts_from_many_threads_all_arrive();
    removed_watches_and_pollers_are_not_called();
    ping_pong_survives_spinning();
    pool_runs_every_job_once_on_few_threads();
    timers_run_in_order_of_time();
    events_merge_and_keep_order();
    return 0;
}
