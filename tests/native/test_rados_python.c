/* The C side of librbd_py.store.rados over a librados of our own: the ring of watch events keeps its bounds and loses
 * whole watches, never single notifies in silence; operation lists may be freed at any time. */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ffi/api_rados.h"
#include "store/store_rados_lib.h"

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1); \
        } \
    } while (0)

/* --- the fake ------------------------------------------------------------------------------------------------------ */

static struct {
    rados_watchcb2_t notify;
    rados_watcherrcb_t error;
    void *arg;
    int watch_result, unwatched;
    uint64_t seq;
} fake;

struct completion {
    void *arg;
    rados_callback_t done;
    _Atomic int refs, result, finished;
};

static _Atomic int ioctxs, completions, lists;

static int f_conf_get(rados_t c, const char *option, char *buf, size_t len)
{
    return -ENOENT;
}

static int f_ioctx_create2(rados_t c, int64_t pool, rados_ioctx_t *io)
{
    if (pool < 0)
        return -ENOENT;
    *io = malloc(1);
    ioctxs++;
    return 0;
}

static void f_ioctx_destroy(rados_ioctx_t io)
{
    free(io);
    ioctxs--;
}

static void f_set_namespace(rados_ioctx_t io, const char *name) {}
static void f_full_try(rados_ioctx_t io) {}
static void f_snap_set_read(rados_ioctx_t io, uint64_t snap) {}

static int f_set_write_ctx(rados_ioctx_t io, uint64_t seq, uint64_t *snaps, int count)
{
    fake.seq = seq;
    return count && snaps[0] > seq ? -EINVAL : 0;
}

static int f_watch3(rados_ioctx_t io, const char *oid, uint64_t *cookie, rados_watchcb2_t notify, rados_watcherrcb_t error,
                    uint32_t timeout, void *arg)
{
    fake.notify = notify;
    fake.error = error;
    fake.arg = arg;
    *cookie = 77;
    if (fake.watch_result < 0)
        error(arg, 77, -ENOTCONN); /* lost while it is being made */
    return fake.watch_result;
}

static int f_watch_check(rados_ioctx_t io, uint64_t cookie)
{
    return 12;
}

static int f_unwatch2(rados_ioctx_t io, uint64_t cookie)
{
    fake.unwatched++;
    return 0;
}

static int f_watch_flush(rados_t cluster)
{
    return 0;
}

static void put(struct completion *c)
{
    if (atomic_fetch_sub(&c->refs, 1) == 1) {
        free(c);
        completions--;
    }
}

static int f_create_completion(void *arg, rados_callback_t done, rados_completion_t *to)
{
    struct completion *c = calloc(1, sizeof *c);
    c->arg = arg;
    c->done = done;
    c->refs = 1;
    *to = c;
    completions++;
    return 0;
}

static void f_release(rados_completion_t c)
{
    put(c);
}

static int f_return_value(rados_completion_t c)
{
    return ((struct completion *)c)->result;
}

static uint64_t f_version(rados_completion_t c)
{
    return 41;
}

static struct completion *flying;
static int submit_result;

static void finish(struct completion *c, int result)
{
    if (atomic_exchange(&c->finished, 1))
        return;
    c->result = result;
    c->done(c, c->arg);
    put(c);
}

static int f_cancel(rados_ioctx_t io, rados_completion_t c)
{
    finish(c, -ECANCELED);
    return 0;
}

static int fly(struct completion *c)
{
    if (submit_result < 0)
        return submit_result;
    atomic_fetch_add(&c->refs, 1);
    flying = c;
    return 0;
}

static int f_write_operate(rados_write_op_t w, rados_ioctx_t io, rados_completion_t c, const char *oid, time_t *mtime,
                           int flags)
{
    return fly(c);
}

static int f_read_operate(rados_read_op_t r, rados_ioctx_t io, rados_completion_t c, const char *oid, int flags)
{
    return fly(c);
}

static void *f_create_op(void)
{
    lists++;
    return malloc(1);
}

static void f_release_op(void *op)
{
    lists--;
    free(op);
}

static char *read_to;

static void f_read(rados_read_op_t r, uint64_t off, size_t len, char *buf, size_t *got, int *rc)
{
    read_to = buf;
    *got = len;
}

static void f_write(rados_write_op_t w, const char *buf, size_t len, uint64_t off) {}

