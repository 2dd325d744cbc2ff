/* librados for Python: a connection, operation lists, watches. Plain C for cffi: no macros. Python never runs on a
 * thread of librados: completions set a flag that rbdn_rados_wait() waits for, watch callbacks go into a ring.
 * Return values: >= 0, or -errno. Strings end with NUL; buffers are copied unless said otherwise. */
#ifndef RBDN_API_RADOS_H
#define RBDN_API_RADOS_H
#include <stdint.h>
#include <stddef.h>

/* 0, or -ENOSYS: no librados.so.2 (Debian: librados2), or one older than Ceph 14. Everything else comes after it. */
int rbdn_rados_load(void);
int rbdn_rados_version(void); /* major * 10000 + minor * 100 + extra, of librados' interface */

/* --- connections: a rados_t. `name`: "client.admin" */
void *rbdn_rados_create(const char *cluster_name, const char *name, int *err);
int rbdn_rados_conf_read(void *cluster, const char *path); /* NULL: $CEPH_CONF, else the usual places */
int rbdn_rados_conf_words(void *cluster, int count, const char **words); /* as on a command line; the first is ignored */
int rbdn_rados_conf_set(void *cluster, const char *option, const char *value);
int rbdn_rados_conf_get(void *cluster, const char *option, char *buf, size_t len); /* -ENAMETOOLONG */
int rbdn_rados_connect(void *cluster);
/* No ioctx, operation or watch may be left. Also for one that never connected. */
void rbdn_rados_shutdown(void *cluster);
/* Loads librados and connects as client.admin by that file, on a thread of its own; the caller goes on meanwhile. Once. */
int rbdn_rados_early(const char *conf);
/* That connection, when it is by that file: waited for, and the caller's. NULL: there is none; *err < 0: connecting failed. */
void *rbdn_rados_early_take(const char *conf, int *err);
int rbdn_rados_fsid(void *cluster, char *buf, size_t len);
int rbdn_rados_addresses(void *cluster, char *buf, size_t len); /* -ENAMETOOLONG */
uint64_t rbdn_rados_instance(void *cluster);
int rbdn_rados_latest_map(void *cluster);
/* The oldest release of clients that the cluster must serve: 13 is Mimic. */
int rbdn_rados_oldest_client(void *cluster);
int rbdn_rados_stat(void *cluster, uint64_t *out); /* KiB in all, used, available; objects */

enum rbdn_rados_target { RBDN_TO_MON, RBDN_TO_MGR, RBDN_TO_OSD, RBDN_TO_PG };
typedef struct {
    char *out, *status; /* freed by rbdn_rados_reply_free */
    size_t out_len, status_len;
} rbdn_rados_reply;
/* `where`: the OSD's number or the placement group's name. The reply is filled on failure too. */
int rbdn_rados_command(void *cluster, int target, const char *where, const char *command, const void *in, size_t len,
                       rbdn_rados_reply *reply);
void rbdn_rados_reply_free(rbdn_rados_reply *reply);

/* --- pools */
int rbdn_rados_pools(void *cluster, char *buf, size_t len); /* bytes of all names, each with a NUL */
int64_t rbdn_rados_pool_lookup(void *cluster, const char *name);
int rbdn_rados_pool_create(void *cluster, const char *name);
int rbdn_rados_pool_delete(void *cluster, const char *name);

/* --- a pool and namespace. Any number of threads at once. */
typedef struct rbdn_ioctx rbdn_ioctx;
rbdn_ioctx *rbdn_ioctx_open(void *cluster, int64_t pool_id, const char *name_space, int *err);
int rbdn_ioctx_locator(rbdn_ioctx *io, const char *key); /* at once after opening it, before its first use */
void rbdn_ioctx_close(rbdn_ioctx *io);
/* Bytes, KiB, objects, clones, copies, objects missing on their primary, unfound, degraded, reads, KiB read, writes, KiB
 * written: 12 numbers, as the manager last counted. */
