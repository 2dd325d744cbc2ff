/* Token buckets for requests and bytes: of all requests (set by the daemon's owner, and by the image's options), of reads,
 * of writes. A request passes while no bucket that it pays into is overdrawn and then pays, so a request larger than a bucket
 * still passes, and the next one waits until it is paid. Who waits, waits in order of arrival; a read overtakes a write, or
 * the other way round, only where the one that came first waits for a limit of its own kind. */
#include "engine/image.h"

static const uint8_t bytes_of[THROTTLES] = {[THROTTLE_OWNER_BYTES] = 1, [THROTTLE_BYTES] = 1, [THROTTLE_READ_BYTES] = 1,
                                            [THROTTLE_WRITE_BYTES] = 1};
/* 1: reads, 2: the others, 3: all */
static const uint8_t kinds_of[THROTTLES] = {[THROTTLE_OWNER_OPS] = 3, [THROTTLE_OWNER_BYTES] = 3, [THROTTLE_OPS] = 3,
                                            [THROTTLE_BYTES] = 3, [THROTTLE_READ_OPS] = 1, [THROTTLE_READ_BYTES] = 1,
                                            [THROTTLE_WRITE_OPS] = 2, [THROTTLE_WRITE_BYTES] = 2};

static unsigned kind(const struct req *r) { return r->type == REQ_READ ? 0 : 1; }

static void fill(struct throttle *t)
{
    uint64_t now = now_ns();
    double elapsed = (now - t->filled_ns) / 1e9;
    t->filled_ns = now;
    for (unsigned n = 0; n < THROTTLES; n++) {
        struct bucket *b = &t->buckets[n];
        double filled = b->level + elapsed * b->rate;
        b->level = filled < b->most ? filled : b->most;
    }
}

void throttle_set(struct image *i, unsigned which, uint64_t rate, uint64_t most)
{
    struct throttle *t = &i->throttle;
    fill(t);
    t->buckets[which] = (struct bucket){.rate = rate, .level = (double)most, .most = (double)most};
    t->limited = false;
    for (unsigned n = 0; n < THROTTLES; n++)
        t->limited |= t->buckets[n].rate > 0;
}

/* Seconds until the next request of that kind may pass; 0: now. */
static double debt(const struct throttle *t, unsigned kind)
{
    double worst = 0;
    for (unsigned n = 0; n < THROTTLES; n++) {
        const struct bucket *b = &t->buckets[n];
        if (b->rate && b->level < 0 && kinds_of[n] & 1u << kind && -b->level / b->rate > worst)
            worst = -b->level / b->rate;
    }
    return worst;
}

static void pay(struct throttle *t, const struct req *r)
{
    uint64_t bytes = r->type == REQ_DISCARD || r->type == REQ_WRITE_ZEROES ? 0 : r->len; /* no data moves */
    for (unsigned n = 0; n < THROTTLES; n++)
        if (t->buckets[n].rate && kinds_of[n] & 1u << kind(r))
            t->buckets[n].level -= bytes_of[n] ? bytes : 1;
}

static void arm(struct throttle *t)
{
    double soonest = -1;
    for (unsigned k = 0; k < 2; k++)
        if (t->waiters[k].first && (soonest < 0 || debt(t, k) < soonest))
            soonest = debt(t, k);
    uint64_t due = t->filled_ns + (uint64_t)(soonest * 1e9) + 1000;
    if (soonest < 0 || (t->timer_set && t->timer.due_ns <= due))
        return;
    t->timer_set = true;
    timer_set(&t->timer, due);
}

bool throttle_pass(struct image *i, struct req *r)
{
    struct throttle *t = &i->throttle;
    fill(t);
    unsigned mine = kind(r), other = !mine;
    bool turn = !t->waiters[mine].first && (!t->waiters[other].first || debt(t, other) > 0);
    if (turn && debt(t, mine) == 0) {
        pay(t, r);
        return true;
    }
    r->flags &= ~REQ_MAY_BLOCK; /* the timer's thread will run it */
    r->next = NULL;
    *t->waiters[mine].last = r;
    t->waiters[mine].last = &r->next;
    t->waiting++;
    arm(t);
    return false;
}

struct req *throttle_take(struct image *i)
{
    struct throttle *t = &i->throttle;
    fill(t);
    struct waiters *turn = NULL;
    for (unsigned k = 0; k < 2; k++) {
        struct waiters *w = &t->waiters[k];
        if (w->first && debt(t, k) == 0 && (!turn || w->first->started_ns < turn->first->started_ns))
            turn = w;
    }
    if (!turn) {
        arm(t);
        return NULL;
    }
    struct req *r = turn->first;
    turn->first = r->next;
    if (!turn->first)
        turn->last = &turn->first;
    t->waiting--;
    pay(t, r);
    return r;
}