static void set_up(void)
{
    rados_lib.conf_get = f_conf_get; /* says that it is filled */
    rados_lib.ioctx_create2 = f_ioctx_create2;
    rados_lib.ioctx_destroy = f_ioctx_destroy;
    rados_lib.ioctx_set_namespace = f_set_namespace;
    rados_lib.set_pool_full_try = f_full_try;
    rados_lib.ioctx_snap_set_read = f_snap_set_read;
    rados_lib.ioctx_selfmanaged_snap_set_write_ctx = f_set_write_ctx;
    rados_lib.watch3 = f_watch3;
    rados_lib.watch_check = f_watch_check;
    rados_lib.unwatch2 = f_unwatch2;
    rados_lib.watch_flush = f_watch_flush;
    rados_lib.aio_create_completion2 = f_create_completion;
    rados_lib.aio_release = f_release;
    rados_lib.aio_get_return_value = f_return_value;
    rados_lib.aio_get_version = f_version;
    rados_lib.aio_cancel = f_cancel;
    rados_lib.aio_write_op_operate = f_write_operate;
    rados_lib.aio_read_op_operate = f_read_operate;
    rados_lib.create_write_op = f_create_op;
    rados_lib.create_read_op = f_create_op;
    rados_lib.release_write_op = f_release_op;
    rados_lib.release_read_op = f_release_op;
    rados_lib.read_op_read = f_read;
    rados_lib.write_op_write = f_write;
    CHECK(rbdn_rados_load() == 0);
}

/* --- watches ------------------------------------------------------------------------------------------------------- */

static char payload[RBDN_PAYLOAD_MAX + 1];

static void readable(rbdn_watch_ring *ring, bool expected)
{
    uint64_t count;
    ssize_t rc = read(rbdn_watch_ring_fd(ring), &count, sizeof count);
    CHECK((rc == sizeof count) == expected);
}

static void test_events_in_order(rbdn_ioctx *io)
{
    int err;
    rbdn_watch_event event;
    rbdn_watch_ring *ring = rbdn_watch_ring_new();
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
    readable(ring, false);
    rbdn_watch *w = rbdn_watch_new(ring, io, "o", 5, 30, &err);
    CHECK(w && rbdn_watch_cookie(w) == 77 && rbdn_watch_check(w) == 12);
    fake.notify(fake.arg, 1, 77, 4242, "one", 3);
    fake.notify(fake.arg, 2, 77, 4243, NULL, 0);
    readable(ring, true);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1);
    CHECK(event.token == 5 && event.notify_id == 1 && event.notifier == 4242 && event.cookie == 77 && event.len == 3);
    CHECK(memcmp(payload, "one", 3) == 0);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.notify_id == 2 && event.len == 0);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
    fake.notify(fake.arg, 3, 77, 1, "last", 4);
    fake.error(fake.arg, 77, -ENOTCONN);
    fake.error(fake.arg, 77, -ESHUTDOWN); /* the first reason stays, and is told once */
    fake.notify(fake.arg, 4, 77, 1, "late", 4);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.notify_id == 3);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.notify_id == 0 && event.error == -ENOTCONN);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
    CHECK(rbdn_watch_check(w) == -ENOTCONN);
    fake.unwatched = 0;
    CHECK(rbdn_watch_end(w, NULL) == 0 && fake.unwatched == 1);
    rbdn_watch_ring_free(ring);
}

static void test_a_full_ring_loses_the_watch(rbdn_ioctx *io, size_t len, unsigned most)
{
    int err;
    rbdn_watch_event event;
    rbdn_watch_ring *ring = rbdn_watch_ring_new();
    rbdn_watch *w = rbdn_watch_new(ring, io, "o", 1, 30, &err);
    for (unsigned n = 1; n < 5000; n++)
        fake.notify(fake.arg, n, 77, 1, payload, len);
    unsigned found = 0;
    while (rbdn_watch_ring_next(ring, &event, payload) && event.notify_id)
        CHECK(event.notify_id == ++found && event.len == len);
    CHECK(found > 0 && found <= most);
    CHECK(event.error == -ENOBUFS && event.token == 1);
    CHECK(rbdn_watch_check(w) == -ENOBUFS);
    rbdn_watch_end(w, NULL);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
    rbdn_watch_ring_free(ring);
}