int rbdn_ioctx_stat(rbdn_ioctx *io, uint64_t *out);
int rbdn_ioctx_application(rbdn_ioctx *io, const char *name, int force);
int rbdn_ioctx_snap_create(rbdn_ioctx *io, uint64_t *snap);
int rbdn_ioctx_snap_remove(rbdn_ioctx *io, uint64_t snap);
/* -EINVAL unless ids descend from seq. */
int rbdn_ioctx_rollback(rbdn_ioctx *io, const char *oid, uint64_t snap, uint64_t seq, uint64_t *snaps, int count);

/* The connection and the pool of a rados_ioctx_t that somebody else opened. */
void *rbdn_foreign_cluster(void *io, int64_t *pool_id);

/* --- names of objects, page by page */
typedef struct rbdn_listing rbdn_listing;
rbdn_listing *rbdn_listing_open(rbdn_ioctx *io, int *err);
/* Before the first row: each is three names, the object's, its locator's and its namespace's. (The namespace "\001" of a
 * context lists all of them.) */
void rbdn_listing_whole(rbdn_listing *l);
/* Bytes of the names put into buf (each with its NUL), 0 at the end; names that hold a NUL are left out. */
int rbdn_listing_next(rbdn_listing *l, char *buf, size_t len);
void rbdn_listing_close(rbdn_listing *l);

/* --- what librados' C interface lacks: -EOPNOTSUPP when this librados has it under other names */
typedef struct {
    char address[256]; /* as librados writes it, with its type in front or not */
    int64_t gid;
    uint64_t cookie;
    uint32_t timeout; /* seconds */
} rbdn_watcher;
/* How many there are; the first `max` of them into out. */
int rbdn_ioctx_watchers(rbdn_ioctx *io, const char *oid, rbdn_watcher *out, int max);
/* The clones of an object as numbers: seq, count, then for each: id, size, count and snaps, count and overlap pairs.
 * How many numbers there are; the first `max` of them into out. */
int64_t rbdn_ioctx_snapset(rbdn_ioctx *io, const char *oid, uint64_t *out, int64_t max);

/* --- operation lists. Built by one thread; rbdn_oplist_free at any time, in flight too. */
typedef struct rbdn_oplist rbdn_oplist;
typedef struct rbdn_out { /* where a result comes; lives as long as the list. Valid once it has succeeded. */
    struct rbdn_out *next;
    char *data;         /* READ, EXEC */
    size_t len;         /* bytes in data */
    void *rows;         /* OMAP..., XATTRS: for rbdn_out_row */
    uint64_t size;      /* STAT */
    long mtime;         /* STAT; seconds since 1970 */
    unsigned char more; /* OMAP_VALS, OMAP_KEYS */
    int result;         /* of this operation alone */
    int kind;
} rbdn_out;
enum rbdn_op_kind {
    /* in both kinds of list */
    RBDN_OP_ASSERT_EXISTS, RBDN_OP_ASSERT_VERSION, RBDN_OP_CMPXATTR, RBDN_OP_OMAP_CMP, RBDN_OP_CMPEXT,
    /* in lists that write */
    RBDN_OP_CREATE, RBDN_OP_WRITE, RBDN_OP_WRITE_FULL, RBDN_OP_APPEND, RBDN_OP_WRITESAME, RBDN_OP_ZERO, RBDN_OP_TRUNCATE,
    RBDN_OP_REMOVE, RBDN_OP_SETXATTR, RBDN_OP_RMXATTR, RBDN_OP_OMAP_RM_RANGE, RBDN_OP_OMAP_CLEAR, RBDN_OP_ALLOC_HINT,
    RBDN_OP_CALL,
    /* with results, in lists that read */
    RBDN_OP_STAT, RBDN_OP_READ, RBDN_OP_EXEC, RBDN_OP_XATTRS, RBDN_OP_OMAP_VALS, RBDN_OP_OMAP_KEYS
};
typedef struct {
    int kind;            /* enum rbdn_op_kind */
    const char *name;    /* xattr; class; OMAP_VALS, OMAP_KEYS: start after */
    const char *method;  /* of the class; OMAP_VALS: prefix */
    uint64_t number;     /* offset; version; size; exclusive; object size of ALLOC_HINT; most rows */
    uint64_t length;     /* bytes; write size of ALLOC_HINT */
    int relation;        /* CMPXATTR, OMAP_CMP: 1 eq, 2 ne, 3 gt, 4 ge, 5 lt, 6 le */
    const void *data;    /* input; OMAP_CMP: the value; OMAP_RM_RANGE: the end */
    size_t data_len;
    const void *key;     /* OMAP_CMP; OMAP_RM_RANGE: the begin */
    size_t key_len;
} rbdn_op;
rbdn_oplist *rbdn_oplist_new(int writes);
int rbdn_oplist_add(rbdn_oplist *l, const rbdn_op *op); /* -EINVAL: no such operation in this kind of list */
rbdn_out *rbdn_oplist_get(rbdn_oplist *l, const rbdn_op *op, int *err);
int rbdn_oplist_omap_set(rbdn_oplist *l, const char **keys, const size_t *key_lens, const char **values,
                         const size_t *lens, size_t count);
