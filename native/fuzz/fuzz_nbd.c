/* The NBD server's parsers and state machine from the first byte to the last, in memory: the input is a script of what
 * the client sends, in which pieces, and when it stops reading.
 *
 *   byte 0: bit 0 export read-only; bit 1 completions come late; bit 2 raw bytes instead of steps
 *   steps:  one byte op, then
 *           < 0x80  send that many of the following bytes
 *           0x80    a valid handshake with structured replies and base:allocation for the default export
 *           0x81    a request: 1 byte command, 1 flags, 2 offset / 256, 3 length (a WRITE's payload is made up)
 *           0x82    the client stops reading after N * 64 bytes    0x83    it reads again
 *           0x84    late completions come (N odd: other thread)    0x85    resize to N * 4 KiB
 *           0x86    the client closes                              0x87    the export is stopped, hard when N is odd,
 *                                                                          just after the client left when N & 2
 *           0x88    requests fail with errno N from now on, 0 = no more
 *           0x89    the handshake's deadline passes
 *           0x8a    N odd: the reactor spins from now on, even: it blocks; N * 256 bytes of what it sent are unread now
 *           others  nothing
 *
 * The reactor, the pool, the sockets and the image are played by this file, on one thread.
 *
 * link: transport/nbd_server.c transport/nbd_negotiate.c transport/nbd_command.c transport/nbd_conn.c
 * link: transport/nbd_send.c transport/nbd_buffer.c transport/export.c
 * define: NBD_SMALL_LIMITS
 * seeds: seeds_nbd.py */
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <sys/epoll.h>

#include "fake_image.h"
#include "engine/event.h"
#include "transport/nbd.h"
#include "transport/nbd_socket.h"

#define IMAGE_SIZE (1u << 20)
#define SOCKET_FD 1000
#define DEADLINE_FD 2000
#define TIMER_FD 2001 /* of the buffer cache */

struct reactor {
    struct post *first, **last;
};

static struct reactor the_reactor = {.last = &the_reactor.first};
static struct job *jobs, **jobs_last = &jobs;
static struct fd_watch *socket_watch, *timer_watch; /* timer: the handshake deadline */
static uint32_t interest;
static const uint8_t *input; /* what the client has sent and nobody received */
static size_t input_size;
static size_t may_send;      /* bytes the client will still read */
static size_t unread;        /* of what it was sent, bytes */
static struct poller *poller; /* of the connection */
static bool spinning;
static bool client_closed, socket_open;
static uint64_t replied;
static int stopped_events;
static bool elsewhere;       /* completions are on a thread of their own */

int reactors_start(unsigned n) { return 0; }
unsigned reactors_count(void) { return 1; }
struct reactor *reactor_pick(void) { return &the_reactor; }
void reactor_release(struct reactor *r) { }
bool reactor_here(struct reactor *r) { return !elsewhere; }
void event_post(int type, uint64_t source, int64_t value) { stopped_events += type == EVENT_EXPORT_STOPPED; }

int reactor_watch(struct reactor *r, struct fd_watch *w, uint32_t events)
{
    w->reactor = r;
    if (w->fd == SOCKET_FD) {
        socket_watch = w;
        interest = events;
    } else if (w->fd == DEADLINE_FD) {
        timer_watch = w;
    }
    return 0;
}

int reactor_rearm(struct fd_watch *w, uint32_t events)
{
    assert(w == socket_watch);
    interest = events;
    return 0;
}

void reactor_unwatch(struct fd_watch *w)
{
    if (w == socket_watch)
        socket_watch = NULL;
    if (w == timer_watch)
        timer_watch = NULL;
}

void reactor_post(struct reactor *r, struct post *p)
{
    if (atomic_exchange(&p->queued, true))
        return;
    p->next = NULL;
    *r->last = p;
    r->last = &p->next;
}

void reactor_add_poller(struct reactor *r, struct poller *p)
{
    assert(!poller);
    poller = p;
}

