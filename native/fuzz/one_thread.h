/* Reactor, pool and events in one thread, step by step under the fuzzer's control: everything is deterministic. */
#ifndef FUZZ_ONE_THREAD_H
#define FUZZ_ONE_THREAD_H
#include <poll.h>
#include <stdlib.h>

#include "engine/event.h"
#include "engine/reactor.h"

struct reactor {
    struct post *first, **last;
    struct poller *pollers;
    struct fd_watch *watched[128];
    unsigned watches;
};

static struct reactor the_reactor = {.last = &the_reactor.first};
static struct job *jobs; /* newest first */
static unsigned job_count;

int reactors_start(unsigned count) { return 0; }
unsigned reactors_count(void) { return 1; }
struct reactor *reactor_pick(void) { return &the_reactor; }
void reactor_release(struct reactor *r) {}
bool reactor_here(struct reactor *r) { return true; }
void event_post(int type, uint64_t source, int64_t value) {}

int reactor_watch(struct reactor *r, struct fd_watch *w, uint32_t events)
{
    if (r->watches == sizeof r->watched / sizeof r->watched[0])
        return -12;
    w->reactor = r;
    r->watched[r->watches++] = w;
    return 0;
}

void reactor_unwatch(struct fd_watch *w)
{
    struct reactor *r = w->reactor;
    for (unsigned n = 0; n < r->watches; n++)
        if (r->watched[n] == w) {
            r->watched[n] = r->watched[--r->watches];
            return;
        }
    abort(); /* not watched */
}

void reactor_post(struct reactor *r, struct post *p)
{
    if (p->queued)
        return;
    p->queued = true;
    p->next = NULL;
    *r->last = p;
    r->last = &p->next;
}

void reactor_add_poller(struct reactor *r, struct poller *p)
{
    p->next = r->pollers;
    r->pollers = p;
}

void reactor_remove_poller(struct reactor *r, struct poller *p)
{
    for (struct poller **l = &r->pollers; *l; l = &(*l)->next)
        if (*l == p) {
            *l = p->next;
            return;
        }
    abort(); /* not there */
}

void pool_run(struct job *j)
{
    j->next = jobs;
    jobs = j;
    job_count++;
}

static void run_posts(void)
{
    struct reactor *r = &the_reactor;
    while (r->first) {
        struct post *p = r->first;
        r->first = p->next;
        if (!r->first)
            r->last = &r->first;
        p->queued = false;
        p->run(p);
    }
}

/* Runs one waiting job, chosen by `which`. */
static void run_job(unsigned which)
{
    if (!job_count)
        return;
    struct job **l = &jobs;
    for (which %= job_count; which > 0; which--)
        l = &(*l)->next;
    struct job *j = *l;
    *l = j->next;
    job_count--;
    j->run(j);
    run_posts();
}

static void run_jobs(void)
{
    while (job_count)
        run_job(0);
}

static void poll_all(void)
{
    for (struct poller *p = the_reactor.pollers, *next; p; p = next) {
        next = p->next;
        p->poll(p);
    }
    run_posts();
}

/* As a reactor about to block, but not for ever: who never stops finding work is left at that. */
static void sleep_all(void)
{
    for (unsigned turn = 0; turn < 3; turn++)
        for (struct poller *p = the_reactor.pollers, *next; p; p = next) {
            next = p->next;
            p->sleep(p);
        }
    run_posts();
}

/* Handles what can be read, until nothing can or `turns` are over. */
static void run_files(unsigned turns)
{
    struct reactor *r = &the_reactor;
    for (; turns > 0; turns--) {
        struct pollfd p[128];
        struct fd_watch *w[128];
        unsigned count = r->watches;
        for (unsigned n = 0; n < count; n++) {
            w[n] = r->watched[n];
            p[n] = (struct pollfd){.fd = w[n]->fd, .events = POLLIN};
        }
        if (poll(p, count, 0) <= 0)
            return;
        for (unsigned n = 0; n < count; n++) {
            bool there = false;
            for (unsigned m = 0; m < r->watches; m++)
                there |= r->watched[m] == w[n];
            if (there && p[n].revents)
                w[n]->ready(w[n], (uint32_t)p[n].revents);
        }
        run_posts();
    }
}

#endif
