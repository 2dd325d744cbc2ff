/* The gate and what hangs on it: blocks that drain and nest, the lock, fences in every state, throttle, flushes, atomic
 * compare-and-write, copy-ups - alone and under load from several threads. */
#undef NDEBUG
#include "memory_store.h"

#include <stdio.h>
#include <unistd.h>

#include "engine/event.h"
#include "engine/image.h"
#include "engine/request.h"
#include "ffi/api_engine.h"

#define SIZE (1 << 20)
#define ORDER 14
#define DRAIN_MS 20000

static rbdn_view *view_of(struct memory_store *m, rbdn_view_config c)
{
    int err;
    c.size = c.size ? c.size : SIZE;
    c.order = ORDER;
    c.store = &m->store;
    c.snap_id = c.snap_id ? c.snap_id : STORE_NOSNAP;
    rbdn_view *v = rbdn_view_new(&c, &err);
    assert(v);
    return v;
}

static void publish(rbdn_image *i, struct memory_store *m, rbdn_view_config c)
{
    rbdn_view *v = view_of(m, c);
    assert(rbdn_image_publish(i, v) == 0);
    rbdn_view_put(v);
}

static rbdn_image *image_of(struct memory_store *m, rbdn_view_config c)
{
    static uint64_t id = 0;
    int err;
    rbdn_view *v = view_of(m, c);
    rbdn_image *i = rbdn_image_new(++id, v, &err);
    assert(i);
    rbdn_view_put(v);
    return i;
}

static struct memory_store *store_new(void)
{
    return memory_new(ORDER, SIZE >> ORDER, 12345);
}

static void end(rbdn_image *i, struct memory_store *m)
{
    assert(rbdn_image_close(i) == 0);
    m->store.ops->close(&m->store);
}

/* --- one request whose end can be waited for -------------------------------------------------------------------------- */

struct ask {
    struct req req;
    struct iovec iov;
    struct flag done;
    uint8_t data[8192];
};

static _Atomic uint64_t order_counter;

static void ask_done(struct req *r)
{
    struct ask *a = r->owner;
    r->started_ns = atomic_fetch_add(&order_counter, 1); /* when it was done; the engine is through with it */
    flag_set(&a->done);
}

static struct ask *ask(rbdn_image *i, int type, uint64_t off, uint64_t len, int fill, int flags)
{
    struct ask *a = calloc(1, sizeof *a);
    memset(a->data, fill, sizeof a->data);
    a->iov.iov_base = a->data;
    a->iov.iov_len = type == REQ_COMPARE_AND_WRITE ? 2 * len : len;
    a->req = (struct req){.type = type, .flags = flags, .off = off, .len = len, .iov = &a->iov, .iovcnt = 1,
                          .done = ask_done, .owner = a};
    image_submit(i, &a->req);
    return a;
}

static bool is_done(struct ask *a)
{
    return atomic_load(&a->done.set);
}

static int64_t finish(struct ask *a)
{
    flag_wait(&a->done);
    int64_t r = a->req.result;
    free(a);
    return r;
}

static uint64_t parked(rbdn_image *i)
{
    rbdn_stats s;
    rbdn_image_stats(i, &s);
    return s.parked;
}

static uint64_t in_flight(rbdn_image *i)
{
    rbdn_stats s;
    rbdn_image_stats(i, &s);
    return s.in_flight;
}

static int next_event(int64_t *value)
{
    rbdn_event e;
    int found = rbdn_event_next(&e);
    if (found && value)
        *value = e.value;
    return found ? e.type : 0;
}

/* --- tests ------------------------------------------------------------------------------------------------------------ */

