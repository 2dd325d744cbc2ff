/* vufe: a small vhost-user-blk front end for benchmarks and crash tests. Knows nothing of this project's code.
 *
 *   vufe SOCKET [name=value ...]         prints one JSON object
 *
 *   mode=read|write|mixed|verify  verify: stamped writes and reads, flush, everything read back        (read)
 *   bs=4096         bytes a request          qd=32          requests in flight, all queues together
 *   queues=1        num=256                  ring entries a queue
 *   seconds=2       warmup=0.2               seconds, not counted
 *   wait=poll|event poll: the front end spins on the used rings; event: it sleeps on eventfds           (poll)
 *   span=BYTES      area used, from 0        (the disk)    seq=0|1   sequential instead of random        (0)
 *   seed=1          indirect=1               inflight=1     log=0|1   dirty log on
 *   fill=0|1        write the span in 64 KiB pieces first (cache and folios like new)
 *   reconnect=0|1   when the back end dies: connect again, with the same in-flight table; waits up to 10 s
 *
 * verify writes {magic, block, version} into every 512 bytes, versions growing; at the end everything is read back and
 * each block must hold the version last completed (or, for one in flight at a reconnect, that or the one before).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>

enum { GET_FEATURES = 1, SET_FEATURES = 2, SET_OWNER = 3, SET_MEM_TABLE = 5, SET_LOG_BASE = 6, VRING_NUM = 8, VRING_ADDR = 9,
       VRING_BASE = 10, GET_BASE = 11, VRING_KICK = 12, VRING_CALL = 13, VRING_ERR = 14, GET_PROTOCOL = 15, SET_PROTOCOL = 16,
       QUEUE_NUM = 17, VRING_ENABLE = 18, GET_CONFIG = 24, GET_INFLIGHT = 31, SET_INFLIGHT = 32 };
enum { P_MQ = 0, P_LOG = 1, P_ACK = 3, P_CONFIG = 9, P_INFLIGHT = 12 };
enum { F_MQ = 12, F_LOG = 26, F_INDIRECT = 28, F_EVENT = 29, F_PROTOCOL = 30, F_V1 = 32 };
#define USER 0x100000000ULL /* our "virtual" address of guest address 0 */
#define QUEUES 16
#define DEPTH 1024
#define MAGIC 0x65667576u

static struct {
    const char *path, *mode;
    uint64_t bs, qd, queues, num, span, seed;
    double seconds, warmup;
    bool poll, seq, indirect, inflight, log, fill, reconnect;
} o = {.mode = "read", .bs = 4096, .qd = 32, .queues = 1, .num = 256, .seconds = 2, .warmup = 0.2, .poll = true,
       .indirect = true, .inflight = true, .seed = 1};

struct request {
    uint64_t started; /* ns */
    uint64_t block;
    uint32_t version;
    uint32_t type;
    bool busy;
};

struct queue {
    struct vring_desc *desc;
    uint16_t *avail;
    struct vring_used *used;
    uint64_t desc_at, avail_at, used_at; /* guest addresses */
    uint16_t avail_idx, seen, kicked;
    int kick, call, err;
    unsigned depth, in_flight;
    struct request req[DEPTH]; /* slot n uses head n (indirect) or 3n (direct) */
    uint16_t idle[DEPTH];
    unsigned idles;
} __attribute__((aligned(64)));

static struct queue qs[QUEUES];
static int sock = -1, memory_fd, inflight_fd = -1, log_fd = -1;
static uint8_t inflight_payload[24];
static uint8_t *mem;
static uint64_t mem_size, headers_at, tables_at, status_at, data_at, disk;
static uint64_t features, protocol;
static bool event_idx;
static uint32_t *versions; /* verify: completed version of a block */
static uint32_t *started;  /* verify: version last written */
static bool *loose;        /* verify: in flight at a reconnect */
static uint64_t kicks, calls, ios, errors, mismatches, reconnects, random_state;
static uint64_t histogram[40 * 16];

