/* One connection, run to completion on its reactor: one large receive, every complete request in it submitted, one
 * send for each batch that is finished by then (nbd_send.c). Requests that finish later, here or on other threads,
 * gather in `out` and leave together with the next turn of the reactor.
 *
 * Back-pressure: a request that finds no slot or no room under NBD_HELD_MAX stays in the receive buffer and nothing is
 * received until replies have left. So a client that does not read costs NBD_HELD_MAX at most, and one that is idle
 * only this struct. All together hold nbd_memory_max; beyond that each may have NBD_SHARE, or one request. */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#include "transport/nbd.h"
#include "transport/nbd_socket.h"

_Atomic size_t nbd_memory_max = NBD_MEMORY_MAX;
static _Atomic size_t all_held; /* bytes of buffers, of all connections */

static struct nbd_buffer *take(struct nbd_conn *c, size_t size)
{
    struct nbd_buffer *b = nbd_buffer_get(c->cache, size);
    if (b) {
        c->held += b->size;
        atomic_fetch_add_explicit(&all_held, b->size, memory_order_relaxed);
    }
    return b;
}

static void release(struct nbd_conn *c, struct nbd_buffer *b)
{
    if (b->refs == 1) {
        c->held -= b->size;
        atomic_fetch_sub_explicit(&all_held, b->size, memory_order_relaxed);
    }
    nbd_buffer_put(c->cache, b);
}

static void slot_post(struct post *);

struct nbd_slot *nbd_conn_slot(struct nbd_conn *c)
{
    if (c->slots >= NBD_SLOTS_MAX || c->held >= NBD_HELD_MAX)
        return NULL;
    struct nbd_slot *s = nbd_slot_get(c->cache);
    if (!s)
        return NULL;
    c->slots++;
    s->conn = c;
    s->buffer = NULL;
    s->req.result = 0;
    s->post.run = slot_post;
    s->post.owner = s;
    atomic_init(&s->post.queued, false);
    return s;
}

int nbd_conn_buffer(struct nbd_conn *c, struct nbd_slot *s, size_t size)
{
    size_t more = nbd_buffer_capacity(size);
    if (c->held + more > NBD_HELD_MAX)
        return -EAGAIN;
    /* Waits for its own replies to leave, so it must have some on the way besides this one. */
    if (c->held + more > NBD_SHARE && c->slots > 1 &&
        atomic_load_explicit(&all_held, memory_order_relaxed) + more >
            atomic_load_explicit(&nbd_memory_max, memory_order_relaxed))
        return -EAGAIN;
    s->buffer = take(c, size);
    return s->buffer ? 0 : -ENOMEM;
}

void nbd_conn_drop_buffer(struct nbd_conn *c, struct nbd_slot *s)
{
    if (s->buffer)
        release(c, s->buffer);
    s->buffer = NULL;
}

void nbd_conn_drop_slot(struct nbd_conn *c, struct nbd_slot *s)
{
    nbd_conn_drop_buffer(c, s);
    nbd_slot_put(c->cache, s);
    c->slots--;
}

static void close_deadline(struct nbd_conn *c)
{
    if (c->deadline.fd < 0)
        return;
    reactor_unwatch(&c->deadline);
    nbd_socket_close(c->deadline.fd);
    c->deadline.fd = -1;
}

static void close_socket(struct nbd_conn *c)
{
    if (c->state == NBD_CLOSED)
        return;
    c->state = NBD_CLOSED;
    close_deadline(c);
    nbd_hold_end(c);
    if (c->watch.reactor)
        reactor_unwatch(&c->watch);
    nbd_socket_close(c->watch.fd);
    while (c->out) {
        struct nbd_slot *s = c->out;
        c->out = s->next;
        nbd_conn_drop_slot(c, s);
    }
    c->out_last = &c->out;
    while (c->status_waiting) {
        struct nbd_slot *s = c->status_waiting;
        c->status_waiting = s->next;
        c->in_flight--;
        nbd_conn_drop_slot(c, s);
    }
    if (c->payload)
        nbd_conn_drop_slot(c, c->payload);
    if (c->refused)
        nbd_conn_drop_slot(c, c->refused);
    if (c->in)
        release(c, c->in);
    c->payload = c->refused = NULL;
    c->in = NULL;
    c->in_at = c->in_end = 0;
    free(c->text);
    c->text = NULL;
    c->text_at = c->text_end = 0;
    if (c->image && c->in_flight)
        nbd_command_drop(c);
    nbd_server_socket_closed(c->server);
}

