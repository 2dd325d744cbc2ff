/* The gate of an image: who may pass, who waits, and when everybody has passed. See image.h for the words and flags.
 *
 * A request that finds none of its flags set passes with one compare-and-swap. All else happens here, under the image's
 * lock. Whatever starts requests again collects them first and runs them after the lock was given back.
 */
#include <errno.h>
#include <stdlib.h>

#include "engine/event.h"
#include "engine/image.h"

#define STOP_ALL (GATE_BIT(GATE_RETIRED) | GATE_BIT(GATE_CLOSED_ALL) | GATE_BIT(GATE_FENCED))
#define STOP_FLUSH (STOP_ALL | GATE_BIT(GATE_CLOSED_WRITES))
#define STOP_WRITE (STOP_FLUSH | GATE_BIT(GATE_NEED_LOCK) | GATE_BIT(GATE_THROTTLED) | GATE_BIT(GATE_EXCLUSIVE))
#define STOP_WAIT (GATE_BIT(GATE_CLOSED_ALL) | GATE_BIT(GATE_CLOSED_WRITES) | GATE_BIT(GATE_NEED_LOCK))

const uint64_t gate_stops[REQ_KINDS] = {
    [REQ_READ] = STOP_ALL | GATE_BIT(GATE_THROTTLED),
    [REQ_WRITE] = STOP_WRITE,
    [REQ_DISCARD] = STOP_WRITE,
    [REQ_WRITE_ZEROES] = STOP_WRITE,
    [REQ_WRITESAME] = STOP_WRITE,
    [REQ_COMPARE_AND_WRITE] = STOP_WRITE | GATE_BIT(GATE_ALWAYS),
    [REQ_FLUSH] = STOP_FLUSH, /* a flush needs no lock: who has not got it has written nothing since */
    [REQ_HOLD_READ] = STOP_ALL,
    [REQ_HOLD_WRITE] = STOP_WRITE & ~(GATE_BIT(GATE_THROTTLED) | GATE_BIT(GATE_EXCLUSIVE)),
};

struct ready { /* requests to run or to refuse once the lock is free */
    struct req *first, **last;
};

static void ready_init(struct ready *q)
{
    q->first = NULL;
    q->last = &q->first;
}

static void ready_add(struct ready *q, struct req *r)
{
    r->next = NULL;
    *q->last = r;
    q->last = &r->next;
}

/* Unlocked. The image may be gone when the last request is through. */
static void ready_run(struct ready *q)
{
    for (struct req *r = q->first, *next; r; r = next) {
        next = r->next;
        if (r->epoch)
            image_run(r->image, r);
        else
            req_refuse(r, r->result);
    }
}

/* --- epochs; all under the lock ------------------------------------------------------------------------------------ */

static uint64_t flags_for(struct image *i, const struct view *v)
{
    uint64_t f = GATE_BIT(GATE_ALWAYS);
    if (i->blocked_all)
        f |= GATE_BIT(GATE_CLOSED_ALL);
    if (i->blocked_all || i->blocked_writes)
        f |= GATE_BIT(GATE_CLOSED_WRITES);
    if (v && v->need_lock)
        f |= GATE_BIT(GATE_NEED_LOCK);
    if (i->fence)
        f |= GATE_BIT(GATE_FENCED);
    if (i->throttle.limited || i->throttle.waiting)
        f |= GATE_BIT(GATE_THROTTLED);
    if (i->exclusive)
        f |= GATE_BIT(GATE_EXCLUSIVE);
    return f;
}

static void flags_update(struct image *i)
{
    struct epoch *e = atomic_load_explicit(&i->now, memory_order_relaxed);
    uint64_t flags = flags_for(i, e->view), word = atomic_load_explicit(&e->word, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&e->word, &word, (word & GATE_COUNT_MASK) | flags,
                                                  memory_order_acq_rel, memory_order_relaxed))
        ;
}

/* A retired epoch that nobody is in any more. */
static void epoch_recycle(struct image *i, struct epoch *e)
{
    struct epoch **link = &i->epochs;
    while (*link != e)
        link = &(*link)->next;
    *link = e->next;
    e->next = i->spare;
    i->spare = e;
    rbdn_view_put(e->view);
    e->view = NULL;
}

