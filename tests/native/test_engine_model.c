/* The engine against a model that is an array of bytes: random requests on clones up to three deep, striped layouts, child
 * snapshots, resizes; every store operation may complete inline, on the pool or on the store's own thread. */
#undef NDEBUG
#include "memory_store.h"

#include <stdio.h>

#include "engine/request.h"
#include "ffi/api_engine.h"

#define MAX_BYTES (1u << 20) /* of an image */
#define SNAPS 4

static uint64_t seed;

static uint64_t rnd(uint64_t below)
{
    return memory_random(&seed) / 7 % below;
}

struct level { /* one image of the chain */
    struct memory_store *store;
    rbdn_view_config config;
    rbdn_view *view;
    rbdn_image *image;
    uint8_t *model;
    struct level *parent;
    rbdn_view *parent_view;
    uint64_t snaps[SNAPS]; /* newest first */
    struct kept {
        uint64_t id, size, overlap;
        uint8_t *model;
    } kept[SNAPS];
    unsigned snap_count;
};

static uint64_t random_size(void)
{
    return rnd(3) ? 1 + rnd(MAX_BYTES) : (1 + rnd(MAX_BYTES >> 14)) << 14;
}

static void publish(struct level *l)
{
    int err;
    l->config.snaps = l->snaps;
    l->config.snap_count = l->snap_count;
    rbdn_view *v = rbdn_view_new(&l->config, &err);
    assert(v);
    if (l->image) {
        assert(rbdn_image_publish(l->image, v) == 0);
        assert(rbdn_image_settle(l->image, 10000) == 0);
        assert(rbdn_view_refs(l->view) == 1); /* what is replaced and settled is ours alone */
        rbdn_view_put(l->view);
    } else {
        l->image = rbdn_image_new(1, v, &err);
        assert(l->image);
    }
    l->view = v;
}

/* The content of `l` as a parent: a view at snapshot 100, which the store has not heard of, so it reads HEAD. */
static rbdn_view *as_parent(struct level *l)
{
    int err;
    rbdn_view_config c = l->config;
    c.snap_id = 1000000;
    c.snap_count = 0;
    rbdn_view *v = rbdn_view_new(&c, &err);
    assert(v);
    return v;
}

static struct level *level_new(struct level *parent)
{
    struct level *l = calloc(1, sizeof *l);
    rbdn_view_config *c = &l->config;
    c->size = random_size();
    c->order = 12 + rnd(6);
    c->stripe_count = rnd(2) ? 1 : 1 + rnd(5);
    c->stripe_unit = c->stripe_count == 1 ? 0 : (1u << c->order) >> rnd(4);
    l->store = memory_new(c->order, (2 * MAX_BYTES >> c->order) + 16, seed + 1);
    l->store->again = rnd(2) * rnd(50);
    l->store->pending = rnd(2) * rnd(50);
    c->store = &l->store->store;
    c->snap_id = STORE_NOSNAP;
    c->discard_granularity = rnd(2) ? 0 : 512u << rnd(5);
    if (parent) {
        l->parent = parent;
        c->parent = l->parent_view = as_parent(parent);
        c->overlap = rnd(2) ? 1 + rnd(parent->config.size) : parent->config.size;
        if (c->overlap > c->size)
            c->overlap = c->size;
    }
    l->model = calloc(1, MAX_BYTES);
    if (parent)
        memcpy(l->model, parent->model, c->overlap);
    publish(l);
    return l;
}

static void level_free(struct level *l)
{
    assert(rbdn_image_close(l->image) == 0);
    rbdn_view_put(l->view);
    rbdn_view_put(l->parent_view);
    l->store->store.ops->close(&l->store->store);
    for (unsigned n = 0; n < l->snap_count; n++)
        free(l->kept[n].model);
    free(l->model);
    free(l);
}

/* --- one request, its buffer cut into random pieces ------------------------------------------------------------------ */

struct asked {
    struct req req;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool done;
};

static void asked_done(struct req *r)
{
    struct asked *a = r->owner;
    pthread_mutex_lock(&a->lock);
    a->done = true;
    pthread_cond_signal(&a->wake);
    pthread_mutex_unlock(&a->lock);
}

static struct memory_store *asked_store; /* of the image that random_request is about */

static int64_t ask(rbdn_image *i, int type, uint64_t off, uint64_t len, uint8_t *buf, uint64_t buf_len, int flags,
                   uint64_t *mismatch)
{
    struct iovec iov[20];
    struct asked a = {.req = {.type = type, .flags = flags, .off = off, .len = len, .iov = iov, .done = asked_done}};
    a.req.owner = &a;
    pthread_mutex_init(&a.lock, NULL);
    pthread_cond_init(&a.wake, NULL);
    while (buf_len) {
        uint64_t n = a.req.iovcnt == 19 || rnd(2) ? buf_len : rnd(buf_len + 1);
        iov[a.req.iovcnt].iov_base = buf;
        iov[a.req.iovcnt++].iov_len = n;
        buf += n;
        buf_len -= n;
        if (a.req.iovcnt == 20)
            break;
    }
    uint64_t before = asked_store->applied;
    image_submit(i, &a.req);
    pthread_mutex_lock(&a.lock);
    while (!a.done)
        pthread_cond_wait(&a.wake, &a.lock);
    pthread_mutex_unlock(&a.lock);
    if (flags & REQ_FUA && a.req.result == 0 && asked_store->applied != before)
        assert(asked_store->flushed == asked_store->applied);
    if (mismatch)
        *mismatch = a.req.mismatch;
    return a.req.result;
}