/* The end of every way in from the reactor: the last of them frees. */
static void leave(struct nbd_conn *c)
{
    if (c->state != NBD_CLOSED || c->in_flight || c->flush_queued)
        return;
    struct nbd_export *e = c->export;
    struct nbd_server *server = c->server;
    bool free_now = nbd_server_forget(c);
    reactor_release(c->reactor);
    if (e)
        export_client_left(&e->base);
    if (free_now)
        free(c);
    else
        c->dead = true;
    nbd_server_unref(server);
}

/* True when something was sent. Closes the socket when the peer is gone. */
static bool send_out(struct nbd_conn *c)
{
    int rc = nbd_send(c);
    if (rc < 0)
        close_socket(c);
    return rc > 0;
}

static enum nbd_want skip_input(struct nbd_conn *c)
{
    uint32_t n = nbd_unread(c) < c->skip ? nbd_unread(c) : c->skip;
    c->in_at += n;
    c->skip -= n;
    if (c->skip)
        return NBD_BYTES;
    if (c->refused)
        nbd_command_skipped(c);
    else if (!nbd_option_skipped(c))
        return NBD_VIOLATION;
    return NBD_AGAIN;
}

static enum nbd_want parse_one(struct nbd_conn *c)
{
    if (c->skip)
        return skip_input(c);
    if (c->payload)
        return NBD_BYTES;
    if (c->state == NBD_TRANSMISSION)
        return nbd_command(c);
    enum nbd_want want = nbd_negotiate(c);
    if (c->state == NBD_TRANSMISSION)
        close_deadline(c);
    return want;
}

/* Everything that is in the receive buffer. */
static enum nbd_want parse(struct nbd_conn *c)
{
    enum nbd_want want = NBD_AGAIN;
    while (want == NBD_AGAIN && c->state < NBD_DRAINING) {
        want = parse_one(c);
        /* Not when stalled: run() must see whether there is anything left that could end the stall. */
        if (want == NBD_AGAIN && nbd_batch_full(c))
            send_out(c);
    }
    return want;
}

static void drain(struct nbd_conn *c)
{
    c->state = NBD_DRAINING;
    if (c->payload)
        nbd_conn_drop_slot(c, c->payload);
    if (c->refused)
        nbd_conn_drop_slot(c, c->refused);
    c->payload = c->refused = NULL;
    c->in_at = c->in_end;
}

static void violation(struct nbd_conn *c)
{
    if (c->export)
        export_broken(&c->export->base, -1);
    send_out(c); /* what was answered before */
    close_socket(c);
}

/* The receive buffer goes back as soon as it is empty; the interest in events follows the state. */
static void settle(struct nbd_conn *c)
{
    if (c->in && c->in_at == c->in_end && c->in->refs == 1) {
        release(c, c->in);
        c->in = NULL;
        c->in_at = c->in_end = 0;
    }
    if (c->text && !c->text_end && c->state == NBD_TRANSMISSION) {
        free(c->text);
        c->text = NULL;
        c->text_size = 0;
    }
    uint32_t interest = (c->state < NBD_DRAINING && !c->stalled ? EPOLLIN : 0) | (c->send_blocked ? EPOLLOUT : 0);
    if (interest != c->interest) {
        c->interest = interest;
        if (reactor_rearm(&c->watch, interest))
            close_socket(c);
    }
}

