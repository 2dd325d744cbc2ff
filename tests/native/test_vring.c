/* Parts of the vhost-user data path that are arithmetic: memory look-up, the dirty log's bits, ring indices around their
 * wrap, signals and kicks by event index, and recovery of the in-flight table after a kill at every step of a batch. */
#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "transport/vring.h"

#define SIZE 65536
#define NUM 32

static uint8_t *bytes;
static struct guest_region region[4];
static struct guest_memory *memory;

static struct guest_region *make(unsigned n, uint64_t guest, uint64_t user, uint64_t size, uint8_t *host)
{
    region[n] = (struct guest_region){.refs = 1, .guest = guest, .user = user, .size = size};
    region[n].shm = (struct shm){.base = host, .len = size, .fd = -1};
    return &region[n];
}

static void memory_look_up(void)
{
    int err;
    unsigned hint = 77;
    struct guest_region *list[] = {
        make(0, 0x10000, 0x900000, 0x1000, bytes), make(1, 0, 0x800000, 0x1000, bytes + 0x1000),
        make(2, 0x11000, 0x100000, 0x1000, bytes + 0x2000), make(3, UINT64_MAX - 0xFFF, 0x200000, 0xFFF, bytes + 0x3000),
    };
    struct guest_memory *m = guest_memory_new(list, 4, &err);
    assert(m && guest_memory_end(m) == UINT64_MAX);
    assert(guest_memory_at(m, &hint, 0, 0x1000) == bytes + 0x1000 && guest_memory_at(m, &hint, 0xFFF, 1));
    assert(!guest_memory_at(m, &hint, 0xFFF, 2) && !guest_memory_at(m, &hint, 0x1000, 1));
    assert(guest_memory_at(m, &hint, 0x10000, 1) == bytes);
    assert(!guest_memory_at(m, &hint, 0x10FFF, 2)); /* the next one begins there, but not in our memory */
    assert(guest_memory_at(m, &hint, 0x11000, 0x1000) == bytes + 0x2000);
    assert(!guest_memory_at(m, &hint, 0x12000, 1) && !guest_memory_at(m, &hint, 0xFFFF, 1));
    assert(guest_memory_at(m, &hint, UINT64_MAX - 1, 1) && !guest_memory_at(m, &hint, UINT64_MAX, 1));
    assert(!guest_memory_at(m, &hint, UINT64_MAX - 1, UINT64_MAX) && !guest_memory_at(m, &hint, 0x10001, UINT64_MAX));
    assert(guest_memory_user(m, 0x900800, 0x800) == bytes + 0x800 && !guest_memory_user(m, 0x900800, 0x801));
    assert(!guest_memory_user(m, 0x901000, 1) && !guest_memory_user(m, 0x900800, UINT64_MAX));
    uint64_t guest, left;
    assert(guest_memory_where(m, bytes + 0x2010, &guest, &left) && guest == 0x11010 && left == 0xFF0);
    assert(!guest_memory_where(m, bytes + 0x4000, &guest, &left));
    guest_memory_put(m);

    make(2, 0x10FFF, 0x100000, 0x1000, bytes);
    assert(!guest_memory_new(list, 4, &err) && err == -EEXIST);
    make(2, 0x11000, 0x900FFF, 0x1000, bytes);
    assert(!guest_memory_new(list, 4, &err) && err == -EEXIST);
    m = guest_memory_new(NULL, 0, &err);
    assert(m && !guest_memory_at(m, &hint, 0, 1) && guest_memory_end(m) == 0);
    guest_memory_put(m);
}

