/* A vhost-user-blk export: the listening socket, one live front end at a time, start and stop. */
#define _GNU_SOURCE /* accept4 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "transport/vhost_session.h"

#define ACCEPT_PAUSE_MS 1000 /* after accept failed, for want of descriptors most likely */

void vhost_export_timer(struct vhost_export *e, unsigned ms)
{
    struct itimerspec t = {.it_value = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000}};
    timerfd_settime(e->timer.fd, 0, &t, NULL);
}

static bool serve(struct vhost_export *e, int fd)
{
    if (!export_client_came(&e->base)) {
        close(fd);
        return false;
    }
    if (vhost_session_new(e, fd) == 0)
        return true;
    export_client_left(&e->base);
    return false;
}

static void listen_on(struct vhost_export *e)
{
    while (!e->live && e->waiting_count) {
        int fd = e->waiting[0];
        memmove(e->waiting, e->waiting + 1, --e->waiting_count * sizeof *e->waiting);
        serve(e, fd);
    }
    if (e->listener.fd < 0 || e->listening || e->live)
        return;
    if (reactor_watch(e->reactor, &e->listener, EPOLLIN) == 0)
        e->listening = true;
    else
        vhost_export_timer(e, ACCEPT_PAUSE_MS);
}

static void listen_off(struct vhost_export *e)
{
    if (e->listening)
        reactor_unwatch(&e->listener);
    e->listening = false;
}

static void on_connect(struct fd_watch *w, uint32_t events)
{
    struct vhost_export *e = w->owner;
    int fd = accept4(w->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
            listen_off(e);
            vhost_export_timer(e, ACCEPT_PAUSE_MS);
        }
        return;
    }
    if (serve(e, fd))
        listen_off(e); /* others wait in the socket's queue until this one has left */
}

static void on_timer(struct fd_watch *w, uint32_t events)
{
    struct vhost_export *e = w->owner;
    uint64_t count;
    if (read(w->fd, &count, sizeof count) < 0)
        return; /* set anew meanwhile */
    if (e->live)
        vhost_session_deadline(e->live);
    else
        listen_on(e);
}

void vhost_export_session_gone(struct vhost_export *e, struct vhost_session *s)
{
    if (e->live == s)
        e->live = NULL;
    bool drained = s && e->draining == s;
    if (drained)
        e->draining = NULL;
    listen_on(e);
    if (drained && e->live)
        vhost_session_start_rings(e->live);
    if (s)
        export_client_left(&e->base); /* last: the export may be freed now */
}

static void on_changed(struct post *p)
{
    struct vhost_export *e = p->owner;
    if (e->live)
        vhost_session_config_changed(e->live);
}

static void image_changed(struct image_user *u)
{
    struct vhost_export *e = u->owner;
    reactor_post(e->reactor, &e->changed_post);
}

static void on_go_on(struct post *p)
{
    struct vhost_export *e = p->owner;
    if (e->live && e->live->holding && !atomic_load(&e->base.held))
        vhost_session_go_on(e->live);
}

/* Any thread. */
static int vhost_go_on(struct export *base, int64_t which)
{
    struct vhost_export *e = (struct vhost_export *)base;
    int64_t held = which;
    if (which <= 0 || !atomic_compare_exchange_strong(&e->base.held, &held, 0))
        return -ESTALE;
    reactor_post(e->reactor, &e->go_on_post);
    return 0;
}

/* ---- calls from other threads that wait for the reactor ---- */

struct call {
    struct post post;
    struct vhost_export *export;
    void (*run)(struct call *);
    int argument, result;
    bool done;
    pthread_mutex_t lock;
    pthread_cond_t wake;
};

static void on_call(struct post *p)
{
    struct call *c = p->owner;
    c->run(c);
    pthread_mutex_lock(&c->lock);
    c->done = true;
    pthread_cond_signal(&c->wake);
    pthread_mutex_unlock(&c->lock);
}

static int call(struct export *base, void (*run)(struct call *), int argument)
{
    struct vhost_export *e = (struct vhost_export *)base;
    struct call c = {.post.run = on_call, .export = e, .run = run, .argument = argument};
    if (reactor_here(e->reactor)) {
        run(&c);
        return c.result;
    }
    c.post.owner = &c;
    pthread_mutex_init(&c.lock, NULL);
    pthread_cond_init(&c.wake, NULL);
    reactor_post(e->reactor, &c.post);
    pthread_mutex_lock(&c.lock);
    while (!c.done)
        pthread_cond_wait(&c.wake, &c.lock);
    pthread_mutex_unlock(&c.lock);
    pthread_cond_destroy(&c.wake);
    pthread_mutex_destroy(&c.lock);
    return c.result;
}

static void serve_here(struct call *c)
{
    struct vhost_export *e = c->export;
    if (e->closed || e->waiting_count == VHOST_WAITING_MAX) {
        c->result = e->closed ? -ESHUTDOWN : -EAGAIN;
        close(c->argument);
        return;
    }
    e->waiting[e->waiting_count++] = c->argument;
    listen_on(e);
    if (e->live)
        listen_off(e);
}