/* A new current epoch with (a reference to) `v`. */
static int epoch_begin(struct image *i, struct view *v)
{
    struct epoch *e = i->spare, *old = atomic_load_explicit(&i->now, memory_order_relaxed);
    if (e)
        i->spare = e->next;
    else if (!(e = malloc(sizeof *e)))
        return -ENOMEM;
    e->view = view_get(v);
    e->seq = i->next_seq++;
    e->next = i->epochs;
    i->epochs = e;
    atomic_store_explicit(&e->word, flags_for(i, v), memory_order_release);
    atomic_store_explicit(&i->now, e, memory_order_release);
    if (old) {
        uint64_t word = atomic_fetch_or_explicit(&old->word, GATE_BIT(GATE_RETIRED), memory_order_acq_rel);
        if (!(word & GATE_COUNT_MASK))
            epoch_recycle(i, old);
    }
    return 0;
}

static bool drained(struct image *i, uint64_t mask, uint64_t before_seq)
{
    for (struct epoch *e = i->epochs; e; e = e->next)
        if (e->seq < before_seq && atomic_load_explicit(&e->word, memory_order_acquire) & mask)
            return false;
    return true;
}

/* --- passing ------------------------------------------------------------------------------------------------------- */

static void park(struct image *i, struct req *r)
{
    r->flags &= ~REQ_MAY_BLOCK; /* another thread will run it */
    r->next = NULL;
    *i->parked_last = r;
    i->parked_last = &r->next;
    i->parked_count++;
}

static bool exclusive_conflict(struct image *i, const struct req *r)
{
    for (struct caw *c = i->exclusive; c; c = c->next)
        if (OVERLAP(r->off, r->off + r->len, c->req->off, c->req->off + c->req->len))
            return true;
    return false;
}

/* Locked. A compare-and-write gets its range: a new epoch begins, and it runs when those before have no writes left. */
static struct epoch *caw_admit(struct image *i, struct req *r, struct ready *q)
{
    struct caw *c = r->work;
    c->next = i->exclusive;
    i->exclusive = c;
    struct view *v = atomic_load_explicit(&i->now, memory_order_relaxed)->view;
    if (epoch_begin(i, v)) {
        i->exclusive = c->next;
        r->result = -ENOMEM;
        ready_add(q, r);
        return NULL;
    }
    c->epoch = r->epoch = atomic_load_explicit(&i->now, memory_order_relaxed);
    atomic_fetch_add_explicit(&r->epoch->word, GATE_WRITE_ONE, memory_order_acquire);
    c->waiting = !drained(i, GATE_WRITE_MASK, c->epoch->seq);
    if (c->waiting)
        r->flags &= ~REQ_MAY_BLOCK;
    return c->waiting ? NULL : r->epoch;
}

/* Locked. The epoch when the request has passed; NULL: parked, waiting, or in `q` to be refused. */
static struct epoch *admit(struct image *i, struct req *r, bool throttled, struct ready *q)
{
    r->epoch = NULL;
    if (i->fence) {
        r->result = i->fence;
        ready_add(q, r);
        return NULL;
    }
    struct epoch *e = atomic_load_explicit(&i->now, memory_order_relaxed);
    uint64_t word = atomic_load_explicit(&e->word, memory_order_relaxed), stops = word & gate_stops[r->type];
    if (!throttled && r->type < REQ_FLUSH && word & GATE_BIT(GATE_THROTTLED) && !throttle_pass(i, r))
        return NULL;
    if (stops & STOP_WAIT || (stops & GATE_BIT(GATE_EXCLUSIVE) && exclusive_conflict(i, r))) {
        if (stops & GATE_BIT(GATE_NEED_LOCK) && !i->lock_asked) {
            i->lock_asked = true;
            event_post(EVENT_LOCK_NEEDED, i->id, 0);
        }
        park(i, r);
        return NULL;
    }
    if (r->type == REQ_COMPARE_AND_WRITE)
        return caw_admit(i, r, q);
    atomic_fetch_add_explicit(&e->word, gate_unit(r->type), memory_order_acquire);
    return r->epoch = e;
}

struct epoch *gate_enter_slow(struct image *i, struct req *r)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    struct epoch *e = admit(i, r, false, &q);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
    return e;
}

/* Locked. Everybody parked tries again, in order. */
static void unpark(struct image *i, struct ready *q)
{
    struct req *r = i->parked;
    i->parked = NULL;
    i->parked_last = &i->parked;
    i->parked_count = 0;
    for (struct req *next; r; r = next) {
        next = r->next;
        if (admit(i, r, true, q))
            ready_add(q, r);
    }
}

void throttle_timer(struct timer *t)
{
    struct image *i = t->owner;
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    i->throttle.timer_set = false;
    for (struct req *r; (r = throttle_take(i));)
        if (admit(i, r, true, &q))
            ready_add(&q, r);
    flags_update(i);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
}