static void a_block_waits_for_those_in_flight_and_parks_new_ones(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    m->pending = 100;
    memory_hold(m, true);
    struct ask *w = ask(i, REQ_WRITE, 0, 4096, 1, 0), *r = ask(i, REQ_READ, 0, 4096, 0, 0);
    assert(in_flight(i) == 2);
    assert(rbdn_image_block(i, 1, 20) == -ETIMEDOUT);
    struct ask *w2 = ask(i, REQ_WRITE, 4096, 4096, 2, 0), *f = ask(i, REQ_FLUSH, 0, 0, 0, 0);
    struct ask *r2 = ask(i, REQ_READ, 4096, 4096, 0, 0);
    assert(parked(i) == 2 && in_flight(i) == 3);
    assert(rbdn_image_block(i, 3, 20) == -ETIMEDOUT);
    struct ask *r3 = ask(i, REQ_READ, 0, 4096, 0, 0);
    assert(parked(i) == 3);
    memory_hold(m, false);
    assert(rbdn_image_block(i, 3, DRAIN_MS) == 0);
    assert(is_done(w) && is_done(r) && is_done(r2) && !is_done(w2) && !is_done(f) && !is_done(r3));
    assert(rbdn_image_unblock(i, 3) == 0);
    assert(parked(i) == 3);
    assert(rbdn_image_unblock(i, 3) == 0);
    assert(finish(r3) == 0);
    assert(!is_done(w2) && !is_done(f) && parked(i) == 2);
    assert(rbdn_image_unblock(i, 1) == 0);
    assert(rbdn_image_unblock(i, 1) == -EINVAL && rbdn_image_unblock(i, 3) == -EINVAL);
    assert(rbdn_image_block(i, 2, 0) == -EINVAL);
    assert(finish(w) == 0 && finish(r) == 0 && finish(w2) == 0 && finish(r2) == 0 && finish(f) == 0);
    end(i, m);
}

static void writes_park_for_the_lock_and_one_event_is_posted(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){.need_lock = 1});
    struct ask *w = ask(i, REQ_WRITE, 0, 4096, 1, 0), *d = ask(i, REQ_DISCARD, 0, 4096, 1, 0);
    struct ask *c = ask(i, REQ_COMPARE_AND_WRITE, 0, 4096, 0, 0);
    assert(finish(ask(i, REQ_READ, 0, 4096, 0, 0)) == 0); /* reads and flushes need no lock */
    assert(finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == 0);
    assert(!is_done(w) && !is_done(d) && !is_done(c) && parked(i) == 3);
    assert(next_event(NULL) == EVENT_LOCK_NEEDED && next_event(NULL) == 0);
    struct ask *again = ask(i, REQ_WRITE, 0, 4096, 1, 0);
    assert(next_event(NULL) == 0 && parked(i) == 4);
    publish(i, m, (rbdn_view_config){.need_lock = 1}); /* the lock was not to be had: asked for again */
    assert(next_event(NULL) == EVENT_LOCK_NEEDED && next_event(NULL) == 0);
    publish(i, m, (rbdn_view_config){0});
    assert(finish(w) == 0 && finish(d) == 0 && finish(again) == 0);
    int64_t r = finish(c);
    assert(r == 0 || r == -EILSEQ);
    assert(next_event(NULL) == 0);
    end(i, m);
}

static void a_fence_fails_parked_and_future_requests_and_lets_others_complete(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){.need_lock = 1});
    struct ask *lock = ask(i, REQ_WRITE, 0, 4096, 1, 0), *caw = ask(i, REQ_COMPARE_AND_WRITE, 0, 512, 0, 0);
    m->pending = 100;
    memory_hold(m, true);
    struct ask *flying = ask(i, REQ_READ, 0, 4096, 0, 0);
    assert(rbdn_image_throttle(i, 1, 0) == 0);
    struct ask *slow[3];
    for (int n = 0; n < 3; n++) /* the first may still pass; it is in flight then */
        slow[n] = ask(i, REQ_READ, 0, 4096, 0, 0);
    assert(rbdn_image_block(i, 3, 0) == -ETIMEDOUT);
    struct ask *shut = ask(i, REQ_FLUSH, 0, 0, 0, 0);
    assert(rbdn_image_fence(i, 5) == -EINVAL);
    assert(rbdn_image_fence(i, -ESHUTDOWN) == 0);
    assert(rbdn_image_fence(i, -EIO) == 0); /* the first stays */
    assert(finish(lock) == -ESHUTDOWN && finish(caw) == -ESHUTDOWN && finish(shut) == -ESHUTDOWN);
    assert(finish(slow[1]) == -ESHUTDOWN && finish(slow[2]) == -ESHUTDOWN);
    assert(!is_done(flying) && parked(i) == 0);
    memory_hold(m, false);
    assert(finish(flying) == 0 && finish(slow[0]) == 0);
    for (int type = 0; type < REQ_TYPES; type++)
        assert(finish(ask(i, type, 0, 512, 0, 0)) == -ESHUTDOWN);
    assert(rbdn_image_unblock(i, 3) == 0);
    assert(finish(ask(i, REQ_READ, 0, 512, 0, 0)) == -ESHUTDOWN);
    struct run run;
    assert(image_runs(i, 0, SIZE, &run, 1) == -ESHUTDOWN && rbdn_image_copyup(i, 0) == -ESHUTDOWN);
    assert(next_event(NULL) == EVENT_LOCK_NEEDED && next_event(NULL) == 0);
    end(i, m);
}

