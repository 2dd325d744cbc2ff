/* Images, views, the gate, I/O from Python, events, statistics. Plain C for cffi. Return: >= 0 or -errno. */
#ifndef RBDN_API_ENGINE_H
#define RBDN_API_ENGINE_H
#include <stdint.h>
#include <stddef.h>
#include "ffi/api_store.h"

typedef struct image rbdn_image;
typedef struct view rbdn_view;

/* An immutable description of an image (or of one of its snapshots) that the engine follows for every request.
 * rbdn_view_new copies everything; the store must outlive the view; the view takes its own reference to `parent`. */
typedef struct {
    uint64_t size;          /* bytes */
    uint8_t order;          /* 12..25 */
    uint64_t stripe_unit;   /* bytes; object size when not striped */
    uint64_t stripe_count;
    rbdn_store *store;
    uint64_t snap_id;       /* STORE_NOSNAP (0xfffffffffffffffe) = HEAD */
    uint64_t snap_seq;      /* snap context of writes */
    const uint64_t *snaps;  /* newest first */
    uint32_t snap_count;
    int read_only;          /* writes fail with -EROFS */
    int need_lock;          /* writes park and EVENT_LOCK_NEEDED is posted until a view without it is published */
    rbdn_view *parent;      /* NULL or a view that is read only: at a snapshot, or at a HEAD that nobody changes */
    uint64_t overlap;       /* bytes of the parent seen through this view */
    int fetch;              /* an object that is absent within the overlap comes through rbdn_image_wanted() before it is
                               changed; without a parent, before it is read too */
    uint64_t discard_granularity; /* bytes; 0 = none. Ceph's default 65536 */
} rbdn_view_config;

rbdn_view *rbdn_view_new(const rbdn_view_config *c, int *err);
void rbdn_view_put(rbdn_view *v);
/* References now: 1 = nobody but the caller, so what the view points at (the store) may go after the caller's put. */
uint32_t rbdn_view_refs(rbdn_view *v);

int rbdn_runtime_start(unsigned reactors); /* idempotent; 0 = one per core. Library use needs no reactors: not called */

rbdn_image *rbdn_image_new(uint64_t id, rbdn_view *v, int *err); /* takes its own reference */
/* Publish a new view: requests in flight finish on the old one. Wakes writers parked for the lock when need_lock is off. */
int rbdn_image_publish(rbdn_image *i, rbdn_view *v);
/* Waits until no request uses an earlier view (timeout_ms < 0: for ever). New requests go on. -ETIMEDOUT. */
int rbdn_image_settle(rbdn_image *i, int timeout_ms);
/* Gate. which: 1 writes (and discards, zeroes, flushes), 3 everything. New requests park; returns 0 when those admitted
 * before have completed, -ETIMEDOUT after timeout_ms (< 0: never; the gate stays closed). Calls nest (a count per class). */
int rbdn_image_block(rbdn_image *i, int which, int timeout_ms);
int rbdn_image_unblock(rbdn_image *i, int which);
/* From now on every request, parked ones included, fails with err (-ESHUTDOWN: fenced; -EIO: failed flush). Final. */
int rbdn_image_fence(rbdn_image *i, int err);
/* How many exports hold the image now. */
int rbdn_image_users(rbdn_image *i);
/* Fails who waits at the gate with -ESHUTDOWN and drains; afterwards no view, so no store, is used any more, and every
 * call but statistics fails with -ESHUTDOWN: other threads may be about to make one. -EBUSY while an export holds the
 * image. Idempotent. */
int rbdn_image_shut(rbdn_image *i);
/* The memory of an image that was shut, when nobody can call with it any more. Does nothing with any other. */
void rbdn_image_free(rbdn_image *i);
int rbdn_image_close(rbdn_image *i); /* both, for callers with one thread */

