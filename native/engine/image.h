/* The engine's own structures. Transports see only request.h.
 *
 * Life of a request: image_submit -> gate (gate.c; may park it) -> image_run -> one piece per object (piece.h)
 * -> req_finish: FUA's flush, statistics, done(), gate_leave.
 */
#ifndef RBDN_IMAGE_H
#define RBDN_IMAGE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "engine/request.h"
#include "engine/threads.h"
#include "ffi/api_engine.h"
#include "store/store.h"
#include "striping/striping.h"

#define VIEW_DEPTH_MAX 64
#define OVERLAP(a, a_end, b, b_end) ((a) < (b_end) && (b) < (a_end))

/* Engine-internal values beside those of request.h. */
enum req_internal_type {
    REQ_HOLD_READ = REQ_TYPES, /* passes the gate like a read; done() runs when admitted; the holder leaves the gate */
    REQ_HOLD_WRITE,            /* the same as a write */
    REQ_KINDS
};
enum req_internal_flags {
    REQ_INTERNAL = 0x40,  /* part of an admitted request: no gate, no statistics, no FUA; `epoch` is set */
    REQ_MAY_BLOCK = 0x80, /* the submitting thread may block: no detour over the pool. Lost when parked */
};

/* --- view.c ------------------------------------------------------------------------------------------------------- */

struct view { /* immutable but for refs */
    _Atomic uint32_t refs;
    uint32_t depth; /* ancestors */
    struct striping striping;
    uint64_t size;  /* bytes */
    struct store *store;
    uint64_t snap_id;
    struct snapc *snapc; /* NULL: no snapshots */
    bool read_only, need_lock;
    bool fetch; /* what Python must bring before it is changed, or without a parent, read */
    struct view *parent;
    uint64_t overlap; /* bytes; 0 without a parent and fetch */
    uint64_t discard_granularity;
};

struct view *view_get(struct view *);

/* How much of the object, from its start, is covered by the parent, or by what is to be fetched, when the object is
 * absent. Bytes. */
static inline uint64_t view_parent_prefix(const struct view *v, uint64_t objno)
{
    return v->overlap ? striping_prefix(&v->striping, objno, v->overlap) : 0;
}

/* --- gate.c ------------------------------------------------------------------------------------------------------- */

/* One period of an image's life with one view. `word` counts the requests in flight that were admitted in it, and says
 * which requests may not pass without a look under the image's lock. Epochs are kept until the image is closed and used
 * again, so that a thread may look at one that was retired a moment ago: it finds GATE_RETIRED. */
struct epoch {
    _Atomic uint64_t word; /* flags change under image->lock only */
    struct view *view;
    uint64_t seq;
    struct epoch *next; /* image->epochs or image->spare; lock */
};

#define GATE_WRITE_ONE 1ULL         /* writes, discards, zeroes, flushes in flight */
#define GATE_READ_ONE (1ULL << 28)
#define GATE_COUNT_MASK ((1ULL << 56) - 1)
#define GATE_WRITE_MASK (GATE_READ_ONE - 1)
enum {
    GATE_RETIRED = 0,   /* another epoch is the current one */
    GATE_CLOSED_ALL,    /* blocked */
    GATE_CLOSED_WRITES,
    GATE_NEED_LOCK,
    GATE_FENCED,
    GATE_THROTTLED,
    GATE_EXCLUSIVE,     /* a compare-and-write owns a range: writes must look whether it is theirs */
    GATE_ALWAYS,        /* set in every epoch: what must never pass without the lock */
};
#define GATE_BIT(flag) (1ULL << (56 + (flag)))
/* Leaving under these may complete somebody's wait. */
#define GATE_LEAVE_SLOWLY (GATE_BIT(GATE_RETIRED) | GATE_BIT(GATE_CLOSED_ALL) | GATE_BIT(GATE_CLOSED_WRITES))

extern const uint64_t gate_stops[REQ_KINDS]; /* flags that keep a kind of request from passing at once */

static inline uint64_t gate_unit(unsigned type)
{
    return type == REQ_READ || type == REQ_HOLD_READ ? GATE_READ_ONE : GATE_WRITE_ONE;
}

struct caw;
struct copyup;

enum { THROTTLE_OWNER_OPS, THROTTLE_OWNER_BYTES, THROTTLE_OPS, THROTTLE_BYTES, THROTTLE_READ_OPS, THROTTLE_READ_BYTES,
       THROTTLE_WRITE_OPS, THROTTLE_WRITE_BYTES, THROTTLES };

struct bucket {
    double rate;  /* per second; 0 = unlimited */
    double level; /* may be overdrawn by one request; below 0: wait */
    double most;
};

struct waiters {
    struct req *first, **last; /* in order */
};

struct brought { /* two bits for each object of HEAD: it has been asked for; there was nothing */
    uint64_t objects;
    _Atomic uint8_t bits[];
};

struct throttle { /* image->lock */
    struct bucket buckets[THROTTLES];
    bool limited; /* some rate is not 0 */
    uint64_t filled_ns;
    struct waiters waiters[2]; /* reads, others */
    uint64_t waiting;
    struct timer timer;
    bool timer_set;
};

struct stats_shard;
#define STATS_SHARDS 4

struct image {
    _Atomic(struct epoch *) now;
    _Atomic(struct stats_shard *) stats[STATS_SHARDS];
    uint64_t id;
    uint64_t made_ns;
    _Atomic uint64_t size; /* bytes; of the current view, as the next two */
    _Atomic uint32_t object_size;
    _Atomic bool read_only;

