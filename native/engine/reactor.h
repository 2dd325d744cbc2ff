/* Reactors: one thread each, epoll, run to completion. Shared by all exports; an idle export costs no thread.
 *
 * A handler runs on its reactor's thread only. reactor_post() is the one way in from other threads (completions).
 * Blocking work goes to pool_run(), whose threads are started when needed and end when idle.
 */
#ifndef RBDN_REACTOR_H
#define RBDN_REACTOR_H

#include <stdbool.h>
#include <stdint.h>

struct reactor;

/* Embedded in the owner; removed before it is freed. */
struct fd_watch {
    int fd;
    void (*ready)(struct fd_watch *, uint32_t epoll_events);
    void *owner;
    struct reactor *reactor; /* set by reactor_watch */
};

/* A message to a reactor. `queued` makes a second post of a waiting one a no-op, so posting may be repeated. */
struct post {
    struct post *next;
    _Atomic bool queued;
    void (*run)(struct post *);
    void *owner;
};

/* Self-tuning poll: polled while spinning, at most 50 us after the last work found. Returns true when it worked.
 * `sleep`, when not NULL, runs before the reactor blocks: switch the peer's notifications on again and look once
 * more; true = there was work, do not block. Both may add and remove pollers, themselves included: who has nothing to
 * do for a while removes its poller, so that idle queues cost nothing. */
struct poller {
    struct poller *next;
    bool (*poll)(struct poller *);
    void *owner;
    bool (*sleep)(struct poller *);
};

int reactors_start(unsigned count);      /* 0 or -errno; idempotent; count 0 = one per core */
unsigned reactors_count(void);
struct reactor *reactor_pick(void);      /* the least loaded one; the caller counts as load until reactor_release */
void reactor_release(struct reactor *);
bool reactor_here(struct reactor *);     /* is this its thread? */
int reactor_watch(struct reactor *, struct fd_watch *, uint32_t epoll_events); /* level triggered */
int reactor_rearm(struct fd_watch *, uint32_t epoll_events);
void reactor_unwatch(struct fd_watch *); /* on the reactor's thread; ready() is not called afterwards */
void reactor_post(struct reactor *, struct post *); /* any thread */
void reactor_add_poller(struct reactor *, struct poller *);    /* on its thread */
void reactor_remove_poller(struct reactor *, struct poller *); /* on its thread */

/* A job for a thread that may block. `run` is called once. Never fails: when no thread can be started, an
 * existing one does it; the first thread is started by reactors_start or the first call. */
struct job {
    struct job *next;
    void (*run)(struct job *);
    void *owner;
};
void pool_run(struct job *);

#endif
