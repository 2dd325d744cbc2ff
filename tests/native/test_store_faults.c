/* What the store does when the kernel says no: fdatasync, pwritev and fallocate are replaced by ones that count and
 * fail on demand. Also shared flushes, the dirty mark, recovery of planted damage, the fault and null stores. */
#include "store_test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>

#define ORDER 16
#define SIZE (1u << ORDER)

static _Atomic int syncs, fail_sync, fail_write, fail_alloc; /* fail_*: the n-th call from now; 0 never */
static _Atomic int gate_closed, waiting_in_sync;
static _Atomic int fail_errno = EIO;

static int fails(_Atomic int *countdown)
{
    int now = *countdown;
    while (now > 0 && !atomic_compare_exchange_weak(countdown, &now, now - 1))
        ;
    if (now == 1)
        errno = fail_errno;
    return now == 1;
}

int fdatasync(int fd)
{
    syncs++;
    waiting_in_sync++;
    while (gate_closed)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    waiting_in_sync--;
    if (fails(&fail_sync))
        return -1;
    return (int)syscall(SYS_fdatasync, fd);
}

ssize_t pwritev(int fd, const struct iovec *iov, int cnt, off_t pos)
{
    if (fails(&fail_write))
        return -1;
    return syscall(SYS_pwritev, fd, iov, cnt, pos, 0);
}

int fallocate(int fd, int mode, off_t off, off_t len)
{
    if (fails(&fail_alloc))
        return -1;
    return (int)syscall(SYS_fallocate, fd, mode, off, len);
}

static uint8_t buf[SIZE], got[SIZE];

static int write_value(rbdn_store *s, uint64_t o, int value, uint64_t snap)
{
    memset(buf, value, SIZE);
    return rbdn_obj_write(s, o, 0, buf, SIZE, snap, &snap, snap != 0);
}

static void expect(rbdn_store *s, uint64_t o, uint64_t snap, int value)
{
    EQ(rbdn_obj_read(s, o, snap, 0, got, SIZE), SIZE);
    for (uint32_t i = 0; i < SIZE; i++)
        CHECK(got[i] == value, "object %d: %d at %u", (int)o, got[i], i);
}

static uint32_t header_dirty(const char *name)
{
    char path[700];
    uint32_t dirty;
    snprintf(path, sizeof path, "%s/index", test_path(name));
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0 && pread(fd, &dirty, 4, 24) == 4);
    close(fd);
    return dirty;
}

static void failed_sync_is_final(void)
{
    rbdn_store *s = test_open("sync", ORDER, 1);
    EQ(write_value(s, 0, 1, 0), 0);
    EQ(rbdn_store_flush(s), 0);
    EQ(write_value(s, 0, 2, 0), 0);
    fail_sync = 1;
    EQ(rbdn_store_flush(s), -EIO);
    EQ(rbdn_store_flush(s), -EIO);
    EQ(write_value(s, 0, 3, 0), -EIO);
    EQ(rbdn_obj_copyup(s, 5, buf, SIZE), -EIO);
    EQ(rbdn_obj_remove(s, 0, 0, NULL, 0), -EIO);
    expect(s, 0, STORE_NOSNAP, 2); /* reads go on */
    rbdn_store_close(s);
    EQ(header_dirty("sync"), 2); /* not called clean */
    s = test_open("sync", ORDER, 0);
    EQ(header_dirty("sync"), 1);
    EQ(write_value(s, 0, 3, 0), 0);
    EQ(rbdn_store_flush(s), 0);
    rbdn_store_close(s);
    EQ(header_dirty("sync"), 0);
}

