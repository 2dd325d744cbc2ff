/* What a transport (vhost-user, NBD, Python) hands to the engine: one request on one image.
 *
 * The caller owns the memory (a preallocated slot per ring head or per NBD request) and the buffers, and keeps
 * both until done(). done() is called exactly once, on any thread, possibly before image_submit() returns.
 */
#ifndef RBDN_REQUEST_H
#define RBDN_REQUEST_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum req_type {
    REQ_READ,
    REQ_WRITE,
    REQ_DISCARD,           /* may be rounded inwards (rbd_discard_granularity_bytes), contents then unspecified or zero */
    REQ_WRITE_ZEROES,      /* exact; reads back as zero */
    REQ_WRITESAME,         /* iov = the pattern, its length divides len */
    REQ_COMPARE_AND_WRITE, /* iov = len bytes to compare, then len bytes to write; -EILSEQ and mismatch on difference */
    REQ_FLUSH,
    REQ_TYPES
};

enum req_flags {
    REQ_FUA = 1,   /* durable before done() */
    REQ_UNMAP = 2, /* WRITE_ZEROES may deallocate; without it space stays allocated where the store can */
    REQ_EXACT = 4, /* DISCARD: no rounding (trim of a resize, remove) */
};

struct image;

struct req {
    /* set by the caller */
    uint8_t type;
    uint8_t flags;
    uint32_t iovcnt;
    uint64_t off, len; /* bytes in the image; the engine answers -EINVAL beyond the image's size */
    struct iovec *iov; /* READ/WRITE: exactly len bytes in total, else -EINVAL */
    void (*done)(struct req *);
    void *owner;

    /* set by the engine before done() */
    int64_t result;    /* 0 or -errno */
    uint64_t mismatch; /* COMPARE_AND_WRITE: first differing byte, from off */

    /* the engine's own until done() */
    struct req *next;
    struct image *image;
    struct epoch *epoch;
    uint64_t started_ns;
    void *work;
};

/* Never fails: errors arrive in req->result. Requests parked by the gate wait; they fail only when the image is fenced
 * or closed. done() may submit again, also from within image_submit(): mind the stack. */
void image_submit(struct image *, struct req *);
/* Who sent them is gone: requests that still wait at the gate and for which whose() is true end with -ECANCELED, and never
 * reach the store. Those that have passed go on. done() runs before this returns. whose() must not block, nor call us. */
void image_drop(struct image *, bool (*whose)(const struct req *, const void *who), const void *who);

/* Facts a transport tells its peer; they change with a resize (then the export's `changed` callback runs). */
uint64_t image_size(struct image *);      /* bytes */
bool image_read_only(struct image *);
uint32_t image_object_size(struct image *); /* bytes */

/* Allocation of [off, off+len) for NBD block status and diff: runs in order, covering the range from off.
 * Returns the number filled (>= 1) or -errno. May block: never call on a reactor without IMAGE_NOWAIT data. */
struct run {
    uint64_t len;
    uint32_t flags; /* RUN_HOLE | RUN_ZERO as NBD's base:allocation */
};
enum run_flags { RUN_HOLE = 1, RUN_ZERO = 2 };
int image_runs(struct image *, uint64_t off, uint64_t len, struct run *, uint32_t max);

/* An export holds the image while it serves it. `changed` (size or read-only) runs on the publishing thread, one at a
 * time; it may be NULL, must not block for long and must not call image_get or image_put, which wait for it. */
struct image_user {
    struct image_user *next;
    void (*changed)(struct image_user *);
    void *owner;
};
void image_get(struct image *, struct image_user *);
void image_put(struct image *, struct image_user *);

#endif