static void log_bits(void)
{
    _Atomic uint64_t marked = 0;
    uint8_t bits[8] = {0};
    struct dirty_log log = {.refs = 1, .marked = &marked};
    log.shm = (struct shm){.base = bits, .len = 2, .fd = -1};
    dirty_log_mark(&log, 0, 0);
    assert(bits[0] == 0);
    dirty_log_mark(&log, 4095, 2);
    assert(bits[0] == 3 && marked == 2);
    dirty_log_mark(&log, 0, 4096);
    assert(bits[0] == 3 && marked == 2);
    dirty_log_mark(&log, 7 * 4096, 1);
    dirty_log_mark(&log, 8 * 4096 + 4095, 1);
    assert(bits[0] == 0x83 && bits[1] == 1);
    dirty_log_mark(&log, 15 * 4096, 1 << 30); /* beyond its end, also below */
    dirty_log_mark(&log, 16 * 4096, 4096);
    dirty_log_mark(&log, UINT64_MAX - 5, 100);
    dirty_log_mark(&log, UINT64_MAX, UINT64_MAX);
    assert(bits[1] == 0x81 && bits[2] == 0);
    assert(dirty_log_covers(&log, 0) && dirty_log_covers(&log, 16 * 4096) && !dirty_log_covers(&log, 16 * 4096 + 1));
    assert(!dirty_log_covers(&log, UINT64_MAX));
}

static struct split_ring ring_at(uint16_t index, bool event_idx, struct inflight_queue *table)
{
    struct split_ring r = {.num = NUM, .mask = NUM - 1, .event_idx = event_idx, .inflight = table};
    struct ring_addresses a = {0x800000, 0x801000, 0x802000};
    uint16_t heads[NUM];
    assert(ring_map(&r, memory, &a) == 0);
    r.used_ring->idx = index;
    r.avail[1] = index;
    assert(ring_start(&r, index, heads) == 0 && r.last_avail == index);
    return r;
}

static void indices_around_the_wrap(void)
{
    for (unsigned event_idx = 0; event_idx < 2; event_idx++) {
        struct split_ring r = ring_at(65530, event_idx, NULL);
        uint16_t *used_event = &r.avail[2 + NUM];
        assert(ring_available(&r) == 0);
        for (unsigned n = 0; n < 100; n++) {
            r.avail[2 + (r.avail[1] & r.mask)] = (uint16_t)(n % NUM);
            r.avail[1]++;
            assert(ring_available(&r) == 1 && ring_next_head(&r) == n % NUM && ring_available(&r) == 0);
            *used_event = r.published;
            r.avail[0] = n % 2;
            ring_push(&r, (uint16_t)(n % NUM), n);
            assert(ring_unpublished(&r));
            ring_publish(&r);
            assert(r.used_ring->idx == (uint16_t)(65531 + n) && r.used_ring->ring[(65530 + n) % NUM].len == n);
            assert(ring_wants_signal(&r) == (event_idx || n % 2 == 0 ? true : false));
        }
        *used_event = (uint16_t)(r.published + 3); /* signal when the fourth from now is used */
        r.avail[0] = 1;
        for (unsigned n = 0; n < 6; n++) {
            ring_push(&r, 0, 0);
            ring_publish(&r);
            assert(ring_wants_signal(&r) == (event_idx && n == 3));
        }
        for (unsigned n = 0; n < RING_BATCH + 1; n++) /* publishes by itself */
            ring_push(&r, 0, 0);
        assert((uint16_t)(r.used - r.published) == 1);

        ring_kicks_off(&r);
        assert(event_idx || r.used_ring->flags == VRING_USED_F_NO_NOTIFY);
        assert(!ring_kicks_on(&r));
        uint16_t avail_event;
        memcpy(&avail_event, &r.used_ring->ring[NUM], sizeof avail_event);
        assert(event_idx ? avail_event == r.last_avail : r.used_ring->flags == 0);
        r.avail[1]++;
        assert(ring_kicks_on(&r));
        r.avail[1] = (uint16_t)(r.last_avail + NUM);
        assert(ring_available(&r) == NUM);
        r.avail[1]++;
        assert(ring_available(&r) == -EPROTO);
        r.avail[1] = (uint16_t)(r.last_avail - 1);
        assert(ring_available(&r) == -EPROTO);
    }
}

/* The stores of a batch, one after the other as in the protocol's text, stopped after each: what recovery then submits again
 * must be exactly what the used index does not cover. */
