/* Properties of the striping arithmetic, against the definition applied byte by byte and against known values. */
#undef NDEBUG
#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "striping/striping.h"

static uint64_t state = 88172645463325252ULL;

static uint64_t rnd(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % below;
}

/* The layout's definition, one byte at a time. */
static void locate(const struct striping *s, uint64_t pos, uint64_t *objno, uint64_t *off)
{
    uint64_t block = pos / s->unit, stripe = block / s->count, spos = block % s->count;
    uint64_t per = (1ULL << s->order) / s->unit;
    *objno = stripe / per * s->count + spos;
    *off = stripe % per * s->unit + pos % s->unit;
}

static void check_extent(const struct striping *s, uint64_t off, uint64_t len)
{
    struct stripe_iter it;
    struct stripe_extent e, one;
    uint64_t pos = off, pieces = 0;
    bool single = stripe_single(s, off, len, &one);
    stripe_begin(&it, s, off, len);
    while (stripe_next(&it, &e)) {
        assert(e.pos == pos && e.len > 0 && e.len <= off + len - pos);
        assert(e.off + e.len <= 1ULL << s->order);
        uint64_t probes[] = {0, e.len - 1, rnd(e.len)};
        for (int i = 0; i < 3; i++) {
            uint64_t objno, in;
            locate(s, e.pos + probes[i], &objno, &in);
            assert(objno == e.objno && in == e.off + probes[i]);
            assert(striping_position(s, objno, in) == e.pos + probes[i]);
        }
        struct unstripe_iter back;
        struct stripe_extent b;
        uint64_t in = e.off, at = e.pos;
        unstripe_begin(&back, s, e.objno, e.off, e.len);
        while (unstripe_next(&back, &b)) {
            assert(b.objno == e.objno && b.off == in && b.pos == at);
            in += b.len;
            at += b.len;
        }
        assert(in == e.off + e.len);
        pos += e.len;
        pieces++;
    }
    assert(pos == off + len);
    if (len)
        assert(single == (pieces == 1 && s->count == 1));
    if (single)
        assert(one.objno == off >> s->order && one.pos == off && one.len == len);
}

/* Prefix and object count against a walk over every unit boundary of a small image. */
static void check_size(const struct striping *s, uint64_t size)
{
    uint64_t objects = striping_objects(s, size), highest = 0, held = 0;
    struct stripe_iter it;
    struct stripe_extent e;
    stripe_begin(&it, s, 0, size);
    while (stripe_next(&it, &e)) {
        if (e.objno + 1 > highest)
            highest = e.objno + 1;
        assert(striping_prefix(s, e.objno, size) >= e.off + e.len);
    }
    assert(objects == highest);
    for (uint64_t o = 0; o < objects + s->count; o++) {
        uint64_t prefix = striping_prefix(s, o, size);
        assert(prefix <= 1ULL << s->order);
        held += prefix;
        if (prefix)
            assert(striping_position(s, o, prefix - 1) < size);
        if (prefix < 1ULL << s->order)
            assert(striping_position(s, o, prefix) >= size);
    }
    assert(held == size);
}

static void known_values(void)
{
    struct striping s;
    struct stripe_iter it;
    struct stripe_extent e;
    /* 1 MiB objects, 64 KiB units, 4 objects: `rbd create --object-size 1M --stripe-unit 65536 --stripe-count 4` */
    assert(striping_init(&s, 20, 65536, 4) == 0);
    stripe_begin(&it, &s, 65536 * 5 + 10, 65536);
    assert(stripe_next(&it, &e) && e.objno == 1 && e.off == 65546 && e.len == 65526);
    assert(stripe_next(&it, &e) && e.objno == 2 && e.off == 65536 && e.len == 10);
    assert(!stripe_next(&it, &e));
    stripe_begin(&it, &s, 4 << 20, 1);
    assert(stripe_next(&it, &e) && e.objno == 4 && e.off == 0);
    assert(striping_objects(&s, 8 << 20) == 8 && striping_objects(&s, 65537) == 2);
    assert(striping_objects(&s, (4 << 20) + 1) == 5 && striping_objects(&s, 0) == 0);
    assert(striping_prefix(&s, 1, 65536 * 5 + 7) == 65536 + 7);
    assert(striping_prefix(&s, 0, 65536 * 5 + 7) == 131072 && striping_prefix(&s, 3, 65536 * 5 + 7) == 65536);
    assert(striping_prefix(&s, UINT64_MAX / 2, 1ULL << 62) == 0);
    assert(striping_init(&s, 22, 0, 1) == 0 && s.unit == 4 << 20);
    stripe_begin(&it, &s, (1ULL << 63) - 512, 512);
    assert(stripe_next(&it, &e) && e.objno == (1ULL << 41) - 1 && e.off == (4 << 20) - 512 && !stripe_next(&it, &e));
    assert(striping_prefix(&s, UINT64_MAX, UINT64_MAX) == 0);
    stripe_begin(&it, &s, 100, 0);
    assert(!stripe_next(&it, &e));
}

static void refused(void)
{
    struct striping s;
    assert(striping_init(&s, 11, 0, 1) == -EINVAL && striping_init(&s, 26, 0, 1) == -EINVAL);
    assert(striping_init(&s, 64 + 22, 0, 1) == -EINVAL);
    assert(striping_init(&s, 22, 0, 0) == -EINVAL && striping_init(&s, 22, 3, 2) == -EINVAL);
    assert(striping_init(&s, 22, 8 << 20, 2) == -EINVAL && striping_init(&s, 22, 4096, UINT64_MAX) == -EINVAL);
    assert(striping_init(&s, 22, 4096, (1ULL << 40) + 1) == -EINVAL && striping_init(&s, 22, 4096, 1ULL << 40) == 0);
}

int main(void)
{
    known_values();
    refused();
    for (int round = 0; round < 3000; round++) {
        struct striping s;
        unsigned order = 12 + rnd(14);
        uint64_t unit = 1ULL << rnd(order + 1), count = 1 + rnd(9);
        if (unit < 1ULL << order >> 8)
            unit = 1ULL << order >> 8; /* keeps the walks short */
        assert(striping_init(&s, order, unit, count) == 0);
        for (int i = 0; i < 20; i++)
            check_extent(&s, rnd(1ULL << (1 + rnd(60))), rnd(s.unit * (1 + rnd(40))));
        if (order < 16)
            check_size(&s, rnd((count << order) * 3 + 2));
    }
    puts("striping: ok");
    return 0;
}