void gate_leave_slow(struct image *i, struct epoch *e, uint64_t unit)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    uint64_t word = atomic_fetch_sub_explicit(&e->word, unit, memory_order_acq_rel) - unit;
    if (word & GATE_BIT(GATE_RETIRED)) {
        if (!(word & GATE_COUNT_MASK))
            epoch_recycle(i, e);
        for (struct caw *c = i->exclusive; c; c = c->next)
            if (c->waiting && drained(i, GATE_WRITE_MASK, c->epoch->seq)) {
                c->waiting = false;
                ready_add(&q, c->req);
            }
    }
    pthread_cond_broadcast(&i->drained);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q); /* what is in it holds the image; with nothing in it the image may be gone */
}

void gate_exclusive_end(struct image *i, struct caw *c)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    struct caw **link = &i->exclusive;
    while (*link != c)
        link = &(*link)->next;
    *link = c->next;
    flags_update(i);
    unpark(i, &q);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
}

void gate_fence(struct image *i, int err)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    if (!i->fence)
        i->fence = err;
    for (unsigned k = 0; k < 2; k++) {
        struct waiters *w = &i->throttle.waiters[k];
        while (w->first) {
            struct req *r = w->first;
            w->first = r->next;
            r->epoch = NULL;
            r->result = i->fence;
            ready_add(&q, r);
        }
        w->last = &w->first;
    }
    i->throttle.waiting = 0;
    flags_update(i);
    unpark(i, &q);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
}

static void drop_from(struct req **first, struct req ***last, uint64_t *count, struct ready *q,
                      bool (*whose)(const struct req *, const void *), const void *who)
{
    struct req **link = first;
    while (*link) {
        struct req *r = *link;
        if (whose(r, who)) {
            *link = r->next;
            --*count;
            r->epoch = NULL;
            r->result = -ECANCELED;
            ready_add(q, r);
        } else {
            link = &r->next;
        }
    }
    *last = link;
}

void image_drop(struct image *i, bool (*whose)(const struct req *, const void *who), const void *who)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    uint64_t parked = i->parked_count, throttled = i->throttle.waiting;
    drop_from(&i->parked, &i->parked_last, &parked, &q, whose, who);
    for (unsigned k = 0; k < 2; k++)
        drop_from(&i->throttle.waiters[k].first, &i->throttle.waiters[k].last, &throttled, &q, whose, who);
    i->parked_count = parked;
    i->throttle.waiting = throttled;
    flags_update(i);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
}

/* The view of the newest epoch before `seq`, with a reference; NULL: there is none. */
static struct view *view_before(struct image *i, uint64_t *seq)
{
    struct view *v = NULL;
    pthread_mutex_lock(&i->lock);
    for (struct epoch *e = i->epochs; e && !v; e = e->next)
        if (e->seq < *seq) {
            *seq = e->seq;
            v = view_get(e->view);
        }
    pthread_mutex_unlock(&i->lock);
    return v;
}

void gate_fence_stores(struct image *i, int err)
{
    gate_fence(i, err);
    uint64_t seq = UINT64_MAX;
    for (struct view *v; (v = view_before(i, &seq)); rbdn_view_put(v))
        for (const struct view *at = v; at; at = at->parent)
            store_fence(at->store, err);
}

/* --- what Python calls --------------------------------------------------------------------------------------------- */

/* Locked. Waits until no request counted by `mask` is in an epoch before `seq`; timeout_ms < 0: for ever. */
static int wait_drained(struct image *i, uint64_t mask, uint64_t seq, int timeout_ms)
{
    uint64_t until = now_ns() + (timeout_ms < 0 ? 0 : timeout_ms) * 1000000ULL;
    struct timespec at = {.tv_sec = until / 1000000000u, .tv_nsec = until % 1000000000u};
    bool late = false;
    while (!drained(i, mask, seq)) {
        if (late)
            return -ETIMEDOUT;
        if (timeout_ms < 0)
            pthread_cond_wait(&i->drained, &i->lock);
        else
            late = pthread_cond_timedwait(&i->drained, &i->lock, &at) == ETIMEDOUT;
    }
    return 0;
}

int rbdn_image_block(rbdn_image *i, int which, int timeout_ms)
{
    if (which != 1 && which != 3)
        return -EINVAL;
    pthread_mutex_lock(&i->lock);
    if (which == 3)
        i->blocked_all++;
    else
        i->blocked_writes++;
    flags_update(i);
    int rc = wait_drained(i, which == 3 ? GATE_COUNT_MASK : GATE_WRITE_MASK, UINT64_MAX, timeout_ms);
    pthread_mutex_unlock(&i->lock);
    return rc;
}

