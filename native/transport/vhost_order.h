/* The order in which finished requests are shown to the guest while it is migrated: that of its own.
 *
 * A back end that dies is missed by nobody who migrates: QEMU 7.2 moves the guest all the same, forgets the in-flight
 * table and lets the next back end begin at the used index. That is right when, and only when, requests are used in the
 * order in which they were made available; otherwise the next host does some twice, which breaks the guest's driver, and
 * others never. So while the front end logs our writes, a request that is done waits for those before it.
 */
#ifndef RBDN_VHOST_ORDER_H
#define RBDN_VHOST_ORDER_H

#include <stdbool.h>
#include <stdint.h>

struct order_slot { /* one per head */
    uint64_t number; /* of the request, counted as they were read */
    uint32_t written; /* used length */
    bool done;
};

struct publish_order {
    bool on;
    uint16_t num;          /* heads */
    uint16_t first, count; /* of the queue */
    uint64_t numbers;
    uint16_t *queue;       /* num: heads read and not shown yet, eldest first; while on */
    struct order_slot *slots;
};

int order_init(struct publish_order *, uint16_t num); /* 0 or -ENOMEM; zeroed before */
void order_free(struct publish_order *);
/* `pending`: heads in flight, any order; they are put into theirs. */
void order_begin(struct publish_order *, uint16_t *pending, uint16_t count);
/* What is done can be shown now, in whatever order: order_next() gives all of it. */
void order_end(struct publish_order *);

static inline void order_read(struct publish_order *o, uint16_t head)
{
    o->slots[head].number = o->numbers++;
    o->slots[head].done = false;
    if (__builtin_expect(o->on, 0))
        o->queue[(uint16_t)(o->first + o->count++) % o->num] = head;
}

static inline void order_done(struct publish_order *o, uint16_t head, uint32_t written)
{
    o->slots[head].written = written;
    o->slots[head].done = true;
}

/* The next head to show, or -1: the eldest is not done, or there is none. */
int order_next(struct publish_order *);

#endif
