#include "transport/vhost_session.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <linux/vhost_types.h>

#include "engine/event.h"

#define MESSAGES_AT_ONCE 16 /* then others get their turn on the reactor */

static void session_free(struct vhost_session *s)
{
    struct vhost_export *e = s->export;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++) {
        session_reap(s, n);
        int *fds[] = {&s->rings[n].kick, &s->rings[n].call, &s->rings[n].err};
        for (unsigned f = 0; f < 3; f++)
            if (*fds[f] >= 0)
                close(*fds[f]);
    }
    if (s->old_fd >= 0)
        close(s->old_fd);
    if (s->backend >= 0)
        close(s->backend);
    guest_memory_put(s->old_mem);
    guest_memory_put(s->mem);
    for (unsigned n = 0; n < s->region_count; n++)
        guest_region_put(s->regions[n]);
    dirty_log_put(s->old_log);
    dirty_log_put(s->log);
    shm_unmap(&s->inflight);
    vhost_export_session_gone(e, s);
    free(s);
}

void session_reap(struct vhost_session *s, unsigned n)
{
    if (!s->queues[n])
        return;
    vhost_queue_free(s->queues[n]);
    atomic_fetch_sub(&s->export->base.rings, 1);
    s->queues[n] = NULL;
    s->stopping[n] = false;
}

/* ---- commands ---- */

static void on_answered(struct vhost_session *s);

bool session_lost(const struct vhost_session *s)
{
    return (s->mem && guest_memory_lost(s->mem)) || (s->old_mem && guest_memory_lost(s->old_mem)) ||
           (s->log && shm_lost(&s->log->shm)) || (s->old_log && shm_lost(&s->old_log->shm)) || shm_lost(&s->inflight);
}

static void on_answer(void *owner, enum queue_command command)
{
    struct vhost_session *s = owner;
    if (command == QUEUE_LOSS) {
        if (session_lost(s))
            vhost_session_close(s, true);
        return;
    }
    if (command == QUEUE_STOP)
        s->undrained--;
    else
        s->unanswered--;
    if (s->unanswered == 0)
        on_answered(s);
}

static void wait_for_queues(struct vhost_session *s, void (*then)(struct vhost_session *))
{
    s->then = then;
    if (s->state == SESSION_READING) {
        s->state = SESSION_WAITING;
        reactor_unwatch(&s->socket);
    }
}

bool session_command(struct vhost_session *s, uint64_t which, enum queue_command command,
                     void (*then)(struct vhost_session *))
{
    unsigned count = 0;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        count += s->queues[n] && which >> n & 1;
    if (count == 0)
        return false;
    wait_for_queues(s, then);
    s->unanswered += count;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        if (s->queues[n] && which >> n & 1)
            vhost_queue_command(s->queues[n], command);
    return true;
}

static bool stop_queues(struct vhost_session *s, uint64_t which)
{
    unsigned count = 0;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        if (which >> n & 1 && s->queues[n] && !s->stopping[n])
            count++;
    if (count == 0)
        return false;
    s->undrained += count;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        if (which >> n & 1 && s->queues[n] && !s->stopping[n]) {
            s->stopping[n] = true;
            vhost_queue_command(s->queues[n], QUEUE_STOP);
        }
    return true;
}

static bool stop_and_wait(struct vhost_session *s, uint64_t which, void (*then)(struct vhost_session *))
{
    if (!stop_queues(s, which))
        return false;
    s->fenced = false;
    vhost_export_timer(s->export, s->export->drain_ms);
    wait_for_queues(s, then);
    return true;
}

bool session_stop_queue(struct vhost_session *s, unsigned index, void (*then)(struct vhost_session *))
{
    return stop_and_wait(s, 1ULL << index, then);
}

bool session_stop_all(struct vhost_session *s, void (*then)(struct vhost_session *))
{
    return stop_and_wait(s, SESSION_ALL_QUEUES, then);
}

/* The rings must lie in the memory the front end told us of. */
static bool rings_fit(const struct ring_config *c)
{
    struct split_ring probe = {.num = c->num};
    return ring_map(&probe, c->mem, &c->addresses) == 0;
}