static void test_a_large_payload_loses_the_watch(rbdn_ioctx *io)
{
    int err;
    rbdn_watch_event event;
    rbdn_watch_ring *ring = rbdn_watch_ring_new();
    rbdn_watch *w = rbdn_watch_new(ring, io, "o", 1, 30, &err);
    fake.notify(fake.arg, 1, 77, 1, payload, RBDN_PAYLOAD_MAX);
    fake.notify(fake.arg, 2, 77, 1, payload, RBDN_PAYLOAD_MAX + 1);
    fake.notify(fake.arg, 3, 77, 1, payload, 1);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.notify_id == 1 && event.len == RBDN_PAYLOAD_MAX);
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.notify_id == 0 && event.error == -ENOBUFS);
    rbdn_watch_end(w, NULL);
    rbdn_watch_ring_free(ring);
}

static void test_watches_that_end_leave_the_list_of_the_lost(rbdn_ioctx *io)
{
    rbdn_watch_event event;
    for (unsigned order = 0; order < 6; order++) {
        static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
        int err;
        rbdn_watch *w[3];
        rbdn_watch_ring *ring = rbdn_watch_ring_new();
        for (int i = 0; i < 3; i++) {
            w[i] = rbdn_watch_new(ring, io, "o", (uint64_t)i, 30, &err);
            fake.error(fake.arg, 77, -ENOTCONN);
        }
        rbdn_watch_end(w[orders[order][0]], NULL);
        rbdn_watch_end(w[orders[order][1]], NULL);
        CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.token == (uint64_t)orders[order][2]);
        CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
        rbdn_watch_end(w[orders[order][2]], NULL);
        w[0] = rbdn_watch_new(ring, io, "o", 9, 30, &err);
        fake.error(fake.arg, 77, 0);
        CHECK(rbdn_watch_ring_next(ring, &event, payload) == 1 && event.token == 9 && event.error == -ENOTCONN);
        rbdn_watch_end(w[0], NULL);
        rbdn_watch_ring_free(ring);
    }
}

static void test_a_watch_that_fails(rbdn_ioctx *io)
{
    int err;
    rbdn_watch_event event;
    rbdn_watch_ring *ring = rbdn_watch_ring_new();
    fake.watch_result = -ENOENT;
    CHECK(rbdn_watch_new(ring, io, "o", 1, 30, &err) == NULL && err == -ENOENT);
    fake.watch_result = 0;
    CHECK(rbdn_watch_ring_next(ring, &event, payload) == 0);
    rbdn_watch_ring_free(ring);
}

static void *notifier(void *arg)
{
    static char sent[100];
    for (unsigned n = 1; n <= 3000; n++)
        fake.notify(fake.arg, n, 77, 1, sent, n % 100);
    return NULL;
}

static void test_events_from_another_thread(rbdn_ioctx *io)
{
    int err;
    pthread_t thread;
    rbdn_watch_event event = {0};
    rbdn_watch_ring *ring = rbdn_watch_ring_new();
    rbdn_watch *w = rbdn_watch_new(ring, io, "o", 1, 30, &err);
    pthread_create(&thread, NULL, notifier, NULL);
    uint64_t last = 0;
    bool lost = false;
    while (last < 3000 && !lost) {
        if (!rbdn_watch_ring_next(ring, &event, payload))
            continue;
        lost = event.notify_id == 0;
        if (!lost)
            CHECK(event.notify_id == ++last && event.len == last % 100);
    }
    pthread_join(thread, NULL);
    rbdn_watch_end(w, NULL);
    rbdn_watch_ring_free(ring);
}

/* --- operation lists ----------------------------------------------------------------------------------------------- */

static rbdn_oplist *reading(rbdn_out **out)
{
    int err;
    rbdn_oplist *l = rbdn_oplist_new(0);
    rbdn_op op = {.kind = RBDN_OP_READ, .length = 100};
    *out = rbdn_oplist_get(l, &op, &err);
    CHECK(*out && err == 0);
    return l;
}

static void *finish_later(void *arg)
{
    usleep(20000);
    memset(read_to, 'x', 100);
    finish(arg, 0);
    return NULL;
}

