/* Several processes on one layout: snapshot readers beside a copying writer, ownership, death at any moment. */
#include "store_test.h"

#include <sys/mman.h>
#include <time.h>

#define ORDER 16
#define SIZE (1u << ORDER)
#define OBJECTS 8

/* Anonymous shared memory: what the processes of a test tell each other. */
struct shared {
    _Atomic uint64_t snap; /* id readers are to look at; every byte of it is the id's low byte */
    _Atomic int stop, reads, step;
};

static struct shared *shared;

static void pause_ms(long ms)
{
    nanosleep(&(struct timespec){0, ms * 1000000}, NULL);
}

static void wait_step(int step)
{
    while (shared->step < step)
        pause_ms(1);
}

/* Reads whole objects at the announced snapshot until told to stop. */
static void reader(void *arg)
{
    static uint8_t buf[SIZE];
    rbdn_store *s = test_open("cow", ORDER, 0);
    while (!shared->stop) {
        uint64_t snap = shared->snap;
        for (uint64_t o = 0; o < OBJECTS; o++) {
            int64_t r = rbdn_obj_read(s, o, snap, 0, buf, SIZE);
            if (snap != shared->snap)
                break; /* may be trimmed by now */
            EQ(r, SIZE);
            for (uint32_t i = 0; i < SIZE; i++)
                CHECK(buf[i] == (uint8_t)snap, "object %d: snapshot %d shows %d at %u", (int)o, (int)snap, buf[i], i);
            shared->reads++;
        }
    }
    rbdn_store_close(s);
}

static void fill(rbdn_store *s, uint64_t value, uint64_t seq)
{
    static uint8_t buf[SIZE];
    memset(buf, (uint8_t)value, SIZE);
    for (uint64_t o = 0; o < OBJECTS; o++)
        EQ(rbdn_obj_write(s, o, 0, buf, SIZE, seq, &seq, seq != 0), 0);
}

/* HEAD is overwritten right after each snapshot, so readers meet copies in the making; old snapshots are trimmed. */
static void snapshot_readers_see_no_overwrite(void)
{
    rbdn_store *s = test_open("cow", ORDER, 1);
    pid_t readers[2];
    memset(shared, 0, sizeof *shared);
    fill(s, 1, 0);
    shared->snap = 1;
    for (int i = 0; i < 2; i++)
        readers[i] = test_fork(reader, NULL);
    for (uint64_t snap = 1; snap < 60; snap++) {
        fill(s, 200, snap);
        fill(s, snap + 1, snap);
        shared->snap = snap + 1;
        uint64_t live[] = {snap + 1, snap + 2};
        EQ(rbdn_layout_trim(s, live, 2), 0);
    }
    while (shared->reads < 200)
        pause_ms(1);
    shared->stop = 1;
    for (int i = 0; i < 2; i++)
        EQ(test_wait(readers[i]), 0);
    test_sound(s);
    rbdn_store_close(s);
}

static void owner(void *arg)
{
    rbdn_store *s = test_open("own", ORDER, 0);
    EQ(rbdn_layout_own(s, 0), 0);
    EQ(rbdn_layout_own(s, 0), 0);
    shared->step = 1;
    wait_step(2);
    EQ(rbdn_layout_disown(s), 0); /* counted: still owned */
    shared->step = 3;
    for (;;)
        pause_ms(100);
}

static void ownership_ends_with_the_owner(void)
{
    rbdn_store *s = test_open("own", ORDER, 1);
    memset(shared, 0, sizeof *shared);
    EQ(rbdn_layout_disown(s), -ENOLCK);
    pid_t pid = test_fork(owner, NULL);
    wait_step(1);
    EQ(rbdn_layout_own(s, 0), -ETIMEDOUT);
    EQ(rbdn_layout_own(s, 30), -ETIMEDOUT);
    shared->step = 2;
    wait_step(3);
    EQ(rbdn_layout_own(s, 0), -ETIMEDOUT);
    kill(pid, SIGSTOP);
    EQ(rbdn_layout_own(s, 20), -ETIMEDOUT); /* a stopped owner could still write */
    kill(pid, SIGKILL);
    EQ(rbdn_layout_own(s, 5000), 0);
    test_wait(pid);
    rbdn_store *other = test_open("own", ORDER, 0); /* another handle of this process is another owner */
    EQ(rbdn_layout_own(other, 0), -ETIMEDOUT);
    EQ(rbdn_layout_disown(s), 0);
    EQ(rbdn_layout_own(other, 0), 0);
    rbdn_store_close(other);
    EQ(rbdn_layout_own(s, 0), 0);
    rbdn_store_close(s);
}