static uint8_t scratch[2 * MAX_BYTES];

static void fill_random(uint8_t *b, uint64_t len)
{
    uint64_t kind = rnd(6);
    if (kind == 0)
        memset(b, 0, len);
    else
        for (uint64_t n = 0; n < len; n++)
            b[n] = kind == 1 ? rnd(2) : memory_random(&seed) >> 20;
}

static void check_range(rbdn_image *i, const uint8_t *model, uint64_t off, uint64_t len)
{
    memset(scratch, 0xee, len);
    assert(ask(i, REQ_READ, off, len, scratch, len, 0, NULL) == 0);
    for (uint64_t n = 0; n < len; n++)
        if (scratch[n] != model[off + n]) {
            fprintf(stderr, "byte %llu of read %llu+%llu: %02x, should be %02x\n", (unsigned long long)(off + n),
                    (unsigned long long)off, (unsigned long long)len, scratch[n], model[off + n]);
            abort();
        }
}

static void check_runs(struct level *l, uint64_t off, uint64_t len)
{
    static struct run runs[5000];
    uint64_t at = off, end = off + len;
    while (at < end) {
        int n = image_runs(l->image, at, end - at, runs, rnd(2) ? 5000 : 1 + rnd(3));
        assert(n > 0);
        for (int k = 0; k < n; k++) {
            assert(runs[k].len > 0 && runs[k].len <= end - at);
            assert(k == 0 || runs[k].flags != runs[k - 1].flags);
            if (runs[k].flags)
                for (uint64_t b = at; b < at + runs[k].len; b++)
                    assert(l->model[b] == 0);
            at += runs[k].len;
        }
    }
}

static void take_snapshot(struct level *l)
{
    if (l->snap_count == SNAPS)
        return;
    assert(rbdn_image_block(l->image, 1, 10000) == 0);
    uint64_t id = ++l->config.snap_seq;
    memmove(l->snaps + 1, l->snaps, l->snap_count * sizeof l->snaps[0]);
    l->snaps[0] = id;
    struct kept *k = &l->kept[l->snap_count++];
    *k = (struct kept){.id = id, .size = l->config.size, .overlap = l->config.overlap, .model = malloc(MAX_BYTES)};
    memcpy(k->model, l->model, MAX_BYTES);
    publish(l);
    assert(rbdn_image_unblock(l->image, 1) == 0);
}

static void check_snapshot(struct level *l)
{
    int err;
    if (!l->snap_count)
        return;
    struct kept *k = &l->kept[rnd(l->snap_count)];
    rbdn_view_config c = l->config;
    c.snap_id = k->id;
    c.size = k->size;
    c.overlap = k->overlap;
    rbdn_view *v = rbdn_view_new(&c, &err);
    rbdn_image *i = rbdn_image_new(2, v, &err);
    assert(v && i);
    rbdn_view_put(v);
    uint64_t off = rnd(k->size), len = rnd(k->size - off + 1);
    check_range(i, k->model, off, len);
    assert(ask(i, REQ_WRITE, 0, 1, scratch, 1, 0, NULL) == -EROFS);
    assert(rbdn_image_close(i) == 0);
}

/* What the image layer does around a resize. */
static void resize(struct level *l)
{
    uint64_t size = random_size(), old = l->config.size;
    if (size < old) {
        uint64_t objects = 2 * MAX_BYTES >> l->config.order;
        for (uint64_t o = 0; l->snap_count && o < objects; o++) /* snapshots must not lose what HEAD stops to see */
            assert(rbdn_image_copyup(l->image, o) >= 0);
        assert(ask(l->image, REQ_DISCARD, size, old - size, NULL, 0, REQ_EXACT, NULL) == 0);
        memset(l->model + size, 0, old - size);
    }
    l->config.size = size;
    if (l->config.overlap > size)
        l->config.overlap = size;
    if (!l->config.overlap)
        l->config.parent = NULL;
    publish(l);
}

/* Is the byte's whole granule (cut at the object's or the image's end) in [from, to)? */
static bool may_be_dropped(struct level *l, uint64_t byte, uint64_t from, uint64_t to)
{
    uint64_t grain = l->config.discard_granularity, object = byte >> l->config.order << l->config.order;
    uint64_t end = object + (1ULL << l->config.order);
    if (!grain)
        return true;
    if (end > l->config.size)
        end = l->config.size;
    uint64_t a = object + (byte - object) / grain * grain, b = a + grain < end ? a + grain : end;
    return a >= from && b <= to;
}