static void test_a_list_is_waited_for(rbdn_ioctx *io)
{
    rbdn_out *out;
    rbdn_oplist *l = reading(&out);
    CHECK(rbdn_oplist_result(l) == -EINPROGRESS);
    CHECK(rbdn_oplist_send(l, io, "o", 5, 0, NULL, 0) == 0);
    CHECK(rbdn_oplist_send(l, io, "o", 5, 0, NULL, 0) == -EINVAL); /* once */
    CHECK(rbdn_oplist_wait(l, 1) == 1);
    pthread_t thread;
    pthread_create(&thread, NULL, finish_later, flying);
    while (rbdn_oplist_wait(l, 200))
        ;
    pthread_join(thread, NULL);
    CHECK(rbdn_oplist_result(l) == 0 && rbdn_oplist_version(l) == 41 && out->len == 100 && out->data[99] == 'x');
    rbdn_oplist_free(l);
}

static void test_a_list_freed_in_flight_is_cancelled(rbdn_ioctx *io)
{
    rbdn_out *out;
    rbdn_oplist *l = reading(&out);
    CHECK(rbdn_oplist_send(l, io, "o", 5, 0, NULL, 0) == 0);
    rbdn_oplist_free(l);
    CHECK(completions == 0 && lists == 0);
}

static void *finish_now(void *arg)
{
    finish(arg, 0);
    return NULL;
}

static void test_freed_while_it_ends(rbdn_ioctx *io)
{
    for (int round = 0; round < 300; round++) {
        rbdn_out *out;
        rbdn_oplist *l = reading(&out);
        CHECK(rbdn_oplist_send(l, io, "o", 5, 0, NULL, 0) == 0);
        pthread_t thread;
        struct completion *c = flying;
        atomic_fetch_add(&c->refs, 1);
        pthread_create(&thread, NULL, finish_now, c);
        rbdn_oplist_free(l);
        pthread_join(thread, NULL);
        put(c);
    }
    CHECK(completions == 0 && lists == 0);
}

static void test_what_is_refused(rbdn_ioctx *io)
{
    int err;
    rbdn_out *out;
    rbdn_oplist *l = reading(&out);
    rbdn_op write = {.kind = RBDN_OP_WRITE, .data = "x", .data_len = 1};
    rbdn_op large = {.kind = RBDN_OP_READ, .length = 1ULL << 40};
    CHECK(rbdn_oplist_add(l, &write) == -EINVAL);
    CHECK(rbdn_oplist_get(l, &write, &err) == NULL && err == -EINVAL);
    CHECK(rbdn_oplist_get(l, &large, &err) == NULL && err == -EINVAL);
    CHECK(rbdn_oplist_omap_set(l, NULL, NULL, NULL, NULL, 0) == -EINVAL);
    submit_result = -EFBIG;
    CHECK(rbdn_oplist_send(l, io, "o", 5, 0, NULL, 0) == -EFBIG);
    submit_result = 0;
    rbdn_oplist_free(l);
    l = rbdn_oplist_new(1);
    rbdn_op read = {.kind = RBDN_OP_READ, .length = 1};
    uint64_t snaps[1] = {9};
    CHECK(rbdn_oplist_add(l, &write) == 0);
    CHECK(rbdn_oplist_add(l, &read) == -EINVAL && rbdn_oplist_get(l, &read, &err) == NULL && err == -EINVAL);
    CHECK(rbdn_oplist_send(l, io, "o", 0, 3, snaps, 1) == -EINVAL); /* librados' word on the snap context */
    rbdn_oplist_free(l);
    CHECK(completions == 0 && lists == 0);
    CHECK(rbdn_ioctx_open(NULL, -1, "", &err) == NULL && err == -ENOENT);
}

int main(void)
{
    int err;
    set_up();
    rbdn_ioctx *io = rbdn_ioctx_open(NULL, 1, "space", &err);
    CHECK(io);
    test_events_in_order(io);
    test_a_full_ring_loses_the_watch(io, 10, 1024);
    test_a_full_ring_loses_the_watch(io, RBDN_PAYLOAD_MAX, (4U << 20) / RBDN_PAYLOAD_MAX);
    test_a_large_payload_loses_the_watch(io);
    test_watches_that_end_leave_the_list_of_the_lost(io);
    test_a_watch_that_fails(io);
    test_events_from_another_thread(io);
    test_a_list_is_waited_for(io);
    test_a_list_freed_in_flight_is_cancelled(io);
    test_freed_while_it_ends(io);
    test_what_is_refused(io);
    rbdn_ioctx_close(io);
    CHECK(ioctxs == 0);
    return 0;
}
