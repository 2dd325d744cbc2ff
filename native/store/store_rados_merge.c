/* Requests that follow each other in an object travel together. One whose neighbour is at librados is sent beside it
 * as long as fewer than FLYING_MAX of its stream are; the next ones wait for the first to land and then are one
 * operation. So a lone request never waits, scattered ones never wait, and a deep sequential queue costs few messages.
 */
#include <errno.h>
#include <stdlib.h>

#include "store/store_rados.h"

#define FLYING_MAX 2
#define REQUEST_MAX (64u << 10) /* bytes; what is larger gains nothing */
#define GROUP_MAX (256u << 10)  /* bytes */

static struct rados_stream **bucket(struct rados_store *s, uint64_t objno, uint64_t end, uint8_t type)
{
    uint64_t h = (objno * 31 + end + type) * 0x9e3779b97f4a7c15u;
    return &s->streams[h >> 58];
}

static struct rados_stream **find(struct rados_store *s, const struct call *c)
{
    const struct store_op *op = c->op;
    struct rados_stream **link = bucket(s, op->objno, op->off, op->type), *t;
    while ((t = *link) && (t->end != op->off || t->objno != op->objno || t->type != op->type ||
                           t->context != c->context || t->flags != (op->flags & STORE_GUARD)))
        link = &t->next;
    return link;
}

static void enter(struct rados_store *s, struct rados_stream *t)
{
    struct rados_stream **link = bucket(s, t->objno, t->end, t->type);
    t->next = *link;
    *link = t;
}

static struct rados_stream *make(struct rados_store *s, const struct call *c)
{
    struct rados_stream *t = s->spare_streams;
    if (t)
        s->spare_streams = t->next;
    else if (!(t = malloc(sizeof *t)))
        return NULL;
    *t = (struct rados_stream){.context = c->context, .objno = c->op->objno, .type = c->op->type,
                               .flags = c->op->flags & STORE_GUARD, .end = c->op->off};
    return t;
}

bool rados_stream_join(struct rados_store *s, struct call *c)
{
    const struct store_op *op = c->op;
    if ((op->type != STORE_READ && op->type != STORE_WRITE) || op->len > REQUEST_MAX || op->len == s->object_size)
        return false;
    struct rados_stream **link = find(s, c), *t = *link;
    if (t && t->flying >= FLYING_MAX && t->waiting_bytes + op->len > GROUP_MAX)
        t = NULL; /* a new one goes on from here */
    else if (t)
        *link = t->next;
    if (!t && !(t = make(s, c)))
        return false;
    c->stream = t;
    t->end += op->len;
    enter(s, t);
    if (!t->waiting && t->flying < FLYING_MAX) {
        t->flying++;
        return false;
    }
    c->member = NULL;
    if (t->waiting) {
        t->last->member = c;
        t->waiting->bytes += op->len;
        t->waiting->hint |= c->hint;
        atomic_fetch_add_explicit(&s->merged[op->type == STORE_WRITE], 1, memory_order_relaxed);
    } else {
        t->waiting = c;
    }
    t->last = c;
    t->waiting_bytes += op->len;
    return true;
}

static struct call *take(struct rados_stream *t)
{
    struct call *c = t->waiting;
    t->waiting = t->last = NULL;
    t->waiting_bytes = 0;
    return c;
}

struct call *rados_stream_next(struct rados_store *s, struct rados_stream *t)
{
    struct call *c = NULL;
    t->flying--;
    if (t->waiting) {
        c = take(t);
        t->flying++;
    } else if (t->flying == 0) {
        struct rados_stream **link = bucket(s, t->objno, t->end, t->type);
        while (*link != t)
            link = &(*link)->next;
        *link = t->next;
        t->next = s->spare_streams;
        s->spare_streams = t;
    }
    return c;
}

struct call *rados_stream_drop(struct rados_store *s)
{
    struct call *dropped = NULL;
    for (unsigned b = 0; b < RADOS_STREAMS; b++)
        for (struct rados_stream *t = s->streams[b]; t; t = t->next)
            if (t->waiting) {
                struct call *c = take(t);
                c->stream = NULL; /* it does not fly */
                c->next = dropped;
                dropped = c;
            }
    return dropped;
}

void rados_streams_free(struct rados_store *s)
{
    for (struct rados_stream *t = s->spare_streams, *next; t; t = next) {
        next = t->next;
        free(t);
    }
}
