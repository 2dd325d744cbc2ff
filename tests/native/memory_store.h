/* An object store in memory for tests of the engine: snapshots as RADOS keeps them, completions on another thread in any
 * order, -EAGAIN, failures on demand. Slow and simple, so that it can be believed. */
#ifndef MEMORY_STORE_H
#define MEMORY_STORE_H

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "store/store.h"

struct memory_content {
    bool exists;
    uint64_t size;
    uint8_t *data; /* 2^order bytes, or NULL */
};

struct memory_version { /* what snapshots up to `upto` see */
    struct memory_version *newer;
    uint64_t upto;
    struct memory_content content;
};

struct memory_object {
    struct memory_content head;
    uint64_t seq; /* snap context of the last change */
    struct memory_version *oldest;
};

struct memory_store {
    struct store store;
    pthread_mutex_t lock;
    unsigned order;
    uint64_t count; /* objects there can be */
    struct memory_object *objects;
    uint64_t random;
    /* percent of the operations; set before use */
    _Atomic unsigned again, pending;
    /* the next `fail_count` operations of type `fail_type` fail so; -1: every one */
    _Atomic int fail_type, fail_errno, fail_count;
    _Atomic bool hold;            /* pending operations wait until it is cleared */
    _Atomic uint64_t calls[16];   /* by type */
    uint64_t applied;             /* changes made; lock */
    _Atomic uint64_t flushed;     /* changes made when the last completed flush began */
    _Atomic bool misused;
    /* completions */
    pthread_t thread;
    pthread_cond_t wake;
    struct memory_wait {
        struct store_op *op;
        uint64_t applied;
    } queue[4096];
    unsigned queued;
    bool stopping;
};

static inline uint64_t memory_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline uint64_t memory_object_size(struct memory_store *m)
{
    return 1ULL << m->order;
}

static inline void memory_extend(struct memory_store *m, struct memory_content *c, uint64_t size)
{
    if (!c->data)
        c->data = calloc(1, memory_object_size(m));
    c->exists = true;
    if (size > c->size)
        c->size = size;
}

static inline struct memory_content memory_copy(struct memory_store *m, const struct memory_content *c)
{
    struct memory_content copy = *c;
    if (c->data) {
        copy.data = malloc(memory_object_size(m));
        memcpy(copy.data, c->data, memory_object_size(m));
    }
    return copy;
}

/* Locked; before a change. */
static inline void memory_preserve(struct memory_store *m, struct memory_object *o, const struct snapc *s)
{
    if (!s || !s->count || s->ids[0] <= o->seq)
        return;
    struct memory_version *v = calloc(1, sizeof *v), **last = &o->oldest;
    v->upto = s->ids[0];
    v->content = memory_copy(m, &o->head);
    while (*last)
        last = &(*last)->newer;
    *last = v;
    o->seq = s->seq;
}

static inline const struct memory_content *memory_at(struct memory_object *o, uint64_t snap)
{
    if (snap != STORE_NOSNAP)
        for (struct memory_version *v = o->oldest; v; v = v->newer)
            if (v->upto >= snap)
                return &v->content;
    return &o->head;
}

static inline void memory_move(const struct store_op *op, uint8_t *object, uint64_t len, bool read)
{
    uint64_t at = 0;
    for (uint32_t n = 0; n < op->iovcnt && at < len; n++) {
        uint64_t part = op->iov[n].iov_len < len - at ? op->iov[n].iov_len : len - at;
        if (read)
            memcpy(op->iov[n].iov_base, object + at, part);
        else
            memcpy(object + at, op->iov[n].iov_base, part);
        at += part;
    }
}