static void die(const char *what)
{
    fprintf(stderr, "vufe: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t rnd(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

/* ---- messages ---- */

static int sends(uint32_t request, uint32_t flags, const void *payload, uint32_t size, int fd)
{
    uint32_t header[3] = {request, 1 | flags, size};
    struct iovec iov[2] = {{header, 12}, {(void *)payload, size}};
    union { struct cmsghdr align; char buf[CMSG_SPACE(4)]; } c;
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    if (fd >= 0) {
        memset(&c, 0, sizeof c);
        m.msg_control = c.buf;
        m.msg_controllen = sizeof c.buf;
        CMSG_FIRSTHDR(&m)->cmsg_level = SOL_SOCKET;
        CMSG_FIRSTHDR(&m)->cmsg_type = SCM_RIGHTS;
        CMSG_FIRSTHDR(&m)->cmsg_len = CMSG_LEN(4);
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, 4);
    }
    return sendmsg(sock, &m, MSG_NOSIGNAL) == (ssize_t)(12 + size) ? 0 : -1;
}

static int receives(void *payload, uint32_t size, int *fd)
{
    uint32_t header[3];
    struct iovec iov = {header, 12};
    union { struct cmsghdr align; char buf[CMSG_SPACE(4)]; } c;
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = c.buf, .msg_controllen = sizeof c.buf};
    if (recvmsg(sock, &m, MSG_WAITALL | MSG_CMSG_CLOEXEC) != 12 || header[2] > size)
        return -1;
    if (fd && CMSG_FIRSTHDR(&m))
        memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&m)), 4);
    return header[2] == 0 || recv(sock, payload, header[2], MSG_WAITALL) == header[2] ? 0 : -1;
}

static uint64_t ask(uint32_t request)
{
    uint64_t v = 0;
    return sends(request, 0, NULL, 0, -1) || receives(&v, 8, NULL) ? 0 : v;
}

static int tell(uint32_t request, const void *payload, uint32_t size, int fd)
{
    uint64_t v = 0;
    if (!(protocol >> P_ACK & 1))
        return sends(request, 0, payload, size, fd);
    return sends(request, 8, payload, size, fd) || receives(&v, 8, NULL) || v ? -1 : 0;
}

static int tell_state(uint32_t request, uint32_t index, uint32_t num)
{
    uint32_t s[2] = {index, num};
    return tell(request, s, 8, -1);
}

static int connect_to(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s", o.path);
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(sock, (struct sockaddr *)&a, sizeof a) == 0)
        return 0;
    close(sock);
    return -1;
}