static void random_request(struct level *l)
{
    rbdn_image *i = l->image;
    asked_store = l->store;
    uint64_t size = l->config.size, off = rnd(size), len = rnd(3) ? rnd(9000) : rnd(size);
    if (rnd(4) == 0)
        off &= ~4095ULL;
    if (rnd(4) == 0)
        len = (len + 4095) & ~4095ULL;
    if (len > size - off)
        len = size - off;
    uint8_t *m = l->model + off;
    int fua = rnd(8) ? 0 : REQ_FUA;
    uint64_t pattern, at;
    switch (rnd(16)) {
    case 0: case 1: case 2: case 3:
        fill_random(scratch, len);
        assert(ask(i, REQ_WRITE, off, len, scratch, len, fua, NULL) == 0);
        memcpy(m, scratch, len);
        break;
    case 4:
        assert(ask(i, REQ_WRITE_ZEROES, off, len, NULL, 0, fua | (rnd(2) ? REQ_UNMAP : 0), NULL) == 0);
        memset(m, 0, len);
        break;
    case 5:
        assert(ask(i, REQ_DISCARD, off, len, NULL, 0, fua | REQ_EXACT, NULL) == 0);
        memset(m, 0, len);
        break;
    case 6: /* each byte may have stayed or become zero */
        assert(ask(i, REQ_DISCARD, off, len, NULL, 0, fua, NULL) == 0);
        assert(ask(i, REQ_READ, off, len, scratch, len, 0, NULL) == 0);
        for (uint64_t n = 0; n < len; n++) {
            assert(scratch[n] == m[n] || scratch[n] == 0);
            if (scratch[n] != m[n] && l->config.stripe_count == 1)
                assert(may_be_dropped(l, off + n, off, off + len));
        }
        memcpy(m, scratch, len);
        break;
    case 7:
        pattern = 1 + rnd(rnd(2) ? 16 : 5000);
        if (pattern > size)
            pattern = size;
        len = len / pattern * pattern;
        if (off > size - len)
            off = size - len;
        fill_random(scratch, pattern);
        assert(ask(i, REQ_WRITESAME, off, len, scratch, pattern, fua, NULL) == 0);
        for (uint64_t n = 0; n < len; n++)
            l->model[off + n] = scratch[n % pattern];
        break;
    case 8:
        if (len == 0)
            break;
        memcpy(scratch, m, len);
        fill_random(scratch + len, len);
        if (rnd(2)) {
            at = rnd(len);
            scratch[at] ^= 1 + rnd(255);
            uint64_t mismatch;
            assert(ask(i, REQ_COMPARE_AND_WRITE, off, len, scratch, 2 * len, fua, &mismatch) == -EILSEQ);
            assert(mismatch == at);
        } else {
            assert(ask(i, REQ_COMPARE_AND_WRITE, off, len, scratch, 2 * len, fua, NULL) == 0);
            memcpy(m, scratch + len, len);
        }
        break;
    case 9:
        assert(ask(i, REQ_FLUSH, 0, 0, NULL, 0, 0, NULL) == 0);
        assert(l->store->flushed == l->store->applied);
        break;
    case 10:
        if (rnd(4) == 0)
            check_runs(l, off, len ? len : 1);
        break;
    case 11:
        if (rnd(10) == 0)
            resize(l);
        else if (rnd(10) == 0)
            take_snapshot(l);
        else
            check_snapshot(l);
        break;
    case 12:
        assert(ask(i, rnd(2) ? REQ_READ : REQ_WRITE, off, size - off + 1, scratch, size - off + 1, 0, NULL) == -EINVAL);
        assert(ask(i, REQ_WRITE, UINT64_MAX - 5, 10, scratch, 10, 0, NULL) == -EINVAL);
        if (l->config.overlap)
            assert(rbdn_image_copyup(i, rnd(2 * MAX_BYTES >> l->config.order)) >= 0);
        break;
    default:
        check_range(i, l->model, off, len);
        return;
    }
}

static void one_chain(unsigned requests)
{
    struct level *chain[4] = {0};
    unsigned depth = rnd(4);
    for (unsigned n = 0; n <= depth; n++) {
        chain[n] = level_new(n ? chain[n - 1] : NULL);
        unsigned count = n == depth ? requests : 30;
        for (unsigned k = 0; k < count; k++)
            random_request(chain[n]);
        check_range(chain[n]->image, chain[n]->model, 0, chain[n]->config.size);
    }
    for (unsigned n = depth + 1; n-- > 0;) { /* nobody wrote to a parent */
        check_range(chain[n]->image, chain[n]->model, 0, chain[n]->config.size);
    }
    for (unsigned n = depth + 1; n-- > 0;)
        level_free(chain[n]);
}

int main(int argc, char **argv)
{
    unsigned chains = argc > 1 ? atoi(argv[1]) : 60;
    uint64_t first = argc > 2 ? strtoull(argv[2], NULL, 0) : 1;
    for (unsigned n = 0; n < chains; n++) {
        seed = (first + n) * 0x9e3779b97f4a7c15ULL | 1;
        for (int k = 0; k < 10; k++)
            memory_random(&seed);
        one_chain(300);
    }
    printf("%u chains ok\n", chains);
    return 0;
}
