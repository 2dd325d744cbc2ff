#include "transport/export.h"

#include <errno.h>
#include <unistd.h>

#include "engine/event.h"

int export_init(struct export *e, const struct export_ops *ops, uint64_t id, struct image *image)
{
    e->ops = ops;
    e->id = id;
    e->image = image;
    e->state = EXPORT_SERVING;
    e->clients = 0;
    int rc = pthread_mutex_init(&e->lock, NULL);
    if (rc)
        return -rc;
    image_get(image, &e->user);
    return 0;
}

bool export_client_came(struct export *e)
{
    pthread_mutex_lock(&e->lock);
    bool serving = e->state == EXPORT_SERVING;
    uint32_t clients = serving ? ++e->clients : 0;
    pthread_mutex_unlock(&e->lock);
    if (serving) {
        atomic_fetch_add(&e->accepted, 1);
        event_post(EVENT_EXPORT_CONNECTED, e->id, clients);
    }
    return serving;
}

void export_client_left(struct export *e)
{
    uint64_t id = e->id;
    pthread_mutex_lock(&e->lock);
    uint32_t clients = --e->clients;
    bool stopped = clients == 0 && e->state == EXPORT_STOPPING;
    if (stopped)
        e->state = EXPORT_STOPPED;
    pthread_mutex_unlock(&e->lock);
    /* Once STOPPED the export may be freed by another thread: only the copy of its id from here on. */
    event_post(EVENT_EXPORT_DISCONNECTED, id, clients);
    if (stopped)
        event_post(EVENT_EXPORT_STOPPED, id, 0);
}

void export_broken(struct export *e, int64_t queue)
{
    atomic_fetch_add(&e->broken, 1);
    event_post(EVENT_EXPORT_BROKEN, e->id, queue);
}

int rbdn_export_stats_get(rbdn_export *e, rbdn_export_stats *out)
{
    pthread_mutex_lock(&e->lock);
    out->clients = e->clients;
    pthread_mutex_unlock(&e->lock);
    out->accepted = atomic_load(&e->accepted);
    out->broken = atomic_load(&e->broken);
    out->resubmitted = atomic_load(&e->resubmitted);
    out->resumed = atomic_load(&e->resumed);
    out->dirty_pages = atomic_load(&e->dirty_pages);
    out->switchover = atomic_load(&e->held);
    out->rings = atomic_load(&e->rings);
    return 0;
}

int rbdn_export_stop(rbdn_export *e, int hard)
{
    pthread_mutex_lock(&e->lock);
    bool first = e->state == EXPORT_SERVING, stopped = false;
    if (first) {
        stopped = e->clients == 0;
        e->state = stopped ? EXPORT_STOPPED : EXPORT_STOPPING;
    }
    bool act = first || (hard && e->state == EXPORT_STOPPING);
    pthread_mutex_unlock(&e->lock);
    if (act)
        e->ops->stop(e, hard);
    if (stopped)
        event_post(EVENT_EXPORT_STOPPED, e->id, 0);
    return 0;
}

int rbdn_export_free(rbdn_export *e)
{
    pthread_mutex_lock(&e->lock);
    bool stopped = e->state == EXPORT_STOPPED;
    pthread_mutex_unlock(&e->lock);
    if (!stopped)
        return -EBUSY;
    image_put(e->image, &e->user);
    pthread_mutex_destroy(&e->lock);
    e->ops->free(e);
    return 0;
}

int rbdn_vhost_serve(rbdn_export *e, int fd)
{
    if (e->ops->serve)
        return e->ops->serve(e, fd);
    close(fd);
    return -EINVAL;
}

int rbdn_export_go_on(rbdn_export *e, int64_t which)
{
    return e->ops->go_on ? e->ops->go_on(e, which) : -EINVAL;
}