static int set_up(void)
{
    uint64_t want = 1ULL << VIRTIO_BLK_F_FLUSH | 1ULL << F_EVENT | 1ULL << F_PROTOCOL | 1ULL << F_V1 | 1ULL << F_MQ;
    if (o.indirect)
        want |= 1ULL << F_INDIRECT;
    features = ask(GET_FEATURES) & want;
    if (!(features >> F_V1 & 1))
        return -1;
    event_idx = features >> F_EVENT & 1;
    uint64_t p = 1ULL << P_MQ | 1ULL << P_LOG | 1ULL << P_ACK | 1ULL << P_CONFIG | (uint64_t)o.inflight << P_INFLIGHT;
    protocol = 0;
    p &= ask(GET_PROTOCOL);
    if (sends(SET_PROTOCOL, 0, &p, 8, -1))
        return -1;
    protocol = p;
    uint8_t config[12 + 60] = {0};
    uint32_t size = 60;
    memcpy(config + 4, &size, 4);
    if (tell(SET_OWNER, NULL, 0, -1) || sends(GET_CONFIG, 0, config, sizeof config, -1) ||
        receives(config, sizeof config, NULL))
        return -1;
    memcpy(&disk, config + 12, 8);
    disk *= 512;
    if (protocol >> P_INFLIGHT & 1) {
        uint16_t geometry[2] = {(uint16_t)o.queues, (uint16_t)o.num};
        if (inflight_fd < 0) {
            memcpy(inflight_payload + 16, geometry, 4);
            if (sends(GET_INFLIGHT, 0, inflight_payload, 24, -1) || receives(inflight_payload, 24, &inflight_fd))
                return -1;
        }
        if (tell(SET_INFLIGHT, inflight_payload, 24, inflight_fd))
            return -1;
    }
    struct { uint32_t count, padding; uint64_t guest, size, user, offset; } table = {1, 0, 0, mem_size, USER, 0};
    if (tell(SET_MEM_TABLE, &table, sizeof table, memory_fd))
        return -1;
    uint64_t f = features;
    if (o.log && protocol >> P_LOG & 1) {
        uint64_t size = mem_size / 4096 / 8 + 8, log[2] = {size, 0}, v;
        if (log_fd < 0 && ((log_fd = memfd_create("log", 0)) < 0 || ftruncate(log_fd, (off_t)size)))
            die("log");
        if (sends(SET_LOG_BASE, 0, log, 16, log_fd) || receives(&v, 8, NULL))
            return -1;
        f |= 1ULL << F_LOG;
    }
    if (tell(SET_FEATURES, &f, 8, -1))
        return -1;
    for (uint32_t n = 0; n < o.queues; n++) {
        struct queue *q = &qs[n];
        struct { uint32_t index, flags; uint64_t desc, used, avail, log; } addr =
            {n, o.log, USER + q->desc_at, USER + q->used_at, USER + q->avail_at, q->used_at};
        uint64_t index = n;
        if (tell_state(VRING_NUM, n, (uint32_t)o.num) ||
            tell_state(VRING_BASE, n, __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE)) ||
            tell(VRING_ADDR, &addr, sizeof addr, -1) || tell(VRING_ERR, &index, 8, q->err) ||
            tell(VRING_CALL, &index, 8, q->call) || tell(VRING_KICK, &index, 8, q->kick) || tell_state(VRING_ENABLE, n, 1))
            return -1;
    }
    return 0;
}

static void reconnect(void)
{
    uint64_t deadline = now() + 10000000000ULL;
    if (!o.reconnect) {
        errno = ECONNRESET;
        die("the back end went away");
    }
    reconnects++;
    if (loose)
        for (unsigned n = 0; n < o.queues; n++)
            for (unsigned r = 0; r < qs[n].depth; r++)
                if (qs[n].req[r].busy)
                    loose[qs[n].req[r].block] = true;
    for (;;) {
        close(sock);
        while (connect_to()) {
            if (now() > deadline)
                die("reconnect");
            usleep(2000);
        }
        if (set_up() == 0)
            break;
        if (now() > deadline)
            die("set up again");
        usleep(2000);
    }
    for (unsigned n = 0; n < o.queues; n++) { /* what we offered while nobody listened */
        uint64_t one = 1;
        if (write(qs[n].kick, &one, 8) < 0)
            die("kick");
    }
}

static bool peer_gone(void)
{
    char c;
    ssize_t n = recv(sock, &c, 1, MSG_DONTWAIT | MSG_PEEK);
    return n == 0 || (n < 0 && errno != EAGAIN);
}

/* ---- memory and rings ---- */

