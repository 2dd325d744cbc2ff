/* A load generator for one image on Ceph, as a client of the cluster itself: librbd, our engine, or librados doing the
 * same object I/O, which is the floor of both. One thread submits the first DEPTH requests; a completion submits the
 * next, as an export does.
 *
 *   imgload BACKEND CONF POOL IMAGE|PREFIX SIZE MODE DEPTH BLOCK SECONDS
 *
 * BACKEND: librbd (IMAGE by name, cache off), ours or rados (PREFIX of the data objects, order 22). SIZE: bytes. MODE: read,
 * write (at random offsets), seqread, seqwrite. Every object must exist. Prints one line of JSON: {"iops", "p50_us",
 * "p99_us", "ios", "cpu_us"}; cpu: of this process per request, the cluster client's own threads included.
 * Built by tests/bench/loads.py with the sources of striping, store and engine. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "engine/request.h"
#include "engine/threads.h"
#include "ffi/api_engine.h"
#include "ffi/api_rados_data.h"
#include "store/store_rados_lib.h"

#define DEPTH_MAX 1024
#define ORDER 22
#define BUCKETS 640 /* of the latency histogram: 16 to each power of two of ns */

typedef void (*rbd_callback_t)(void *completion, void *arg);

static struct {
    int (*open)(rados_ioctx_t, const char *name, void **image, const char *snap);
    int (*close)(void *image);
    int (*aio_create_completion)(void *arg, rbd_callback_t, void **completion);
    int (*aio_read)(void *image, uint64_t off, size_t len, char *buf, void *completion);
    int (*aio_write)(void *image, uint64_t off, size_t len, const char *buf, void *completion);
    ssize_t (*aio_get_return_value)(void *completion);
    void (*aio_release)(void *completion);
} rbd;

struct slot {
    struct req req;
    struct iovec iov;
    char *buf;
    uint64_t seed, begun_ns;
};

static struct {
    void (*submit)(struct slot *, uint64_t off);
    bool write, sequential;
    uint32_t block;
    uint64_t blocks;
    _Atomic uint64_t next; /* sequential: block */
    _Atomic bool stop;
    _Atomic uint64_t done, histogram[BUCKETS];
    _Atomic unsigned in_flight;
    const char *prefix;
    rados_ioctx_t ioctx;
    void *librbd_image;
    rbdn_image *image;
} b;

static void fail(const char *what, int code)
{
    fprintf(stderr, "imgload: %s: %s\n", what, strerror(abs(code)));
    exit(1);
}

static unsigned bucket(uint64_t ns)
{
    unsigned power = 63 - __builtin_clzll(ns | 16), at = (power - 4) * 16 + (unsigned)(ns >> (power - 4) & 15);
    return at < BUCKETS ? at : BUCKETS - 1;
}

static double bucket_us(unsigned at)
{
    return (double)((16ULL + at % 16) << at / 16) / 1000;
}

/* Never from within itself: a cluster answers on other threads. */
static void run(struct slot *s)
{
    s->seed = s->seed * 6364136223846793005u + 1442695040888963407u;
    uint64_t at = b.sequential ? atomic_fetch_add(&b.next, 1) : s->seed >> 33;
    s->begun_ns = now_ns();
    b.submit(s, at % b.blocks * b.block);
}

static void finished(struct slot *s, int64_t result)
{
    if (result < 0)
        fail("a request failed", (int)result);
    b.histogram[bucket(now_ns() - s->begun_ns)]++;
    b.done++;
    if (b.stop)
        b.in_flight--;
    else
        run(s);
}

/* --- librbd */

static void librbd_done(void *completion, void *arg)
{
    int64_t result = rbd.aio_get_return_value(completion);
    rbd.aio_release(completion);
    finished(arg, result);
}

static void librbd_submit(struct slot *s, uint64_t off)
{
    void *c;
    int rc = rbd.aio_create_completion(s, librbd_done, &c);
    if (rc == 0)
        rc = b.write ? rbd.aio_write(b.librbd_image, off, b.block, s->buf, c)
                     : rbd.aio_read(b.librbd_image, off, b.block, s->buf, c);
    if (rc < 0)
        fail("librbd", rc);
}