/* I/O from Python. type: enum req_type; flags: enum req_flags. buf: READ into, else from. Blocks; GIL released. */
int64_t rbdn_io(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags, uint64_t *mismatch);
/* Asynchronous: the completion appears in the process's completion queue with `token`. buf must stay until then. */
int rbdn_aio(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags, uint64_t token);
int rbdn_aio_fd(void); /* eventfd, readable while completions wait */
typedef struct { uint64_t token; int64_t result; uint64_t mismatch; } rbdn_completion;
int rbdn_aio_reap(rbdn_completion *out, int max); /* never blocks */

/* Moves bytes between an image and a file without Python. `in`: from the file into the image. Zeros of `grain` bytes,
 * aligned in their `chunk` of the image, are not written (0: all is). `stream`: the file is a pipe and is read in order; only with `in`.
 * Returns bytes moved, holes included, or -errno, and then what is where it should be is not known. Fewer than `len`:
 * the file ended (`ended`), or the pipe brought nothing for 200 ms (call again from there). Blocks; any thread. */
typedef struct {
    int fd;
    int in, stream;
    uint64_t off, len;  /* bytes in the image */
    uint64_t pos;       /* where in the file `off` is */
    uint32_t step;      /* bytes moved at once, <= 32 MiB */
    uint32_t threads;   /* <= 64, the caller's included */
    uint32_t grain, chunk; /* bytes */
} rbdn_pump;
typedef struct { uint64_t left_out; int ended; } rbdn_pumped; /* left_out: bytes of zeros that were not written */
int64_t rbdn_image_pump(rbdn_image *i, const rbdn_pump *what, rbdn_pumped *out);

/* Allocation: rows of (length, flags: 1 hole, 2 zero), in order from off; returns rows filled. */
typedef struct { uint64_t len; uint32_t flags; } rbdn_run;
int rbdn_image_runs(rbdn_image *i, uint64_t off, uint64_t len, rbdn_run *out, uint32_t max);
/* Copy one object of the parent into the image (flatten): 0 done, 1 nothing to do (exists, or beyond the overlap). */
int rbdn_image_copyup(rbdn_image *i, uint64_t objno);

/* Objects that requests wait for, of views with `fetch`: 1 and the next one (each is given once), or 0. Never blocks.
 * EVENT_OBJECT_WANTED says when to ask. */
int rbdn_image_wanted(rbdn_image *i, uint64_t *objno, uint64_t *token);
/* The answer, for every token. `what`: 0 it is here now; 1 there is nothing, and what is not written reads as zeros; 2 `buf`
 * is what it holds, good for the reads that wait; -errno. Runs the requests; may block. -ENOENT: no such token. */
int rbdn_image_fetched(rbdn_image *i, uint64_t token, int what, const void *buf, uint64_t len);

/* Events (native/engine/event.h). */
int rbdn_event_fd(void);
typedef struct { int type; uint64_t source; int64_t value; } rbdn_event;
int rbdn_event_next(rbdn_event *out); /* 1 or 0, never blocks */

/* Statistics: counters since the image was made. Histogram: bucket b counts latencies in [2^b, 2^(b+1)) ns, b = 0..39. */
typedef struct {
    uint64_t ops[8];       /* by enum req_type */
    uint64_t bytes[8];
    uint64_t failed[8];
    uint64_t merged[8];    /* always 0 on the embedded store */
    uint64_t total_ns[8];
    uint64_t idle_ns;      /* since the last request completed; since the image was made when none did */
    int32_t last_type;     /* enum req_type of that request; -1: none yet */
    uint64_t in_flight, parked;
    uint64_t histogram[8][40];
} rbdn_stats;
int rbdn_image_stats(rbdn_image *i, rbdn_stats *out); /* stops nothing */
/* Token bucket; 0 = unlimited. Requests over the limit wait in order. */
int rbdn_image_throttle(rbdn_image *i, uint64_t iops, uint64_t bytes_per_s);
/* The same by the image's options, beside it: requests and bytes a second of all, of reads, of the rest, in this order.
 * `most`: what a bucket holds, so what may pass at once after a pause. */
typedef struct { uint64_t rate, most; } rbdn_limit;
int rbdn_image_limits(rbdn_image *i, const rbdn_limit *limits); /* six */
#endif
