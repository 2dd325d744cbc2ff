/* A load generator for NBD servers with as little client as there can be: a thread for each connection, DEPTH requests
 * in flight on each, replies taken in one receive, requests sent in one send. It measures the server, not itself; so
 * it checks replies (magic, error, cookie) but not data.
 *
 *   rawnbd SOCKET|HOST:PORT [read|write] [DEPTH] [BLOCK_SIZE] [SECONDS] [EXPORT] [CONNECTIONS] [simple]
 *
 * HOST is an IPv4 address. Prints one line of JSON: {"iops", "bytes_per_s", "p50_us", "p99_us", "requests",
 * "client_cpu_us"}; latency is from the send of a request to the receive that held its reply, cpu per request.
 * Make: cc -O2 -pthread -Inative -o rawnbd rawnbd.c */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "transport/nbd_wire.h"

#define DEPTH_MAX 1024
#define CONNECTIONS_MAX 64
#define BUCKETS 4096 /* of the latency histogram: 0.25 us each up to 512 us, then 16 us */

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static void fail(const char *what)
{
    fprintf(stderr, "rawnbd: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void send_all(int fd, const void *data, size_t size)
{
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0)
            fail("send");
        data = (const char *)data + n;
        size -= n;
    }
}

static void receive_all(int fd, void *data, size_t size)
{
    ssize_t n = size ? recv(fd, data, size, MSG_WAITALL) : 0;
    if (n != (ssize_t)size) {
        errno = n < 0 ? errno : ECONNRESET;
        fail("receive");
    }
}

static void option(int fd, uint32_t number, const void *data, uint32_t size)
{
    struct nbd_option_header head = {htobe64(NBD_OPTION_MAGIC), htobe32(number), htobe32(size)};
    send_all(fd, &head, sizeof head);
    send_all(fd, data, size);
}

/* Replies up to the acknowledgement; returns the export's size when one told it. */
static uint64_t answers(int fd)
{
    uint64_t size = 0;
    for (;;) {
        struct nbd_option_reply r;
        uint8_t data[8192];
        receive_all(fd, &r, sizeof r);
        uint32_t length = be32toh(r.length), kind = be32toh(r.reply);
        if (length > sizeof data || kind & 0x80000000u) {
            errno = EPROTO;
            fail("the server refused an option");
        }
        receive_all(fd, data, length);
        if (kind == NBD_REP_INFO && length >= 10 && nbd_get16(data) == NBD_INFO_EXPORT)
            size = (uint64_t)nbd_get32(data + 2) << 32 | nbd_get32(data + 6);
        if (kind == NBD_REP_ACK)
            return size;
    }
}