static void lay_out(void)
{
    uint64_t at = 0, slots = 0;
    for (unsigned n = 0; n < o.queues; n++) {
        struct queue *q = &qs[n];
        q->depth = (unsigned)(o.qd / o.queues + (n < o.qd % o.queues));
        unsigned most = o.indirect ? (unsigned)o.num : (unsigned)o.num / 3;
        if (q->depth > most)
            q->depth = most;
        slots += q->depth;
    }
    headers_at = 64ULL * 4096 * o.queues; /* rings first: 1024 entries take 16 + 2 + 8 KiB */
    tables_at = headers_at + slots * 16;
    status_at = tables_at + slots * 64;
    data_at = (status_at + slots * 64 + 4095) & ~4095ULL;
    mem_size = (data_at + slots * ((o.bs + 4095) & ~4095ULL) + 2097151) & ~2097151ULL;
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    if (memory_fd < 0 || ftruncate(memory_fd, (off_t)mem_size))
        die("memfd");
    mem = mmap(NULL, mem_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory_fd, 0);
    if (mem == MAP_FAILED)
        die("mmap");
    for (unsigned n = 0; n < o.queues; n++) {
        struct queue *q = &qs[n];
        at = 64ULL * 4096 * n;
        q->desc_at = at;
        q->avail_at = at + 16 * 4096;
        q->used_at = at + 32 * 4096;
        q->desc = (void *)(mem + q->desc_at);
        q->avail = (void *)(mem + q->avail_at);
        q->used = (void *)(mem + q->used_at);
        q->kick = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        q->call = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        q->err = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
        for (unsigned r = 0; r < q->depth; r++)
            q->idle[q->idles++] = (uint16_t)(q->depth - 1 - r);
        if (o.poll)
            q->avail[0] = VRING_AVAIL_F_NO_INTERRUPT;
    }
}

static uint64_t slot_of(struct queue *q, unsigned n)
{
    uint64_t slot = n;
    for (struct queue *p = qs; p < q; p++)
        slot += p->depth;
    return slot;
}

static uint8_t *data_of(struct queue *q, unsigned n)
{
    return mem + data_at + slot_of(q, n) * ((o.bs + 4095) & ~4095ULL);
}

static void stamp(uint8_t *data, uint64_t block, uint32_t version)
{
    for (uint64_t at = 0; at < o.bs; at += 512) {
        uint64_t sector = block * (o.bs / 512) + at / 512;
        memcpy(data + at, &(uint32_t){MAGIC}, 4);
        memcpy(data + at + 4, &version, 4);
        memcpy(data + at + 8, &sector, 8);
        memcpy(data + at + 504, &version, 4);
        memcpy(data + at + 508, &(uint32_t){MAGIC}, 4);
    }
}

static bool stamped(const uint8_t *data, uint64_t block, uint32_t version)
{
    for (uint64_t at = 0; at < o.bs; at += 512) {
        uint64_t sector = block * (o.bs / 512) + at / 512, s;
        uint32_t magic, v, w;
        memcpy(&magic, data + at, 4);
        memcpy(&v, data + at + 4, 4);
        memcpy(&s, data + at + 8, 8);
        memcpy(&w, data + at + 504, 4);
        if (version == 0 ? magic || v || s || w : magic != MAGIC || v != version || s != sector || w != version)
            return false;
    }
    return true;
}

/* Offers one request; the index is moved by offer_all. */
static void begin(struct queue *q, uint32_t type, uint64_t block, uint64_t t)
{
    unsigned n = q->idle[--q->idles];
    uint64_t slot = slot_of(q, n), data = data_at + slot * ((o.bs + 4095) & ~4095ULL);
    struct virtio_blk_outhdr *h = (void *)(mem + headers_at + slot * 16);
    struct request *r = &q->req[n];
    *r = (struct request){.started = t, .block = block, .type = type, .busy = true};
    h->type = type;
    h->ioprio = 0;
    h->sector = block * (o.bs / 512);
    mem[status_at + slot * 64] = 0xff;
    if (versions && type == VIRTIO_BLK_T_OUT) {
        r->version = ++started[block];
        stamp(mem + data, block, r->version);
    }
    uint16_t head = (uint16_t)(o.indirect ? n : 3 * n), next = o.indirect ? 0 : head;
    struct vring_desc *d = o.indirect ? (void *)(mem + tables_at + slot * 64) : &q->desc[head];
    unsigned c = 0;
    d[c] = (struct vring_desc){headers_at + slot * 16, 16, VRING_DESC_F_NEXT, (uint16_t)(next + c + 1)};
    c++;
    if (type != VIRTIO_BLK_T_FLUSH) {
        uint16_t write = type == VIRTIO_BLK_T_IN ? VRING_DESC_F_WRITE : 0;
        d[c] = (struct vring_desc){data, (uint32_t)o.bs, VRING_DESC_F_NEXT | write, (uint16_t)(next + c + 1)};
        c++;
    }
    d[c++] = (struct vring_desc){status_at + slot * 64, 1, VRING_DESC_F_WRITE, 0};
    if (o.indirect)
        q->desc[head] = (struct vring_desc){tables_at + slot * 64, c * 16, VRING_DESC_F_INDIRECT, 0};
    q->avail[2 + (q->avail_idx++ & (o.num - 1))] = head;
    q->in_flight++;
}

