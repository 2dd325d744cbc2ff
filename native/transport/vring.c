#define _GNU_SOURCE /* qsort_r */
#include "transport/vring.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "rings are little-endian and so must be the host"
#endif

#define AVAIL_IDX 1
#define AVAIL_RING 2

/* Compiler barrier: what was copied before it cannot be read from the guest's memory again. */
#define COPIED() __asm__ volatile("" ::: "memory")

static uint16_t load(const uint16_t *p, int order)
{
    return __atomic_load_n(p, order);
}

static void store(uint16_t *p, uint16_t v, int order)
{
    __atomic_store_n(p, v, order);
}

static uint16_t *avail_event(struct split_ring *r)
{
    return (uint16_t *)&r->used_ring->ring[r->num];
}

static uint16_t used_event(struct split_ring *r)
{
    return load(&r->avail[AVAIL_RING + r->num], __ATOMIC_RELAXED);
}

static void log_used(struct split_ring *r, const void *at, uint64_t len)
{
    if (r->log && r->log_used)
        dirty_log_mark(r->log, r->log_addr + ((const uint8_t *)at - (const uint8_t *)r->used_ring), len);
}

int ring_map(struct split_ring *r, struct guest_memory *mem, const struct ring_addresses *a)
{
    if (a->desc % 16 || a->avail % 2 || a->used % 4)
        return -EINVAL;
    void *desc = guest_memory_user(mem, a->desc, r->num * sizeof(struct vring_desc));
    void *avail = guest_memory_user(mem, a->avail, (AVAIL_RING + r->num + 1) * sizeof(uint16_t));
    void *used = guest_memory_user(mem, a->used, sizeof(struct vring_used) + r->num * sizeof(struct vring_used_elem) + 2);
    if (!desc || !avail || !used)
        return -EFAULT;
    /* The mappings are page-aligned but the regions need not be. */
    if ((uintptr_t)desc % 16 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return -EINVAL;
    r->desc = desc;
    r->avail = avail;
    r->used_ring = used;
    r->mem = mem;
    return 0;
}

/* ---- in-flight table ---- */

static int by_counter(const void *a, const void *b, void *table)
{
    const struct inflight_desc *desc = table;
    uint64_t x = desc[*(const uint16_t *)a].counter, y = desc[*(const uint16_t *)b].counter;
    return x < y ? -1 : x > y;
}

static int recover(struct split_ring *r, uint16_t base, uint16_t *heads)
{
    struct inflight_queue *t = r->inflight;
    if (load(&t->version, __ATOMIC_RELAXED) == 0) { /* fresh */
        uint16_t behind = base - r->used;
        if (behind && behind <= INT16_MAX) {
            r->stale = true;
            r->used = r->published = r->signalled = base;
        }
        t->features = 0;
        t->desc_num = r->num;
        t->last_batch_head = 0;
        t->used_idx = r->used;
        store(&t->version, 1, __ATOMIC_RELEASE);
    }
    if (t->version != 1 || t->desc_num < r->num)
        return -EPROTO;
    bool any = false;
    for (uint16_t n = 0; n < r->num; n++)
        any |= t->desc[n].inflight;
    uint16_t batch = any ? r->used - load(&t->used_idx, __ATOMIC_RELAXED) : 0;
    if (batch > r->num)
        return -EPROTO;
    /* We died between publishing a batch and clearing its marks: finish that. */
    uint16_t head = load(&t->last_batch_head, __ATOMIC_RELAXED);
    for (; batch > 0; batch--) {
        if (head >= r->num)
            return -EPROTO;
        t->desc[head].inflight = 0;
        head = load(&t->desc[head].next, __ATOMIC_RELAXED);
    }
    store(&t->used_idx, r->used, __ATOMIC_RELEASE);

    int count = 0;
    r->counter = 0;
    struct inflight_desc copy[RING_SIZE_MAX]; /* sorted by a copy: the table may change under us */
    for (uint16_t n = 0; n < r->num; n++) {
        copy[n] = t->desc[n];
        if (copy[n].inflight) {
            heads[count++] = n;
            if (copy[n].counter >= r->counter)
                r->counter = copy[n].counter + 1;
        }
    }
    COPIED();
    qsort_r(heads, count, sizeof *heads, by_counter, copy);
    return count;
}

int ring_start(struct split_ring *r, uint16_t base, uint16_t *heads)
{
    r->used = r->published = load(&r->used_ring->idx, __ATOMIC_ACQUIRE);
    r->signalled = r->used;
    r->signalled_valid = r->stale = false;
    r->last_avail = base;
    if (!r->inflight)
        return 0;
    int count = recover(r, base, heads);
    /* The front end resumes at the used index; entries before it that are still in flight were read as well. */
    if (count >= 0)
        r->last_avail = r->used + count;
    return count;
}

void ring_track(struct split_ring *r, uint16_t head)
{
    if (!r->inflight)
        return;
    struct inflight_desc *d = &r->inflight->desc[head];
    __atomic_store_n(&d->counter, r->counter++, __ATOMIC_RELAXED);
    __atomic_store_n(&d->inflight, 1, __ATOMIC_RELEASE);
}

/* ---- avail ---- */

int ring_available(struct split_ring *r)
{
    uint16_t n = load(&r->avail[AVAIL_IDX], __ATOMIC_ACQUIRE) - r->last_avail;
    return n > r->num ? -EPROTO : n;
}

uint16_t ring_next_head(struct split_ring *r)
{
    return load(&r->avail[AVAIL_RING + (r->last_avail++ & r->mask)], __ATOMIC_RELAXED);
}

/* Adds a buffer; pieces when it reaches over several regions. False: not all of it is mapped. */
static bool add_buffer(struct split_ring *r, struct ring_chain *c, unsigned *count, uint64_t addr, uint32_t len)
{
    while (len) {
        const struct guest_range *g = guest_range_at(r->mem, &r->hint, addr);
        if (!g)
            return false;
        if (c->out + c->in == c->iov_max) {
            if (!c->wide)
                return false;
            memcpy(c->wide, c->iov, (c->out + c->in) * sizeof *c->iov);
            c->iov = c->wide;
            c->iov_max = c->wide_max;
            c->wide = NULL;
        }
        uint64_t left = g->size - (addr - g->guest);
        uint32_t part = len < left ? len : (uint32_t)left;
        c->iov[c->out + c->in] = (struct iovec){g->host + (addr - g->guest), part};
        ++*count;
        addr += part; /* cannot wrap: a region ends at or below 2^64 - 1 */
        len -= part;
    }
    return true;
}

int ring_fetch(struct split_ring *r, uint16_t head, struct ring_chain *c)
{
    const uint8_t *table = (const uint8_t *)r->desc;
    unsigned table_num = r->num, at = head, seen = 0;
    bool indirect = false;
    bool writable = false, last_known = false;
    uint64_t last_addr = 0; /* of the last writable byte */
    c->out = c->in = 0;
    c->out_len = c->in_len = 0;
    c->last = NULL;
    c->fault = false;
    for (;;) {
        struct vring_desc d;
        memcpy(&d, table + at * sizeof d, sizeof d);
        COPIED();
        if (d.flags & VRING_DESC_F_INDIRECT) {
            if (!r->indirect || indirect || d.flags & VRING_DESC_F_NEXT || d.len == 0 || d.len % sizeof d)
                return -EPROTO;
            if (d.len / sizeof d > r->num)
                return -EPROTO;
            table = guest_memory_at(r->mem, &r->hint, d.addr, d.len);
            if (!table) { /* nothing is known of the request, not even where its status goes */
                c->fault = true;
                return 0;
            }
            table_num = d.len / sizeof d;
            at = 0;
            indirect = true;
            continue;
        }
        if (++seen > r->num) /* a loop, or longer than any driver may make it */
            return -EPROTO;
        if (d.flags & VRING_DESC_F_WRITE) {
            writable = true;
            c->in_len += d.len;
            if (d.len) {
                last_known = !__builtin_add_overflow(d.addr, d.len - 1, &last_addr);
                if (!add_buffer(r, c, &c->in, d.addr, d.len))
                    c->fault = true;
            }
        } else {
            if (writable)
                return -EPROTO; /* readable ones come first */
            c->out_len += d.len;
            if (!add_buffer(r, c, &c->out, d.addr, d.len))
                c->fault = true;
        }
        if (!(d.flags & VRING_DESC_F_NEXT))
            break;
        if (d.next >= table_num)
            return -EPROTO;
        at = d.next;
    }
    if (last_known)
        c->last = guest_memory_at(r->mem, &r->hint, last_addr, 1);
    return 0;
}

/* ---- used ---- */

void ring_push(struct split_ring *r, uint16_t head, uint32_t len)
{
    uint16_t pending = r->used - r->published;
    if (pending == RING_BATCH) {
        ring_publish(r);
        pending = 0;
    }
    struct vring_used_elem *e = &r->used_ring->ring[r->used & r->mask];
    e->id = head;
    e->len = len;
    r->used++;
    r->batch[pending] = head;
    if (r->inflight) {
        struct inflight_queue *t = r->inflight;
        store(&t->desc[head].next, load(&t->last_batch_head, __ATOMIC_RELAXED), __ATOMIC_RELAXED);
        store(&t->last_batch_head, head, __ATOMIC_RELEASE);
    }
}

void ring_publish(struct split_ring *r)
{
    uint16_t count = r->used - r->published;
    if (count == 0)
        return;
    if (r->log && r->log_used)
        for (uint16_t n = r->published; n != r->used; n++)
            log_used(r, &r->used_ring->ring[n & r->mask], sizeof(struct vring_used_elem));
    store(&r->used_ring->idx, r->used, __ATOMIC_RELEASE);
    log_used(r, &r->used_ring->idx, sizeof r->used_ring->idx);
    r->published = r->used;
    if (!r->inflight)
        return;
    /* Who recovers after a kill counts on this order: index, marks, used_idx. */
    for (uint16_t n = 0; n < count; n++)
        __atomic_store_n(&r->inflight->desc[r->batch[n]].inflight, 0, __ATOMIC_RELEASE);
    store(&r->inflight->used_idx, r->used, __ATOMIC_RELEASE);
}

bool ring_wants_signal(struct split_ring *r)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the index before the guest's wish */
    bool valid = r->signalled_valid;
    uint16_t old = r->signalled;
    r->signalled = r->published;
    r->signalled_valid = true;
    if (!r->event_idx)
        return !(load(&r->avail[0], __ATOMIC_RELAXED) & VRING_AVAIL_F_NO_INTERRUPT);
    return !valid || vring_need_event(used_event(r), r->published, old);
}

void ring_kicks_off(struct split_ring *r)
{
    if (r->event_idx)
        return; /* the event index stays behind: no kick until it is moved */
    store(&r->used_ring->flags, VRING_USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
    log_used(r, &r->used_ring->flags, sizeof r->used_ring->flags);
}

bool ring_kicks_on(struct split_ring *r)
{
    if (r->event_idx) {
        store(avail_event(r), r->last_avail, __ATOMIC_RELAXED);
        log_used(r, avail_event(r), sizeof(uint16_t));
    } else {
        store(&r->used_ring->flags, 0, __ATOMIC_RELAXED);
        log_used(r, &r->used_ring->flags, sizeof r->used_ring->flags);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the wish before the index */
    return ring_available(r) != 0;
}
