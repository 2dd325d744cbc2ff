/* Token buckets for requests and bytes. A request passes while no bucket is overdrawn and then pays, so a request larger
 * than a bucket still passes, and the next one waits until it is paid. Who waits, waits in order. */
#include "engine/image.h"

#define BURST_S 0.1 /* a bucket holds what flows in in this time */

void throttle_set(struct image *i, uint64_t iops, uint64_t bytes_per_s)
{
    struct throttle *t = &i->throttle;
    t->iops = iops;
    t->bytes_per_s = bytes_per_s;
    t->ops_level = iops * BURST_S;
    t->bytes_level = bytes_per_s * BURST_S;
    t->filled_ns = now_ns();
}

static double level(double now, double elapsed_s, uint64_t rate)
{
    double filled = now + elapsed_s * rate;
    return filled < rate * BURST_S ? filled : rate * BURST_S;
}

static void fill(struct throttle *t)
{
    uint64_t now = now_ns();
    double elapsed = (now - t->filled_ns) / 1e9;
    t->filled_ns = now;
    t->ops_level = level(t->ops_level, elapsed, t->iops);
    t->bytes_level = level(t->bytes_level, elapsed, t->bytes_per_s);
}

/* Seconds until the next request may pass; 0: now. */
static double debt(const struct throttle *t)
{
    double ops = t->iops && t->ops_level < 0 ? -t->ops_level / t->iops : 0;
    double bytes = t->bytes_per_s && t->bytes_level < 0 ? -t->bytes_level / t->bytes_per_s : 0;
    return ops > bytes ? ops : bytes;
}

static void pay(struct throttle *t, const struct req *r)
{
    t->ops_level -= 1;
    t->bytes_level -= r->type == REQ_DISCARD || r->type == REQ_WRITE_ZEROES ? 0 : r->len; /* no data moves */
}

static void arm(struct throttle *t)
{
    uint64_t due = t->filled_ns + (uint64_t)(debt(t) * 1e9) + 1000;
    if (!t->first || (t->timer_set && t->timer.due_ns <= due))
        return;
    t->timer_set = true;
    timer_set(&t->timer, due);
}

bool throttle_pass(struct image *i, struct req *r)
{
    struct throttle *t = &i->throttle;
    fill(t);
    if (!t->first && debt(t) == 0) {
        pay(t, r);
        return true;
    }
    r->flags &= ~REQ_MAY_BLOCK; /* the timer's thread will run it */
    r->next = NULL;
    *t->last = r;
    t->last = &r->next;
    t->waiting++;
    arm(t);
    return false;
}

struct req *throttle_take(struct image *i)
{
    struct throttle *t = &i->throttle;
    fill(t);
    struct req *r = t->first;
    if (!r)
        return NULL;
    if (debt(t) > 0) {
        arm(t);
        return NULL;
    }
    t->first = r->next;
    if (!t->first)
        t->last = &t->first;
    t->waiting--;
    pay(t, r);
    return r;
}
