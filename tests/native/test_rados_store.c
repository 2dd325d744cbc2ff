/* The store on RADOS over a librados of our own: what it sends, in which order, and what it does in trouble. */
#include "store_test.h"

#include "engine/threads.h"
#include "fake_librados.h"
#include "ffi/api_rados_data.h"

#define SIZE (1u << FAKE_ORDER)
#define K4 4096u
#define CLUSTER ((void *)0x1234)

static rbdn_store *store;

static void begin(void)
{
    int err;
    store = rbdn_rados_open(CLUSTER, 7, "", FAKE_PREFIX, FAKE_ORDER, &err);
    CHECK(store, "%s", strerror(-err));
}

static void end(void)
{
    rbdn_store_close(store);
    store = NULL;
}

static void map_start(void)
{
    rbdn_object_map m = {.pool_id = 7, .image_id = FAKE_IMAGE, .states = fake.head, .count = FAKE_OBJECTS, .fast_diff = 1,
                         .assert_locked = FAKE_ASSERT, .assert_len = strlen(FAKE_ASSERT)};
    fake.map_used = true;
    fake.map_invalid = false;
    EQ(rbdn_map_start(store, &m), 0);
}

static void map_stop(void)
{
    EQ(rbdn_map_stop(store), 0);
    fake.map_used = false;
}

/* All objects gone, a map of nothing. */
static void clean(void)
{
    for (unsigned n = 0; n < FAKE_OBJECTS; n++) {
        rbdn_obj_remove(store, n, 0, NULL, 0);
        fake.objects->objects[n].seq = 0;
        for (struct memory_version *v = fake.objects->objects[n].oldest, *next; v; v = next) {
            next = v->newer;
            free(v->content.data);
            free(v);
        }
        fake.objects->objects[n].oldest = NULL;
    }
    memset(fake.head, 0, sizeof fake.head);
    memset(fake.snaps, 0, sizeof fake.snaps);
    memset(fake.snap_objects, 0, sizeof fake.snap_objects);
    fake.snap_invalid = 0;
}

struct pending {
    struct store_op op;
    struct iovec iov[2];
    struct flag done;
    int64_t result;
    uint8_t data[K4];
};

static void pending_done(struct store_op *op)
{
    struct pending *p = op->owner;
    p->result = op->result;
    flag_set(&p->done);
}

static void start(struct pending *p, uint8_t type, uint64_t objno, uint64_t off)
{
    p->done.set = 0;
    p->iov[0] = (struct iovec){p->data, 1000};
    p->iov[1] = (struct iovec){p->data + 1000, K4 - 1000};
    p->op = (struct store_op){.type = type, .flags = STORE_NOWAIT, .objno = objno, .off = off, .len = K4, .iov = p->iov,
                              .iovcnt = 2, .snap_id = STORE_NOSNAP, .done = pending_done, .owner = p};
    int64_t r = store_submit(store, &p->op);
    if (r != STORE_PENDING) {
        p->result = r;
        flag_set(&p->done);
    }
}

static int64_t finish(struct pending *p)
{
    flag_wait(&p->done);
    return p->result;
}

static struct pending many[256];

static uint64_t flying(void)
{
    pthread_mutex_lock(&fake.lock);
    uint64_t n = fake.ops;
    pthread_mutex_unlock(&fake.lock);
    return n;
}