/* Fail each fdatasync, pwritev and fallocate of a copy-up, a copy-on-write and a rollback in turn. */
static void failing_calls_leave_legal_objects(void)
{
    static _Atomic int *const what[] = {&fail_sync, &fail_write, &fail_alloc};
    for (int kind = 0; kind < 3; kind++)
        for (int n = 1;; n++) {
            char name[32];
            snprintf(name, sizeof name, "legal-%d-%d", kind, n);
            rbdn_store *s = test_open(name, ORDER, 1);
            EQ(write_value(s, 0, 1, 0), 0);
            EQ(write_value(s, 1, 1, 0), 0);
            fail_errno = kind ? ENOSPC : EIO;
            *what[kind] = n;
            int want = kind ? -ENOSPC : -EIO, failed = 0, r;
            failed |= r = rbdn_obj_copyup(s, 9, memset(buf, 7, SIZE), SIZE);
            CHECK(r == 0 || r == want);
            if (r == 0)
                expect(s, 9, STORE_NOSNAP, 7);
            else
                EQ(rbdn_obj_stat(s, 9, STORE_NOSNAP), -ENOENT);
            failed |= r = write_value(s, 0, 2, 5);
            CHECK(r == 0 || r == want);
            expect(s, 0, 5, 1);
            if (r == 0)
                expect(s, 0, STORE_NOSNAP, 2);
            failed |= r = rbdn_layout_rollback(s, 0, 5, 5, (uint64_t[]){5}, 1);
            CHECK(r == 0 || r == want);
            expect(s, 0, 5, 1);
            failed |= r = rbdn_obj_remove(s, 1, 5, (uint64_t[]){5}, 1);
            CHECK(r == 0 || r == want);
            expect(s, 1, 5, 1);
            int left = *what[kind];
            *what[kind] = 0;
            if (kind) { /* space came back */
                EQ(rbdn_obj_copyup(s, 9, memset(buf, 7, SIZE), SIZE), 0);
                EQ(write_value(s, 0, 3, 5), 0);
                expect(s, 0, STORE_NOSNAP, 3);
                expect(s, 0, 5, 1);
                EQ(rbdn_store_flush(s), 0);
            }
            rbdn_store_close(s);
            s = test_open(name, ORDER, 0);
            test_sound(s);
            expect(s, 0, 5, 1);
            expect(s, 1, 5, 1);
            rbdn_store_close(s);
            if (left) {
                CHECK(n >= 3, "only %d calls", n);
                EQ(failed, 0);
                break;
            }
            CHECK(n < 200);
        }
}

static void *flusher(void *s)
{
    return (void *)(intptr_t)rbdn_store_flush(s);
}

static void flushes_are_shared(void)
{
    enum { N = 16 };
    pthread_t t[N];
    rbdn_store *s = test_open("shared", ORDER, 1);
    EQ(write_value(s, 0, 1, 0), 0);
    gate_closed = 1;
    syncs = 0;
    pthread_create(&t[0], NULL, flusher, s);
    while (!waiting_in_sync)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    EQ(write_value(s, 0, 2, 0), 0); /* behind the round that runs: the others must not be content with it */
    for (int i = 1; i < N; i++)
        pthread_create(&t[i], NULL, flusher, s);
    gate_closed = 0;
    for (int i = 0; i < N; i++) {
        void *r;
        pthread_join(t[i], &r);
        EQ((intptr_t)r, 0);
    }
    CHECK(syncs >= 3 && syncs <= 4, "%d fdatasyncs", syncs); /* HEAD, index, HEAD; the index was not touched again */
    syncs = 0;
    EQ(rbdn_store_flush(s), 0);
    EQ(syncs, 0); /* nothing to do */
    rbdn_store_close(s);
}

static void dirty_mark_is_durable_first(void)
{
    rbdn_store *s = test_open("mark", ORDER, 1);
    EQ(header_dirty("mark"), 0);
    struct iovec v = {buf, 512};
    struct store_op op = {.type = STORE_WRITE, .flags = STORE_NOWAIT, .len = 512, .iov = &v, .iovcnt = 1};
    EQ(store_submit(s, &op), -EAGAIN); /* must sync first */
    EQ(header_dirty("mark"), 0);
    syncs = 0;
    EQ(write_value(s, 0, 1, 0), 0);
    EQ(syncs, 1);
    EQ(header_dirty("mark"), 1);
    EQ(store_submit(s, &op), 0);
    rbdn_store *two = test_open("mark", ORDER, 0);
    rbdn_store_close(s);
    EQ(header_dirty("mark"), 1); /* the other one may write */
    rbdn_store_close(two);
    EQ(header_dirty("mark"), 0);
    fail_sync = 1;
    s = test_open("mark", ORDER, 0);
    EQ(write_value(s, 0, 1, 0), -EIO);
    EQ(write_value(s, 0, 1, 0), -EIO);
    rbdn_store_close(s);
}

static void put(const char *name, const char *file, uint64_t pos, const void *data, size_t len)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s", test_path(name), file);
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, data, len, (off_t)pos) == (ssize_t)len, "%s", path);
    close(fd);
}