int session_start_ready(struct vhost_session *s, void (*then)(struct vhost_session *))
{
    struct vhost_export *e = s->export;
    unsigned count = 0;
    bool running = false;
    if (e->draining)
        return 0;
    bool fresh[VHOST_QUEUES_MAX] = {false};
    for (unsigned n = 0; n < e->settings.num_queues; n++) {
        struct ring_config *c = &s->rings[n];
        running |= s->queues[n] && !fresh[n];
        if (s->queues[n] || c->kick < 0 || !c->num || !s->addressed[n] || !c->mem)
            continue;
        if (!rings_fit(c) || (c->inflight && c->num > c->inflight_num))
            return -EPROTO;
        if (c->inflight && __atomic_load_n(&c->inflight->version, __ATOMIC_RELAXED))
            atomic_fetch_add(&e->base.resumed, 1); /* before the event below */
        c->event_idx = s->features >> VIRTIO_RING_F_EVENT_IDX & 1;
        c->indirect = s->features >> VIRTIO_RING_F_INDIRECT_DESC & 1;
        s->queues[n] = vhost_queue_new(&e->base, &e->device, n, c, e->reactor, on_answer, s);
        if (!s->queues[n])
            return -EPROTO; /* no memory: the front end will come back */
        atomic_fetch_add(&e->base.rings, 1);
        fresh[n] = true;
        count++;
    }
    if (count == 0)
        return 0;
    s->unlogged |= s->features >> VHOST_F_LOG_ALL & 1;
    if (!running) {
        event_post(EVENT_EXPORT_RINGS, e->base.id, e->switched ? e->switchovers : 0);
        e->switched = false;
    }
    wait_for_queues(s, then);
    s->unanswered += count;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        if (fresh[n])
            vhost_queue_command(s->queues[n], QUEUE_START);
    return 1;
}

static void let_go(struct vhost_session *s)
{
    if (s->old_fd >= 0)
        close(s->old_fd);
    s->old_fd = -1;
    guest_memory_put(s->old_mem);
    s->old_mem = NULL;
    dirty_log_put(s->old_log);
    s->old_log = NULL;
}

/* No command but QUEUE_STOP is under way. */
static void on_answered(struct vhost_session *s)
{
    if (s->state == SESSION_ABANDONING) {
        let_go(s);
        s->state = SESSION_DRAINING;
        if (s->mem)
            guest_memory_detach(s->mem);
        stop_queues(s, SESSION_ALL_QUEUES);
    }
    if (s->undrained)
        return;
    if (s->state == SESSION_DRAINING) {
        session_free(s);
        return;
    }
    if (s->state != SESSION_WAITING)
        return;
    vhost_export_timer(s->export, 0);
    let_go(s);
    s->then(s);
}

/* ---- the end ---- */

void vhost_session_close(struct vhost_session *s, bool violation)
{
    struct vhost_export *e = s->export;
    if (s->state == SESSION_ABANDONING || s->state == SESSION_DRAINING)
        return;
    if (violation)
        export_broken(&e->base, -1);
    if (s->holding) {
        atomic_store(&e->base.held, 0); /* too late for go_on */
        vhost_export_timer(e, 0);
        s->holding = false;
    }
    if (s->state == SESSION_READING)
        reactor_unwatch(&s->socket);
    close(s->socket.fd);
    s->socket.fd = -1;
    vhost_msg_drop(&s->in);
    s->state = SESSION_ABANDONING;
    bool queues = session_command(s, SESSION_ALL_QUEUES, QUEUE_ABANDON, NULL);
    if (queues || s->unanswered || s->undrained) {
        e->live = NULL;
        e->draining = s;
        vhost_export_timer(e, 0);
        vhost_export_session_gone(e, NULL);
    } else {
        session_free(s);
    }
}