static void close_fails_who_waits_and_is_refused_while_used(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){.need_lock = 1});
    struct image_user user = {0};
    image_get(i, &user);
    assert(rbdn_image_close(i) == -EBUSY);
    image_put(i, &user);
    m->pending = 100;
    struct ask *w = ask(i, REQ_WRITE, 0, 4096, 1, 0), *r = ask(i, REQ_READ, 0, 4096, 1, 0);
    end(i, m);
    assert(finish(w) == -ESHUTDOWN && finish(r) == 0);
    assert(next_event(NULL) == EVENT_LOCK_NEEDED);
}

static int changes;

static void user_changed(struct image_user *u)
{
    changes++;
}

static void publishing_tells_users_of_size_and_read_only(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    struct image_user user = {.changed = user_changed};
    image_get(i, &user);
    publish(i, m, (rbdn_view_config){.snap_seq = 3});
    assert(changes == 0);
    publish(i, m, (rbdn_view_config){.size = 5000});
    assert(changes == 1 && image_size(i) == 5000 && !image_read_only(i) && image_object_size(i) == 1 << ORDER);
    publish(i, m, (rbdn_view_config){.size = 5000, .read_only = 1});
    assert(changes == 2 && image_read_only(i));
    assert(finish(ask(i, REQ_WRITE, 0, 512, 0, 0)) == -EROFS && finish(ask(i, REQ_READ, 0, 512, 0, 0)) == 0);
    assert(finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == 0 && finish(ask(i, 7, 0, 0, 0, 0)) == -EINVAL);
    image_put(i, &user);
    end(i, m);
}

static void requests_in_flight_finish_on_the_view_they_began_with(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    int err;
    rbdn_view *v = view_of(m, (rbdn_view_config){.size = SIZE / 2});
    m->pending = 100;
    memory_hold(m, true);
    struct ask *late = ask(i, REQ_WRITE, SIZE - 4096, 4096, 7, 0);
    assert(rbdn_image_publish(i, v) == 0);
    assert(finish(ask(i, REQ_READ, SIZE - 4096, 4096, 0, 0)) == -EINVAL);
    assert(rbdn_image_settle(i, 10) == -ETIMEDOUT);
    memory_hold(m, false);
    assert(rbdn_image_settle(i, DRAIN_MS) == 0 && finish(late) == 0);
    assert(rbdn_view_refs(v) == 2);
    publish(i, m, (rbdn_view_config){0});
    assert(rbdn_image_settle(i, DRAIN_MS) == 0 && rbdn_view_refs(v) == 1);
    rbdn_view_put(v);
    struct ask *r = ask(i, REQ_READ, SIZE - 4096, 4096, 0, 0);
    flag_wait(&r->done);
    assert(r->data[0] == 7 && r->data[4095] == 7);
    finish(r);
    assert(!rbdn_view_new(&(rbdn_view_config){.store = &m->store, .order = 11}, &err) && err == -EINVAL);
    end(i, m);
}

static void flushes_are_shared_and_a_failed_one_fences(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    int64_t value;
    m->pending = 100;
    memory_hold(m, true);
    struct ask *f[10];
    for (int n = 0; n < 10; n++)
        f[n] = ask(i, REQ_FLUSH, 0, 0, 0, 0);
    memory_hold(m, false);
    for (int n = 0; n < 10; n++)
        assert(finish(f[n]) == 0);
    assert(m->calls[STORE_FLUSH] == 2); /* the first, and one for all that came while it ran */

    m->fail_type = STORE_WRITE;
    m->fail_errno = -ENOSPC;
    m->fail_count = 1;
    assert(finish(ask(i, REQ_WRITE, 0, 4096, 1, REQ_FUA)) == -ENOSPC);
    assert(finish(ask(i, REQ_WRITE, 0, 4096, 1, REQ_FUA)) == 0);
    assert(next_event(&value) == EVENT_IO_ERROR && value == -ENOSPC && next_event(NULL) == 0);

    m->fail_type = STORE_FLUSH;
    m->fail_errno = -EIO;
    m->fail_count = 1;
    memory_hold(m, true);
    struct ask *fua = ask(i, REQ_WRITE, 0, 4096, 1, REQ_FUA);
    for (int n = 0; n < 3; n++)
        f[n] = ask(i, REQ_FLUSH, 0, 0, 0, 0);
    memory_hold(m, false);
    assert(finish(fua) == -EIO);
    for (int n = 0; n < 3; n++)
        assert(finish(f[n]) == -EIO);
    assert(finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == -EIO && finish(ask(i, REQ_READ, 0, 512, 0, 0)) == -EIO);
    assert(next_event(&value) == EVENT_IO_ERROR && value == -EIO && next_event(NULL) == 0);
    end(i, m);
}