static void killed_at_every_step(void)
{
    struct inflight_queue *t = aligned_alloc(64, inflight_size(NUM));
    enum { TAKEN = 9, BATCH = 4 };
    for (unsigned start = 65530; start < 65540; start++)
        for (unsigned stop = 0; stop <= 2 * BATCH + 1 + BATCH + 1; stop++) {
            memset(t, 0, inflight_size(NUM));
            struct split_ring r = ring_at((uint16_t)start, true, t);
            uint16_t order[TAKEN];
            for (unsigned n = 0; n < TAKEN; n++) {
                order[n] = (uint16_t)((n * 7 + 3) % NUM);
                ring_track(&r, order[n]);
            }
            /* An earlier batch of two, complete; then one of four: the 2nd, 4th, 6th, 8th taken. */
            ring_push(&r, order[0], 0);
            ring_push(&r, order[2], 0);
            ring_publish(&r);
            unsigned step = 0;
            for (unsigned n = 0; n < BATCH && step < stop; n++) {
                t->desc[order[2 * n + 1]].next = t->last_batch_head;
                if (++step == stop)
                    break;
                t->last_batch_head = order[2 * n + 1];
                step++;
            }
            bool published = step < stop;
            if (published && ++step)
                r.used_ring->idx += BATCH;
            for (unsigned n = 0; n < BATCH && step < stop; n++, step++)
                t->desc[order[2 * n + 1]].inflight = 0;
            if (step < stop && ++step)
                t->used_idx = r.used_ring->idx;
            uint16_t heads[NUM];
            struct split_ring again = r;
            int count = ring_start(&again, r.used_ring->idx, heads);
            assert(count == TAKEN - 2 - (published ? BATCH : 0));
            int expect = 0;
            for (unsigned n = 0; n < TAKEN; n++) {
                if (n == 0 || n == 2 || (published && n % 2))
                    continue;
                assert(heads[expect++] == order[n]);
            }
            assert(again.last_avail == (uint16_t)(start + TAKEN) && again.counter == TAKEN);
            assert(t->used_idx == r.used_ring->idx);
        }
    /* The same by our own code: nothing is left, and the order of the fields is the protocol's. */
    memset(t, 0, inflight_size(NUM));
    struct split_ring r = ring_at(5, true, t);
    assert(t->version == 1 && t->desc_num == NUM && t->used_idx == 5);
    for (uint16_t n = 0; n < 20; n++)
        ring_track(&r, n);
    for (uint16_t n = 0; n < 20; n++)
        ring_push(&r, n, 0);
    assert(t->used_idx == 5 + RING_BATCH && t->desc[0].inflight == 0 && t->desc[17].inflight == 1);
    assert(t->last_batch_head == 19 && t->desc[19].next == 18);
    ring_publish(&r);
    assert(t->used_idx == 25 && t->desc[17].inflight == 0);
    /* Lies. */
    uint16_t heads[NUM];
    t->desc[3].inflight = 1;
    t->used_idx = (uint16_t)(25 - NUM - 1);
    assert(ring_start(&r, 0, heads) == -EPROTO);
    t->used_idx = 24;
    t->last_batch_head = NUM;
    assert(ring_start(&r, 0, heads) == -EPROTO);
    t->used_idx = 25;
    t->desc_num = NUM - 1;
    assert(ring_start(&r, 0, heads) == -EPROTO);
    t->desc_num = NUM;
    t->version = 2;
    assert(ring_start(&r, 0, heads) == -EPROTO);
    free(t);
}

int main(void)
{
    int err;
    bytes = aligned_alloc(4096, SIZE);
    memset(bytes, 0, SIZE);
    memory_look_up();
    log_bits();
    struct guest_region *all = make(0, 0, 0x800000, SIZE, bytes);
    memory = guest_memory_new(&all, 1, &err);
    indices_around_the_wrap();
    killed_at_every_step();
    guest_memory_put(memory);
    free(bytes);
    puts("vring: ok");
    return 0;
}