static void test_operations(void)
{
    uint8_t buf[2 * K4], data[K4], big[SIZE];
    uint64_t snap = 3, pairs[4], size;
    begin();
    memset(data, 'x', sizeof data);
    EQ(rbdn_obj_read(store, 0, STORE_NOSNAP, 0, buf, K4), -ENOENT);
    EQ(rbdn_obj_zero(store, 0, 0, K4, 0, NULL, 0), -ENOENT);
    EQ(rbdn_obj_truncate(store, 0, 5, 0, 0, NULL, 0), -ENOENT);
    EQ(rbdn_obj_remove(store, 0, 0, NULL, 0), -ENOENT);
    EQ(rbdn_obj_stat(store, 0, STORE_NOSNAP), -ENOENT);
    EQ(rbdn_obj_write(store, 0, K4, data, K4, 0, NULL, 0), 0);
    EQ(rbdn_obj_read(store, 0, STORE_NOSNAP, 0, buf, sizeof buf), 2 * K4);
    CHECK(buf[K4 - 1] == 0 && buf[K4] == 'x' && buf[2 * K4 - 1] == 'x');
    EQ(rbdn_obj_stat(store, 0, STORE_NOSNAP), 2 * K4);
    EQ(rbdn_obj_extents(store, 0, STORE_NOSNAP, 100, SIZE - 100, pairs, 2), 1);
    CHECK(pairs[0] == 100 && pairs[1] == 2 * K4 - 100);
    EQ(rbdn_obj_extents(store, 0, STORE_NOSNAP, 2 * K4, 10, pairs, 2), 0);
    memset(data, 'y', sizeof data);
    EQ(rbdn_obj_write(store, 0, K4, data, K4, snap, &snap, 1), 0);
    EQ(rbdn_obj_read(store, 0, snap, K4, buf, 1), 1);
    EQ(buf[0], 'x');
    EQ(rbdn_obj_read(store, 0, STORE_NOSNAP, K4, buf, 1), 1);
    EQ(buf[0], 'y');
    EQ(rbdn_obj_truncate(store, 1, 0, 1, snap, &snap, 1), 0);
    EQ(rbdn_obj_stat(store, 1, STORE_NOSNAP), 0);
    for (size = 0; size < SIZE; size++)
        big[size] = size / K4 % 3 == 1 ? size : 0;
    EQ(rbdn_obj_copyup(store, 2, big, SIZE), 0);
    uint8_t again[SIZE];
    memset(again, 0, sizeof again);
    CHECK(rbdn_obj_read(store, 2, STORE_NOSNAP, 0, again, SIZE) > 0 && !memcmp(big, again, SIZE));
    EQ(rbdn_obj_copyup(store, 2, data, K4), 0);
    CHECK(rbdn_obj_read(store, 2, STORE_NOSNAP, 0, again, SIZE) > 0 && !memcmp(big, again, SIZE));
    EQ(rbdn_obj_write(store, 3, 0, big, SIZE, 0, NULL, 0), 0);
    EQ(rbdn_obj_write(store, 3, SIZE - 1, data, 2, 0, NULL, 0), -EINVAL);
    EQ(rbdn_obj_write(store, 3, 9, data, 0, 0, NULL, 0), 0);
    EQ(rbdn_store_flush(store), 0);
    int err;
    CHECK(!rbdn_rados_open(CLUSTER, 8, "", FAKE_PREFIX, FAKE_ORDER, &err) && err == -ENOENT);
    fake.submit_errno = -ENOMEM;
    EQ(rbdn_obj_stat(store, 0, STORE_NOSNAP), -ENOMEM);
    clean();
    end();
}

static void test_neighbours_travel_together(void)
{
    enum { N = SIZE / K4 };
    begin();
    for (int type = STORE_WRITE; type >= STORE_READ; type--) {
        uint64_t before = fake.messages;
        fake_hold(true);
        for (unsigned n = 0; n < N; n++) {
            memset(many[n].data, type == STORE_WRITE ? (int)n + 1 : 0, K4);
            start(&many[n], type, 4, n * K4);
        }
        EQ(flying(), 2);
        fake_hold(false);
        for (unsigned n = 0; n < N; n++) {
            EQ(finish(&many[n]), type == STORE_WRITE ? 0 : K4);
            CHECK(many[n].data[0] == n + 1 && many[n].data[K4 - 1] == n + 1, "%u: %u", n, many[n].data[0]);
        }
        CHECK(fake.messages - before <= 4, "%llu messages", (unsigned long long)(fake.messages - before));
    }
    uint64_t reads, writes;
    EQ(rbdn_rados_merged(store, &reads, &writes), 0);
    CHECK(reads >= N - 4 && writes >= N - 4);
    /* What is not a neighbour waits for nobody; a read past the end is short for those behind it only. */
    fake_hold(true);
    for (unsigned n = 0; n < 8; n++)
        start(&many[n], STORE_READ, 4, (7 - n) * K4);
    EQ(flying(), 8);
    fake_hold(false);
    for (unsigned n = 0; n < 8; n++)
        EQ(finish(&many[n]), K4);
    EQ(rbdn_obj_truncate(store, 4, 5 * K4 + 7, 0, 0, NULL, 0), 0);
    fake_hold(true);
    for (unsigned n = 0; n < 8; n++)
        start(&many[n], STORE_READ, 4, n * K4);
    fake_hold(false);
    for (unsigned n = 0; n < 8; n++)
        EQ(finish(&many[n]), n < 5 ? K4 : n == 5 ? 7 : 0);
    /* One error is everybody's who travelled in it. */
    fake_hold(true);
    for (unsigned n = 0; n < 4; n++)
        start(&many[n], STORE_READ, 5, n * K4);
    fake_hold(false);
    for (unsigned n = 0; n < 4; n++)
        EQ(finish(&many[n]), -ENOENT);
    clean();
    end();
}