static void a_store_that_fences_us_fences_the_image(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    int64_t value;
    m->fail_type = STORE_READ;
    m->fail_errno = -EIO;
    m->fail_count = 1;
    assert(finish(ask(i, REQ_READ, 0, 512, 0, 0)) == -EIO && finish(ask(i, REQ_READ, 0, 512, 0, 0)) == 0);
    assert(next_event(&value) == EVENT_READ_ERROR && value == -EIO);
    m->fail_errno = -ESHUTDOWN;
    m->fail_count = 1;
    assert(finish(ask(i, REQ_READ, 0, 512, 0, 0)) == -ESHUTDOWN);
    assert(finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == -ESHUTDOWN);
    assert(next_event(&value) == EVENT_READ_ERROR && value == -ESHUTDOWN && next_event(NULL) == 0);
    end(i, m);
}

static void a_compare_and_write_waits_for_earlier_writes_and_holds_later_ones(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    m->pending = 100;
    memory_hold(m, true);
    struct ask *first = ask(i, REQ_WRITE, 0, 4096, 5, 0);
    struct ask *caw = ask(i, REQ_COMPARE_AND_WRITE, 0, 512, 5, 0);
    memset(caw->data + 512, 6, 512); /* not looked at yet: it waits for `first` */
    struct ask *later = ask(i, REQ_WRITE, 256, 512, 7, 0), *other = ask(i, REQ_WRITE, 8192, 512, 8, 0);
    struct ask *second = ask(i, REQ_COMPARE_AND_WRITE, 511, 1, 7, 0);
    pthread_mutex_lock(&m->lock);
    assert(m->queued == 2); /* `first` and `other` only: nothing is read for the comparison yet */
    pthread_mutex_unlock(&m->lock);
    assert(parked(i) == 2);
    assert(in_flight(i) == 3);
    memory_hold(m, false);
    assert(finish(first) == 0 && finish(caw) == 0 && finish(later) == 0 && finish(other) == 0);
    int64_t r = finish(second);
    assert(r == 0 || r == -EILSEQ);
    struct ask *check = ask(i, REQ_READ, 0, 4096, 0, 0);
    flag_wait(&check->done);
    assert(check->data[0] == 6 && check->data[255] == 6 && check->data[256] == 7 && check->data[767] == 7);
    assert(check->data[768] == 5 && check->data[2000] == 5);
    finish(check);
    end(i, m);
}

static void writers_of_one_object_share_its_copy_up(void)
{
    struct memory_store *parent = store_new(), *m = store_new();
    rbdn_image *p = image_of(parent, (rbdn_view_config){0});
    for (int n = 0; n < 4; n++)
        assert(finish(ask(p, REQ_WRITE, n * 4096, 4096, 9, 0)) == 0);
    rbdn_view *pv = view_of(parent, (rbdn_view_config){.snap_id = 77});
    rbdn_view_config clone = {.parent = pv, .overlap = SIZE};
    rbdn_image *i = image_of(m, clone);
    m->pending = parent->pending = 100;
    struct ask *w[40];
    memory_hold(parent, true);
    for (int n = 0; n < 40; n++)
        w[n] = ask(i, REQ_WRITE, n * 400, 200, n, 0);
    while (m->calls[STORE_WRITE] < 40) /* all of them found no object before the parent answers */
        usleep(10);
    memory_hold(parent, false);
    for (int n = 0; n < 40; n++)
        assert(finish(w[n]) == 0);
    assert(m->calls[STORE_COPYUP] == 1 && parent->calls[STORE_READ] == 1);
    struct ask *r = ask(i, REQ_READ, 8000, 4096, 0, 0);
    flag_wait(&r->done);
    for (int n = 0; n < 4096; n++)
        assert(r->data[n] == ((8000 + n) % 400 < 200 ? (8000 + n) / 400 : 9));
    finish(r);
    /* nothing in the parent: nothing is copied; a failing parent fails the write and leaves the object absent */
    assert(finish(ask(i, REQ_WRITE, 1 << ORDER, 512, 1, 0)) == 0 && m->calls[STORE_COPYUP] == 1);
    assert(rbdn_image_copyup(i, 0) == 1 && rbdn_image_copyup(i, 2) == 1 && rbdn_image_copyup(i, 1 << 20) == 1);
    parent->fail_type = STORE_READ;
    parent->fail_errno = -EIO;
    parent->fail_count = -1;
    assert(finish(ask(i, REQ_WRITE, 3 << ORDER, 512, 1, 0)) == -EIO && rbdn_image_copyup(i, 3) == -EIO);
    assert(!m->objects[3].head.exists);
    assert(next_event(NULL) == EVENT_IO_ERROR);
    parent->fail_count = 0;
    end(i, m);
    rbdn_view_put(pv);
    end(p, parent);
}

