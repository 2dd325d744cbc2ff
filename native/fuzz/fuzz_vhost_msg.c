/* A front end that sends what it likes: messages whole and in pieces, well-formed and not, with descriptors of all kinds,
 * in any order, and kicks in between. Input: records of one byte each and what follows it, see step().
 *
 * After every run the number of open files is what it was, and the session is gone.
 *
 * link: transport/vhost_*.c transport/vring.c transport/virtio_blk.c transport/guest_memory.c transport/export.c
 * link: store/guard.c
 * seeds: seeds_vhost_msg.py
 */
#define _GNU_SOURCE /* memfd_create */
#include "one_thread.h"
#include "vhost_image.h"

#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include "transport/vhost_session.h"

#define MEMORY 65536
#define USER 0x10000000ULL
#define RECORDS 200

static struct image *image;
static int memory_fd, small_fd, kick_fd, pipe_fd, socket_fd, timer_fd;
static int inflight_fd = -1; /* the last one we were given */
static uint8_t *memory;
static int peer;

struct input {
    const uint8_t *at, *end;
};

static uint64_t number(struct input *i, unsigned bytes)
{
    uint64_t v = 0;
    for (unsigned n = 0; n < bytes; n++)
        v |= (uint64_t)(i->at < i->end ? *i->at++ : 0) << 8 * n;
    return v;
}

static void once(void)
{
    int fds[2];
    image = fake_image_new(NULL, 1 << 20, 1 << 20);
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    small_fd = memfd_create("small", MFD_CLOEXEC);
    kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (ftruncate(memory_fd, MEMORY) || ftruncate(small_fd, 100) || pipe(fds))
        abort();
    pipe_fd = fds[0];
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    if (memory == MAP_FAILED || socketpair(AF_UNIX, SOCK_STREAM, 0, fds))
        abort();
    socket_fd = fds[0];
}

