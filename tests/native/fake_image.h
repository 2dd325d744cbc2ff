/* An image in memory for tests of transports: image_* of engine/request.h over a byte array, completing inline, on the
 * pool, or when told to. Included once, by the program that replaces the engine. */
#ifndef RBDN_FAKE_IMAGE_H
#define RBDN_FAKE_IMAGE_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "engine/reactor.h"
#include "engine/request.h"

#define FAKE_BLOCK 4096u

struct image {
    pthread_mutex_t lock;     /* guards everything here but `data` */
    uint8_t *data;
    uint64_t size, capacity;
    bool read_only, held, pooled;
    int fail;                 /* errno of every request, 0 = none */
    int runs_fail;
    struct image_user *users;
    struct req *waiting, **last; /* held */
    uint64_t count[REQ_TYPES], unmapped, fua;
};

struct fake_job {
    struct job job;
    struct image *image;
    struct req *req;
};

static inline struct image *fake_image_new(uint64_t size, uint64_t capacity)
{
    struct image *i = calloc(1, sizeof *i);
    pthread_mutex_init(&i->lock, NULL);
    i->data = calloc(1, capacity);
    i->size = size;
    i->capacity = capacity;
    i->last = &i->waiting;
    return i;
}

static inline void fake_image_free(struct image *i)
{
    pthread_mutex_destroy(&i->lock);
    free(i->data);
    free(i);
}

static inline int64_t fake_execute(struct image *i, struct req *r)
{
    uint64_t at = r->off, total = 0;
    for (uint32_t n = 0; n < r->iovcnt; n++)
        total += r->iov[n].iov_len;
    if (r->type != REQ_FLUSH && (r->off > i->size || r->len > i->size - r->off))
        return -EINVAL;
    if ((r->type == REQ_READ || r->type == REQ_WRITE) && total != r->len)
        return -EINVAL;
    switch (r->type) {
    case REQ_READ:
    case REQ_WRITE:
        for (uint32_t n = 0; n < r->iovcnt; at += r->iov[n++].iov_len) {
            if (r->type == REQ_READ)
                memcpy(r->iov[n].iov_base, i->data + at, r->iov[n].iov_len);
            else
                memcpy(i->data + at, r->iov[n].iov_base, r->iov[n].iov_len);
        }
        return 0;
    case REQ_DISCARD:
    case REQ_WRITE_ZEROES:
        memset(i->data + r->off, 0, r->len);
        return 0;
    case REQ_FLUSH:
        return 0;
    default:
        return -EOPNOTSUPP;
    }
}

static inline void fake_run(struct image *i, struct req *r)
{
    pthread_mutex_lock(&i->lock);
    int fail = i->fail;
    if (!fail) {
        i->count[r->type]++;
        i->unmapped += r->flags & REQ_UNMAP ? 1 : 0;
        i->fua += r->flags & REQ_FUA ? 1 : 0;
        r->result = fake_execute(i, r);
    }
    pthread_mutex_unlock(&i->lock);
    if (fail)
        r->result = -fail;
    r->done(r);
}

static inline void fake_job_run(struct job *j)
{
    struct fake_job *f = j->owner;
    struct image *i = f->image;
    struct req *r = f->req;
    free(f);
    fake_run(i, r);
}

void image_submit(struct image *i, struct req *r)
{
    pthread_mutex_lock(&i->lock);
    bool held = i->held, pooled = i->pooled;
    if (held) {
        r->next = NULL;
        *i->last = r;
        i->last = &r->next;
    }
    pthread_mutex_unlock(&i->lock);
    if (held)
        return;
    if (!pooled) {
        fake_run(i, r);
        return;
    }
    struct fake_job *f = malloc(sizeof *f);
    *f = (struct fake_job){.job = {.run = fake_job_run, .owner = f}, .image = i, .req = r};
    pool_run(&f->job);
}

/* What waits here has passed the gate: a store that hangs. */
void image_drop(struct image *i, bool (*whose)(const struct req *, const void *), const void *who)
{
}

static inline int fake_image_set(struct image *i, bool *what, bool value)
{
    pthread_mutex_lock(&i->lock);
    *what = value;
    pthread_mutex_unlock(&i->lock);
    return 0;
}

static inline int fake_image_fail(struct image *i, int requests, int runs)
{
    pthread_mutex_lock(&i->lock);
    i->fail = requests;
    i->runs_fail = runs;
    pthread_mutex_unlock(&i->lock);
    return 0;
}

/* Requests held so far are done, in order, on the calling thread. */
static inline unsigned fake_image_release(struct image *i, bool hold_further)
{
    unsigned n = 0;
    pthread_mutex_lock(&i->lock);
    struct req *r = i->waiting;
    i->waiting = NULL;
    i->last = &i->waiting;
    i->held = hold_further;
    pthread_mutex_unlock(&i->lock);
    for (; r; n++) {
        struct req *next = r->next;
        fake_run(i, r);
        r = next;
    }
    return n;
}

static inline unsigned fake_image_waiting(struct image *i)
{
    unsigned n = 0;
    pthread_mutex_lock(&i->lock);
    for (struct req *r = i->waiting; r; r = r->next)
        n++;
    pthread_mutex_unlock(&i->lock);
    return n;
}

uint64_t image_size(struct image *i)
{
    pthread_mutex_lock(&i->lock);
    uint64_t size = i->size;
    pthread_mutex_unlock(&i->lock);
    return size;
}

bool image_read_only(struct image *i)
{
    pthread_mutex_lock(&i->lock);
    bool read_only = i->read_only;
    pthread_mutex_unlock(&i->lock);
    return read_only;
}

uint32_t image_object_size(struct image *i)
{
    return 4u << 20;
}

/* A block of zeroes is a hole. Runs are not merged: that is the caller's to do. */
int image_runs(struct image *i, uint64_t off, uint64_t len, struct run *runs, uint32_t max)
{
    static const uint8_t zeroes[FAKE_BLOCK];
    uint32_t n = 0;
    pthread_mutex_lock(&i->lock);
    int fail = i->runs_fail;
    while (!fail && len && n < max && off < i->size) {
        uint64_t part = FAKE_BLOCK - off % FAKE_BLOCK;
        part = part < len ? part : len;
        part = part < i->size - off ? part : i->size - off;
        runs[n++] = (struct run){.len = part, .flags = memcmp(i->data + off, zeroes, part) ? 0 : RUN_HOLE | RUN_ZERO};
        off += part;
        len -= part;
    }
    pthread_mutex_unlock(&i->lock);
    return fail ? -fail : n ? (int)n : -EINVAL;
}

void image_get(struct image *i, struct image_user *u)
{
    pthread_mutex_lock(&i->lock);
    u->next = i->users;
    i->users = u;
    pthread_mutex_unlock(&i->lock);
}

void image_put(struct image *i, struct image_user *u)
{
    pthread_mutex_lock(&i->lock);
    struct image_user **link = &i->users;
    while (*link != u)
        link = &(*link)->next;
    *link = u->next;
    pthread_mutex_unlock(&i->lock);
}

static inline void fake_image_change(struct image *i, uint64_t size, bool read_only)
{
    pthread_mutex_lock(&i->lock);
    i->size = size < i->capacity ? size : i->capacity;
    i->read_only = read_only;
    struct image_user *u = i->users;
    pthread_mutex_unlock(&i->lock);
    for (; u; u = u->next)
        u->changed(u);
}

#endif