static void discarding_everything_leaves_no_object_or_tombstones(void)
{
    struct memory_store *m = store_new();
    uint64_t size = SIZE - 1234; /* the last object is not a whole one */
    rbdn_image *i = image_of(m, (rbdn_view_config){.size = size, .discard_granularity = 4096});
    for (uint64_t n = 0; n < size; n += 4096)
        assert(finish(ask(i, REQ_WRITE, n, size - n < 4096 ? size - n : 4096, 1, 0)) == 0);
    assert(m->objects[63].head.exists);
    assert(finish(ask(i, REQ_DISCARD, 0, size, 0, 0)) == 0);
    for (uint64_t n = 0; n < m->count; n++)
        assert(!m->objects[n].head.exists);
    rbdn_view *pv = view_of(m, (rbdn_view_config){.size = size, .snap_id = 5, .order = ORDER});
    struct memory_store *c = store_new();
    rbdn_image *clone = image_of(c, (rbdn_view_config){.size = size, .parent = pv, .overlap = 3 << ORDER});
    assert(finish(ask(clone, REQ_DISCARD, 0, size, 0, 0)) == 0);
    for (uint64_t n = 0; n < c->count; n++)
        assert(c->objects[n].head.exists == (n < 3));
    end(clone, c);
    rbdn_view_put(pv);
    end(i, m);
}

static void a_throttle_keeps_order_and_rate(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    assert(rbdn_image_throttle(i, 1000, 0) == 0);
    struct ask *r[150]; /* 100 pass at once, 50 at 1000 a second */
    uint64_t begin = now_ns(), last = 0;
    for (int n = 0; n < 150; n++)
        r[n] = ask(i, n % 2 ? REQ_READ : REQ_WRITE, 0, 512, 0, 0);
    for (int n = 0; n < 150; n++) {
        flag_wait(&r[n]->done);
        assert(n == 0 || r[n]->req.started_ns > last);
        last = r[n]->req.started_ns;
        assert(finish(r[n]) == 0);
    }
    assert(now_ns() - begin > 40000000);
    assert(rbdn_image_throttle(i, 0, 1) == 0); /* one byte a second: the second one waits for minutes ... */
    struct ask *a = ask(i, REQ_READ, 0, 4096, 0, 0), *b = ask(i, REQ_READ, 0, 4096, 0, 0);
    assert(finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == 0);
    assert(finish(a) == 0 && !is_done(b) && parked(i) == 1);
    assert(rbdn_image_throttle(i, 0, 0) == 0); /* ... or until nothing limits it */
    assert(finish(b) == 0);
    end(i, m);
}

static struct flag timers_held, timers_may_go;

static void hold_timers(struct timer *t)
{
    flag_set(&timers_held);
    flag_wait(&timers_may_go);
}

