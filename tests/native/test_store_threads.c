/* Many threads on one store: for the thread sanitizer, and for what they must never see of each other. */
#include "store_test.h"

#include <pthread.h>
#include <stdatomic.h>

#define ORDER 16
#define SIZE (1u << ORDER)
#define SECTORS (SIZE / 512)
#define OBJECTS 6
#define THREADS 6
#define ROUNDS 1500

static rbdn_store *store;
static _Atomic uint64_t seq;              /* newest snapshot */
static pthread_rwlock_t snapshots = PTHREAD_RWLOCK_INITIALIZER; /* as the engine's gate */
static uint64_t newest[OBJECTS][SECTORS]; /* each sector belongs to one thread: index % THREADS */
static uint64_t at_snapshot[OBJECTS][SECTORS];
static uint64_t snapshot;                 /* id of at_snapshot, 0 none; under `snapshots` */
static _Atomic uint64_t numbers;

#define PARENT 0x7070707070707070ULL

static uint64_t random_of(uint64_t *state, uint64_t below)
{
    *state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
    return (*state >> 33) % below;
}

/* A guarded write as the engine does it: inline if possible, copy-up when there is nothing to write to. */
static void write_sector(uint64_t o, uint32_t sector, uint64_t value)
{
    uint64_t data[64], parent[SIZE / 8], now = seq;
    for (int i = 0; i < 64; i++)
        data[i] = value;
    struct iovec v = {data, 512};
    struct {
        struct snapc c;
        uint64_t id;
    } snapc = {{now, now != 0}, now};
    struct store_op op = {.type = STORE_WRITE, .flags = STORE_GUARD | STORE_NOWAIT, .objno = o, .off = sector * 512,
                          .len = 512, .iov = &v, .iovcnt = 1, .snapc = &snapc.c};
    int64_t r;
    while ((r = store_submit(store, &op)) != 0) {
        if (r == -EAGAIN) {
            op.flags = STORE_GUARD;
            continue;
        }
        EQ(r, -ENOENT);
        for (uint32_t i = 0; i < SIZE / 8; i++)
            parent[i] = PARENT;
        EQ(rbdn_obj_copyup(store, o, parent, SIZE), 0);
    }
}

static void *worker(void *arg)
{
    uint32_t me = (uint32_t)(uintptr_t)arg;
    uint64_t state = me * 7919 + 1, data[64];
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t o = random_of(&state, OBJECTS);
        uint32_t sector = (uint32_t)random_of(&state, SECTORS / THREADS) * THREADS + me;
        uint64_t what = random_of(&state, 100);
        if (what == 0) { /* a new snapshot of everything */
            pthread_rwlock_wrlock(&snapshots);
            snapshot = ++seq;
            memcpy(at_snapshot, newest, sizeof newest);
            uint64_t live[] = {snapshot, snapshot + 1};
            EQ(rbdn_layout_trim(store, live, 2), 0);
            pthread_rwlock_unlock(&snapshots);
            continue;
        }
        pthread_rwlock_rdlock(&snapshots);
        if (what < 3) {
            EQ(rbdn_store_flush(store), 0);
        } else if (what < 50) {
            uint64_t value = ++numbers;
            write_sector(o, sector, value);
            newest[o][sector] = value;
        } else {
            bool head = what < 75 || snapshot == 0;
            uint64_t want = head ? newest[o][sector] : at_snapshot[o][sector];
            int64_t n = rbdn_obj_read(store, o, head ? STORE_NOSNAP : snapshot, sector * 512, data, 512);
            if (n == -ENOENT)
                EQ(want, 0);
            else
                EQ(n, 512);
            for (int i = 0; n > 0 && i < 64; i++)
                CHECK(data[i] == (want ? want : PARENT), "object %d sector %u %s: %llx, not %llx", (int)o, sector,
                      head ? "head" : "snapshot", (unsigned long long)data[i], (unsigned long long)want);
        }
        pthread_rwlock_unlock(&snapshots);
    }
    return NULL;
}

/* Everybody copies the same objects up: one content wins whole. */
static void *copier(void *arg)
{
    static _Atomic int arrived;
    uint8_t buf[4096];
    memset(buf, 1 + (int)(uintptr_t)arg, sizeof buf);
    arrived++;
    while (arrived < THREADS)
        ;
    for (uint64_t o = 100; o < 160; o++) {
        EQ(rbdn_obj_copyup(store, o, buf, sizeof buf), 0);
        uint8_t got[4096];
        EQ(rbdn_obj_read(store, o, STORE_NOSNAP, 0, got, sizeof got), sizeof got);
        for (uint32_t i = 1; i < sizeof got; i++)
            CHECK(got[i] == got[0], "object %d: mixed", (int)o);
    }
    return NULL;
}

static void together(void *(*fn)(void *))
{
    pthread_t t[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&t[i], NULL, fn, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(t[i], NULL);
}

int main(void)
{
    test_folder(NULL);
    store = test_open("threads", ORDER, 1);
    together(copier);
    together(worker);
    test_sound(store);
    rbdn_store_close(store);
    puts("store threads: ok");
    return 0;
}
