/* The block device of virtio 1.2, 5.2: configuration space and requests. Knows rings only as buffers of a chain. */
#ifndef RBDN_VIRTIO_BLK_H
#define RBDN_VIRTIO_BLK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/request.h"
#include "transport/vring.h"

#define BLK_RANGES_MAX 8                    /* segments of one discard or write-zeroes */
#define BLK_DISCARD_MAX (1U << 21)          /* sectors a segment: 1 GiB */
#define BLK_ZEROES_MAX (1U << 17)           /* sectors a segment: 64 MiB, bounded because it may have to write */
#define BLK_DISCARD_ALIGN 128               /* sectors: Ceph's rbd_discard_granularity_bytes, 64 KiB */
#define BLK_CONFIG_SIZE 256                 /* what a front end may ask for; unknown fields are zero */
#define BLK_INLINE_IOV 8

/* What the requests of one device need. */
struct blk_device {
    struct image *image;
    bool read_only;
    _Atomic bool write_through; /* every write is FUA; changed by the front end while requests run */
    char serial[20];            /* GET_ID; zero-padded */
};

struct blk_settings {
    uint16_t num_queues, queue_size_max;
    uint32_t block_size; /* bytes */
    bool write_cache;    /* offer FLUSH and CONFIG_WCE */
};

uint64_t blk_features(const struct blk_device *, const struct blk_settings *);
/* Fills the whole space; the capacity is the image's now. `writeback`: the present cache mode. */
void blk_config(const struct blk_device *, const struct blk_settings *, bool writeback, uint8_t out[BLK_CONFIG_SIZE]);
#define BLK_CONFIG_WCE 32 /* offset of the one byte a driver may write */

struct blk_range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct blk_request {
    struct req req;    /* given to image_submit */
    uint8_t *status;   /* in guest memory; NULL = there is none */
    uint32_t written;  /* used length on success */
    struct iovec *fill; /* guest memory that the request may have written to, apart from the status */
    unsigned filled;
    uint8_t range, ranges; /* REQ_DISCARD, REQ_WRITE_ZEROES: the next one and how many */
    union {
        struct iovec iov[BLK_INLINE_IOV];
        struct blk_range range_list[BLK_RANGES_MAX];
    };
};

#define BLK_SUBMIT (-1)
/* Judges a request. The chain's buffers are r->iov or other memory that stays until the request is done.
 * BLK_SUBMIT: r->req is ready for image_submit, done and owner excepted. Otherwise the status byte to answer. */
int blk_parse(const struct blk_device *, struct blk_request *, struct ring_chain *);
/* After done(): will blk_finish() ask for another submission? */
static inline bool blk_more(const struct blk_request *r) { return r->req.result == 0 && r->range < r->ranges; }
/* After done(): BLK_SUBMIT when another range of the same request is to be submitted, else the status byte. */
int blk_finish(struct blk_request *);

#endif