static void a_request_does_not_overtake_throttled_ones(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    struct timer blocker = {.run = hold_timers};
    timer_set(&blocker, 0);
    flag_wait(&timers_held);
    assert(rbdn_image_throttle(i, 1000, 0) == 0);
    struct ask *r[110];
    for (int n = 0; n < 110; n++)
        r[n] = ask(i, REQ_READ, 0, 512, 0, 0);
    assert(!is_done(r[109]));
    uint64_t paid = now_ns() + 50000000; /* what was overdrawn has flowed in, but nobody may say so */
    while (now_ns() < paid)
        usleep(1000);
    struct ask *last = ask(i, REQ_READ, 0, 512, 0, 0);
    assert(!is_done(last) && !is_done(r[109]));
    flag_set(&timers_may_go);
    for (int n = 0; n < 110; n++)
        assert(finish(r[n]) == 0);
    assert(finish(last) == 0);
    timer_cancel(&blocker);
    end(i, m);
}

static void statistics_count_what_happened(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    for (int n = 0; n < 10; n++)
        assert(finish(ask(i, REQ_WRITE, n * 4096, 4096, 1, 0)) == 0);
    assert(finish(ask(i, REQ_READ, SIZE, 512, 0, 0)) == -EINVAL && finish(ask(i, REQ_FLUSH, 0, 0, 0, 0)) == 0);
    rbdn_stats s;
    assert(rbdn_image_stats(i, &s) == 0);
    uint64_t sum = 0;
    for (int b = 0; b < 40; b++)
        sum += s.histogram[REQ_WRITE][b];
    assert(s.ops[REQ_WRITE] == 10 && sum == 10 && s.bytes[REQ_WRITE] == 40960 && s.failed[REQ_WRITE] == 0);
    assert(s.ops[REQ_READ] == 1 && s.failed[REQ_READ] == 1 && s.bytes[REQ_READ] == 0 && s.ops[REQ_FLUSH] == 1);
    assert(s.total_ns[REQ_WRITE] > 0 && s.in_flight == 0 && s.parked == 0 && s.idle_ns > 0);
    end(i, m);
}

/* --- load ------------------------------------------------------------------------------------------------------------- */

#define WORKERS 3
#define SECTOR 512
#define ROUNDS 1500

struct worker {
    pthread_t thread;
    rbdn_image *image;
    rbdn_view_config config;
    unsigned index;
    uint64_t seed;
    uint8_t model[SIZE / SECTOR]; /* what each of this worker's sectors is filled with */
};

static _Atomic bool stopping;
static _Atomic int fenced_after; /* requests until the fence; -1: no fence */

/* Sectors of one worker lie between those of the others, in the same objects. */
static void *work(void *arg)
{
    struct worker *w = arg;
    uint8_t buf[2 * SECTOR];
    for (int n = 0; n < ROUNDS; n++) {
        uint64_t s = memory_random(&w->seed) % (SIZE / SECTOR / WORKERS - 8) * WORKERS + w->index;
        uint64_t off = s * SECTOR;
        uint8_t value = memory_random(&w->seed) >> 30, old = w->model[s];
        int64_t r = 0;
        switch (memory_random(&w->seed) / 7 % 8) {
        case 0: case 1: case 2:
            memset(buf, value, SECTOR);
            r = rbdn_io(w->image, REQ_WRITE, off, SECTOR, buf, SECTOR, memory_random(&w->seed) % 16 ? 0 : REQ_FUA, NULL);
            old = value;
            break;
        case 3:
            r = rbdn_io(w->image, REQ_WRITE_ZEROES, off, SECTOR, NULL, 0, REQ_UNMAP, NULL);
            old = 0;
            break;
        case 4:
            memset(buf, old, SECTOR);
            memset(buf + SECTOR, value, SECTOR);
            r = rbdn_io(w->image, REQ_COMPARE_AND_WRITE, off, SECTOR, buf, 2 * SECTOR, 0, NULL);
            old = value;
            break;
        case 5:
            r = rbdn_io(w->image, REQ_FLUSH, 0, 0, NULL, 0, 0, NULL);
            break;
        default:
            memset(buf, 0xee, SECTOR);
            r = rbdn_io(w->image, REQ_READ, off, SECTOR, buf, SECTOR, 0, NULL);
            for (int b = 0; r == 0 && b < SECTOR; b++)
                assert(buf[b] == old);
        }
        if (r == -ESHUTDOWN && atomic_load(&fenced_after) >= 0)
            return NULL;
        assert(r == 0);
        w->model[s] = old;
    }
    return NULL;
}