static uint64_t negotiate(int fd, const char *name, bool structured)
{
    uint8_t greeting[18], flags[4], go[4096 + 6] = {0};
    receive_all(fd, greeting, sizeof greeting);
    nbd_put32(flags, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    send_all(fd, flags, sizeof flags);
    if (structured) {
        option(fd, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        answers(fd);
    }
    size_t length = strlen(name) > 4096 ? 4096 : strlen(name);
    nbd_put32(go, length);
    memcpy(go + 4, name, length);
    option(fd, NBD_OPT_GO, go, length + 6);
    return answers(fd);
}

/* The byte stream of replies. */
struct stream {
    uint8_t *buffer;
    size_t size, begin, end;
    size_t skip; /* payload bytes that are still to come */
};

static struct {
    const char *address, *export;
    bool write, simple;
    unsigned depth;
    uint32_t block; /* bytes */
    double seconds;
} config;

struct connection {
    pthread_t thread;
    int fd;
    uint64_t blocks, seed;
    uint64_t sent_ns[DEPTH_MAX];
    unsigned free_list[DEPTH_MAX], free_count;
    uint64_t done, latency[BUCKETS];
    double took; /* seconds */
    uint8_t *out;
    struct stream in;
};

static unsigned bucket(uint64_t ns)
{
    uint64_t quarter_us = ns / 250;
    unsigned at = quarter_us < 2048 ? quarter_us : 2048 + (quarter_us - 2048) / 64;
    return at < BUCKETS ? at : BUCKETS - 1;
}

static double bucket_us(unsigned at)
{
    return at < 2048 ? at / 4.0 : 512 + (at - 2048) * 16.0;
}

static void send_requests(struct connection *b)
{
    size_t each = sizeof(struct nbd_request) + (config.write ? config.block : 0), n = 0;
    uint64_t now = now_ns();
    while (b->free_count) {
        unsigned slot = b->free_list[--b->free_count];
        b->seed = b->seed * 6364136223846793005u + 1442695040888963407u;
        struct nbd_request r = {.magic = htobe32(NBD_REQUEST_MAGIC),
                                .type = htobe16(config.write ? NBD_CMD_WRITE : NBD_CMD_READ), .cookie = slot,
                                .offset = htobe64((b->seed >> 33) % b->blocks * config.block),
                                .length = htobe32(config.block)};
        memcpy(b->out + n, &r, sizeof r); /* a write's payload is whatever lies behind */
        n += each;
        b->sent_ns[slot] = now;
    }
    send_all(b->fd, b->out, n);
}

static void complete(struct connection *b, uint64_t cookie, uint32_t error, uint64_t now)
{
    if (error || cookie >= config.depth) {
        errno = error ? (int)error : EPROTO;
        fail("a request failed");
    }
    b->latency[bucket(now - b->sent_ns[cookie])]++;
    b->free_list[b->free_count++] = cookie;
    b->done++;
}

/* Takes whole reply headers from the stream and counts payload away. */
static void parse(struct connection *b)
{
    struct stream *s = &b->in;
    uint64_t now = now_ns();
    for (;;) {
        size_t have = s->end - s->begin, part = have < s->skip ? have : s->skip;
        s->begin += part;
        s->skip -= part;
        have -= part;
        if (s->skip || have < sizeof(struct nbd_simple_reply))
            break;
        uint8_t *p = s->buffer + s->begin;
        if (nbd_get32(p) == NBD_SIMPLE_REPLY_MAGIC) {
            struct nbd_simple_reply r;
            memcpy(&r, p, sizeof r);
            complete(b, r.cookie, be32toh(r.error), now);
            s->begin += sizeof r;
            s->skip = config.write ? 0 : config.block;
        } else {
            struct nbd_chunk r;
            if (have < sizeof r)
                break;
            memcpy(&r, p, sizeof r);
            if (be32toh(r.magic) != NBD_STRUCTURED_REPLY_MAGIC) {
                errno = EPROTO;
                fail("a reply has the wrong magic");
            }
            if (be16toh(r.flags) & NBD_REPLY_FLAG_DONE)
                complete(b, r.cookie, be16toh(r.type) & 0x8000 ? EIO : 0, now);
            s->begin += sizeof r;
            s->skip = be32toh(r.length);
        }
    }
    memmove(s->buffer, s->buffer + s->begin, s->end - s->begin);
    s->end -= s->begin;
    s->begin = 0;
}

static void receive(struct connection *b)
{
    struct stream *s = &b->in;
    ssize_t n = recv(b->fd, s->buffer + s->end, s->size - s->end, 0);
    if (n <= 0) {
        errno = n ? errno : ECONNRESET;
        fail("receive");
    }
    s->end += n;
    parse(b);
}

static double percentile(const struct connection *b, double part)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((sum += b->latency[i]) >= b->done * part)
            return bucket_us(i);
    return bucket_us(BUCKETS - 1);
}

static double cpu_us(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e6 + u.ru_utime.tv_usec + u.ru_stime.tv_usec;
}

static int connect_to(const char *address)
{
    struct sockaddr_un local = {.sun_family = AF_UNIX};
    struct sockaddr_in remote = {.sin_family = AF_INET};
    const char *colon = strrchr(address, ':');
    bool inet = colon && !strchr(address, '/');
    int fd = socket(inet ? AF_INET : AF_UNIX, SOCK_STREAM, 0), buffer = 4 << 20, one = 1, rc;
    if (inet) {
        char host[64] = "";
        memcpy(host, address, (size_t)(colon - address) < sizeof host ? (size_t)(colon - address) : 0);
        remote.sin_port = htons(strtoul(colon + 1, NULL, 10));
        if (inet_pton(AF_INET, host, &remote.sin_addr) != 1) {
            errno = EINVAL;
            fail(address);
        }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        rc = connect(fd, (struct sockaddr *)&remote, sizeof remote);
    } else {
        strncpy(local.sun_path, address, sizeof local.sun_path - 1);
        setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &buffer, sizeof buffer);
        rc = connect(fd, (struct sockaddr *)&local, sizeof local);
    }
    if (fd < 0 || rc)
        fail(address);
    return fd;
}

