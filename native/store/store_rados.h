/* The parts of the store on RADOS; for its own files only (store_rados*.c).
 *
 * An operation of the engine becomes a call. It asks the object map (if there is one), may wait behind its neighbour
 * (streams: store_rados_merge.c), may wait for room in the client (store_rados_client.c), is one librados operation, and
 * ends in librados' callback: no thread of ours is involved.
 */
#ifndef RBDN_STORE_RADOS_H
#define RBDN_STORE_RADOS_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "ffi/api_rados_data.h"
#include "store/store_rados_lib.h"
#include "store/object_map.h"
#include "store/store.h"

#define RADOS_OID_MAX 128 /* bytes of an object's name with its NUL */
#define RADOS_STREAMS 64  /* buckets */

struct rados_store;
struct call;

/* One librados operation, from rados_aio_begin until done(). */
struct rados_aio {
    struct rados_aio *next, **link; /* of store->running; store->lock */
    struct rados_store *store;
    rados_completion_t completion;
    void (*done)(struct rados_aio *, int result); /* in librados' callback */
};

/* An ioctx for one snapshot or one snap context: librados keeps both in the ioctx. Immutable but for uses. */
struct rados_context {
    struct rados_context *next;
    rados_ioctx_t io;
    uint64_t snap_id;    /* reads */
    struct snapc *snapc; /* writes; NULL: none */
    uint32_t uses;       /* calls with it; store->lock */
};

/* Neighbouring requests, each beginning where the one before ended. */
struct rados_stream {
    struct rados_stream *next; /* of its bucket, or spare */
    struct rados_context *context;
    uint64_t objno, end; /* end: of the last request, bytes */
    uint8_t type, flags;
    uint8_t flying;      /* operations at librados */
    struct call *waiting, *last; /* what will be one operation */
    uint64_t waiting_bytes;
};

struct call {
    struct rados_aio aio;       /* first */
    struct call *next;          /* of the client's queue, or spare; in work lists */
    struct call *member;        /* what is done together with this one */
    struct store_op *op;
    struct rados_context *context;
    struct rados_stream *stream;
    struct object_map *map;     /* NULL: none */
    struct map_ticket ticket;
    uint64_t off, bytes;        /* of the whole group */
    uint8_t *buffer;            /* for a group, or for several iovecs */
    uint64_t size;              /* STAT */
    time_t mtime;
    uint32_t snap_at;           /* COPYUP: snapshots whose maps still have to be changed */
    bool first_snap_done;
    bool hint;                  /* the object may be new */
    bool sent;                  /* room was taken for it */
    int64_t result;
};

/* What all stores on one cluster handle share: librados blocks who submits more than its limits allow. */
struct rados_client {
    struct rados_client *next;
    rados_t cluster;
    uint32_t users;             /* stores */
    pthread_mutex_t lock;       /* guards all below */
    uint64_t ops, bytes;        /* at librados */
    uint64_t ended;             /* operations, ever */
    uint64_t ops_max, bytes_max;
    struct call *first, **last; /* waiting */
};

struct rados_map_store { /* where the object map lies */
    rados_ioctx_t io;
    char image_id[64];
    bool fast_diff;
    size_t assert_len;
    uint8_t assert_locked[256]; /* input of lock.assert_locked */
};

struct rados_store {
    struct store store; /* first */
    struct rados_client *client;
    int64_t pool_id;
    char namespace[128];
    char prefix[RADOS_OID_MAX - 20];
    uint64_t object_size;
    _Atomic int fence;             /* 0 or -errno; set under lock */
    _Atomic uint32_t inside;       /* threads in submit or in a callback */
    _Atomic uint32_t map_users;    /* threads that use the map outside a request */
    _Atomic(struct object_map *) map; /* changed under lock */
    struct rados_context base;     /* HEAD, no snapshots */
    struct rados_map_store map_store;
    _Atomic uint64_t merged[2];    /* reads, writes that needed no operation of their own */
    pthread_mutex_t lock;          /* guards all below */
    struct rados_aio *running;
    struct rados_context *contexts;
    struct call *spare;
    unsigned spares;
    struct rados_stream *streams[RADOS_STREAMS], *spare_streams;
    uint8_t hinted[64];            /* objects whose allocation hint was sent, by a part of their number */
};

/* --- store_rados.c */
struct rados_store *rados_store_of(struct store *); /* NULL: another kind of store */
int rados_aio_begin(struct rados_store *, struct rados_aio *); /* 0, a fence's err or -ENOMEM */
/* librados' answer: < 0: there will be no callback, so done() runs here. The operation may be gone afterwards. */
void rados_aio_sent(struct rados_store *, struct rados_aio *, int rc);
void rados_call_run(struct call *);  /* to librados; the map agrees */
void rados_call_end(struct call *, int result); /* and its members */
void rados_call_complete(struct call *); /* the last step, with call->result */
rados_ioctx_t rados_ioctx_for(struct rados_store *, int64_t pool_id, int *err);
void rados_fence(struct rados_store *, int err);

/* --- store_rados_ops.c: one librados operation for the call and its members */
int rados_call_send(struct call *); /* librados' answer */
/* Sets member->result; `at`: where its bytes are in the group's. `result`: librados' of the group. */
void rados_call_result(struct call *group, struct call *member, uint64_t at, int result);

/* --- store_rados_client.c */
struct rados_client *rados_client_get(rados_t cluster);
void rados_client_put(struct rados_client *);
bool rados_client_take(struct rados_client *, struct call *); /* false: it waits */
struct call *rados_client_give(struct rados_client *, uint64_t bytes); /* whose turn has come, linked by next */
struct call *rados_client_drop(struct rados_client *, struct rados_store *); /* who waits there, linked by next */

/* --- store_rados_merge.c; under store->lock */
bool rados_stream_join(struct rados_store *, struct call *); /* true: it waits behind its neighbour */
struct call *rados_stream_next(struct rados_store *, struct rados_stream *); /* after one landed: what may fly now */
struct call *rados_stream_drop(struct rados_store *); /* all who wait, linked by next */
void rados_streams_free(struct rados_store *);

/* --- store_rados_map.c */
bool rados_map_says_absent(struct rados_store *, const struct store_op *);
int rados_map_begin(struct call *);  /* 0 go on; MAP_WAITS: rados_call_run() or _complete() follows; or -errno */
bool rados_map_forget(struct call *); /* after a removal; true: rados_call_complete() follows */

#endif