    pthread_mutex_t lock; /* guards everything down to `flush` */
    pthread_cond_t drained;  /* some count went down while somebody may wait; CLOCK_MONOTONIC */
    struct epoch *epochs;    /* the current one and retired ones in use, newest first */
    struct epoch *spare;
    uint64_t next_seq;
    unsigned blocked_writes, blocked_all; /* nested */
    int fence;               /* 0 or -errno */
    bool shut;               /* the current epoch has no view any more; `fence` is set */
    bool lock_asked;         /* EVENT_LOCK_NEEDED posted for this view */
    struct req *parked, **parked_last;
    uint64_t parked_count;
    struct caw *exclusive;   /* compare-and-writes running or waiting for earlier writes */
    struct throttle throttle;
    struct req *flush_waiting, *flush_running; /* linked by ->next */
    struct flush {
        struct store_op op;
        struct job job;
        struct image *image;
        struct store *store;
    } flush;                 /* used by the one that runs flush_running */

    pthread_mutex_t copyup_lock; /* guards copyups; taken alone */
    struct copyup *copyups;
    _Atomic uint64_t fetches; /* begun or ended; changes under copyup_lock */
    _Atomic(struct brought *) brought; /* set once, copyup_lock */

    pthread_mutex_t users_lock; /* guards users; held while `changed` runs; serialises publish and close */
    struct image_user *users;
};

int gate_init(struct image *, struct view *);
void gate_shut(struct image *); /* fails who waits, drains, gives the view back; idempotent */
void gate_destroy(struct image *); /* after gate_shut */
int gate_publish(struct image *, struct view *);
void gate_in_flight(struct image *, uint64_t *in_flight, uint64_t *parked);
struct epoch *gate_enter_slow(struct image *, struct req *); /* NULL: parked or failed */
void gate_leave_slow(struct image *, struct epoch *, uint64_t unit);
void gate_fence(struct image *, int err); /* the first error stays */
/* Also what the stores of its views have in flight fails: nobody of ours is let in again. */
void gate_fence_stores(struct image *, int err);
void gate_exclusive_end(struct image *, struct caw *);

/* Counts the request in, in the current epoch; NULL: it is parked or has failed, and may be gone. */
static inline struct epoch *gate_enter(struct image *i, struct req *r)
{
    struct epoch *e = atomic_load_explicit(&i->now, memory_order_acquire);
    uint64_t word = atomic_load_explicit(&e->word, memory_order_relaxed);
    uint64_t stop = gate_stops[r->type], unit = gate_unit(r->type);
    while (!(word & stop))
        if (atomic_compare_exchange_weak_explicit(&e->word, &word, word + unit, memory_order_acquire,
                                                  memory_order_relaxed))
            return r->epoch = e;
    return gate_enter_slow(i, r);
}

/* The image may be gone afterwards. */
static inline void gate_leave(struct image *i, struct epoch *e, uint64_t unit)
{
    uint64_t word = atomic_load_explicit(&e->word, memory_order_relaxed);
    while (!(word & GATE_LEAVE_SLOWLY))
        if (atomic_compare_exchange_weak_explicit(&e->word, &word, word - unit, memory_order_release,
                                                  memory_order_relaxed))
            return;
    gate_leave_slow(i, e, unit);
}

/* throttle.c: all under image->lock. */
void throttle_set(struct image *, unsigned which, uint64_t rate, uint64_t most);
bool throttle_pass(struct image *, struct req *); /* false: it is queued */
struct req *throttle_take(struct image *);        /* the next one whose turn has come, or NULL */
void throttle_timer(struct timer *);

/* --- image.c ------------------------------------------------------------------------------------------------------ */

void image_run(struct image *, struct req *);   /* an admitted or internal request */
void req_finish(struct req *, int64_t result);  /* of image_run, any thread */
void req_complete(struct req *, int64_t result); /* the last step of req_finish */
void req_refuse(struct req *, int err);         /* not admitted */
/* Posts EVENT_READ_ERROR or EVENT_IO_ERROR; -ESHUTDOWN fences. */
void image_store_error(struct image *, bool read, int err);
int image_check(const struct view *, const struct req *); /* 0, -EINVAL, -EROFS */
int64_t iov_total(const struct iovec *, uint32_t count); /* bytes; -EINVAL on overflow */

void flush_join(struct req *); /* flush.c: completes the request after a STORE_FLUSH begun from now on */

int caw_prepare(struct req *);     /* caw.c: compare-and-write; before the gate: sets req->work, or -ENOMEM */
void caw_refuse(struct req *);
void caw_run(struct caw *);        /* its range is ours, earlier writes are through */

struct caw {
    struct req part; /* the read, then the write; REQ_INTERNAL */
    struct req *req;
    struct epoch *epoch;
    struct caw *next; /* image->exclusive; image->lock */
    bool waiting;     /* for writes of earlier epochs; image->lock */
    struct iovec iov, *write_iov; /* iov: of `data` */
    uint8_t *data;    /* what was read */
};

/* --- stats.c ------------------------------------------------------------------------------------------------------ */

void stats_count(struct image *, unsigned type, uint64_t bytes, int64_t result, uint64_t ns, uint64_t now);
void stats_free(struct image *);

#endif
