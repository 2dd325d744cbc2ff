/* Random programs on the embedded store against a model that keeps whole copies: what a snapshot shows is simply what
 * HEAD showed when it was taken. argv: seed, operations, folder. */
#include "store_test.h"

#define ORDER 16
#define SIZE (1u << ORDER)
#define OBJECTS 20
#define SNAPS 6

struct object {
    int exists;
    uint32_t size;
    uint8_t data[SIZE]; /* zeros behind size */
};

struct snapshot {
    uint64_t id;
    struct object objects[OBJECTS];
};

static struct object head[OBJECTS];
static uint64_t object_seq[OBJECTS]; /* newest snapshot made before the object's last write */
static struct snapshot *snaps[SNAPS]; /* oldest first */
static uint32_t snap_count;
static uint64_t seq; /* highest snapshot id ever */
static uint64_t numbers[OBJECTS]; /* object numbers: near, and far beyond each other */
static rbdn_store *store;
static uint8_t buffer[SIZE], expected[SIZE];
static uint64_t refused; /* operations that had to be repeated without STORE_NOWAIT */

static struct snapc *context(void)
{
    struct snapc *c = malloc(sizeof *c + SNAPS * sizeof c->ids[0]);
    c->seq = seq;
    c->count = snap_count;
    for (uint32_t i = 0; i < snap_count; i++)
        c->ids[i] = snaps[snap_count - 1 - i]->id;
    return c;
}

/* Scatters buf over a few pieces; tries inline first. */
static int64_t submit(struct store_op *op, void *buf)
{
    struct iovec iov[5];
    uint64_t done = 0;
    op->iovcnt = 0;
    while (buf && done < op->len && op->iovcnt < 5) {
        uint64_t n = op->iovcnt == 4 ? op->len - done : rnd(op->len - done + 1);
        iov[op->iovcnt++] = (struct iovec){(char *)buf + done, n};
        done += n;
    }
    if (buf && done < op->len)
        iov[op->iovcnt - 1].iov_len += op->len - done;
    op->iov = iov;
    struct snapc *c = context();
    op->snapc = c;
    uint8_t flags = op->flags;
    int64_t r = -EAGAIN;
    if (rnd(2)) {
        op->flags |= STORE_NOWAIT;
        r = store_submit(store, op);
        refused += r == -EAGAIN;
    }
    op->flags = flags;
    if (r == -EAGAIN)
        r = store_submit(store, op);
    free(c);
    return r;
}

static void extent(uint64_t *off, uint64_t *len)
{
    if (rnd(2)) {
        *off = rnd(SIZE / 512) * 512;
        *len = 512 + rnd((SIZE - *off) / 512) * 512;
    } else {
        *off = rnd(SIZE);
        *len = rnd(SIZE - *off + 1);
    }
    if (*len > 8192 && rnd(3))
        *len = 1 + *len % 8192;
}

static void wrote(uint32_t o)
{
    object_seq[o] = seq;
}

static void do_write(uint32_t o, int guard)
{
    struct store_op op = {.type = STORE_WRITE, .flags = guard ? STORE_GUARD : 0, .objno = numbers[o]};
    extent(&op.off, &op.len);
    for (uint64_t i = 0; i < op.len; i++)
        buffer[i] = (uint8_t)rnd(256);
    int64_t r = submit(&op, buffer);
    if (guard && !head[o].exists) {
        EQ(r, -ENOENT);
        return;
    }
    EQ(r, 0);
    head[o].exists = 1;
    memcpy(head[o].data + op.off, buffer, op.len);
    if (op.off + op.len > head[o].size)
        head[o].size = (uint32_t)(op.off + op.len);
    wrote(o);
}

static void do_zero(uint32_t o)
{
    struct store_op op = {.type = STORE_ZERO, .objno = numbers[o]};
    extent(&op.off, &op.len);
    EQ(submit(&op, NULL), head[o].exists ? 0 : -ENOENT);
    if (!head[o].exists)
        return;
    memset(head[o].data + op.off, 0, op.len);
    wrote(o);
}