static void librbd_open(const char *name)
{
    void *library = dlopen("librbd.so.1", RTLD_NOW);
    if (!library)
        fail("librbd.so.1", ENOENT);
#define LOOK(f) \
    if (!(*(void **)&rbd.f = dlsym(library, "rbd_" #f))) \
    fail("rbd_" #f, ENOSYS)
    LOOK(open);
    LOOK(close);
    LOOK(aio_create_completion);
    LOOK(aio_read);
    LOOK(aio_write);
    LOOK(aio_get_return_value);
    LOOK(aio_release);
    int rc = rbd.open(b.ioctx, name, &b.librbd_image, NULL);
    if (rc < 0)
        fail(name, rc);
}

/* --- librados */

static void rados_done(rados_completion_t completion, void *arg)
{
    int result = RADOS(aio_get_return_value)(completion);
    RADOS(aio_release)(completion);
    finished(arg, result);
}

static void rados_submit(struct slot *s, uint64_t off)
{
    char oid[128];
    snprintf(oid, sizeof oid, "%s.%016llx", b.prefix, (unsigned long long)(off >> ORDER));
    uint64_t at = off & ((1ULL << ORDER) - 1);
    rados_completion_t c;
    int rc = RADOS(aio_create_completion2)(s, rados_done, &c);
    if (rc == 0)
        rc = b.write ? RADOS(aio_write)(b.ioctx, oid, c, s->buf, b.block, at)
                     : RADOS(aio_read)(b.ioctx, oid, c, s->buf, b.block, at);
    if (rc < 0)
        fail("librados", rc);
}

/* --- ours */

static void our_done(struct req *r)
{
    finished(r->owner, r->result);
}

static void our_submit(struct slot *s, uint64_t off)
{
    s->iov = (struct iovec){s->buf, b.block};
    s->req = (struct req){.type = b.write ? REQ_WRITE : REQ_READ, .off = off, .len = b.block, .iov = &s->iov, .iovcnt = 1,
                          .done = our_done, .owner = s};
    image_submit(b.image, &s->req);
}

static void our_open(rados_t cluster, int64_t pool, const char *prefix, uint64_t size)
{
    int err = 0;
    rbdn_store *store = rbdn_rados_open(cluster, pool, "", prefix, ORDER, &err);
    if (!store)
        fail("our store", err);
    rbdn_view_config c = {.size = size, .order = ORDER, .stripe_unit = 1u << ORDER, .stripe_count = 1, .store = store,
                          .snap_id = 0xfffffffffffffffeULL};
    rbdn_view *v = rbdn_view_new(&c, &err);
    b.image = v ? rbdn_image_new(1, v, &err) : NULL;
    if (!b.image)
        fail("our image", err);
    rbdn_view_put(v);
}

/* --- */

static double percentile(double part)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < BUCKETS; i++)
        if ((sum += b.histogram[i]) >= (double)b.done * part)
            return bucket_us(i);
    return bucket_us(BUCKETS - 1);
}

static double cpu_us(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e6 + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

static void connect_to(const char *conf, const char *pool, rados_t *cluster, int64_t *pool_id)
{
    int rc = rados_lib_load();
    if (rc == 0)
        rc = RADOS(create2)(cluster, "ceph", "client.admin", 0);
    if (rc == 0)
        rc = RADOS(conf_read_file)(*cluster, conf);
    if (rc == 0)
        rc = RADOS(conf_set)(*cluster, "rbd_cache", "false");
    if (rc == 0)
        rc = RADOS(connect)(*cluster);
    if (rc < 0)
        fail(conf, rc);
    *pool_id = RADOS(pool_lookup)(*cluster, pool);
    if (*pool_id < 0 || (rc = RADOS(ioctx_create2)(*cluster, *pool_id, &b.ioctx)) < 0)
        fail(pool, *pool_id < 0 ? (int)*pool_id : rc);
}

int main(int argc, char **argv)
{
    if (argc != 10) {
        fprintf(stderr, "usage: imgload librbd|ours|rados CONF POOL IMAGE|PREFIX SIZE MODE DEPTH BLOCK SECONDS\n");
        return 2;
    }
    const char *backend = argv[1], *mode = argv[6];
    uint64_t size = strtoull(argv[5], NULL, 0);
    unsigned depth = strtoul(argv[7], NULL, 0);
    b.block = strtoul(argv[8], NULL, 0);
    double seconds = strtod(argv[9], NULL);
    b.sequential = !strncmp(mode, "seq", 3);
    b.write = strstr(mode, "write") != NULL;
    b.blocks = b.block ? size / b.block : 0;
    b.prefix = argv[4];
    if (!b.blocks || depth == 0 || depth > DEPTH_MAX)
        fail("size, block or depth", EINVAL);
    rados_t cluster;
    int64_t pool;
    connect_to(argv[2], argv[3], &cluster, &pool);
    if (!strcmp(backend, "librbd")) {
        librbd_open(argv[4]);
        b.submit = librbd_submit;
    } else if (!strcmp(backend, "ours")) {
        our_open(cluster, pool, argv[4], size);
        b.submit = our_submit;
    } else {
        b.submit = rados_submit;
    }
    struct slot *slots = calloc(depth, sizeof *slots);
    double cpu = cpu_us();
    uint64_t begin = now_ns();
    b.in_flight = depth;
    for (unsigned i = 0; i < depth; i++) {
        slots[i].buf = malloc(b.block);
        memset(slots[i].buf, (int)i + 1, b.block);
        slots[i].seed = i * 7919 + begin;
        run(&slots[i]);
    }
    usleep((useconds_t)(seconds * 1e6));
    uint64_t done = b.done;
    double took = (double)(now_ns() - begin) / 1e9;
    cpu = cpu_us() - cpu;
    b.stop = true;
    while (b.in_flight)
        usleep(1000);
    printf("{\"iops\": %.0f, \"p50_us\": %.2f, \"p99_us\": %.2f, \"ios\": %llu, \"cpu_us\": %.3f}\n", (double)done / took,
           percentile(0.5), percentile(0.99), (unsigned long long)done, done ? cpu / (double)done : 0);
    if (b.librbd_image)
        rbd.close(b.librbd_image);
    if (b.image)
        rbdn_image_close(b.image);
    return 0; /* the cluster's handle goes with the process: shutting it down takes longer than the run */
}
