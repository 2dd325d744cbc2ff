/* See striping.h. */
#include "striping/striping.h"

#include <errno.h>

int striping_init(struct striping *s, unsigned order, uint64_t unit, uint64_t count)
{
    if (order < STRIPING_ORDER_MIN || order > STRIPING_ORDER_MAX || count == 0)
        return -EINVAL;
    uint64_t size = 1ULL << order;
    if (unit == 0)
        unit = size;
    if (unit > size || size % unit != 0 || count > (1ULL << 62) / size)
        return -EINVAL;
    if (count == 1)
        unit = size; /* the same layout, and one extent per object */
    s->order = order;
    s->unit = unit;
    s->count = count;
    s->per_object = size / unit;
    return 0;
}

bool stripe_next(struct stripe_iter *it, struct stripe_extent *e)
{
    const struct striping *s = it->s;
    if (it->pos >= it->end)
        return false;
    uint64_t room;
    if (s->count == 1) {
        e->objno = it->pos >> s->order;
        e->off = it->pos & ((1ULL << s->order) - 1);
        room = (1ULL << s->order) - e->off;
    } else {
        uint64_t block = it->pos / s->unit, in_unit = it->pos % s->unit;
        uint64_t stripe = block / s->count;
        e->objno = stripe / s->per_object * s->count + block % s->count;
        e->off = stripe % s->per_object * s->unit + in_unit;
        room = s->unit - in_unit;
    }
    e->pos = it->pos;
    e->len = it->end - it->pos < room ? it->end - it->pos : room;
    it->pos += e->len;
    return true;
}

uint64_t striping_position(const struct striping *s, uint64_t objno, uint64_t off)
{
    if (s->count == 1)
        return (objno << s->order) + off;
    uint64_t stripe = objno / s->count * s->per_object + off / s->unit;
    return (stripe * s->count + objno % s->count) * s->unit + off % s->unit;
}

bool unstripe_next(struct unstripe_iter *it, struct stripe_extent *e)
{
    const struct striping *s = it->s;
    if (it->off >= it->end)
        return false;
    uint64_t room = s->unit - it->off % s->unit;
    e->objno = it->objno;
    e->off = it->off;
    e->len = it->end - it->off < room ? it->end - it->off : room;
    e->pos = striping_position(s, it->objno, it->off);
    it->off += e->len;
    return true;
}

uint64_t striping_objects(const struct striping *s, uint64_t size)
{
    uint64_t set = s->count << s->order; /* bytes */
    uint64_t whole = size / set * s->count, rest = size % set;
    if (rest == 0)
        return whole;
    uint64_t units = rest / s->unit + (rest % s->unit != 0);
    return whole + (units < s->count ? units : s->count);
}

uint64_t striping_prefix(const struct striping *s, uint64_t objno, uint64_t size)
{
    uint64_t object = 1ULL << s->order, set = objno / s->count;
    if (set > (UINT64_MAX >> s->order) / s->count)
        return 0; /* begins beyond any size */
    uint64_t begin = set * s->count << s->order; /* image position of the object set */
    if (size <= begin)
        return 0;
    uint64_t rest = size - begin, index = objno % s->count;
    if (s->count == 1)
        return rest < object ? rest : object;
    uint64_t stripe = s->unit * s->count;
    uint64_t full = rest / stripe; /* stripes wholly inside */
    if (full >= s->per_object)
        return object;
    uint64_t tail = rest % stripe, before = index * s->unit;
    uint64_t part = tail <= before ? 0 : tail - before;
    return full * s->unit + (part < s->unit ? part : s->unit);
}