static void run(struct nbd_conn *c, bool may_hold)
{
    bool again = true, held = false;
    while (again && c->state != NBD_CLOSED) {
        enum nbd_want want = parse(c);
        if (want == NBD_DRAIN)
            drain(c);
        if (want == NBD_VIOLATION) {
            violation(c);
            break;
        }
        c->stalled = want == NBD_STALL;
        if (c->stalled && !c->slots && !c->text_end) {
            violation(c); /* out of memory, and nobody is there who will give any back */
            break;
        }
        held = want == NBD_BYTES && may_hold && nbd_hold(c);
        again = !held && send_out(c) && c->stalled;
    }
    if (!held)
        nbd_hold_end(c);
    if (c->state == NBD_DRAINING && !c->in_flight && !c->out && !c->text_end)
        close_socket(c);
    if (c->state != NBD_CLOSED)
        settle(c);
}

void nbd_conn_turn(struct nbd_conn *c, bool may_hold)
{
    c->running = true;
    run(c, may_hold);
    c->running = false;
    leave(c);
}

/* Room to receive into. */
static bool make_room(struct nbd_conn *c)
{
    if (!c->in) {
        c->in = take(c, NBD_IN_SIZE);
        c->in_at = c->in_end = 0;
        return c->in != NULL;
    }
    if (c->in->refs == 1 && c->in_at == c->in_end)
        c->in_at = c->in_end = 0;
    if (c->in->size - c->in_end >= NBD_IN_ROOM)
        return true;
    uint32_t unread = nbd_unread(c);
    if (c->in->refs == 1) {
        memmove(nbd_buffer_data(c->in), nbd_input(c), unread);
    } else { /* writes in flight still point into it */
        struct nbd_buffer *b = take(c, NBD_IN_SIZE);
        if (!b)
            return false;
        memcpy(nbd_buffer_data(b), nbd_input(c), unread);
        release(c, c->in);
        c->in = b;
    }
    c->in_at = 0;
    c->in_end = unread;
    return true;
}

static void receive(struct nbd_conn *c)
{
    /* Behind a payload there is nothing to parse yet: more input only where there happens to be room. */
    bool room = c->payload ? c->in && c->in->size - c->in_end >= NBD_IN_ROOM : make_room(c);
    if (!room && !c->payload) {
        close_socket(c);
        return;
    }
    struct iovec iov[2];
    unsigned count = 0;
    size_t missing = 0;
    if (c->payload) {
        missing = c->payload->req.len - c->payload_have;
        uint8_t *rest = nbd_buffer_data(c->payload->buffer) + c->payload_have;
        iov[count++] = (struct iovec){.iov_base = rest, .iov_len = missing};
    }
    if (room)
        iov[count++] = (struct iovec){.iov_base = nbd_buffer_data(c->in) + c->in_end,
                                      .iov_len = c->in->size - c->in_end};
    ssize_t n = nbd_socket_receive(c->watch.fd, iov, count);
    if (n == -EAGAIN)
        return;
    if (n < 0) {
        close_socket(c);
        return;
    }
    if (n == 0) {
        drain(c);
        return;
    }
    size_t taken = (size_t)n < missing ? (size_t)n : missing;
    c->in_end += n - taken;
    if (c->payload) {
        c->payload_have += taken;
        if (c->payload_have == c->payload->req.len) {
            struct nbd_slot *s = c->payload;
            c->payload = NULL;
            nbd_command_submit(c, s);
        }
    }
}

static void ready(struct fd_watch *w, uint32_t events)
{
    struct nbd_conn *c = w->owner;
    c->running = true;
    if (events & (EPOLLHUP | EPOLLERR) && !(events & EPOLLIN)) {
        close_socket(c); /* nobody is left who could read a reply */
    } else {
        if (events & EPOLLOUT)
            c->send_blocked = false;
        if (events & EPOLLIN && c->state < NBD_DRAINING && !c->stalled)
            receive(c);
        run(c, true);
    }
    c->running = false;
    leave(c);
}

static void flush_run(struct post *p)
{
    struct nbd_conn *c = p->owner;
    c->flush_queued = false;
    nbd_conn_turn(c, true);
}