static void transmit(const void *bytes, size_t size, const int *fds, unsigned count)
{
    struct iovec iov = {(void *)bytes, size};
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(16 * sizeof(int))];
    } c;
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    if (count) {
        memset(&c, 0, sizeof c);
        m.msg_control = c.buf;
        m.msg_controllen = CMSG_SPACE(count * sizeof(int));
        CMSG_FIRSTHDR(&m)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&m)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&m)->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), fds, count * sizeof(int));
    }
    if (size && sendmsg(peer, &m, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        return; /* the session has closed: its right */
}

static int some_fd(unsigned which)
{
    int fds[] = {memory_fd, kick_fd, small_fd, pipe_fd, socket_fd, timer_fd, inflight_fd >= 0 ? inflight_fd : memory_fd, 0};
    return fds[which % 8];
}

static void whole(uint32_t request, const void *payload, uint32_t size, int fd)
{
    uint8_t bytes[12 + 512];
    uint32_t header[3] = {request, 9, size};
    memcpy(bytes, header, 12);
    if (size)
        memcpy(bytes + 12, payload, size);
    transmit(bytes, 12 + size, &fd, fd >= 0);
}

/* A message as a good front end sends it, for queue n; some of its fields may be bent a little. */
static void proper(unsigned what, unsigned n, uint64_t bend)
{
    uint32_t state[2] = {n, 0};
    uint64_t index = n, v;
    uint64_t ring = USER + n * 8192;
    switch (what % 16) {
    case 0:
        v = 0x174007E46ULL ^ bend;
        whole(VHOST_SET_FEATURES, &v, 8, -1);
        break;
    case 1:
        v = VHOST_PROTOCOL_FEATURES ^ bend;
        whole(VHOST_SET_PROTOCOL_FEATURES, &v, 8, -1);
        break;
    case 2: {
        uint64_t table[5] = {1, 0, MEMORY, USER, bend};
        whole(VHOST_SET_MEM_TABLE, table, sizeof table, memory_fd);
        break;
    }
    case 3: {
        uint64_t one[5] = {0, (uint64_t)n << 20, MEMORY / 2, USER + ((uint64_t)n << 20), bend * 4096};
        whole(n & 1 ? VHOST_REM_MEM_REG : VHOST_ADD_MEM_REG, one, sizeof one, n & 1 ? -1 : memory_fd);
        break;
    }
    case 4:
        state[1] = 8u << bend % 4;
        whole(VHOST_SET_VRING_NUM, state, 8, -1);
        break;
    case 5:
        state[1] = (uint32_t)bend;
        whole(VHOST_SET_VRING_BASE, state, 8, -1);
        break;
    case 6: {
        uint64_t addr[5] = {n | (bend & 1) << 32, ring, ring + 4096 - (bend & ~3ULL), ring + 2048, ring - USER + 4096};
        whole(VHOST_SET_VRING_ADDR, addr, sizeof addr, -1);
        break;
    }
    case 7:
        whole(VHOST_SET_VRING_KICK, &index, 8, kick_fd);
        break;
    case 8:
        whole(bend & 1 ? VHOST_SET_VRING_CALL : VHOST_SET_VRING_ERR, &index, 8, kick_fd);
        break;
    case 9:
        state[1] = bend & 1;
        whole(VHOST_SET_VRING_ENABLE, state, 8, -1);
        break;
    case 10:
        whole(VHOST_GET_VRING_BASE, state, 8, -1);
        break;
    case 11: {
        struct { uint64_t size, offset; uint16_t queues, num; uint32_t pad; } t = {MEMORY / 2, bend * 64, 2, 64, 0};
        bool set = n & 1;
        whole(set ? VHOST_SET_INFLIGHT_FD : VHOST_GET_INFLIGHT_FD, &t, sizeof t, set ? some_fd(n & 2 ? 0 : 6) : -1);
        break;
    }
    case 12: {
        uint64_t log[2] = {4096, bend};
        whole(VHOST_SET_LOG_BASE, log, sizeof log, memory_fd);
        break;
    }
    case 13: {
        uint32_t config[4] = {(uint32_t)bend, 4, 0, 0};
        whole(n & 1 ? VHOST_SET_CONFIG : VHOST_GET_CONFIG, config, sizeof config, -1);
        break;
    }
    case 14:
        whole(VHOST_SET_BACKEND_REQ_FD, NULL, 0, socket_fd);
        break;
    case 15: {
        static const uint32_t plain[] = {VHOST_GET_FEATURES, VHOST_SET_OWNER, VHOST_RESET_OWNER, VHOST_GET_PROTOCOL_FEATURES,
                                         VHOST_GET_QUEUE_NUM, VHOST_RESET_DEVICE, VHOST_GET_MAX_MEM_SLOTS};
        whole(plain[bend % 7], NULL, 0, -1);
        break;
    }
    }
}

/* Everything up to two running rings. */
static void start_all(unsigned how)
{
    static const uint8_t order[] = {1, 0, 2, 4, 5, 6, 7, 8, 9};
    if (how & 1) {
        proper(1, 0, 0);
        proper(11, 3, 512 / 64); /* a table in the guest's own memory */
    }
    for (unsigned n = 0; n < 2; n++)
        for (unsigned m = n ? 3 : 0; m < sizeof order; m++)
            proper(order[m], n, order[m] == 9 ? 1 : 0);
    if (how & 2) {
        proper(12, 0, 0);
        uint64_t v = 0x174007E46ULL;
        whole(VHOST_SET_FEATURES, &v, 8, -1);
    }
}

static void read_replies(void)
{
    uint8_t bytes[4096];
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(4 * sizeof(int))];
    } c;
    for (;;) {
        struct iovec iov = {bytes, sizeof bytes};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = c.buf, .msg_controllen = sizeof c.buf};
        if (recvmsg(peer, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0)
            return;
        struct cmsghdr *h = CMSG_FIRSTHDR(&m);
        if (!h)
            continue;
        if (inflight_fd >= 0)
            close(inflight_fd);
        memcpy(&inflight_fd, CMSG_DATA(h), sizeof inflight_fd);
    }
}