/* The states that a power cut may leave, made by hand. */
static void planted_damage_is_repaired(void)
{
    uint64_t row[3];
    rbdn_store *s = test_open("planted", ORDER, 1);
    EQ(write_value(s, 0, 1, 0), 0);
    EQ(write_value(s, 1, 1, 0), 0);
    EQ(rbdn_obj_truncate(s, 1, 1000, 0, 0, NULL, 0), 0);
    EQ(write_value(s, 0, 2, 4), 0); /* clone 4 */
    EQ(rbdn_obj_copyup(s, 3, buf, 4096), 0);
    rbdn_store_close(s);
    uint64_t zero = 0, stray = 2ULL << 32;
    uint32_t dirty = 1;
    memset(buf, 9, SIZE);
    put("planted", "head.0", SIZE + 1000, buf, 500);     /* behind the end of object 1 */
    put("planted", "head.0", SIZE * 2 + 8192, buf, 512); /* object 2 does not exist */
    put("planted", "head.0", SIZE * 700, buf, 512);      /* nor does 700 */
    put("planted", "index", 4096 + 3 * 16 + 8, &stray, 8);
    put("planted", "index", 4096, &zero, 8); /* object 0: older than its clone */
    s = test_open("planted", ORDER, 0);      /* clean: nobody looks */
    char text[2000];
    EQ(rbdn_layout_check(s, text, sizeof text), 6); /* 3 x data, stray state, its data, clone newer */
    CHECK(strstr(text, "object 1: data behind the object's end\n") && strstr(text, "clone 4, object 0: newer"), "%s", text);
    EQ(rbdn_layout_check(s, text, 10), 6);
    rbdn_store_close(s);
    put("planted", "index", 24, &dirty, 4);
    s = test_open("planted", ORDER, 0);
    test_sound(s);
    expect(s, 0, 4, 1);
    expect(s, 0, STORE_NOSNAP, 2);
    EQ(rbdn_layout_snap_seq(s, 0), 4);
    EQ(rbdn_layout_clones(s, 0, row, 1), 1);
    EQ(row[0], 4);
    EQ(row[1], 0);
    EQ(row[2], SIZE);
    EQ(rbdn_obj_stat(s, 1, STORE_NOSNAP), 1000);
    EQ(rbdn_obj_stat(s, 3, STORE_NOSNAP), -ENOENT);
    EQ(rbdn_obj_write(s, 3, SIZE - 1, "", 1, 0, NULL, 0), 0);
    expect(s, 3, STORE_NOSNAP, 0);
    rbdn_store_close(s);
    EQ(header_dirty("planted"), 0);
}

static _Atomic int answered;

static void on_done(struct store_op *op)
{
    answered++;
}

static void fault_store_does_as_told(void)
{
    static const char *const bad[] = {
        "", ";", "read", "read:", "read:errno", "read:errno=", "read:errno=0", "read:errno=4096", "read:errno=-5",
        "read:errno=5;", "read:errno=5:errno=6", "read:every=0:errno=5", "read:nth=1:every=2:errno=5", "reads:errno=5",
        "read:nth=3", "read::errno=5", "read:errno=5 ", "read:done", "read:done:delay_ms=1", "read:delay_ms=60001",
        "read:pending=2", ":errno=5", "read:errno=99999999999999999999", "read:speed=5",
    };
    int err;
    rbdn_store *null = rbdn_null_open(ORDER, &err);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        CHECK(!rbdn_fault_open(null, bad[i], &err), "\"%s\"", bad[i]);
        EQ(err, -EINVAL);
    }
    rbdn_store *s = rbdn_fault_open(null, "read:every=3:errno=5;flush:nth=2:errno=28;write:after=2:errno=30;"
                                    "remove:errno=16:done;zero:delay_ms=1;copyup:pending=1:delay_ms=2", &err);
    CHECK(s && s->ops->caps == STORE_KEEPS_OBJECT_MAP);
    for (int i = 1; i <= 9; i++)
        EQ(rbdn_obj_read(s, 0, STORE_NOSNAP, 0, got, 512), i % 3 ? 512 : -EIO);
    for (int i = 1; i <= 4; i++)
        EQ(rbdn_store_flush(s), i == 2 ? -ENOSPC : 0);
    for (int i = 1; i <= 4; i++)
        EQ(rbdn_obj_write(s, 0, 0, buf, 512, 0, NULL, 0), i > 2 ? -EROFS : 0);
    EQ(rbdn_obj_remove(s, 0, 0, NULL, 0), -EBUSY);
    EQ(rbdn_obj_zero(s, 0, 0, 512, 0, NULL, 0), 0);
    EQ(rbdn_obj_copyup(s, 0, buf, 512), 0); /* waits for the answer */
    EQ(rbdn_obj_stat(s, 0, STORE_NOSNAP), SIZE);
    EQ(rbdn_layout_next(s, 0, 0), -EOPNOTSUPP);
    struct iovec v = {buf, 512};
    struct store_op op = {.type = STORE_READ, .flags = STORE_NOWAIT, .len = 512, .iov = &v, .iovcnt = 1,
                          .snap_id = STORE_NOSNAP, .done = on_done};
    EQ(store_submit(s, &op), -EAGAIN);
    op.type = STORE_COPYUP;
    EQ(store_submit(s, &op), STORE_PENDING);
    while (!answered)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    EQ(op.result, 0);
    rbdn_store_close(s);

    s = test_open("faulty", ORDER, 1);
    s = rbdn_fault_open(s, "any:nth=1:errno=5", &err);
    EQ(rbdn_obj_write(s, 1, 0, "x", 1, 0, NULL, 0), -EIO);
    EQ(rbdn_obj_write(s, 1, 0, "x", 1, 0, NULL, 0), 0);
    EQ(rbdn_layout_next(s, 0, 0), 1); /* the layout inside */
    rbdn_store_close(s);
    CHECK(!rbdn_null_open(11, &err) && err == -EINVAL);
}

