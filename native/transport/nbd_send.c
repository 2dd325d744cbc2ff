/* What leaves a connection: replies gather in `out` and leave together, about a batch in one send.
 *
 * Not all at once: a client that waits starts on the first batch while the rest is served, and a batch is what the
 * kernel puts into one buffer of a unix socket.
 *
 * Not one by one either: a client that sends a request for each reply it takes would get a system call, a buffer and a
 * ride of cache lines between two CPUs for each. As long as it has plenty of replies to read, a few more at the end of
 * the queue are of no use to it, so they wait for others - only while the reactor spins anyway: before it blocks, all
 * is sent. Unix sockets only: TCP cannot tell what the peer has read. */
#include <errno.h>

#include "transport/nbd.h"
#include "transport/nbd_socket.h"

#define IOV_MAX_SENT 128
#define SPARE 4 /* replies: what a client takes in the time we need to notice and to send */

bool nbd_batch_full(const struct nbd_conn *c)
{
    return c->out_bytes >= NBD_BATCH_BYTES || c->out_count >= NBD_BATCH_COUNT;
}

void nbd_conn_reply(struct nbd_conn *c, struct nbd_slot *s)
{
    if (c->state == NBD_CLOSED) {
        nbd_conn_drop_slot(c, s);
        return;
    }
    s->next = NULL;
    *c->out_last = s;
    c->out_last = &s->next;
    c->out_count++;
    c->out_bytes += s->reply_size;
}

static void consume(struct nbd_conn *c, size_t n)
{
    size_t text = c->text_end - c->text_at;
    if (text) {
        size_t taken = n < text ? n : text;
        c->text_at += taken;
        n -= taken;
        if (c->text_at == c->text_end)
            c->text_at = c->text_end = 0;
    }
    while (n) {
        struct nbd_slot *s = c->out;
        uint32_t left = s->reply_size - c->out_sent;
        if (n < left) {
            c->out_sent += n;
            c->out_bytes -= n;
            return;
        }
        n -= left;
        c->out_bytes -= left;
        c->out_sent = 0;
        c->out_count--;
        c->out = s->next;
        if (!c->out)
            c->out_last = &c->out;
        nbd_conn_drop_slot(c, s);
    }
}

static ssize_t send_some(struct nbd_conn *c)
{
    struct iovec iov[IOV_MAX_SENT];
    unsigned count = 0;
    if (c->text_end)
        iov[count++] = (struct iovec){.iov_base = c->text + c->text_at, .iov_len = c->text_end - c->text_at};
    uint32_t skip = c->out_sent;
    for (struct nbd_slot *s = c->out; s && count < IOV_MAX_SENT; s = s->next) {
        iov[count++] = (struct iovec){.iov_base = s->reply + skip, .iov_len = s->reply_size - skip};
        skip = 0;
    }
    return nbd_socket_send(c->watch.fd, iov, count);
}

int nbd_send(struct nbd_conn *c)
{
    bool sent = false;
    while (!c->send_blocked && (c->out || c->text_end)) {
        uint32_t replies = c->out_count;
        ssize_t n = send_some(c);
        if (n == -EAGAIN) {
            c->send_blocked = true;
        } else if (n < 0) {
            return n;
        } else {
            consume(c, n);
            sent = true;
            replies -= c->out_count;
            if (replies)
                c->last_batch = replies;
            size_t unread = c->unread && replies ? nbd_socket_unread(c->watch.fd) : 0;
            if (unread > c->unread)
                c->unread_each = (unread - c->unread) / replies;
        }
        c->unread = 0;
    }
    return sent;
}

/* The client has plenty of replies to read before those in `out`. A batch counts as unread until its last byte is read,
 * so one of them may be nearly over. */
static bool peer_busy(struct nbd_conn *c)
{
    c->unread = nbd_socket_unread(c->watch.fd);
    return c->unread_each && c->unread / c->unread_each >= c->last_batch + SPARE;
}

static void hold_over(struct nbd_conn *c)
{
    nbd_hold_end(c);
    nbd_conn_turn(c, false);
}

static bool hold_poll(struct poller *p)
{
    struct nbd_conn *c = p->owner;
    if (peer_busy(c))
        return false;
    hold_over(c);
    return true;
}

static bool hold_sleep(struct poller *p)
{
    hold_over(p->owner);
    return true;
}

bool nbd_hold(struct nbd_conn *c)
{
    if (!c->tells_unread || !c->out || c->text_end || c->send_blocked || nbd_batch_full(c) || !peer_busy(c))
        return false;
    if (!c->holding) {
        c->holding = true;
        c->hold = (struct poller){.poll = hold_poll, .owner = c, .sleep = hold_sleep};
        reactor_add_poller(c->reactor, &c->hold);
    }
    return true;
}

void nbd_hold_end(struct nbd_conn *c)
{
    if (c->holding)
        reactor_remove_poller(c->reactor, &c->hold);
    c->holding = false;
}