static void test_room(void)
{
    fake.conf_ops = "8"; /* half of it is ours */
    fake.conf_bytes = "1000000";
    fake.ops_most = 0;
    begin();
    fake_hold(true);
    for (unsigned n = 0; n < 64; n++)
        start(&many[n], STORE_WRITE, n % FAKE_OBJECTS, n / FAKE_OBJECTS * 3 * K4);
    EQ(flying(), 4);
    fake_hold(false);
    for (unsigned n = 0; n < 64; n++)
        EQ(finish(&many[n]), 0);
    EQ(fake.ops_most, 4);
    end();
    fake.conf_ops = NULL;
    fake.conf_bytes = "40000";
    fake.bytes_most = 0;
    begin();
    static uint8_t whole[SIZE]; /* larger than all there is: it goes alone */
    EQ(rbdn_obj_write(store, 1, 0, whole, SIZE, 0, NULL, 0), 0);
    fake.bytes_most = 0;
    for (unsigned n = 0; n < 64; n++)
        start(&many[n], STORE_WRITE, n % FAKE_OBJECTS, n / FAKE_OBJECTS * 3 * K4);
    for (unsigned n = 0; n < 64; n++)
        EQ(finish(&many[n]), 0);
    CHECK(fake.bytes_most <= 20000);
    fake.conf_bytes = NULL;
    clean();
    end();
}

static void test_fence(void)
{
    for (int how = 0; how < 3; how++) {
        fake.conf_ops = how == 1 ? "8" : NULL;
        begin();
        if (how == 2)
            map_start();
        fake_hold(true);
        for (unsigned n = 0; n < 48; n++)
            start(&many[n], n % 3 ? STORE_WRITE : STORE_READ, n / 16, n % 16 * K4);
        if (how == 0) { /* one answer is enough */
            pthread_mutex_lock(&fake.lock);
            strcpy(fake.fail, "rbd_data");
            fake.fail_errno = -ESHUTDOWN;
            fake.fail_count = 1;
            pthread_mutex_unlock(&fake.lock);
            fake_hold(false);
        } else {
            EQ(rbdn_store_fence(store, -ESHUTDOWN), 0);
        }
        unsigned refused = 0;
        for (unsigned n = 0; n < 48; n++) {
            int64_t r = finish(&many[n]);
            CHECK(r == -ESHUTDOWN || (how != 1 && r >= -ENOENT), "%lld", (long long)r);
            refused += r == -ESHUTDOWN;
        }
        CHECK(refused >= (how ? 32 : 1));
        EQ(rbdn_obj_stat(store, 0, STORE_NOSNAP), -ESHUTDOWN);
        EQ(rbdn_store_fence(store, 0), -EINVAL);
        fake_hold(false);
        end();
        fake.map_used = false;
        begin();
        clean();
        end();
    }
    fake.conf_ops = NULL;
}

static void test_map_goes_first(void)
{
    begin();
    map_start();
    uint64_t before = fake.messages;
    EQ(rbdn_obj_read(store, 0, STORE_NOSNAP, 0, many[0].data, K4), -ENOENT);
    EQ(rbdn_obj_stat(store, 0, STORE_NOSNAP), -ENOENT);
    EQ(rbdn_obj_remove(store, 0, 0, NULL, 0), -ENOENT);
    EQ(rbdn_obj_zero(store, 0, 0, K4, 0, NULL, 0), -ENOENT);
    EQ(fake.messages, before); /* nobody was asked */
    /* Many new neighbours: few changes of the map. */
    before = fake.map_updates;
    fake_hold(true);
    for (unsigned n = 0; n < FAKE_OBJECTS; n++)
        start(&many[n], STORE_WRITE, n, 0);
    EQ(rbdn_map_stop(store), -EBUSY);
    fake_hold(false);
    for (unsigned n = 0; n < FAKE_OBJECTS; n++)
        EQ(finish(&many[n]), 0);
    CHECK(fake.map_updates - before <= 5, "%llu", (unsigned long long)(fake.map_updates - before));
    before = fake.map_updates;
    EQ(rbdn_obj_write(store, 3, 0, "again", 5, 0, NULL, 0), 0);
    EQ(fake.map_updates, before);
    EQ(rbdn_obj_remove(store, 3, 0, NULL, 0), 0);
    EQ(fake.head[3], 0);
    /* A snapshot makes all clean: the next change says it. */
    map_stop();
    for (unsigned n = 0; n < FAKE_OBJECTS; n++)
        fake.head[n] = fake.head[n] ? 3 : 0;
    map_start();
    uint64_t snap = 2;
    EQ(rbdn_obj_write(store, 4, 0, "again", 5, snap, &snap, 1), 0);
    EQ(fake.head[4], 1);
    EQ(fake.head[5], 3);
    EQ(rbdn_obj_truncate(store, 5, 9, 0, snap, &snap, 1), 0);
    EQ(fake.head[5], 1);
    /* For who changes objects past the store. */
    EQ(rbdn_map_change(store, 3, 1), 0);
    EQ(fake.head[3], 1);
    EQ(rbdn_map_change(store, 3, 2), 0);
    EQ(fake.head[3], 2);
    EQ(rbdn_map_change(store, 3, 0), 0);
    EQ(fake.head[3], 0);
    EQ(rbdn_map_change(store, 3, 2), 0);
    EQ(fake.head[3], 0);
    EQ(rbdn_map_broken(store), 0);
    map_stop();
    EQ(rbdn_map_broken(store), -ENOENT);
    clean();
    end();
}

