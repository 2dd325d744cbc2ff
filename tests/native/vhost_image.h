/* An image in memory behind the engine's interface, so that transports are tested without engine and store.
 * Include it in one file of a program; the archive's engine is then not linked. */
#ifndef VHOST_IMAGE_H
#define VHOST_IMAGE_H
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/reactor.h"
#include "engine/request.h"
#include "ffi/api_engine.h"

struct image {
    pthread_mutex_t lock; /* everything but data */
    uint8_t *data;
    _Atomic uint64_t size;
    uint64_t capacity;
    bool read_only, blocked;
    bool async; /* requests complete on threads of the pool, in any order */
    int fence;  /* 0 or -errno */
    uint64_t hold_from, hold_to; /* bytes: requests that begin there wait, and no fence ends their wait */
    struct req *parked, *held;
    struct image_user *users;
    _Atomic uint64_t submitted, fua; /* writes with REQ_FUA */
};

/* path: NULL, or a file that keeps the data when the process is killed. */
static struct image *fake_image_new(const char *path, uint64_t size, uint64_t capacity)
{
    struct image *i = calloc(1, sizeof *i);
    pthread_mutex_init(&i->lock, NULL);
    int fd = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : memfd_create("image", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)capacity))
        abort();
    i->data = mmap(NULL, capacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (i->data == MAP_FAILED)
        abort();
    close(fd);
    i->size = size;
    i->capacity = capacity;
    return i;
}

static void fake_perform(struct image *i, struct req *r)
{
    uint64_t at = r->off;
    r->result = 0;
    if (r->type != REQ_FLUSH && (r->off > i->size || r->len > i->size - r->off)) {
        r->result = -EINVAL;
    } else if (r->type == REQ_READ || r->type == REQ_WRITE) {
        for (uint32_t n = 0; n < r->iovcnt; n++) {
            if (r->type == REQ_READ)
                memcpy(r->iov[n].iov_base, i->data + at, r->iov[n].iov_len);
            else
                memcpy(i->data + at, r->iov[n].iov_base, r->iov[n].iov_len);
            at += r->iov[n].iov_len;
        }
        if (at != r->off + r->len)
            abort(); /* the transport's own mistake */
    } else if (r->type == REQ_DISCARD || r->type == REQ_WRITE_ZEROES) {
        memset(i->data + r->off, 0, r->len);
    }
}

static void fake_job(struct job *j)
{
    struct req *r = j->owner;
    struct image *i = r->work;
    free(j);
    fake_perform(i, r);
    r->done(r);
}

static void fake_run(struct image *i, struct req *r)
{
    pthread_mutex_lock(&i->lock);
    i->submitted++;
    i->fua += r->type == REQ_WRITE && r->flags & REQ_FUA;
    int fence = i->fence;
    bool hold = r->type != REQ_FLUSH && r->off >= i->hold_from && r->off < i->hold_to;
    bool park = !hold && i->blocked && !fence, async = i->async && !fence;
    if (park || hold) {
        struct req **list = hold ? &i->held : &i->parked;
        r->next = *list;
        *list = r;
    }
    pthread_mutex_unlock(&i->lock);
    if (park || hold)
        return;
    if (async) {
        struct job *j = calloc(1, sizeof *j);
        j->run = fake_job;
        j->owner = r;
        r->work = i;
        pool_run(j);
        return;
    }
    if (fence)
        r->result = fence;
    else
        fake_perform(i, r);
    r->done(r);
}

void image_submit(struct image *i, struct req *r) { fake_run(i, r); }

__attribute__((unused)) static void fake_block(struct image *i, bool on)
{
    pthread_mutex_lock(&i->lock);
    i->blocked = on;
    struct req *r = on ? NULL : i->parked;
    if (!on)
        i->parked = NULL;
    pthread_mutex_unlock(&i->lock);
    while (r) {
        struct req *next = r->next;
        fake_run(i, r);
        r = next;
    }
}

/* Nothing is held any more when from == to. What was held is carried out, fence or not: it was in the store already. */
__attribute__((unused)) static void fake_hold(struct image *i, uint64_t from, uint64_t to)
{
    pthread_mutex_lock(&i->lock);
    i->hold_from = from;
    i->hold_to = to;
    struct req *r = from == to ? i->held : NULL;
    if (r)
        i->held = NULL;
    pthread_mutex_unlock(&i->lock);
    while (r) {
        struct req *next = r->next;
        fake_perform(i, r);
        r->done(r);
        r = next;
    }
}

void image_drop(struct image *i, bool (*whose)(const struct req *, const void *), const void *who)
{
    struct req *dropped = NULL;
    pthread_mutex_lock(&i->lock);
    for (struct req **link = &i->parked; *link;) {
        struct req *r = *link;
        if (whose(r, who)) {
            *link = r->next;
            r->next = dropped;
            dropped = r;
        } else {
            link = &r->next;
        }
    }
    pthread_mutex_unlock(&i->lock);
    while (dropped) {
        struct req *next = dropped->next;
        dropped->result = -ECANCELED;
        dropped->done(dropped);
        dropped = next;
    }
}

int rbdn_image_fence(struct image *i, int err)
{
    pthread_mutex_lock(&i->lock);
    i->fence = err;
    struct req *r = i->parked;
    i->parked = NULL;
    pthread_mutex_unlock(&i->lock);
    while (r) {
        struct req *next = r->next;
        r->result = err;
        r->done(r);
        r = next;
    }
    return 0;
}

__attribute__((unused)) static void fake_resize(struct image *i, uint64_t size)
{
    pthread_mutex_lock(&i->lock);
    i->size = size < i->capacity ? size : i->capacity;
    for (struct image_user *u = i->users; u; u = u->next)
        u->changed(u);
    pthread_mutex_unlock(&i->lock);
}

uint64_t image_size(struct image *i) { return i->size; }
bool image_read_only(struct image *i) { return i->read_only; }
uint32_t image_object_size(struct image *i) { return 4 << 20; }

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
    for (struct image_user **l = &i->users; *l; l = &(*l)->next)
        if (*l == u) {
            *l = u->next;
            break;
        }
    pthread_mutex_unlock(&i->lock);
}

#endif
