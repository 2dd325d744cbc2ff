/* Listening sockets, exports by name, connections, and how all of them end. */
#define _GNU_SOURCE /* accept4 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "transport/nbd.h"
#include "transport/nbd_socket.h"

#define ACCEPT_RETRY_MS 100
#define ACCEPT_BATCH 16

void nbd_server_unref(struct nbd_server *s)
{
    pthread_mutex_lock(&s->lock);
    bool last = --s->refs == 0;
    pthread_mutex_unlock(&s->lock);
    if (!last)
        return;
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static struct nbd_export *find(struct nbd_server *s, const void *name, uint32_t size)
{
    for (struct nbd_export *e = s->exports; e; e = e->next)
        if (e->name_size == size && !memcmp(e->name, name, size))
            return e;
    return NULL;
}

bool nbd_server_find(struct nbd_server *s, const uint8_t *name, uint32_t size,
                     void (*use)(struct nbd_conn *, struct nbd_export *), struct nbd_conn *c)
{
    pthread_mutex_lock(&s->lock);
    struct nbd_export *e = find(s, name, size);
    if (e)
        use(c, e);
    pthread_mutex_unlock(&s->lock);
    return e;
}

void nbd_server_each(struct nbd_server *s, void (*use)(struct nbd_conn *, struct nbd_export *), struct nbd_conn *c)
{
    pthread_mutex_lock(&s->lock);
    for (struct nbd_export *e = s->exports; e; e = e->next)
        use(c, e);
    pthread_mutex_unlock(&s->lock);
}

void nbd_server_socket_closed(struct nbd_server *s)
{
    pthread_mutex_lock(&s->lock);
    s->sockets--;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

bool nbd_server_forget(struct nbd_conn *c)
{
    struct nbd_server *s = c->server;
    pthread_mutex_lock(&s->lock);
    *c->link = c->next;
    if (c->next)
        c->next->link = c->link;
    s->count--;
    bool queued = c->control_queued;
    pthread_mutex_unlock(&s->lock);
    return !queued;
}

rbdn_nbd_server *rbdn_nbd_server_new(unsigned max_connections, int *err)
{
    struct nbd_server *s = max_connections ? calloc(1, sizeof *s) : NULL;
    *err = s ? 0 : max_connections ? -ENOMEM : -EINVAL;
    if (!s)
        return NULL;
    *err = -pthread_mutex_init(&s->lock, NULL);
    if (!*err) {
        *err = -pthread_cond_init(&s->changed, NULL);
        if (*err)
            pthread_mutex_destroy(&s->lock);
    }
    if (*err) {
        free(s);
        return NULL;
    }
    s->max_connections = max_connections;
    s->refs = 1;
    return s;
}

static void accept_ready(struct fd_watch *w, uint32_t events)
{
    struct nbd_listener *l = w->owner;
    for (int i = 0; i < ACCEPT_BATCH; i++) {
        int fd = accept4(w->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            nbd_conn_new(l->server, fd); /* a refusal (too many, stopping) closes it: the client sees the end */
        } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            reactor_rearm(w, 0); /* they wait in the backlog; trying at once would only spin */
            nbd_timer_arm(l->retry_watch.fd, ACCEPT_RETRY_MS);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            return;
        }
    }
}

static void accept_retry(struct fd_watch *w, uint32_t events)
{
    struct nbd_listener *l = w->owner;
    nbd_timer_clear(w->fd);
    reactor_rearm(&l->watch, EPOLLIN);
}

static void listener_free(struct nbd_listener *l)
{
    if (l->watch.fd >= 0)
        close(l->watch.fd);
    if (l->retry_watch.fd >= 0)
        close(l->retry_watch.fd);
    free(l);
}

static void listener_stop(struct post *p)
{
    struct nbd_listener *l = p->owner;
    struct nbd_server *s = l->server;
    reactor_unwatch(&l->watch);
    reactor_unwatch(&l->retry_watch);
    listener_free(l);
    nbd_server_socket_closed(s);
}

int rbdn_nbd_listen(rbdn_nbd_server *s, int listen_fd)
{
    int listening = 0;
    socklen_t size = sizeof listening;
    if (getsockopt(listen_fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size))
        return -errno;
    if (!listening)
        return -EINVAL;
    struct nbd_listener *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->server = s;
    l->watch = (struct fd_watch){.fd = fcntl(listen_fd, F_DUPFD_CLOEXEC, 0), .ready = accept_ready, .owner = l};
    l->retry_watch = (struct fd_watch){.fd = nbd_timer_new(0), .ready = accept_retry, .owner = l};
    l->stop = (struct post){.run = listener_stop, .owner = l};
    struct reactor *r = reactor_pick();
    int rc = l->watch.fd < 0 || l->retry_watch.fd < 0 ? -EMFILE : r ? 0 : -ENODEV;
    if (!rc && fcntl(l->watch.fd, F_SETFL, fcntl(l->watch.fd, F_GETFL) | O_NONBLOCK))
        rc = -errno;
    if (r)
        reactor_release(r); /* a listener is hardly load */
    pthread_mutex_lock(&s->lock);
    if (!rc && s->stopping)
        rc = -ESHUTDOWN;
    if (!rc && !(rc = reactor_watch(r, &l->retry_watch, EPOLLIN)))
        rc = reactor_watch(r, &l->watch, EPOLLIN);
    if (!rc) {
        l->next = s->listeners;
        s->listeners = l;
        s->sockets++;
    }
    pthread_mutex_unlock(&s->lock);
    if (rc)
        listener_free(l); /* closing the timer took it out of epoll; it was not armed */
    return rc;
}

int rbdn_nbd_serve(rbdn_nbd_server *s, int fd)
{
    return nbd_conn_new(s, fd);
}

static void image_changed(struct image_user *u)
{
    struct nbd_export *e = u->owner;
    uint64_t size;
    do { /* the first call, at the start of the export, may race with one from a resize */
        size = image_size(e->base.image);
        atomic_store(&e->size, size);
    } while (image_size(e->base.image) != size);
    atomic_store(&e->image_read_only, image_read_only(e->base.image));
}

static void unlist(struct nbd_export *e)
{
    if (!e->listed)
        return;
    struct nbd_export **link = &e->server->exports;
    while (*link != e)
        link = &(*link)->next;
    *link = e->next;
    e->listed = false;
}

static void export_stop(struct export *base, bool hard)
{
    struct nbd_export *e = (struct nbd_export *)base;
    pthread_mutex_lock(&e->server->lock);
    unlist(e);
    for (struct nbd_conn *c = e->server->conns; hard && c; c = c->next)
        if (c->export == e)
            nbd_conn_kill(c);
    pthread_mutex_unlock(&e->server->lock);
}

static void export_free_memory(struct nbd_export *e)
{
    free(e->name);
    free(e->description);
    free(e);
}

static void export_free(struct export *base)
{
    struct nbd_export *e = (struct nbd_export *)base;
    nbd_server_unref(e->server);
    export_free_memory(e);
}

static const struct export_ops nbd_export_ops = {.name = "nbd", .stop = export_stop, .free = export_free};

rbdn_export *rbdn_nbd_export(rbdn_nbd_server *s, uint64_t id, rbdn_image *i, const char *name, const rbdn_nbd_config *c,
                             int *err)
{
    size_t size = strlen(name), description = c->description ? strlen(c->description) : 0;
    if (size > NBD_STRING_MAX || description > NBD_STRING_MAX) {
        *err = -ENAMETOOLONG;
        return NULL;
    }
    struct nbd_export *e = calloc(1, sizeof *e);
    *err = -ENOMEM;
    if (!e)
        return NULL;
    e->name = strdup(name);
    e->description = c->description ? strdup(c->description) : NULL;
    if (!e->name || (c->description && !e->description)) {
        export_free_memory(e);
        return NULL;
    }
    e->server = s;
    e->name_size = size;
    e->read_only = c->read_only;
    e->base.user = (struct image_user){.changed = image_changed, .owner = e};
    *err = export_init(&e->base, &nbd_export_ops, id, i);
    if (*err) {
        export_free_memory(e);
        return NULL;
    }
    image_changed(&e->base.user);
    pthread_mutex_lock(&s->lock);
    *err = s->stopping ? -ESHUTDOWN : find(s, e->name, e->name_size) ? -EEXIST : 0;
    if (!*err) {
        e->serial = ++s->next_serial;
        e->next = s->exports;
        s->exports = e;
        e->listed = true;
        s->refs++;
    }
    pthread_mutex_unlock(&s->lock);
    if (*err) {
        image_put(i, &e->base.user);
        pthread_mutex_destroy(&e->base.lock);
        export_free_memory(e);
        return NULL;
    }
    return &e->base;
}

/* Waits for the sockets, not for requests in flight: those hold references and free the rest when they end. */
int rbdn_nbd_server_stop(rbdn_nbd_server *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->exports) {
        pthread_mutex_unlock(&s->lock);
        return -EBUSY;
    }
    s->stopping = true;
    while (s->listeners) {
        struct nbd_listener *l = s->listeners;
        s->listeners = l->next;
        reactor_post(l->watch.reactor, &l->stop);
    }
    for (struct nbd_conn *c = s->conns; c; c = c->next)
        nbd_conn_kill(c);
    while (s->sockets)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
    nbd_server_unref(s);
    return 0;
}