static void far_writer(void *arg)
{
    rbdn_store *s = test_open("grow", ORDER, 0);
    EQ(rbdn_obj_write(s, 3000000, 5, "far", 3, 0, NULL, 0), 0);
    rbdn_store_close(s);
}

static void growth_is_seen(void)
{
    char buf[8];
    rbdn_store *s = test_open("grow", ORDER, 1);
    EQ(rbdn_obj_stat(s, 3000000, STORE_NOSNAP), -ENOENT);
    EQ(test_wait(test_fork(far_writer, NULL)), 0);
    EQ(rbdn_obj_read(s, 3000000, STORE_NOSNAP, 0, buf, 8), 8);
    CHECK(!memcmp(buf, "\0\0\0\0\0far", 8));
    EQ(rbdn_layout_next(s, 0, 0), 3000000);
    test_sound(s);
    rbdn_store_close(s);
}

/* Copies up, overwrites, snapshots and removes as fast as it can; dies at any moment. Objects hold one value. */
static void mortal(void *arg)
{
    static uint8_t buf[SIZE];
    rbdn_store *s = test_open("mortal", ORDER, 0);
    uint64_t seq = *(uint64_t *)arg, ids[1];
    test_seed ^= (uint64_t)getpid() << 20;
    for (;;) {
        uint64_t o = rnd(OBJECTS);
        memset(buf, 1 + (int)rnd(100), SIZE);
        ids[0] = seq;
        switch (rnd(4)) {
        case 0: rbdn_obj_remove(s, o, seq, ids, seq != 0); break;
        case 1: rbdn_obj_truncate(s, o, 0, 1, seq, ids, seq != 0); break;
        case 2: rbdn_obj_copyup(s, o, buf, SIZE); break;
        default: seq = ++shared->snap;
        }
    }
}

/* An object is absent, empty or holds one value all over; what others create reads as zeros beside what they wrote. */
static void survivors_see_whole_objects(void)
{
    static uint8_t buf[SIZE];
    memset(shared, 0, sizeof *shared);
    rbdn_store *s = test_open("mortal", ORDER, 1);
    for (int round = 0; round < 40; round++) {
        uint64_t seq = shared->snap;
        pid_t pid = test_fork(mortal, &seq);
        nanosleep(&(struct timespec){0, 1000000 + (long)rnd(6000000)}, NULL);
        kill(pid, SIGKILL);
        test_wait(pid);
        if (round % 4 == 3) { /* nobody has it open: repaired */
            rbdn_store_close(s);
            s = test_open("mortal", ORDER, 0);
            test_sound(s);
        }
        uint64_t now = shared->snap;
        for (uint64_t o = 0; o < OBJECTS; o++) {
            int64_t n = rbdn_obj_read(s, o, STORE_NOSNAP, 0, buf, SIZE);
            if (n == -ENOENT) {
                EQ(rbdn_obj_write(s, o, 100, "x", 1, now, &now, now != 0), 0);
                EQ(rbdn_obj_truncate(s, o, SIZE, 0, now, &now, now != 0), 0);
                EQ(rbdn_obj_read(s, o, STORE_NOSNAP, 0, buf, SIZE), SIZE);
                for (uint32_t i = 0; i < SIZE; i++)
                    CHECK(buf[i] == (i == 100 ? 'x' : 0), "stray data at %u of object %d", i, (int)o);
                EQ(rbdn_obj_remove(s, o, now, &now, now != 0), 0);
            } else {
                /* A truncation that was cut short may have cleared it already: zeros, or all of it. */
                CHECK(n == 0 || n == SIZE, "size %lld", (long long)n);
                for (uint32_t i = 0; i < (uint32_t)n; i++)
                    CHECK(buf[i] == buf[0], "object %d: %d at %u, %d at 0", (int)o, buf[i], i, buf[0]);
            }
        }
    }
    rbdn_store_close(s);
    s = test_open("mortal", ORDER, 0);
    test_sound(s);
    rbdn_store_close(s);
}

int main(void)
{
    test_folder(NULL);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(shared != MAP_FAILED);
    snapshot_readers_see_no_overwrite();
    ownership_ends_with_the_owner();
    growth_is_seen();
    survivors_see_whole_objects();
    puts("store processes: ok");
    return 0;
}