/* Locked. */
static inline int64_t memory_apply(struct memory_store *m, struct store_op *op)
{
    atomic_fetch_add(&m->calls[op->type], 1);
    if (atomic_load(&m->fail_type) == op->type && atomic_load(&m->fail_count) != 0) {
        if (atomic_load(&m->fail_count) > 0)
            atomic_fetch_sub(&m->fail_count, 1);
        return atomic_load(&m->fail_errno);
    }
    if (op->type == STORE_FLUSH)
        return 0;
    if (op->objno >= m->count || op->off + op->len > memory_object_size(m) || op->off + op->len < op->off) {
        atomic_store(&m->misused, true);
        return -EINVAL;
    }
    if (op->type == STORE_READ || op->type == STORE_WRITE || op->type == STORE_COPYUP) {
        uint64_t total = 0;
        for (uint32_t n = 0; n < op->iovcnt; n++)
            total += op->iov[n].iov_len;
        if (total != op->len)
            atomic_store(&m->misused, true);
    }
    struct memory_object *o = &m->objects[op->objno];
    const struct memory_content *c = &o->head;
    uint64_t n;
    switch (op->type) {
    case STORE_READ:
        c = memory_at(o, op->snap_id);
        if (!c->exists)
            return -ENOENT;
        n = c->size > op->off ? c->size - op->off : 0;
        n = n < op->len ? n : op->len;
        memory_move(op, c->data + op->off, n, true);
        return n;
    case STORE_STAT:
        c = memory_at(o, op->snap_id);
        return c->exists ? (int64_t)c->size : -ENOENT;
    case STORE_EXTENTS: { /* data = bytes that are not zero, merged when less than 64 apart */
        c = memory_at(o, op->snap_id);
        if (!c->exists)
            return -ENOENT;
        uint32_t found = 0;
        for (uint64_t at = op->off; at < op->off + op->len && at < c->size; at++) {
            if (!c->data[at])
                continue;
            struct store_extent *last = found ? &op->extents[found - 1] : NULL;
            if (last && (found == op->max_extents || at - (last->off + last->len) < 64)) {
                last->len = at + 1 - last->off;
            } else {
                op->extents[found].off = at;
                op->extents[found++].len = 1;
            }
        }
        return found;
    }
    }
    if (op->type == STORE_COPYUP) {
        if (o->head.exists)
            return 0;
        memory_extend(m, &o->head, op->len);
        memory_move(op, o->head.data, op->len, false);
        for (struct memory_version *v = o->oldest; v; v = v->newer)
            if (!v->content.exists)
                v->content = memory_copy(m, &o->head);
        m->applied++;
        return 0;
    }
    bool creates = op->type == STORE_WRITE ? !(op->flags & STORE_GUARD) : op->flags & STORE_CREATE;
    if (!o->head.exists && !creates)
        return -ENOENT;
    memory_preserve(m, o, op->snapc);
    struct memory_content *h = &o->head;
    switch (op->type) {
    case STORE_WRITE:
        memory_extend(m, h, op->off + op->len);
        memory_move(op, h->data + op->off, op->len, false);
        break;
    case STORE_ZERO:
        n = h->size > op->off ? h->size - op->off : 0;
        memset(h->data + op->off, 0, n < op->len ? n : op->len);
        break;
    case STORE_TRUNCATE:
        memory_extend(m, h, op->off);
        memset(h->data + op->off, 0, memory_object_size(m) - op->off);
        h->size = op->off;
        break;
    case STORE_REMOVE:
        free(h->data);
        *h = (struct memory_content){0};
        break;
    default:
        atomic_store(&m->misused, true);
        return -EINVAL;
    }
    m->applied++;
    return 0;
}

static inline void memory_flushed(struct memory_store *m, struct store_op *op, uint64_t applied)
{
    uint64_t seen = atomic_load(&m->flushed);
    while (op->type == STORE_FLUSH && seen < applied && !atomic_compare_exchange_weak(&m->flushed, &seen, applied))
        ;
}

static void *memory_thread(void *arg)
{
    struct memory_store *m = arg;
    pthread_mutex_lock(&m->lock);
    for (;;) {
        while (!m->stopping && (!m->queued || atomic_load(&m->hold)))
            pthread_cond_wait(&m->wake, &m->lock);
        if (m->stopping)
            break;
        unsigned n = memory_random(&m->random) % m->queued;
        struct memory_wait w = m->queue[n];
        m->queue[n] = m->queue[--m->queued];
        w.op->result = memory_apply(m, w.op);
        pthread_mutex_unlock(&m->lock);
        if (w.op->result == 0)
            memory_flushed(m, w.op, w.applied);
        w.op->done(w.op);
        pthread_mutex_lock(&m->lock);
    }
    pthread_mutex_unlock(&m->lock);
    return NULL;
}

static int64_t memory_submit(struct store *s, struct store_op *op)
{
    struct memory_store *m = (struct memory_store *)s;
    pthread_mutex_lock(&m->lock);
    uint64_t applied = m->applied;
    unsigned dice = memory_random(&m->random) % 100;
    int64_t r;
    if (op->flags & STORE_NOWAIT && dice < atomic_load(&m->again)) {
        r = -EAGAIN;
    } else if (m->queued < 4096 && dice >= 100 - atomic_load(&m->pending)) {
        m->queue[m->queued++] = (struct memory_wait){op, applied};
        pthread_cond_signal(&m->wake);
        r = STORE_PENDING;
    } else {
        r = memory_apply(m, op);
    }
    pthread_mutex_unlock(&m->lock);
    if (r == 0)
        memory_flushed(m, op, applied);
    return r;
}

static inline void memory_hold(struct memory_store *m, bool hold)
{
    pthread_mutex_lock(&m->lock);
    atomic_store(&m->hold, hold);
    pthread_cond_broadcast(&m->wake);
    pthread_mutex_unlock(&m->lock);
}

static void memory_close(struct store *s)
{
    struct memory_store *m = (struct memory_store *)s;
    pthread_mutex_lock(&m->lock);
    assert(!m->queued);
    m->stopping = true;
    pthread_cond_broadcast(&m->wake);
    pthread_mutex_unlock(&m->lock);
    pthread_join(m->thread, NULL);
    assert(!atomic_load(&m->misused));
    for (uint64_t n = 0; n < m->count; n++) {
        free(m->objects[n].head.data);
        for (struct memory_version *v = m->objects[n].oldest, *next; v; v = next) {
            next = v->newer;
            free(v->content.data);
            free(v);
        }
    }
    free(m->objects);
    pthread_cond_destroy(&m->wake);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

static inline struct memory_store *memory_new(unsigned order, uint64_t count, uint64_t seed)
{
    static const struct store_ops ops = {.name = "memory", .submit = memory_submit, .close = memory_close};
    struct memory_store *m = calloc(1, sizeof *m);
    m->store.ops = &ops;
    m->order = order;
    m->count = count;
    m->objects = calloc(count, sizeof *m->objects);
    m->random = seed | 1;
    m->fail_type = -1;
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->wake, NULL);
    pthread_create(&m->thread, NULL, memory_thread, m);
    return m;
}

#endif
