/* The object store as the data path sees it: one `struct store` serves the data objects of ONE image.
 *
 * One interface, one file per implementation (store_embedded.c, store_null.c, store_fault.c, store_rados.c).
 * Objects are named by number (the <objno> of rbd_data.<id>.<%016x objno>), never by string.
 *
 * Threads: submit() may be called from any thread at any time until close().
 * Looks down on: nothing. Knows no images, no parents, no striping.
 */
#ifndef RBDN_STORE_H
#define RBDN_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define STORE_NOSNAP 0xfffffffffffffffeULL /* "HEAD", Ceph's CEPH_NOSNAP */

/* Returned by submit(): the store calls op->done(op) later, on any thread, with op->result set. */
#define STORE_PENDING INT64_MIN

/* Ids of existing self-managed snapshots, newest first, as RADOS wants them with every write. Immutable. */
struct snapc {
    uint64_t seq;
    uint32_t count;
    uint64_t ids[];
};

enum store_op_type {
    STORE_READ,     /* bytes read (short at the object's end; the caller zero-fills); -ENOENT no object */
    STORE_WRITE,    /* 0; creates the object unless STORE_GUARD; extends it. A new object may be seen, also after a
                       power cut, holding zeros before the data: where a parent shines through, use COPYUP */
    STORE_ZERO,     /* 0; bytes off..off+len read as zero; never extends; -ENOENT no object */
    STORE_TRUNCATE, /* 0; object ends at off; -ENOENT no object, with STORE_CREATE makes one (a clone's tombstone) */
    STORE_REMOVE,   /* 0; -ENOENT no object. Older snapshots keep their content */
    STORE_COPYUP,   /* 0; writes iov at 0 if there is no object, else does nothing. The copy, made with an empty
                       snap context, belongs to every snapshot too: those of op->snapc, whose object maps change with
                       HEAD's (oldest first: exists, clean in the others). Durable before the object is seen to exist */
    STORE_STAT,     /* object size in bytes; -ENOENT no object */
    STORE_EXTENTS,  /* fills op->extents with the data ranges of [off, off+len); result: how many */
    STORE_FLUSH,    /* 0 when every op completed before this call is durable. Concurrent flushes share the work */
};

enum store_op_flags {
    STORE_NOWAIT = 1, /* do it inline only if that cannot block, else return -EAGAIN having done nothing */
    STORE_GUARD = 2,  /* STORE_WRITE only if the object exists, else -ENOENT having done nothing */
    STORE_CREATE = 4,
    STORE_CLEAN = 8,  /* STORE_COPYUP: no write follows, so HEAD's object map says "clean" if snapshots have the copy */
};

struct store_extent {
    uint64_t off, len; /* bytes within the object, holding data; holes between them read as zero */
};

struct store_op {
    uint8_t type;         /* enum store_op_type */
    uint8_t flags;        /* enum store_op_flags */
    uint64_t objno;
    uint64_t off, len;    /* bytes within the object; off + len <= object size of the layout */
    struct iovec *iov;    /* READ, WRITE, COPYUP: exactly len bytes; valid until done; the store may not change it */
    uint32_t iovcnt;
    uint64_t snap_id;     /* READ, STAT, EXTENTS: STORE_NOSNAP or a snapshot id */
    const struct snapc *snapc; /* writes; NULL = no snapshots; valid until done */
    struct store_extent *extents;
    uint32_t max_extents; /* when more are found the last one is stretched over the rest */
    int64_t result;       /* set before done() */
    void (*done)(struct store_op *); /* only after STORE_PENDING */
    void *owner;          /* the caller's */
};

enum store_caps {
    STORE_KEEPS_OBJECT_MAP = 1, /* the store itself records existence in the image's HEAD object map, and what a copy-up
                                   gives to snapshots in theirs */
};

struct store;
struct store_ops {
    const char *name;
    uint32_t caps;
    int64_t (*submit)(struct store *, struct store_op *);
    void (*close)(struct store *); /* all ops have completed; flushes nothing by itself */
    /* NULL, or: everything in flight and all that comes fails with err, soon, whatever state the store is in. Final. */
    void (*fence)(struct store *, int err);
};

/* First member of every implementation. */
struct store {
    const struct store_ops *ops;
};

static inline void store_fence(struct store *s, int err)
{
    if (s->ops->fence)
        s->ops->fence(s, err);
}

static inline int64_t store_submit(struct store *s, struct store_op *op) { return s->ops->submit(s, op); }

#endif