static void do_truncate(uint32_t o)
{
    struct store_op op = {.type = STORE_TRUNCATE, .flags = rnd(2) ? STORE_CREATE : 0, .objno = numbers[o]};
    op.off = rnd(3) ? rnd(SIZE + 1) : 0;
    EQ(submit(&op, NULL), head[o].exists || op.flags ? 0 : -ENOENT);
    if (!head[o].exists && !op.flags)
        return;
    if (op.off < head[o].size)
        memset(head[o].data + op.off, 0, head[o].size - op.off);
    head[o].exists = 1;
    head[o].size = (uint32_t)op.off;
    wrote(o);
}

static void do_remove(uint32_t o)
{
    struct store_op op = {.type = STORE_REMOVE, .objno = numbers[o]};
    EQ(submit(&op, NULL), head[o].exists ? 0 : -ENOENT);
    if (head[o].exists)
        wrote(o);
    memset(&head[o], 0, sizeof head[o]);
}

static void do_copyup(uint32_t o)
{
    struct store_op op = {.type = STORE_COPYUP, .objno = numbers[o], .len = rnd(SIZE + 1)};
    for (uint64_t i = 0; i < op.len; i++)
        buffer[i] = (uint8_t)rnd(256);
    EQ(submit(&op, buffer), 0);
    if (head[o].exists)
        return;
    head[o].exists = 1;
    head[o].size = (uint32_t)op.len;
    memcpy(head[o].data, buffer, op.len);
    /* The copy belongs to every snapshot that was made since the object was last there. */
    for (uint32_t i = 0; i < snap_count; i++)
        if (snaps[i]->id > object_seq[o])
            snaps[i]->objects[o] = head[o];
}

static void do_snapshot(void)
{
    if (snap_count == SNAPS)
        return;
    struct snapshot *s = malloc(sizeof *s);
    seq += 1 + rnd(3);
    s->id = seq;
    memcpy(s->objects, head, sizeof head);
    snaps[snap_count++] = s;
}

static void do_snapshot_remove(void)
{
    uint64_t live[SNAPS + 1];
    if (snap_count == 0)
        return;
    uint32_t i = (uint32_t)rnd(snap_count);
    free(snaps[i]);
    memmove(&snaps[i], &snaps[i + 1], (snap_count - i - 1) * sizeof snaps[0]);
    snap_count--;
    for (i = 0; i < snap_count; i++)
        live[i] = snaps[i]->id;
    live[i] = seq + 1;
    EQ(rbdn_layout_trim(store, live, snap_count + 1), 0);
    if (snap_count == 0) {
        uint64_t row[3];
        for (uint32_t o = 0; o < OBJECTS; o++)
            EQ(rbdn_layout_clones(store, numbers[o], row, 1), 0);
    }
}

static void do_rollback(uint32_t o)
{
    if (snap_count == 0)
        return;
    struct snapshot *s = snaps[rnd(snap_count)];
    struct snapc *c = context();
    EQ(rbdn_layout_rollback(store, numbers[o], s->id, c->seq, c->ids, c->count), 0);
    free(c);
    if (memcmp(&head[o], &s->objects[o], sizeof head[o]) != 0 || s->id <= object_seq[o])
        wrote(o);
    head[o] = s->objects[o];
}

static void do_read(uint32_t o, const struct object *want, uint64_t snap)
{
    struct store_op op = {.type = STORE_READ, .objno = numbers[o], .snap_id = snap};
    extent(&op.off, &op.len);
    memset(buffer, 0x5a, op.len);
    int64_t r = submit(&op, buffer);
    if (!want->exists) {
        EQ(r, -ENOENT);
        return;
    }
    uint64_t n = op.off >= want->size ? 0 : want->size - op.off < op.len ? want->size - op.off : op.len;
    CHECK(r == (int64_t)n, "object %u snap %llu: read %lld, not %llu", o, (unsigned long long)snap, (long long)r,
          (unsigned long long)n);
    memset(expected, 0x5a, op.len);
    memcpy(expected, want->data + op.off, n);
    CHECK(!memcmp(buffer, expected, op.len), "object %u snap %llu: wrong data", o, (unsigned long long)snap);
    op = (struct store_op){.type = STORE_STAT, .objno = numbers[o], .snap_id = snap};
    EQ(submit(&op, NULL), want->size);
}

