/* Where the bytes of an image lie: image extent -> object extents and back. Arithmetic only: no I/O, no allocation.
 *
 * The image is cut into stripe units of `unit` bytes. `count` consecutive units make a stripe and go to `count`
 * different objects; an object takes units until it holds 2^order bytes, and `count` objects filled together are an
 * object set. With count 1 that is simply: object = off >> order. The layout is Ceph's (file layouts, RBD STRIPINGV2).
 */
#ifndef RBDN_STRIPING_H
#define RBDN_STRIPING_H

#include <stdbool.h>
#include <stdint.h>

#define STRIPING_ORDER_MIN 12
#define STRIPING_ORDER_MAX 25

/* Immutable after striping_init; copy freely. */
struct striping {
    uint8_t order;       /* objects hold 2^order bytes */
    uint64_t unit;       /* bytes; divides the object size; the object size when count is 1 */
    uint64_t count;      /* objects in a set, >= 1 */
    uint64_t per_object; /* units in an object */
};

/* unit 0 means the object size. -EINVAL: order out of range, unit does not divide the object size, count 0, or an
 * object set of 2^62 bytes and more. */
int striping_init(struct striping *, unsigned order, uint64_t unit, uint64_t count);

/* A piece of one object and where it lies in the image; contiguous in both. */
struct stripe_extent {
    uint64_t objno;
    uint64_t off; /* bytes in the object */
    uint64_t len; /* bytes, > 0 */
    uint64_t pos; /* bytes in the image */
};

/* Image extent -> object extents, in image order. Use: stripe_begin; while (stripe_next) ... */
struct stripe_iter {
    const struct striping *s;
    uint64_t pos, end; /* bytes in the image: next, and behind the last */
};

static inline void stripe_begin(struct stripe_iter *it, const struct striping *s, uint64_t off, uint64_t len)
{
    it->s = s;
    it->pos = off;
    it->end = off + len;
}

bool stripe_next(struct stripe_iter *, struct stripe_extent *);

/* The whole extent lies in one object, contiguously: the common case, kept inline. */
static inline bool stripe_single(const struct striping *s, uint64_t off, uint64_t len, struct stripe_extent *e)
{
    if (s->count != 1 || (off & ((1ULL << s->order) - 1)) + len > 1ULL << s->order)
        return false;
    e->objno = off >> s->order;
    e->off = off & ((1ULL << s->order) - 1);
    e->len = len;
    e->pos = off;
    return true;
}

/* Object extent -> image extents, in object order, which is image order too. off + len <= 2^order. */
struct unstripe_iter {
    const struct striping *s;
    uint64_t objno;
    uint64_t off, end; /* bytes in the object: next, and behind the last */
};

static inline void unstripe_begin(struct unstripe_iter *it, const struct striping *s, uint64_t objno, uint64_t off,
                                  uint64_t len)
{
    it->s = s;
    it->objno = objno;
    it->off = off;
    it->end = off + len;
}

bool unstripe_next(struct unstripe_iter *, struct stripe_extent *);

/* Image position of one byte of an object. */
uint64_t striping_position(const struct striping *, uint64_t objno, uint64_t off);

/* How many objects an image of `size` bytes may have: the highest object number in use + 1. */
uint64_t striping_objects(const struct striping *, uint64_t size);

/* How many bytes of the object, from its start, lie below image position `size`. (What an image keeps of an object
 * when it shrinks to `size`, and what a child sees of it through an overlap of `size`: always a prefix.) */
uint64_t striping_prefix(const struct striping *, uint64_t objno, uint64_t size);

#endif
