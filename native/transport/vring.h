/* One split virtqueue, device side (virtio 1.2, 2.7). No I/O, no threads: used by its owner's thread only.
 *
 * The ring lives in memory the guest may change at any time. Every field is read once into our own memory and only
 * the copy is judged; what is judged wrong ends with -EPROTO (the ring cannot be trusted any more) or, when only a
 * buffer's address is wrong, with chain->fault (this request fails).
 */
#ifndef RBDN_VRING_H
#define RBDN_VRING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define VIRTIO_RING_NO_LEGACY
#include <linux/virtio_ring.h>

#include "transport/guest_memory.h"
#include "transport/vhost_log.h"

#define RING_SIZE_MAX 1024
#define RING_BATCH 16 /* used entries written before the index is published, at most */

/* In-flight table of one queue, as vhost-user defines it for split rings. Shared with the front end, which keeps it
 * while we are dead. */
struct inflight_desc {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next; /* head completed before this one */
    uint64_t counter;
};

struct inflight_queue {
    uint64_t features;
    uint16_t version; /* 1; 0 = not used yet */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct inflight_desc desc[];
};
/* Bytes of one queue's table; queues follow each other at this distance. */
static inline uint64_t inflight_size(unsigned num)
{
    return (sizeof(struct inflight_queue) + num * sizeof(struct inflight_desc) + 63) & ~63ULL;
}

struct split_ring {
    uint16_t num, mask;
    uint16_t last_avail; /* next entry of the avail ring to read */
    uint16_t used;       /* next entry of the used ring to write */
    uint16_t published;  /* used index the guest sees */
    uint16_t signalled;  /* used index at the last decision about a signal */
    bool signalled_valid;
    bool event_idx, indirect; /* negotiated */
    bool stale;               /* at the start the used index was older than the front end's base */
    bool log_used;            /* VHOST_VRING_F_LOG */
    unsigned hint;            /* region of the last look-up */
    struct vring_desc *desc;
    uint16_t *avail; /* flags, idx, ring[num], used_event */
    struct vring_used *used_ring;
    struct guest_memory *mem;
    struct dirty_log *log; /* NULL = off */
    uint64_t log_addr;     /* guest address of the used ring */
    struct inflight_queue *inflight; /* NULL = not tracked */
    uint64_t counter;                /* the next in-flight counter */
    uint16_t batch[RING_BATCH];      /* heads pushed since the last publication */
};

/* A request as the guest laid it out: readable buffers, then writable ones. */
struct ring_chain {
    struct iovec *iov; /* the caller's */
    unsigned iov_max;
    struct iovec *wide; /* the caller's, taken instead when iov does not suffice; NULL = none */
    unsigned wide_max;
    unsigned out, in;          /* entries: iov[0..out) readable, iov[out..out+in) writable; empty buffers left out */
    uint64_t out_len, in_len;  /* bytes, also those that could not be mapped */
    uint8_t *last;             /* last writable byte, NULL when there is none or it is not mapped */
    bool fault;                /* a buffer is outside the guest's memory: iov is not complete */
};

/* Addresses are checked: aligned as virtio wants, each part inside one region. -EFAULT or -EINVAL. */
struct ring_addresses {
    uint64_t desc, avail, used; /* user addresses */
};
int ring_map(struct split_ring *, struct guest_memory *, const struct ring_addresses *);
/* Start at `base`. With an in-flight table: repair it after a crash and set last_avail behind what is in flight;
 * `heads` (room for num) receives the heads to submit again, oldest first. Returns how many, or -EPROTO.
 *
 * A fresh table and a used index behind the base: the guest has moved here and some of its memory has not. QEMU before
 * 9.0 drops the dirty log of a back end that is killed in a migration, but it sends the used index it saw last as the
 * base. That one is believed (`stale`): with the older one, requests that the guest has back would be done again. */
int ring_start(struct split_ring *, uint16_t base, uint16_t *heads);

/* Entries not read yet; -EPROTO when the guest claims more than fit. */
int ring_available(struct split_ring *);
/* Head of the next entry (only when available); not judged: compare it with num. */
uint16_t ring_next_head(struct split_ring *);
/* 0 or -EPROTO. The caller has checked that head < num. */
int ring_fetch(struct split_ring *, uint16_t head, struct ring_chain *);
void ring_track(struct split_ring *, uint16_t head); /* note it as in flight */

/* len: bytes written to the writable buffers. */
void ring_push(struct split_ring *, uint16_t head, uint32_t len);
void ring_publish(struct split_ring *); /* what was pushed; also happens by itself after RING_BATCH */
static inline bool ring_unpublished(const struct split_ring *r) { return r->used != r->published; }
bool ring_wants_signal(struct split_ring *); /* once per batch, after publishing */

void ring_kicks_off(struct split_ring *); /* while we look by ourselves */
bool ring_kicks_on(struct split_ring *);  /* true: entries came meanwhile, look again */

#endif