void reactor_remove_poller(struct reactor *r, struct poller *p)
{
    assert(poller == p);
    poller = NULL;
}

void pool_run(struct job *j)
{
    j->next = NULL;
    *jobs_last = j;
    jobs_last = &j->next;
}

ssize_t nbd_socket_receive(int fd, struct iovec *iov, unsigned count)
{
    size_t n = 0;
    assert(fd == SOCKET_FD && socket_open);
    for (unsigned i = 0; i < count && input_size; i++) {
        size_t part = iov[i].iov_len < input_size ? iov[i].iov_len : input_size;
        if (input)
            memcpy(iov[i].iov_base, input, part);
        else
            memset(iov[i].iov_base, 0x5a, part);
        input = input ? input + part : NULL;
        input_size -= part;
        n += part;
    }
    return n ? (ssize_t)n : client_closed ? 0 : -EAGAIN;
}

ssize_t nbd_socket_send(int fd, struct iovec *iov, unsigned count)
{
    size_t n = 0;
    assert(fd == SOCKET_FD && socket_open);
    if (client_closed)
        return -EPIPE;
    for (unsigned i = 0; i < count && n < may_send; i++) {
        size_t part = iov[i].iov_len < may_send - n ? iov[i].iov_len : may_send - n;
        for (size_t at = 0; at < part; at += 64) /* the sanitizer looks at what leaves */
            replied += ((uint8_t *)iov[i].iov_base)[at];
        n += part;
    }
    may_send -= n;
    unread += n;
    return n ? (ssize_t)n : -EAGAIN;
}

int nbd_socket_prepare(int fd) { return 0; }
bool nbd_socket_tells_unread(int fd) { return true; }
size_t nbd_socket_unread(int fd) { return unread; }
int nbd_timer_new(int ms) { return ms ? DEADLINE_FD : TIMER_FD; }
void nbd_timer_arm(int fd, int ms) { }
void nbd_timer_clear(int fd) { }

void nbd_socket_close(int fd)
{
    if (fd == SOCKET_FD)
        socket_open = false;
}

static void run_posts(void)
{
    while (the_reactor.first) {
        struct post *p = the_reactor.first;
        the_reactor.first = p->next;
        if (!the_reactor.first)
            the_reactor.last = &the_reactor.first;
        atomic_store(&p->queued, false);
        p->run(p);
    }
}

static void run_jobs(void)
{
    while (jobs) {
        struct job *j = jobs;
        jobs = j->next;
        if (!jobs)
            jobs_last = &jobs;
        j->run(j);
    }
}

/* Until nothing more happens by itself. */
static void turn(void)
{
    run_posts();
    for (int quiet = 0; socket_watch && !quiet;) {
        uint32_t ready = client_closed ? EPOLLHUP : 0;
        if ((input_size || client_closed) && interest & EPOLLIN)
            ready |= EPOLLIN;
        if (may_send && interest & EPOLLOUT)
            ready |= EPOLLOUT;
        if (ready)
            socket_watch->ready(socket_watch, ready);
        quiet = !ready;
        if (poller)
            poller->poll(poller);
        if (poller && quiet && !spinning) {
            bool worked = poller->sleep(poller);
            assert(worked && !poller); /* no reply is held when the reactor blocks */
            quiet = 0;
        }
        run_posts();
    }
}

static void client_sends(const uint8_t *data, size_t size)
{
    if (input_size)
        turn();
    if (!size || !socket_open || input_size) /* the server does not read: this client could not send either */
        return;
    input = data;
    input_size = size;
    turn();
}

static void handshake(void)
{
    static const uint8_t bytes[] =
        "\0\0\0\3" "IHAVEOPT\0\0\0\10\0\0\0\0"
        "IHAVEOPT\0\0\0\12\0\0\0\33" "\0\0\0\0\0\0\0\1\0\0\0\17" "base:allocation"
        "IHAVEOPT\0\0\0\7\0\0\0\6\0\0\0\0\0\0";
    client_sends(bytes, sizeof bytes - 1);
}