static void step(struct input *in, struct vhost_export *e)
{
    uint8_t what = (uint8_t)number(in, 1), bytes[300];
    int fds[16];
    switch (what % 8) {
    case 0: { /* a header of any kind and a payload of the right or another size */
        uint32_t header[3] = {(uint32_t)number(in, 1) % 48, what & 8 ? 9 : 1, (uint32_t)number(in, 2)};
        unsigned count = (unsigned)number(in, 1) % 16, size = 12 + header[2] % 280;
        for (unsigned n = 0; n < count; n++)
            fds[n] = some_fd((unsigned)number(in, 1));
        memcpy(bytes, header, 12);
        for (unsigned n = 12; n < size; n++)
            bytes[n] = (uint8_t)number(in, 1);
        transmit(bytes, size, fds, count);
        break;
    }
    case 1: { /* any bytes, perhaps a part of a message */
        unsigned size = (unsigned)number(in, 1) % 64;
        for (unsigned n = 0; n < size; n++)
            bytes[n] = (uint8_t)number(in, 1);
        fds[0] = some_fd(what / 8);
        transmit(bytes, size, fds, what & 128 ? 1 : 0);
        break;
    }
    case 2: case 3: {
        unsigned n = (unsigned)number(in, 1), bent = what & 128;
        proper(what / 8, n % 4, bent ? number(in, 8) : n / 4);
        break;
    }
    case 4:
        start_all(what / 8);
        break;
    case 5: { /* the guest writes: rings, headers; sizes that reach the interesting places */
        unsigned at = (unsigned)number(in, 2);
        for (unsigned n = (unsigned)number(in, 1) % 40; n > 0; n--)
            memory[at++ % MEMORY] = (uint8_t)number(in, 1);
        uint64_t one = 1;
        if (write(kick_fd, &one, sizeof one) < 0)
            return;
        break;
    }
    case 6:
        if (what & 8)
            run_job(what / 16);
        else if (what & 16)
            sleep_all();
        else
            poll_all();
        break;
    case 7:
        if (what & 8 && e->live)
            vhost_session_deadline(e->live);
        else
            fake_resize(image, 1 << 20);
        run_posts();
        break;
    }
    run_files(3);
    read_replies();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    if (!image)
        once();
    memset(memory, 0, MEMORY);
    image->fence = 0;
    int before = dup(0);
    close(before);
    struct vhost_export e = {
        .device = {.image = image}, .drain_ms = 1000, .fenced_ms = 1000, .reactor = &the_reactor, .writeback = true,
        .settings = {.num_queues = 4, .queue_size_max = 256, .block_size = 512, .write_cache = true},
        .listener = {.fd = -1}, .timer = {.fd = timer_fd},
    };
    e.base = (struct export){.image = image, .state = EXPORT_SERVING};
    pthread_mutex_init(&e.base.lock, NULL);
    image->async = number(&in, 1) & 1;
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair))
        abort();
    peer = pair[0];
    if (!export_client_came(&e.base) || vhost_session_new(&e, pair[1]))
        abort();
    for (unsigned n = 0; n < RECORDS && in.at < in.end && e.live; n++)
        step(&in, &e);
    close(peer);
    if (e.live)
        run_files(3);
    if (e.live) /* waits for a ring to drain, so it cannot have seen the end yet */
        vhost_session_close(e.live, false);
    run_posts();
    run_jobs();
    if (e.live || e.draining || e.base.clients || the_reactor.watches || the_reactor.pollers)
        abort();
    if (inflight_fd >= 0)
        close(inflight_fd);
    inflight_fd = -1;
    int after = dup(0);
    close(after);
    if (after != before)
        abort(); /* a descriptor was left open, or closed twice */
    uint64_t count;
    if (read(kick_fd, &count, sizeof count) < 0)
        count = 0;
    pthread_mutex_destroy(&e.base.lock);
    return 0;
}