static void *reshape(void *arg)
{
    struct worker *w = arg;
    while (!atomic_load(&stopping)) {
        int which = memory_random(&w->seed) % 2 ? 1 : 3;
        if (memory_random(&w->seed) % 4) {
            assert(rbdn_image_block(w->image, which, DRAIN_MS) == 0);
            assert(in_flight(w->image) == 0 || which == 1);
            assert(rbdn_image_unblock(w->image, which) == 0);
        } else {
            int err;
            rbdn_view_config c = w->config;
            c.need_lock = memory_random(&w->seed) % 3 == 0;
            rbdn_view *v = rbdn_view_new(&c, &err);
            assert(v && rbdn_image_publish(w->image, v) == 0);
            bool replaced = c.need_lock;
            if (replaced) {
                rbdn_view *open;
                c.need_lock = 0;
                open = rbdn_view_new(&c, &err);
                assert(open && rbdn_image_publish(w->image, open) == 0);
                rbdn_view_put(open);
            }
            assert(rbdn_image_settle(w->image, DRAIN_MS) == 0 && (!replaced || rbdn_view_refs(v) == 1));
            rbdn_view_put(v);
        }
        if (atomic_load(&fenced_after) >= 0 && atomic_fetch_sub(&fenced_after, 1) <= 1) {
            atomic_store(&fenced_after, 0);
            assert(rbdn_image_fence(w->image, -ESHUTDOWN) == 0);
            break;
        }
        usleep(memory_random(&w->seed) % 300);
    }
    return NULL;
}

static void load(unsigned again, unsigned pending, int fence_at)
{
    struct memory_store *parent = store_new(), *m = store_new();
    rbdn_image *p = image_of(parent, (rbdn_view_config){0});
    for (int n = 0; n < SIZE / SECTOR; n++)
        assert(finish(ask(p, REQ_WRITE, n * SECTOR, SECTOR, n, 0)) == 0);
    rbdn_view *pv = view_of(parent, (rbdn_view_config){.snap_id = 9});
    rbdn_image *i = image_of(m, (rbdn_view_config){.parent = pv, .overlap = SIZE});
    m->again = parent->again = again;
    m->pending = parent->pending = pending;
    atomic_store(&stopping, false);
    atomic_store(&fenced_after, fence_at);
    struct worker *w = calloc(WORKERS + 1, sizeof *w);
    for (unsigned n = 0; n <= WORKERS; n++) {
        w[n].image = i;
        w[n].config = (rbdn_view_config){.size = SIZE, .order = ORDER, .store = &m->store, .snap_id = STORE_NOSNAP,
                                         .parent = pv, .overlap = SIZE};
        w[n].index = n;
        w[n].seed = n * 77 + 5;
        for (int s = 0; s < SIZE / SECTOR; s++)
            w[n].model[s] = s;
        pthread_create(&w[n].thread, NULL, n < WORKERS ? work : reshape, &w[n]);
    }
    for (unsigned n = 0; n < WORKERS; n++)
        pthread_join(w[n].thread, NULL);
    atomic_store(&stopping, true);
    pthread_join(w[WORKERS].thread, NULL);
    assert(rbdn_image_block(i, 3, DRAIN_MS) == 0 && in_flight(i) == 0 && parked(i) == 0);
    assert(rbdn_image_unblock(i, 3) == 0);
    if (fence_at < 0) {
        uint8_t buf[SECTOR];
        for (int s = 0; s < SIZE / SECTOR; s++) {
            assert(rbdn_io(i, REQ_READ, s * SECTOR, SECTOR, buf, SECTOR, 0, NULL) == 0);
            assert(buf[0] == w[s % WORKERS].model[s] && buf[SECTOR - 1] == buf[0]);
        }
    }
    while (next_event(NULL))
        ;
    free(w);
    end(i, m);
    rbdn_view_put(pv);
    end(p, parent);
}

struct late {
    pthread_t thread;
    rbdn_image *image;
    _Atomic uint64_t calls;
};

static void *call_until_shut(void *arg)
{
    struct late *l = arg;
    uint8_t buf[SECTOR] = {0};
    rbdn_stats stats;
    struct run run;
    int64_t r;
    do {
        r = rbdn_io(l->image, l->calls % 2 ? REQ_READ : REQ_WRITE, 0, SECTOR, buf, SECTOR, 0, NULL);
        int64_t rows = image_runs(l->image, 0, SIZE, &run, 1);
        assert((r == 0 || r == -ESHUTDOWN) && (rows == 1 || rows == -ESHUTDOWN));
        assert(rbdn_image_stats(l->image, &stats) == 0);
        atomic_fetch_add(&l->calls, 1);
    } while (r == 0);
    return NULL;
}