static int vhost_serve(struct export *base, int fd)
{
    int type = 0, flags = fcntl(fd, F_GETFL);
    socklen_t size = sizeof type;
    if (flags < 0 || getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) || type != SOCK_STREAM ||
        fcntl(fd, F_SETFL, flags | O_NONBLOCK)) {
        if (flags >= 0)
            close(fd);
        return -EINVAL;
    }
    return call(base, serve_here, fd);
}

/* ---- stop and free, called on any thread ---- */

static void stop_here(struct call *c)
{
    struct vhost_export *e = c->export;
    bool hard = c->argument;
    e->closed = true;
    while (e->waiting_count)
        close(e->waiting[--e->waiting_count]);
    listen_off(e);
    if (e->listener.fd >= 0)
        close(e->listener.fd);
    e->listener.fd = -1;
    if (hard && e->live)
        vhost_session_close(e->live, false);
}

/* Returns when the listener is closed: nobody can come any more. */
static void vhost_stop(struct export *base, bool hard)
{
    call(base, stop_here, hard);
}

static void on_free(struct post *p)
{
    struct vhost_export *e = p->owner;
    reactor_unwatch(&e->timer);
    close(e->timer.fd);
    reactor_release(e->reactor);
    free(e);
}

/* By a post, behind everything that was posted about this export before. */
static void vhost_free(struct export *base)
{
    struct vhost_export *e = (struct vhost_export *)base;
    reactor_post(e->reactor, &e->free_post);
}

static const struct export_ops vhost_ops = {
    .name = "vhost-user-blk", .stop = vhost_stop, .free = vhost_free, .serve = vhost_serve, .go_on = vhost_go_on,
};

static bool power_of_two(uint32_t n)
{
    return n && (n & (n - 1)) == 0;
}

rbdn_export *rbdn_vhost_start(uint64_t id, rbdn_image *image, int listen_fd, const rbdn_vhost_config *c, int *err)
{
    struct vhost_export *e = NULL;
    int timer = -1, listener = -1, flags;
    *err = -EINVAL;
    if (c->num_queues < 1 || c->num_queues > VHOST_QUEUES_MAX || c->queue_size_max < 2 ||
        c->queue_size_max > RING_SIZE_MAX || !power_of_two(c->queue_size_max) || c->logical_block_size < 512 ||
        c->logical_block_size > 65536 || !power_of_two(c->logical_block_size) ||
        !memchr(c->serial, 0, sizeof c->serial))
        return NULL;
    e = calloc(1, sizeof *e);
    if (listen_fd >= 0)
        listener = fcntl(listen_fd, F_DUPFD_CLOEXEC, 0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (!e || (listen_fd >= 0 && listener < 0) || timer < 0 ||
        (listen_fd >= 0 &&
         ((flags = fcntl(listener, F_GETFL)) < 0 || fcntl(listener, F_SETFL, flags | O_NONBLOCK)))) {
        *err = e ? -errno : -ENOMEM;
        goto failed;
    }
    e->reactor = reactor_pick();
    if (!e->reactor) {
        *err = -ENXIO; /* rbdn_runtime_start() was not called */
        goto failed;
    }
    e->device.image = image;
    e->device.read_only = c->read_only || image_read_only(image);
    e->device.write_through = !c->write_cache;
    memcpy(e->device.serial, c->serial, strlen(c->serial));
    e->settings = (struct blk_settings){
        .num_queues = c->num_queues, .queue_size_max = c->queue_size_max, .block_size = c->logical_block_size,
        .write_cache = c->write_cache,
    };
    e->protocol = VHOST_PROTOCOL_FEATURES;
    if (c->whole_memory)
        e->protocol &= ~(1ULL << VHOST_P_CONFIGURE_MEM_SLOTS);
    e->writeback = c->write_cache;
    e->drain_ms = VHOST_DRAIN_MS;
    e->fenced_ms = VHOST_FENCED_MS;
    e->offer_ms = VHOST_OFFER_MS;
    e->listener = (struct fd_watch){.fd = listener, .ready = on_connect, .owner = e};
    e->timer = (struct fd_watch){.fd = timer, .ready = on_timer, .owner = e};
    e->changed_post = (struct post){.run = on_changed, .owner = e};
    e->go_on_post = (struct post){.run = on_go_on, .owner = e};
    e->free_post = (struct post){.run = on_free, .owner = e};
    e->base.user = (struct image_user){.changed = image_changed, .owner = e};
    *err = export_init(&e->base, &vhost_ops, id, image);
    if (*err) {
        reactor_release(e->reactor);
        goto failed;
    }
    /* The timer first: once the listener is watched, things happen on the reactor. */
    *err = reactor_watch(e->reactor, &e->timer, EPOLLIN);
    if (*err == 0 && listener < 0)
        return &e->base;
    if (*err == 0) {
        e->listening = true;
        *err = reactor_watch(e->reactor, &e->listener, EPOLLIN);
        if (*err == 0)
            return &e->base;
        e->listening = false;
    }
    image_put(image, &e->base.user);
    pthread_mutex_destroy(&e->base.lock);
    if (listener >= 0)
        close(listener);
    reactor_post(e->reactor, &e->free_post); /* closes the timer on its own thread */
    return NULL;
failed:
    if (timer >= 0)
        close(timer);
    if (listener >= 0)
        close(listener);
    free(e);
    return NULL;
}
