/* Buffers and request slots of NBD connections, recycled per reactor: taking and giving back is a list operation
 * without a lock. What nobody needed for a second goes back to the system, so idle connections hold none of it. */
#ifndef RBDN_NBD_BUFFER_H
#define RBDN_NBD_BUFFER_H

#include <stddef.h>
#include <stdint.h>

struct reactor;
struct nbd_cache; /* of one reactor; lives as long as the process; used on the reactor's thread only */

#define NBD_HEADROOM 64 /* bytes before data: a reply's header goes right in front of its payload */

struct nbd_buffer {
    struct nbd_buffer *next;
    uint32_t refs;
    uint8_t size_class;
    size_t size; /* bytes at data() */
} __attribute__((aligned(64)));

static inline uint8_t *nbd_buffer_data(struct nbd_buffer *b)
{
    return (uint8_t *)b + sizeof *b + NBD_HEADROOM;
}

struct nbd_cache *nbd_cache_of(struct reactor *); /* on its thread; NULL without memory */
/* At least `size` bytes, contents undefined, one reference. NULL without memory. */
struct nbd_buffer *nbd_buffer_get(struct nbd_cache *, size_t size);
void nbd_buffer_put(struct nbd_cache *, struct nbd_buffer *); /* drops one reference */
size_t nbd_buffer_capacity(size_t size); /* what a get of `size` will really hold */

struct nbd_slot;
struct nbd_slot *nbd_slot_get(struct nbd_cache *);
void nbd_slot_put(struct nbd_cache *, struct nbd_slot *);

#endif