static void prepare(struct connection *b, unsigned number)
{
    b->fd = connect_to(config.address);
    b->blocks = negotiate(b->fd, config.export, !config.simple) / config.block;
    b->in.size = 4u << 20;
    b->in.buffer = malloc(b->in.size);
    b->out = calloc(config.depth, sizeof(struct nbd_request) + config.block);
    if (!b->blocks || !b->out || !b->in.buffer) {
        errno = EINVAL;
        fail("the export is too small, or no memory");
    }
    for (unsigned i = 0; i < config.depth; i++)
        b->free_list[b->free_count++] = i;
    b->seed = number + 1;
}

static void *run(void *arg)
{
    struct connection *b = arg;
    uint64_t begin = now_ns(), end = begin + (uint64_t)(config.seconds * 1e9), now;
    while ((now = now_ns()) < end) {
        send_requests(b);
        receive(b);
    }
    b->took = (now - begin) / 1e9;
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        fprintf(stderr, "usage: rawnbd SOCKET|HOST:PORT [read|write] [DEPTH] [BLOCK_SIZE] [SECONDS] [EXPORT] "
                        "[CONNECTIONS] [simple]\n");
        return 2;
    }
    config.address = argv[1];
    config.write = argc > 2 && !strcmp(argv[2], "write");
    config.depth = argc > 3 ? strtoul(argv[3], NULL, 0) : 32;
    config.block = argc > 4 ? strtoul(argv[4], NULL, 0) : 4096;
    config.seconds = argc > 5 ? strtod(argv[5], NULL) : 2;
    config.export = argc > 6 ? argv[6] : "";
    unsigned count = argc > 7 ? strtoul(argv[7], NULL, 0) : 1;
    config.simple = argc > 8 && !strcmp(argv[8], "simple");
    static struct connection connections[CONNECTIONS_MAX], all;
    if (!config.depth || config.depth > DEPTH_MAX || !config.block || !count || count > CONNECTIONS_MAX) {
        errno = EINVAL;
        fail("depth, block size or connections");
    }
    for (unsigned i = 0; i < count; i++)
        prepare(&connections[i], i);
    double cpu = cpu_us(), iops = 0;
    for (unsigned i = 1; i < count; i++)
        if ((errno = pthread_create(&connections[i].thread, NULL, run, &connections[i])))
            fail("thread");
    run(&connections[0]);
    for (unsigned i = 0; i < count; i++) {
        struct connection *b = &connections[i];
        if (i)
            pthread_join(b->thread, NULL);
        iops += b->done / b->took;
        all.done += b->done;
        for (unsigned n = 0; n < BUCKETS; n++)
            all.latency[n] += b->latency[n];
    }
    cpu = cpu_us() - cpu;
    printf("{\"iops\": %.0f, \"bytes_per_s\": %.0f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"requests\": %llu, "
           "\"client_cpu_us\": %.2f}\n",
           iops, iops * (double)config.block, percentile(&all, 0.5), percentile(&all, 0.99),
           (unsigned long long)all.done, all.done ? cpu / all.done : 0);
    return 0;
}