void vhost_session_deadline(struct vhost_session *s)
{
    if (s->holding) {
        int64_t held = s->export->switchovers;
        if (atomic_compare_exchange_strong(&s->export->base.held, &held, 0))
            vhost_session_go_on(s); /* else somebody said so just now */
        return;
    }
    if (s->state != SESSION_WAITING || !s->undrained)
        return;
    if (!s->fenced) {
        /* The peer (QEMU's main loop) waits for us. Parked requests fail now; nobody else may write either. */
        s->fenced = true;
        vhost_export_timer(s->export, s->export->fenced_ms);
        rbdn_image_fence(s->export->base.image, -ESHUTDOWN);
    } else {
        vhost_session_close(s, true);
    }
}

/* ---- messages ---- */

/* True: go on with the next message. */
static bool message_ends(struct vhost_session *s, uint64_t result)
{
    const struct vhost_header h = s->in.msg.header;
    vhost_msg_drop(&s->in); /* first: who sees the acknowledgement may count on its descriptors being closed */
    int rc = 0;
    if (h.flags & VHOST_NEED_REPLY && s->protocol >> VHOST_P_REPLY_ACK & 1)
        rc = vhost_write(s->socket.fd, h.request, VHOST_REPLY, &result, sizeof result, -1);
    if (rc == 0)
        return true;
    vhost_session_close(s, rc == -EAGAIN);
    return false;
}

void session_read_on(struct vhost_session *s)
{
    vhost_msg_drop(&s->in);
    s->then = NULL;
    s->state = SESSION_READING;
    if (reactor_watch(s->export->reactor, &s->socket, EPOLLIN | EPOLLRDHUP)) {
        s->state = SESSION_WAITING; /* not watched: close must not unwatch */
        vhost_session_close(s, false);
    } else if (!s->export->draining) {
        vhost_session_start_rings(s); /* an older session may have ended meanwhile */
    }
}

void session_acknowledge(struct vhost_session *s)
{
    if (message_ends(s, 0))
        session_read_on(s);
}

void vhost_session_start_rings(struct vhost_session *s)
{
    if (s->state == SESSION_READING && session_start_ready(s, session_read_on) < 0)
        vhost_session_close(s, true);
}

static void on_readable(struct fd_watch *w, uint32_t events)
{
    struct vhost_session *s = w->owner;
    for (unsigned n = 0; n < MESSAGES_AT_ONCE; n++) {
        int rc = vhost_read(w->fd, &s->in, s->protocol);
        if (rc == 0)
            return;
        if (rc < 0) {
            vhost_session_close(s, rc == -EPROTO);
            return;
        }
        switch (vhost_handle(s)) {
        case HANDLED:
            rc = session_start_ready(s, session_acknowledge);
            if (rc < 0)
                vhost_session_close(s, true);
            if (rc || !message_ends(s, 0))
                return;
            break;
        case REPLIED:
            vhost_msg_drop(&s->in);
            break;
        case REFUSED:
            if (!message_ends(s, 1))
                return;
            break;
        case WAITING:
            return;
        case VIOLATION:
            vhost_session_close(s, true);
            return;
        }
    }
}

void vhost_session_config_changed(struct vhost_session *s)
{
    /* A socket that is full holds such a message already: nothing is lost by dropping this one. */
    if (s->backend >= 0 && s->protocol >> VHOST_P_CONFIG & 1)
        vhost_write(s->backend, VHOST_BACKEND_CONFIG_CHANGE, 0, NULL, 0, -1);
}

int vhost_session_new(struct vhost_export *e, int fd)
{
    struct vhost_session *s = calloc(1, sizeof *s);
    if (!s) {
        close(fd);
        return -ENOMEM;
    }
    s->export = e;
    s->backend = s->old_fd = -1;
    s->inflight = SHM_NONE;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        s->rings[n].kick = s->rings[n].call = s->rings[n].err = -1;
    s->socket = (struct fd_watch){.fd = fd, .ready = on_readable, .owner = s};
    int rc = reactor_watch(e->reactor, &s->socket, EPOLLIN | EPOLLRDHUP);
    if (rc) {
        close(fd);
        free(s);
        return rc;
    }
    e->live = s;
    return 0;
}