/* As the engine does: at first STORE_NOWAIT, and once more without when that is refused. */
static int64_t as_the_engine(struct store *s, struct store_op *op)
{
    answered = 0;
    op->flags = STORE_NOWAIT;
    int64_t r = store_submit(s, op);
    if (r == -EAGAIN) {
        op->flags = 0;
        r = store_submit(s, op);
    }
    if (r != STORE_PENDING)
        return r;
    while (!answered)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    return op->result;
}

static int64_t cold_reads; /* a store that refuses to block first */

static int64_t cold_submit(struct store *s, struct store_op *op)
{
    if (op->flags & STORE_NOWAIT)
        return -EAGAIN;
    cold_reads++;
    return (int64_t)op->len;
}

static void cold_close(struct store *s)
{
}

/* Operations that come twice, because they may block, count once: whichever store refuses, whatever the rules. */
static void fault_store_counts_once(void)
{
    static const struct store_ops cold_ops = {.name = "cold", .submit = cold_submit, .close = cold_close};
    static const struct {
        const char *spec;
        int errors[6];
    } cases[] = {
        {"read:nth=3:errno=5:pending=1", {0, 0, EIO, 0, 0, 0}},
        {"read:every=2:errno=5:pending=1", {0, EIO, 0, EIO, 0, EIO}},
        {"read:after=4:errno=5:pending=1", {0, 0, 0, 0, EIO, EIO}},
        {"read:nth=2:errno=28:pending=1;read:nth=2:errno=5", {0, ENOSPC, EIO, 0, 0, 0}},
        {"any:nth=2:errno=5;read:pending=1", {0, EIO, 0, 0, 0, 0}},
        {"read:pending=1;read:nth=1:errno=5", {0, 0, 0, 0, 0, 0}},
        {"write:nth=1:errno=5:pending=1;read:every=3:errno=5", {0, 0, EIO, 0, 0, EIO}},
    };
    struct store cold = {.ops = &cold_ops};
    for (size_t n = 0; n < sizeof cases / sizeof cases[0]; n++) {
        int err;
        rbdn_store *s = rbdn_fault_open(&cold, cases[n].spec, &err);
        CHECK(s, "%s: %d", cases[n].spec, err);
        int64_t before = cold_reads;
        int failed = 0;
        for (int i = 0; i < 6; i++) {
            struct iovec v = {got, 512};
            struct store_op op = {.type = STORE_READ, .len = 512, .iov = &v, .iovcnt = 1, .snap_id = STORE_NOSNAP,
                                  .done = on_done};
            int64_t r = as_the_engine(s, &op);
            CHECK(r == (cases[n].errors[i] ? -cases[n].errors[i] : 512), "%s, read %d: %d", cases[n].spec, i + 1, (int)r);
            failed += r < 0;
        }
        EQ(cold_reads - before, 6 - failed);
        rbdn_store_close(s);
    }
}

int main(void)
{
    test_folder(NULL);
    failed_sync_is_final();
    failing_calls_leave_legal_objects();
    flushes_are_shared();
    dirty_mark_is_durable_first();
    planted_damage_is_repaired();
    fault_store_does_as_told();
    fault_store_counts_once();
    puts("store faults: ok");
    return 0;
}