int rbdn_oplist_omap_rm(rbdn_oplist *l, const char **keys, const size_t *key_lens, size_t count);
rbdn_out *rbdn_oplist_omap_get(rbdn_oplist *l, const char **keys, const size_t *key_lens, size_t count, int *err);
/* Sends it; once. A list that writes: under this snap context (ids descending). One that reads: at `snap`. */
int rbdn_oplist_send(rbdn_oplist *l, rbdn_ioctx *io, const char *oid, uint64_t snap, uint64_t seq, uint64_t *snaps,
                     int count);
/* A notify is an operation of its own; its reply is in *out. Sends it. */
rbdn_oplist *rbdn_notify_send(rbdn_ioctx *io, const char *oid, const void *payload, size_t len, uint64_t timeout_ms,
                              rbdn_out **out, int *err);
/* 0 when it has ended, 1 when it has not after so many milliseconds. */
int rbdn_oplist_wait(rbdn_oplist *l, int timeout_ms);
int rbdn_oplist_result(rbdn_oplist *l);       /* after it has ended */
uint64_t rbdn_oplist_version(rbdn_oplist *l); /* of the object, after it has ended */
void rbdn_oplist_free(rbdn_oplist *l);        /* what is in flight is cancelled; a write may still happen */
/* The next row: 1; 0 at the end. key and value are borrowed until the list is freed. */
int rbdn_out_row(rbdn_out *out, const char **key, size_t *key_len, const char **value, size_t *len);

/* --- watches */
typedef struct rbdn_watch_ring rbdn_watch_ring;
typedef struct rbdn_watch rbdn_watch;
rbdn_watch_ring *rbdn_watch_ring_new(void); /* NULL: no memory or descriptors */
int rbdn_watch_ring_fd(rbdn_watch_ring *e); /* an eventfd: read it, then take events until there is none */
typedef struct {
    uint64_t token;     /* of the watch */
    uint64_t notify_id; /* 0: the watch is lost */
    uint64_t notifier;
    uint64_t cookie;
    int error;          /* when lost: -ENOTCONN, -ESHUTDOWN... -ENOBUFS: a notify found no room; watch again */
    size_t len;         /* of the payload */
} rbdn_watch_event;
/* The most bytes of a payload: larger ones are refused by loss. */
enum { RBDN_PAYLOAD_MAX = 65536 };
int rbdn_watch_ring_next(rbdn_watch_ring *e, rbdn_watch_event *out, void *payload); /* 1, or 0: none */
void rbdn_watch_ring_free(rbdn_watch_ring *e); /* no watch may be left */
rbdn_watch *rbdn_watch_new(rbdn_watch_ring *e, rbdn_ioctx *io, const char *oid, uint64_t token, uint32_t timeout, int *err);
uint64_t rbdn_watch_cookie(rbdn_watch *w);
int rbdn_watch_check(rbdn_watch *w); /* milliseconds since it was confirmed */
/* Waits until no callback of it runs. Frees it; events of it may still be in the ring. */
int rbdn_watch_end(rbdn_watch *w, void *cluster);
int rbdn_notify_ack(rbdn_ioctx *io, const char *oid, uint64_t notify_id, uint64_t cookie, const void *data, size_t len);
#endif