static void offer_all(struct queue *q)
{
    uint16_t old = q->kicked;
    if (q->avail_idx == old)
        return;
    __atomic_store_n(&q->avail[1], q->avail_idx, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    q->kicked = q->avail_idx;
    uint16_t event = __atomic_load_n((uint16_t *)&q->used->ring[o.num], __ATOMIC_RELAXED);
    uint16_t flags = __atomic_load_n(&q->used->flags, __ATOMIC_RELAXED);
    if (event_idx ? vring_need_event(event, q->avail_idx, old) : !(flags & VRING_USED_F_NO_NOTIFY)) {
        uint64_t one = 1;
        kicks++;
        if (write(q->kick, &one, 8) < 0 && errno != EAGAIN)
            die("kick");
    }
}

static void record(uint64_t ns)
{
    unsigned exponent = ns < 16 ? 0 : 60 - (unsigned)__builtin_clzll(ns); /* 16 steps an octave */
    unsigned bucket = ns < 16 ? (unsigned)ns : exponent * 16 + (unsigned)(ns >> (exponent - 1) & 15);
    histogram[bucket < 40 * 16 ? bucket : 40 * 16 - 1]++;
}

static double quantile(double part)
{
    uint64_t total = 0, sum = 0;
    for (unsigned n = 0; n < 40 * 16; n++)
        total += histogram[n];
    for (unsigned n = 0; n < 40 * 16; n++) {
        sum += histogram[n];
        if (total && (double)sum >= (double)total * part)
            return n < 16 ? n / 1e3 : (double)((16ULL + n % 16) << (n / 16 - 1)) / 1e3;
    }
    return 0;
}

/* Takes what was used. Returns how many. */
static unsigned take(struct queue *q, uint64_t t)
{
    uint16_t used = __atomic_load_n(&q->used->idx, __ATOMIC_ACQUIRE);
    unsigned count = 0;
    for (; q->seen != used; q->seen++, count++) {
        struct vring_used_elem e = q->used->ring[q->seen & (o.num - 1)];
        unsigned n = o.indirect ? e.id : e.id / 3;
        struct request *r = n < q->depth ? &q->req[n] : NULL;
        if (!r || !r->busy) {
            fprintf(stderr, "vufe: head %u used that was not offered\n", e.id);
            exit(1);
        }
        bool bad = mem[status_at + slot_of(q, n) * 64] != 0;
        errors += bad;
        if (versions && r->type == VIRTIO_BLK_T_OUT && !bad)
            versions[r->block] = r->version;
        if (versions && r->type == VIRTIO_BLK_T_IN && !bad) {
            const uint8_t *data = data_of(q, n);
            if (!stamped(data, r->block, versions[r->block]) && !(loose[r->block] && stamped(data, r->block, started[r->block])))
                mismatches++;
        }
        record(t - r->started);
        r->busy = false;
        q->idle[q->idles++] = (uint16_t)n;
        q->in_flight--;
        ios++;
    }
    return count;
}

/* Waits until something may have been used. */
static void wait_used(void)
{
    static unsigned turns;
    if (o.poll) {
        if (++turns % 4096 == 0 && peer_gone())
            reconnect();
        __builtin_ia32_pause();
        return;
    }
    struct pollfd p[QUEUES + 1];
    for (unsigned n = 0; n < o.queues; n++) {
        struct queue *q = &qs[n];
        __atomic_store_n(&q->avail[2 + o.num], q->seen, __ATOMIC_RELAXED); /* signal the next one */
        p[n] = (struct pollfd){.fd = q->call, .events = POLLIN};
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (unsigned n = 0; n < o.queues; n++)
        if (__atomic_load_n(&qs[n].used->idx, __ATOMIC_RELAXED) != qs[n].seen)
            return;
    p[o.queues] = (struct pollfd){.fd = sock, .events = POLLIN | POLLRDHUP};
    if (poll(p, (nfds_t)o.queues + 1, 20000) == 0) {
        errno = ETIMEDOUT;
        die("nothing was used for 20 s");
    }
    for (unsigned n = 0; n < o.queues; n++) {
        uint64_t v;
        if (p[n].revents && read(qs[n].call, &v, 8) == 8)
            calls++;
    }
    if (p[o.queues].revents && peer_gone())
        reconnect();
}

static uint64_t blocks, cursor;

static void run(double seconds, int kind) /* 0 reads, 1 writes, 2 both, 3 verify */
{
    uint64_t end = now() + (uint64_t)(seconds * 1e9), t = now();
    unsigned since = 0;
    while (t < end) {
        bool idle = true;
        t = now();
        for (unsigned n = 0; n < o.queues; n++) {
            struct queue *q = &qs[n];
            idle &= take(q, t) == 0;
            while (q->idles && (versions ? since < 4096 : true)) {
                uint64_t block = o.seq ? cursor++ % blocks : rnd() % blocks;
                bool write = kind == 1 || kind == 3 || (kind == 2 && rnd() % 2);
                if (versions) { /* two writes of one block may not be in flight together */
                    bool taken = false;
                    for (unsigned p = 0; p < o.queues && !taken; p++)
                        for (unsigned r = 0; r < qs[p].depth && !taken; r++)
                            taken = qs[p].req[r].busy && qs[p].req[r].block == block;
                    if (taken)
                        break;
                    loose[block] = false;
                    write = rnd() % 4 != 0;
                }
                begin(q, write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN, block, t);
            }
            offer_all(q);
        }
        if (idle)
            wait_used();
    }
    for (;;) {
        unsigned left = 0;
        t = now();
        for (unsigned n = 0; n < o.queues; n++) {
            take(&qs[n], t);
            left += qs[n].in_flight;
        }
        if (!left)
            return;
        wait_used();
    }
}

static void one_by_one(uint32_t type, uint64_t count)
{
    uint64_t next = 0;
    while (next < count || qs[0].in_flight) {
        take(&qs[0], now());
        while (qs[0].idles && next < count)
            begin(&qs[0], type, next++, now());
        offer_all(&qs[0]);
        if (qs[0].in_flight)
            wait_used();
    }
}

static bool flag(const char *v) { return strcmp(v, "0") != 0; }

static void options(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: vufe SOCKET [name=value ...]\n");
        exit(2);
    }
    o.path = argv[1];
    for (int n = 2; n < argc; n++) {
        char *v = strchr(argv[n], '=');
        if (!v)
            goto wrong;
        *v++ = 0;
        const char *k = argv[n];
        struct { const char *name; uint64_t *to; } numbers[] = {{"bs", &o.bs}, {"qd", &o.qd}, {"queues", &o.queues},
            {"num", &o.num}, {"span", &o.span}, {"seed", &o.seed}};
        struct { const char *name; bool *to; } flags[] = {{"seq", &o.seq}, {"indirect", &o.indirect}, {"log", &o.log},
            {"inflight", &o.inflight}, {"fill", &o.fill}, {"reconnect", &o.reconnect}};
        bool known = false;
        for (unsigned i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
            if (!strcmp(k, numbers[i].name)) {
                *numbers[i].to = strtoull(v, NULL, 0);
                known = true;
            }
        for (unsigned i = 0; i < sizeof flags / sizeof flags[0]; i++)
            if (!strcmp(k, flags[i].name)) {
                *flags[i].to = flag(v);
                known = true;
            }
        if (!strcmp(k, "mode"))
            o.mode = v;
        else if (!strcmp(k, "seconds"))
            o.seconds = atof(v);
        else if (!strcmp(k, "warmup"))
            o.warmup = atof(v);
        else if (!strcmp(k, "wait"))
            o.poll = strcmp(v, "event") != 0;
        else if (!known)
            goto wrong;
        continue;
    wrong:
        fprintf(stderr, "vufe: unknown option %s\n", argv[n]);
        exit(2);
    }
    if (o.queues < 1 || o.queues > QUEUES || o.num < 4 || o.num > 1024 || o.num & (o.num - 1) || o.qd < o.queues ||
        o.qd > DEPTH * o.queues || o.bs < 512 || o.bs % 512 || o.bs > 16 << 20) {
        fprintf(stderr, "vufe: an option is out of range\n");
        exit(2);
    }
    random_state = o.seed * 0x9E3779B97F4A7C15ULL | 1;
}

int main(int argc, char **argv)
{
    options(argc, argv);
    uint64_t bs = o.bs;
    if (o.fill && bs < 65536)
        o.bs = 65536; /* memory for the larger of the two */
    lay_out();
    if (connect_to())
        die(o.path);
    if (set_up()) {
        errno = EPROTO;
        die("set up");
    }
    uint64_t span = o.span && o.span < disk ? o.span : disk;
    if (o.fill) {
        one_by_one(VIRTIO_BLK_T_OUT, span / o.bs);
        one_by_one(VIRTIO_BLK_T_FLUSH, 1);
    }
    o.bs = bs;
    blocks = span / o.bs;
    if (blocks == 0) {
        fprintf(stderr, "vufe: the disk is smaller than one request\n");
        return 2;
    }
    bool verify = !strcmp(o.mode, "verify");
    if (verify) {
        versions = calloc(blocks, sizeof *versions);
        started = calloc(blocks, sizeof *started);
        loose = calloc(blocks, sizeof *loose);
        if (!versions || !started || !loose)
            die("memory");
    }
    int kind = verify ? 3 : !strcmp(o.mode, "write") ? 1 : !strcmp(o.mode, "mixed") ? 2 : 0;
    if (!verify)
        run(o.warmup, kind);
    kicks = calls = ios = errors = 0;
    memset(histogram, 0, sizeof histogram);
    uint64_t begun = now();
    run(o.seconds, kind);
    double took = (double)(now() - begun) / 1e9;
    uint64_t measured = ios;
    if (verify) {
        one_by_one(VIRTIO_BLK_T_FLUSH, 1);
        one_by_one(VIRTIO_BLK_T_IN, blocks);
    }
    for (unsigned n = 0; n < o.queues; n++) {
        uint32_t s[2] = {n, 0};
        if (sends(GET_BASE, 0, s, 8, -1) || receives(s, 8, NULL) || s[1] != qs[n].avail_idx) {
            fprintf(stderr, "vufe: queue %u stopped at %u, offered %u\n", n, s[1], qs[n].avail_idx);
            return 1;
        }
    }
    printf("{\"mode\": \"%s\", \"bs\": %llu, \"qd\": %llu, \"queues\": %llu, \"wait\": \"%s\", \"seconds\": %.3f, "
           "\"ios\": %llu, \"iops\": %.0f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"kicks_per_io\": %.4f, "
           "\"calls_per_io\": %.4f, \"errors\": %llu, \"mismatches\": %llu, \"reconnects\": %llu}\n",
           o.mode, (unsigned long long)o.bs, (unsigned long long)o.qd, (unsigned long long)o.queues,
           o.poll ? "poll" : "event", took, (unsigned long long)measured, (double)measured / took, quantile(0.5),
           quantile(0.99), (double)kicks / (double)(measured ? measured : 1), (double)calls / (double)(measured ? measured : 1),
           (unsigned long long)errors, (unsigned long long)mismatches, (unsigned long long)reconnects);
    return errors || mismatches;
}
