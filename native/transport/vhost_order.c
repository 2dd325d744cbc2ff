#define _GNU_SOURCE /* qsort_r */
#include "transport/vhost_order.h"

#include <errno.h>
#include <stdlib.h>

int order_init(struct publish_order *o, uint16_t num)
{
    o->num = num;
    o->queue = calloc(num, sizeof *o->queue);
    o->slots = calloc(num, sizeof *o->slots);
    return o->queue && o->slots ? 0 : -ENOMEM;
}

void order_free(struct publish_order *o)
{
    free(o->queue);
    free(o->slots);
}

static int by_number(const void *a, const void *b, void *slots)
{
    const struct order_slot *s = slots;
    uint64_t x = s[*(const uint16_t *)a].number, y = s[*(const uint16_t *)b].number;
    return x < y ? -1 : x > y;
}

void order_begin(struct publish_order *o, uint16_t *pending, uint16_t count)
{
    qsort_r(pending, count, sizeof *pending, by_number, o->slots);
    for (uint16_t n = 0; n < count; n++)
        o->queue[n] = pending[n];
    o->first = 0;
    o->count = count;
    o->on = true;
}

void order_end(struct publish_order *o)
{
    uint16_t kept = 0; /* those that are done, to the front */
    for (uint16_t n = 0; n < o->count; n++) {
        uint16_t head = o->queue[(o->first + n) % o->num];
        if (o->slots[head].done)
            o->queue[(o->first + kept++) % o->num] = head;
    }
    o->count = kept;
    o->on = false;
}

int order_next(struct publish_order *o)
{
    if (o->count == 0)
        return -1;
    uint16_t head = o->queue[o->first];
    if (!o->slots[head].done)
        return -1;
    o->first = (o->first + 1) % o->num;
    o->count--;
    return head;
}