/* Outside the extents is nothing but zeros, and they ascend within what was asked. */
static void do_extents(uint32_t o, const struct object *want, uint64_t snap)
{
    struct store_extent e[3];
    struct store_op op = {.type = STORE_EXTENTS, .objno = numbers[o], .snap_id = snap, .extents = e,
                          .max_extents = 1 + (uint32_t)rnd(3)};
    extent(&op.off, &op.len);
    int64_t n = submit(&op, NULL);
    if (!want->exists) {
        EQ(n, -ENOENT);
        return;
    }
    CHECK(n >= 0 && n <= op.max_extents);
    uint64_t at = op.off;
    for (int64_t i = 0; i <= n; i++) {
        uint64_t next = i < n ? e[i].off : op.off + op.len;
        CHECK(next >= at && next <= op.off + op.len);
        for (; at < next; at++)
            CHECK(want->data[at] == 0, "object %u snap %llu: byte %llu is in a hole", o, (unsigned long long)snap,
                  (unsigned long long)at);
        if (i < n) {
            CHECK(e[i].len > 0 && e[i].off + e[i].len <= op.off + op.len);
            at = e[i].off + e[i].len;
        }
    }
}

static void look(uint32_t o)
{
    uint32_t i = (uint32_t)rnd(snap_count + 1);
    const struct object *want = i == snap_count ? &head[o] : &snaps[i]->objects[o];
    uint64_t snap = i == snap_count ? STORE_NOSNAP : snaps[i]->id;
    if (rnd(4))
        do_read(o, want, snap);
    else
        do_extents(o, want, snap);
}

static void whole(void)
{
    int64_t next = 0;
    for (uint32_t o = 0; o < OBJECTS; o++) {
        for (uint32_t i = 0; i <= snap_count; i++) {
            const struct object *want = i == snap_count ? &head[o] : &snaps[i]->objects[o];
            int64_t r = rbdn_obj_read(store, numbers[o], i == snap_count ? STORE_NOSNAP : snaps[i]->id, 0, buffer, SIZE);
            EQ(r, want->exists ? (int64_t)want->size : -ENOENT);
            if (want->exists)
                CHECK(!memcmp(buffer, want->data, want->size), "object %u snap %u", o, i);
        }
        if (head[o].exists) {
            EQ(rbdn_layout_next(store, (uint64_t)next, 0), numbers[o]);
            next = (int64_t)numbers[o] + 1;
        }
    }
    EQ(rbdn_layout_next(store, (uint64_t)next, 0), -ENOENT);
    test_sound(store);
    uint8_t map[64];
    EQ(rbdn_layout_map_get(store, map, sizeof map), 64);
    for (uint32_t o = 0; o < OBJECTS && numbers[o] < 64; o++)
        EQ(map[numbers[o]], head[o].exists);
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    long ops = argc > 2 ? atol(argv[2]) : 50000;
    test_seed ^= seed * 0x2545f4914f6cdd1dULL;
    test_folder(argc > 3 ? argv[3] : NULL);
    for (uint32_t o = 0; o < OBJECTS; o++)
        numbers[o] = o < 12 ? o * 3 : o < 16 ? 20000 + o : (1ULL << 26) - 18 + o; /* on both sides of 4 TiB */
    store = test_open("layout", ORDER, 1);
    uint8_t map[64] = {0};
    EQ(rbdn_layout_map_get(store, map, 64), -ENOENT);
    EQ(rbdn_layout_map_set(store, map, 64), 0);
    for (long i = 0; i < ops; i++) {
        uint32_t o = (uint32_t)rnd(OBJECTS);
        switch (rnd(40)) {
        case 0 ... 11: do_write(o, 0); break;
        case 12 ... 13: do_write(o, 1); break;
        case 14 ... 15: do_zero(o); break;
        case 16 ... 17: do_truncate(o); break;
        case 18: do_remove(o); break;
        case 19 ... 20: do_copyup(o); break;
        case 21: if (rnd(6) == 0) do_snapshot(); break;
        case 22: if (rnd(8) == 0) do_snapshot_remove(); break;
        case 23: if (rnd(2) == 0) do_rollback(o); break;
        case 24: if (rnd(20) == 0) EQ(rbdn_store_flush(store), 0); break;
        case 25:
            if (rnd(60) == 0) {
                rbdn_store_close(store);
                store = test_open("layout", rnd(2) ? ORDER : 0, 0);
                whole();
            }
            break;
        default: look(o);
        }
    }
    whole();
    rbdn_store_close(store);
    printf("store model: %ld operations, %llu not inline, ok\n", ops, (unsigned long long)refused);
    return 0;
}