int rbdn_image_unblock(rbdn_image *i, int which)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    unsigned *count = which == 3 ? &i->blocked_all : &i->blocked_writes;
    if ((which != 1 && which != 3) || *count == 0) {
        pthread_mutex_unlock(&i->lock);
        return -EINVAL;
    }
    --*count;
    flags_update(i);
    unpark(i, &q);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
    return 0;
}

int rbdn_image_fence(rbdn_image *i, int err)
{
    if (err >= 0 || err < -4095)
        return -EINVAL;
    if (err == -ESHUTDOWN)
        gate_fence_stores(i, err);
    else
        gate_fence(i, err);
    return 0;
}

int rbdn_image_settle(rbdn_image *i, int timeout_ms)
{
    pthread_mutex_lock(&i->lock);
    uint64_t now = atomic_load_explicit(&i->now, memory_order_relaxed)->seq;
    int rc = wait_drained(i, GATE_COUNT_MASK, now, timeout_ms);
    pthread_mutex_unlock(&i->lock);
    return rc;
}

int gate_publish(struct image *i, struct view *v)
{
    struct ready q;
    ready_init(&q);
    pthread_mutex_lock(&i->lock);
    i->lock_asked = false;
    int rc = i->shut ? -ESHUTDOWN : epoch_begin(i, v);
    if (!rc)
        unpark(i, &q);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
    return rc;
}

/* Locked; unlocks. */
static void limits_changed(struct image *i)
{
    struct ready q;
    ready_init(&q);
    for (struct req *r; (r = throttle_take(i));)
        if (admit(i, r, true, &q))
            ready_add(&q, r);
    flags_update(i);
    pthread_mutex_unlock(&i->lock);
    ready_run(&q);
}

int rbdn_image_throttle(rbdn_image *i, uint64_t iops, uint64_t bytes_per_s)
{
    pthread_mutex_lock(&i->lock);
    throttle_set(i, THROTTLE_OWNER_OPS, iops, iops / 10);
    throttle_set(i, THROTTLE_OWNER_BYTES, bytes_per_s, bytes_per_s / 10);
    limits_changed(i);
    return 0;
}

int rbdn_image_limits(rbdn_image *i, const rbdn_limit *limits)
{
    pthread_mutex_lock(&i->lock);
    for (unsigned n = 0; n < THROTTLES - THROTTLE_OPS; n++)
        throttle_set(i, THROTTLE_OPS + n, limits[n].rate, limits[n].most);
    limits_changed(i);
    return 0;
}

void gate_in_flight(struct image *i, uint64_t *in_flight, uint64_t *parked)
{
    *in_flight = 0;
    pthread_mutex_lock(&i->lock);
    for (struct epoch *e = i->epochs; e; e = e->next) {
        uint64_t word = atomic_load_explicit(&e->word, memory_order_relaxed) & GATE_COUNT_MASK;
        *in_flight += (word & GATE_WRITE_MASK) + word / GATE_READ_ONE;
    }
    *parked = i->parked_count + i->throttle.waiting;
    pthread_mutex_unlock(&i->lock);
}

int gate_init(struct image *i, struct view *v)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_mutex_init(&i->lock, NULL);
    pthread_cond_init(&i->drained, &attr);
    pthread_condattr_destroy(&attr);
    i->parked_last = &i->parked;
    for (unsigned k = 0; k < 2; k++)
        i->throttle.waiters[k].last = &i->throttle.waiters[k].first;
    i->throttle.timer.run = throttle_timer;
    i->throttle.timer.owner = i;
    return epoch_begin(i, v);
}

void gate_shut(struct image *i)
{
    rbdn_image_block(i, 3, -1);
    gate_fence(i, -ESHUTDOWN);
    timer_cancel(&i->throttle.timer);
    pthread_mutex_lock(&i->lock);
    if (!i->shut)
        epoch_recycle(i, atomic_load_explicit(&i->now, memory_order_relaxed)); /* stays the current one, fenced */
    i->shut = true;
    pthread_mutex_unlock(&i->lock);
}

void gate_destroy(struct image *i)
{
    for (struct epoch *e = i->spare, *next; e; e = next) {
        next = e->next;
        free(e);
    }
    pthread_cond_destroy(&i->drained);
    pthread_mutex_destroy(&i->lock);
}