static size_t request(const uint8_t *data, size_t size)
{
    if (size < 7)
        return size;
    static uint8_t message[28] = {0x25, 0x60, 0x95, 0x13}; /* it may wait to be received */
    if (input_size)
        turn();
    if (input_size)
        return 7;
    uint32_t length = (uint32_t)(data[4] & 3) << 16 | data[5] << 8 | data[6];
    message[5] = data[1];
    message[7] = data[0];
    nbd_put64(message + 16, ((uint64_t)data[2] << 8 | data[3]) << 8);
    nbd_put32(message + 24, length);
    client_sends(message, sizeof message);
    if (data[0] == NBD_CMD_WRITE)
        client_sends(NULL, length);
    return 7;
}

static void step(struct image *image, struct export *export, uint8_t op, const uint8_t **data, size_t *size)
{
    bool has_argument = ((op > 0x81 && op <= 0x88) || op == 0x8a) && *size;
    uint8_t argument = has_argument ? **data : 0;
    size_t used = has_argument;
    if (op < 0x80) {
        used = op < *size ? op : *size;
        client_sends(*data, used);
    } else if (op == 0x80) {
        handshake();
    } else if (op == 0x81) {
        used = request(*data, *size);
    } else if (op == 0x82) {
        may_send = (size_t)argument * 64;
    } else if (op == 0x83) {
        may_send = SIZE_MAX / 2;
        turn();
    } else if (op == 0x84) {
        elsewhere = argument & 1;
        fake_image_release(image, true);
        run_jobs();
        elsewhere = false;
        turn();
    } else if (op == 0x85) {
        fake_image_change(image, (uint64_t)argument << 12, image->read_only);
    } else if (op == 0x86) {
        client_closed = true;
        turn();
    } else if (op == 0x87) {
        rbdn_export_stop(export, argument & 1);
        client_closed |= argument & 2;
        if (argument & 2 && socket_watch) /* the end of the client is noticed before the order to stop */
            socket_watch->ready(socket_watch, EPOLLIN | EPOLLHUP);
        turn();
    } else if (op == 0x89) {
        if (timer_watch)
            timer_watch->ready(timer_watch, EPOLLIN);
        turn();
    } else if (op == 0x8a) {
        spinning = argument & 1;
        unread = (size_t)argument * 256;
        turn();
    } else if (op == 0x88) {
        fake_image_fail(image, argument, argument);
    }
    *data += used;
    *size -= used;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static rbdn_nbd_server *server;
    static struct image *image;
    int err = 0;
    if (!server) {
        server = rbdn_nbd_server_new(4, &err);
        image = fake_image_new(IMAGE_SIZE, IMAGE_SIZE);
        memset(image->data, 0xa5, IMAGE_SIZE / 4);
    }
    if (size < 1)
        return 0;
    uint8_t mode = *data++;
    size--;
    image->size = IMAGE_SIZE;
    image->held = mode & 2;
    fake_image_fail(image, 0, 0);
    rbdn_nbd_config config = {.read_only = mode & 1, .description = "fuzz"};
    struct export *export = rbdn_nbd_export(server, 1, image, "", &config, &err);
    assert(export);
    stopped_events = 0;
    client_closed = spinning = false;
    unread = 0;
    socket_open = true;
    may_send = SIZE_MAX / 2;
    err = rbdn_nbd_serve(server, SOCKET_FD);
    assert(err == 0);
    turn();
    if (mode & 4)
        client_sends(data, size);
    while (!(mode & 4) && size) {
        uint8_t op = *data++;
        size--;
        step(image, export, op, &data, &size);
    }
    client_closed = true;
    spinning = false;
    turn();
    input_size = 0;
    fake_image_release(image, false);
    run_jobs();
    turn();
    rbdn_export_stop(export, true);
    turn();
    assert(!socket_open && !socket_watch && !timer_watch && stopped_events == 1);
    err = rbdn_export_free(export);
    assert(err == 0);
    return 0;
}