static int64_t copyup(uint64_t objno, const struct snapc *snapc, uint8_t flags)
{
    struct pending *p = &many[0];
    p->done.set = 0;
    p->iov[0] = (struct iovec){p->data, K4};
    p->op = (struct store_op){.type = STORE_COPYUP, .flags = flags, .objno = objno, .len = K4, .iov = p->iov, .iovcnt = 1,
                              .snapc = snapc, .done = pending_done, .owner = p};
    memset(p->data, 'p', K4);
    EQ(store_submit(store, &p->op), STORE_PENDING);
    return finish(p);
}

static void test_copies_appear_in_the_maps_of_snapshots(void)
{
    struct {
        struct snapc c;
        uint64_t ids[4];
    } s = {{9, 4}, {9, 7, 5, 2}};
    begin();
    fake.snap_objects[9] = fake.snap_objects[7] = fake.snap_objects[5] = FAKE_OBJECTS;
    fake.snap_objects[2] = 3; /* smaller then */
    map_start();
    EQ(copyup(6, &s.c, 0), 0);
    EQ(fake.snaps[5][6], 1);
    EQ(fake.snaps[7][6], 3);
    EQ(fake.snaps[9][6], 3);
    EQ(fake.head[6], 1);
    EQ(copyup(2, &s.c, STORE_CLEAN), 0);
    EQ(fake.snaps[2][2], 1);
    EQ(fake.snaps[5][2], 3);
    EQ(fake.head[2], 3);
    fake.snap_objects[7] = 0; /* has none */
    EQ(copyup(8, &s.c, 0), 0);
    EQ(fake.snaps[5][8], 1);
    EQ(fake.snaps[9][8], 3);
    strcpy(fake.fail, "rbd_object_map." FAKE_IMAGE ".");
    fake.fail_errno = -EIO;
    fake.fail_count = 1;
    EQ(copyup(9, &s.c, 0), 0);
    end(); /* what flags the failed one may still be under way */
    fake.fail_count = 0;
    fake.map_used = false;
    begin();
    clean();
    end();
}

static void test_a_map_that_fails_is_declared_invalid(void)
{
    begin();
    for (int lost_lock = 0; lost_lock < 2; lost_lock++) {
        map_start();
        if (lost_lock) {
            fake.map_locked = false;
        } else {
            strcpy(fake.fail, "rbd_object_map");
            fake.fail_errno = -EIO;
            fake.fail_count = 1;
        }
        for (unsigned n = 0; n < 16; n++)
            start(&many[n], STORE_WRITE, n * 2 + 1, 0);
        for (unsigned n = 0; n < 16; n++)
            EQ(finish(&many[n]), 0);
        CHECK(fake.map_invalid);
        EQ(rbdn_map_broken(store), 1);
        EQ(rbdn_obj_remove(store, 1, 0, NULL, 0), 0);
        EQ(rbdn_obj_remove(store, 1, 0, NULL, 0), -ENOENT);
        EQ(rbdn_obj_stat(store, 3, STORE_NOSNAP), K4); /* asked, not believed */
        fake.map_locked = true;
        fake.fail_count = 0;
        map_stop();
        clean();
    }
    end();
}

/* --- many threads -------------------------------------------------------------------------------------------------- */

#define THREADS 4
#define ROUNDS 700

static uint32_t shadow[FAKE_OBJECTS][SIZE / K4]; /* 0: reads as zeros; object n belongs to thread n % THREADS */
static bool exists[FAKE_OBJECTS];
static _Atomic uint32_t numbers = 1;