static void finish(struct nbd_conn *c, struct nbd_slot *s)
{
    c->in_flight--;
    if (s->command == NBD_CMD_BLOCK_STATUS) {
        struct nbd_slot *next = c->status_waiting;
        c->status_running = next != NULL;
        if (next) {
            c->status_waiting = next->next;
            pool_run(&next->job);
        }
    }
    if (c->state == NBD_CLOSED)
        nbd_conn_drop_slot(c, s);
    else
        nbd_command_finish(c, s);
    if (!c->running && !c->flush_queued) {
        c->flush_queued = true;
        reactor_post(c->reactor, &c->flush);
    }
}

static void slot_post(struct post *p)
{
    struct nbd_slot *s = p->owner;
    finish(s->conn, s);
}

void nbd_conn_completed(struct nbd_slot *s)
{
    struct reactor *r = s->conn->reactor;
    if (reactor_here(r))
        finish(s->conn, s);
    else
        reactor_post(r, &s->post); /* from here on the connection may be gone; the reactor never is */
}

static void deadline_passed(struct fd_watch *w, uint32_t events)
{
    struct nbd_conn *c = w->owner;
    close_socket(c);
    leave(c);
}

/* On the reactor at last. */
static int start(struct nbd_conn *c)
{
    c->cache = nbd_cache_of(c->reactor);
    int rc = c->cache ? nbd_greet(c) : -ENOMEM;
    if (rc)
        return rc;
    c->deadline.fd = nbd_timer_new(NBD_HANDSHAKE_MS);
    if (c->deadline.fd < 0)
        return c->deadline.fd;
    rc = reactor_watch(c->reactor, &c->deadline, EPOLLIN);
    if (rc) {
        nbd_socket_close(c->deadline.fd);
        c->deadline.fd = -1;
        return rc;
    }
    c->interest = EPOLLIN;
    rc = reactor_watch(c->reactor, &c->watch, EPOLLIN);
    if (rc)
        c->watch.reactor = NULL;
    return rc;
}

static void control_run(struct post *p)
{
    struct nbd_conn *c = p->owner;
    struct nbd_server *server = c->server;
    if (c->dead) {
        free(c);
        return;
    }
    pthread_mutex_lock(&server->lock);
    c->control_queued = false;
    bool kill = c->kill;
    pthread_mutex_unlock(&server->lock);
    if (c->state == NBD_CLOSED)
        return; /* waits for requests in flight, whose end frees it */
    c->running = true;
    if (kill || (!c->cache && start(c)))
        close_socket(c);
    run(c, false);
    c->running = false;
    leave(c);
}

void nbd_conn_kill(struct nbd_conn *c)
{
    c->kill = true;
    c->control_queued = true;
    reactor_post(c->reactor, &c->control);
}

int nbd_conn_new(struct nbd_server *server, int fd)
{
    int rc = nbd_socket_prepare(fd);
    struct nbd_conn *c = rc ? NULL : calloc(1, sizeof *c);
    if (!rc && !c)
        rc = -ENOMEM;
    if (!rc && !(c->reactor = reactor_pick()))
        rc = -ENODEV; /* the runtime was not started */
    if (!rc) {
        c->server = server;
        c->tells_unread = nbd_socket_tells_unread(fd);
        c->watch = (struct fd_watch){.fd = fd, .ready = ready, .owner = c};
        c->deadline = (struct fd_watch){.fd = -1, .ready = deadline_passed, .owner = c};
        c->flush = (struct post){.run = flush_run, .owner = c};
        c->control = (struct post){.run = control_run, .owner = c};
        c->out_last = &c->out;
        pthread_mutex_lock(&server->lock);
        rc = server->stopping ? -ESHUTDOWN : server->count >= server->max_connections ? -EMFILE : 0;
        if (!rc) {
            server->count++;
            server->sockets++;
            server->refs++;
            c->next = server->conns;
            c->link = &server->conns;
            if (c->next)
                c->next->link = &c->next;
            server->conns = c;
            c->control_queued = true;
            reactor_post(c->reactor, &c->control);
        }
        pthread_mutex_unlock(&server->lock);
        if (rc)
            reactor_release(c->reactor);
    }
    if (rc) {
        free(c);
        nbd_socket_close(fd);
    }
    return rc;
}