static void shutting_waits_for_other_threads_calls_and_refuses_later_ones(void)
{
    struct memory_store *m = store_new();
    m->again = 20;
    m->pending = 30;
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    rbdn_view *v = view_of(m, (rbdn_view_config){0});
    struct late late[WORKERS];
    for (int n = 0; n < WORKERS; n++) {
        late[n].image = i;
        atomic_init(&late[n].calls, 0);
        pthread_create(&late[n].thread, NULL, call_until_shut, &late[n]);
    }
    for (int n = 0; n < WORKERS; n++)
        while (atomic_load(&late[n].calls) < 20)
            sched_yield();
    rbdn_image_free(i); /* not shut: nothing happens */
    struct image_user user = {0};
    image_get(i, &user);
    assert(rbdn_image_shut(i) == -EBUSY);
    image_put(i, &user);
    assert(rbdn_image_shut(i) == 0 && in_flight(i) == 0);
    m->store.ops->close(&m->store); /* nobody looks at it any more */
    for (int n = 0; n < WORKERS; n++)
        pthread_join(late[n].thread, NULL);
    for (int type = 0; type < REQ_TYPES; type++)
        assert(finish(ask(i, type, 0, 512, 0, 0)) == -ESHUTDOWN);
    assert(rbdn_image_publish(i, v) == -ESHUTDOWN && rbdn_image_copyup(i, 0) == -ESHUTDOWN);
    assert(rbdn_image_settle(i, 0) == 0 && rbdn_image_throttle(i, 5, 5) == 0 && rbdn_image_fence(i, -EIO) == 0);
    assert(rbdn_image_block(i, 3, 0) == 0 && rbdn_image_unblock(i, 3) == 0);
    assert(finish(ask(i, REQ_READ, 0, 512, 0, 0)) == -ESHUTDOWN);
    assert(rbdn_image_shut(i) == 0);
    rbdn_view_put(v);
    rbdn_image_free(i);
}

/* Threads increment one number with compare-and-write: none is lost. */
static void *increment(void *arg)
{
    rbdn_image *i = arg;
    for (int n = 0; n < 200;) {
        uint32_t v[2];
        assert(rbdn_io(i, REQ_READ, 4000, 4, v, 4, 0, NULL) == 0);
        v[1] = v[0] + 1;
        int64_t r = rbdn_io(i, REQ_COMPARE_AND_WRITE, 4000, 4, v, 8, 0, NULL);
        assert(r == 0 || r == -EILSEQ);
        n += r == 0;
    }
    return NULL;
}

static void compare_and_writes_of_many_threads_lose_nothing(void)
{
    struct memory_store *m = store_new();
    rbdn_image *i = image_of(m, (rbdn_view_config){0});
    m->again = m->pending = 25;
    pthread_t threads[WORKERS];
    for (int n = 0; n < WORKERS; n++)
        pthread_create(&threads[n], NULL, increment, i);
    for (int n = 0; n < WORKERS; n++)
        pthread_join(threads[n], NULL);
    uint32_t sum;
    assert(rbdn_io(i, REQ_READ, 4000, 4, &sum, 4, 0, NULL) == 0 && sum == WORKERS * 200);
    end(i, m);
}

int main(void)
{
    a_block_waits_for_those_in_flight_and_parks_new_ones();
    writes_park_for_the_lock_and_one_event_is_posted();
    a_fence_fails_parked_and_future_requests_and_lets_others_complete();
    close_fails_who_waits_and_is_refused_while_used();
    publishing_tells_users_of_size_and_read_only();
    requests_in_flight_finish_on_the_view_they_began_with();
    flushes_are_shared_and_a_failed_one_fences();
    a_store_that_fences_us_fences_the_image();
    a_compare_and_write_waits_for_earlier_writes_and_holds_later_ones();
    writers_of_one_object_share_its_copy_up();
    discarding_everything_leaves_no_object_or_tombstones();
    a_throttle_keeps_order_and_rate();
    a_request_does_not_overtake_throttled_ones();
    statistics_count_what_happened();
    compare_and_writes_of_many_threads_lose_nothing();
    shutting_waits_for_other_threads_calls_and_refuses_later_ones();
    load(0, 0, -1);
    load(30, 0, -1);
    load(20, 40, -1);
    load(20, 40, 40);
    printf("gate ok\n");
    return 0;
}