static void verify(uint64_t o, const struct pending *p, unsigned block)
{
    if (p->result == -ENOENT) {
        CHECK(!exists[o]);
        return;
    }
    CHECK(p->result >= 0, "%lld", (long long)p->result);
    uint32_t found = 0;
    if (p->result == K4)
        memcpy(&found, p->data + 2000, 4);
    CHECK(found == shadow[o][block], "object %llu block %u: %u, not %u", (unsigned long long)o, block, found,
          shadow[o][block]);
}

static void *worker(void *arg)
{
    unsigned me = (uintptr_t)arg;
    uint64_t state = me * 7919 + 3;
    struct pending *mine = &many[me * 16];
    for (unsigned round = 0; round < ROUNDS; round++) {
        unsigned o = memory_random(&state) % (FAKE_OBJECTS / THREADS) * THREADS + me, count = 0, first;
        unsigned dice = memory_random(&state) % 10;
        first = memory_random(&state) % (SIZE / K4);
        if (dice < 5) { /* a row of writes or reads */
            for (unsigned b = first; b < SIZE / K4 && count < 12; b++, count++) {
                if (dice < 3) {
                    uint32_t n = atomic_fetch_add(&numbers, 1);
                    for (unsigned at = 0; at < K4; at += 4)
                        memcpy(mine[count].data + at, &n, 4);
                    shadow[o][b] = n;
                    exists[o] = true;
                }
                start(&mine[count], dice < 3 ? STORE_WRITE : STORE_READ, o, b * K4);
            }
            for (unsigned n = 0; n < count; n++) {
                finish(&mine[n]);
                if (dice < 3)
                    EQ(mine[n].result, 0);
                else
                    verify(o, &mine[n], first + n);
            }
        } else if (dice < 7) {
            EQ(rbdn_obj_remove(store, o, 0, NULL, 0), exists[o] ? 0 : -ENOENT);
            memset(shadow[o], 0, sizeof shadow[o]);
            exists[o] = false;
        } else if (dice < 8) {
            EQ(rbdn_obj_zero(store, o, first * K4, K4, 0, NULL, 0), exists[o] ? 0 : -ENOENT);
            shadow[o][first] = 0;
        } else if (dice < 9) {
            EQ(rbdn_obj_truncate(store, o, first * K4, 1, 0, NULL, 0), 0);
            exists[o] = true;
            memset(&shadow[o][first], 0, (SIZE / K4 - first) * sizeof shadow[o][0]);
        } else { /* write and remove at once: either may win, the map must know */
            start(&mine[0], STORE_WRITE, o, 0);
            start(&mine[1], STORE_REMOVE, o, 0);
            start(&mine[2], STORE_WRITE, o, 3 * K4);
            for (unsigned n = 0; n < 3; n++)
                CHECK(finish(&mine[n]) == 0 || (n == 1 && mine[n].result == -ENOENT), "%u: %lld", n,
                      (long long)mine[n].result);
            rbdn_obj_remove(store, o, 0, NULL, 0);
            memset(shadow[o], 0, sizeof shadow[o]);
            exists[o] = false;
        }
    }
    return NULL;
}

static void test_threads(bool with_map, bool map_fails)
{
    pthread_t threads[THREADS];
    memset(shadow, 0, sizeof shadow);
    memset(exists, 0, sizeof exists);
    fake.conf_ops = "40";
    begin();
    if (with_map)
        map_start();
    if (map_fails) {
        pthread_mutex_lock(&fake.lock);
        strcpy(fake.fail, "rbd_object_map");
        fake.fail_errno = -EIO;
        fake.fail_count = 1;
        pthread_mutex_unlock(&fake.lock);
    }
    for (uintptr_t n = 0; n < THREADS; n++)
        pthread_create(&threads[n], NULL, worker, (void *)n);
    for (unsigned n = 0; n < THREADS; n++)
        pthread_join(threads[n], NULL);
    if (with_map && !map_fails)
        for (unsigned n = 0; n < FAKE_OBJECTS; n++)
            CHECK(fake.head[n] == exists[n], "object %u: %u", n, fake.head[n]);
    if (with_map)
        map_stop();
    fake.conf_ops = NULL;
    clean();
    end();
}

int main(void)
{
    fake_start();
    test_operations();
    test_neighbours_travel_together();
    test_room();
    test_fence();
    test_map_goes_first();
    test_copies_appear_in_the_maps_of_snapshots();
    test_a_map_that_fails_is_declared_invalid();
    test_threads(false, false);
    test_threads(true, false);
    test_threads(true, true);
    fake_stop();
    return 0;
}
