/* Watches for Python: librados' callbacks put events into a bounded ring and poke a descriptor (ffi/api_rados.h). */
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ffi/api_rados.h"
#include "store/rados_python.h"

#define RING 1024                 /* events */
#define RING_BYTES (4U << 20)     /* of all payloads in it */

struct entry {
    rbdn_watch_event event;
    void *payload; /* malloc */
};

struct rbdn_watch_ring {
    int fd;
    pthread_mutex_t lock; /* guards all below */
    uint32_t first, count;
    size_t bytes;
    struct entry ring[RING];
    rbdn_watch *lost, **lost_last;
};

struct rbdn_watch {
    rbdn_watch_ring *events;
    rbdn_ioctx *io;
    uint64_t token, cookie;
    int error;             /* 0, or why it is lost; events->lock */
    bool listed;           /* among the lost; events->lock */
    rbdn_watch *next_lost; /* events->lock */
};

rbdn_watch_ring *rbdn_watch_ring_new(void)
{
    rbdn_watch_ring *e = calloc(1, sizeof *e);
    if (!e)
        return NULL;
    e->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->fd < 0) {
        free(e);
        return NULL;
    }
    pthread_mutex_init(&e->lock, NULL);
    e->lost_last = &e->lost;
    return e;
}

int rbdn_watch_ring_fd(rbdn_watch_ring *e)
{
    return e->fd;
}

void rbdn_watch_ring_free(rbdn_watch_ring *e)
{
    for (; e->count; e->count--)
        free(e->ring[e->first++ % RING].payload);
    close(e->fd);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

static void poke(rbdn_watch_ring *e)
{
    uint64_t one = 1;
    ssize_t rc = write(e->fd, &one, sizeof one); /* fails when it is readable without end: that wakes too */
    (void)rc;
}

/* Needs no memory: it must never fail. */
static void lose(rbdn_watch *w, int error)
{
    if (w->error == 0) {
        rbdn_watch_ring *e = w->events;
        w->error = error < 0 ? error : -ENOTCONN;
        w->listed = true;
        w->next_lost = NULL;
        *e->lost_last = w;
        e->lost_last = &w->next_lost;
    }
}

static void on_notify(void *arg, uint64_t notify_id, uint64_t cookie, uint64_t notifier, void *data, size_t len)
{
    rbdn_watch *w = arg;
    rbdn_watch_ring *e = w->events;
    void *copy = len <= RBDN_PAYLOAD_MAX ? malloc(len ? len : 1) : NULL;
    if (copy && len)
        memcpy(copy, data, len);
    pthread_mutex_lock(&e->lock);
    if (w->error) {
        free(copy);
    } else if (!copy || e->count == RING || e->bytes + len > RING_BYTES) {
        free(copy);
        lose(w, -ENOBUFS);
    } else {
        e->ring[(e->first + e->count++) % RING] =
            (struct entry){{w->token, notify_id, notifier, cookie, 0, len}, copy};
        e->bytes += len;
    }
    pthread_mutex_unlock(&e->lock);
    poke(e);
}

static void on_error(void *arg, uint64_t cookie, int error)
{
    rbdn_watch *w = arg;
    pthread_mutex_lock(&w->events->lock);
    lose(w, error);
    pthread_mutex_unlock(&w->events->lock);
    poke(w->events);
}

int rbdn_watch_ring_next(rbdn_watch_ring *e, rbdn_watch_event *out, void *payload)
{
    int found = 1;
    pthread_mutex_lock(&e->lock);
    if (e->count) {
        struct entry *entry = &e->ring[e->first % RING];
        *out = entry->event;
        memcpy(payload, entry->payload, entry->event.len); /* never NULL, of 0 bytes too */
        free(entry->payload);
        e->bytes -= entry->event.len;
        e->first = (e->first + 1) % RING;
        e->count--;
    } else if (e->lost) {
        rbdn_watch *w = e->lost;
        e->lost = w->next_lost;
        if (!e->lost)
            e->lost_last = &e->lost;
        w->listed = false;
        *out = (rbdn_watch_event){w->token, 0, 0, w->cookie, w->error, 0};
    } else {
        found = 0;
    }
    pthread_mutex_unlock(&e->lock);
    return found;
}

/* After it no event can lead to the watch. */
static void release(rbdn_watch *w)
{
    rbdn_watch_ring *e = w->events;
    pthread_mutex_lock(&e->lock);
    if (w->listed) {
        rbdn_watch **link = &e->lost;
        while (*link != w)
            link = &(*link)->next_lost;
        *link = w->next_lost;
        if (!*link)
            e->lost_last = link;
    }
    pthread_mutex_unlock(&e->lock);
    free(w);
}

rbdn_watch *rbdn_watch_new(rbdn_watch_ring *e, rbdn_ioctx *io, const char *oid, uint64_t token, uint32_t timeout, int *err)
{
    rbdn_watch *w = calloc(1, sizeof *w);
    *err = -ENOMEM;
    if (!w)
        return NULL;
    w->events = e;
    w->io = io;
    w->token = token;
    uint64_t cookie = 0;
    *err = RADOS(watch3)(io->io, oid, &cookie, on_notify, on_error, timeout, w);
    if (*err < 0) {
        release(w);
        return NULL;
    }
    pthread_mutex_lock(&e->lock);
    w->cookie = cookie;
    pthread_mutex_unlock(&e->lock);
    return w;
}

uint64_t rbdn_watch_cookie(rbdn_watch *w)
{
    return w->cookie;
}

int rbdn_watch_check(rbdn_watch *w)
{
    pthread_mutex_lock(&w->events->lock);
    int error = w->error;
    pthread_mutex_unlock(&w->events->lock);
    return error ? error : RADOS(watch_check)(w->io->io, w->cookie);
}

int rbdn_watch_end(rbdn_watch *w, void *cluster)
{
    int rc = RADOS(unwatch2)(w->io->io, w->cookie);
    RADOS(watch_flush)(cluster);
    release(w);
    return rc;
}

int rbdn_notify_ack(rbdn_ioctx *io, const char *oid, uint64_t notify_id, uint64_t cookie, const void *data, size_t len)
{
    return len > INT32_MAX ? -EMSGSIZE : RADOS(notify_ack)(io->io, oid, notify_id, cookie, data, (int)len);
}
