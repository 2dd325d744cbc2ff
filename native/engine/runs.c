/* What of an image is allocated, the parents' data included, and copying one object up for flatten. Both hold the gate like
 * a request but run in the caller's thread, which may block. */
#include <errno.h>

#include "engine/image.h"
#include "engine/piece.h"

#define EXTENTS 64          /* asked for at once */
#define CALLS_MAX 100000    /* store calls for one answer; the rows found so far are an answer too */

struct hold {
    struct req req;
    struct flag admitted;
};

static void hold_admitted(struct req *r)
{
    struct hold *h = r->owner;
    flag_set(&h->admitted);
}

/* Waits while the gate is closed. */
static int hold(struct hold *h, struct image *i, uint8_t type)
{
    h->req = (struct req){.type = type, .done = hold_admitted, .owner = h, .image = i};
    h->admitted.set = 0;
    if (!gate_enter(i, &h->req))
        flag_wait(&h->admitted);
    return h->req.epoch ? 0 : (int)h->req.result;
}

static void release(struct hold *h)
{
    gate_leave(h->req.image, h->req.epoch, gate_unit(h->req.type));
}

static void call_done(struct store_op *op)
{
    flag_set(op->owner);
}

static int64_t call(struct store *store, struct store_op *op)
{
    struct flag done = {0};
    op->done = call_done;
    op->owner = &done;
    int64_t r = store_submit(store, op);
    if (r != STORE_PENDING)
        return r;
    flag_wait(&done);
    return op->result;
}

struct rows {
    struct run *rows;
    uint32_t count, max;
    unsigned calls;
};

/* False: no room, or enough done for one answer. */
static bool add(struct rows *out, uint64_t len, uint32_t flags)
{
    if (len == 0)
        return true;
    if (out->count && out->rows[out->count - 1].flags == flags) {
        out->rows[out->count - 1].len += len;
        return true;
    }
    if (out->count == out->max)
        return false;
    out->rows[out->count].len = len;
    out->rows[out->count++].flags = flags;
    return true;
}

static int view_runs(const struct view *v, uint64_t off, uint64_t len, struct rows *out);

/* The object is absent: 1 go on, 0 stop, -errno. */
static int absent_runs(const struct view *v, const struct stripe_extent *e, struct rows *out)
{
    uint64_t below = v->overlap > e->pos ? v->overlap - e->pos : 0;
    if (below > e->len)
        below = e->len;
    if (below) {
        /* without a parent nobody knows before it is fetched */
        int rc = v->parent ? view_runs(v->parent, e->pos, below, out) : add(out, below, 0);
        if (rc <= 0)
            return rc;
    }
    return add(out, e->len - below, RUN_HOLE | RUN_ZERO);
}

/* One object extent, contiguous in the image too: 1 go on, 0 stop, -errno. */
static int extent_runs(const struct view *v, const struct stripe_extent *e, struct rows *out)
{
    struct store_extent found[EXTENTS];
    uint64_t at = e->off, end = e->off + e->len;
    while (at < end) {
        struct store_op op = {.type = STORE_EXTENTS, .objno = e->objno, .off = at, .len = end - at,
                              .snap_id = v->snap_id, .extents = found, .max_extents = EXTENTS};
        if (out->calls++ > CALLS_MAX && out->count)
            return 0;
        int64_t n = call(v->store, &op);
        if (n == -ENOENT && at == e->off)
            return absent_runs(v, e, out);
        if (n < 0 && n != -ENOENT)
            return n < -4095 ? -EIO : (int)n;
        if (n < 0)
            n = 0; /* removed while we looked */
        bool more = n == EXTENTS; /* then the last one covers what did not fit: ask for it again */
        for (int64_t k = 0; k < n - more; k++) {
            if (found[k].off < at || found[k].len > end - found[k].off)
                return -EIO;
            if (!add(out, found[k].off - at, RUN_HOLE | RUN_ZERO) || !add(out, found[k].len, 0))
                return 0;
            at = found[k].off + found[k].len;
        }
        if (!more) {
            if (!add(out, end - at, RUN_HOLE | RUN_ZERO))
                return 0;
            at = end;
        }
    }
    return 1;
}

/* 1: all of it is in `out`; 0: a part; -errno. Recurses once per ancestor, VIEW_DEPTH_MAX at most. */
static int view_runs(const struct view *v, uint64_t off, uint64_t len, struct rows *out)
{
    struct stripe_iter it;
    struct stripe_extent e;
    stripe_begin(&it, &v->striping, off, len);
    while (stripe_next(&it, &e)) {
        int rc = extent_runs(v, &e, out);
        if (rc <= 0)
            return rc;
    }
    return 1;
}

int image_runs(struct image *i, uint64_t off, uint64_t len, struct run *rows, uint32_t max)
{
    struct hold h;
    struct rows out = {.rows = rows, .max = max};
    if (len == 0 || max == 0)
        return -EINVAL;
    int rc = hold(&h, i, REQ_HOLD_READ);
    if (rc)
        return rc;
    const struct view *v = h.req.epoch->view;
    if (off > v->size || len > v->size - off)
        rc = -EINVAL;
    else
        rc = view_runs(v, off, len, &out);
    release(&h);
    return rc < 0 ? rc : (int)out.count;
}

int rbdn_image_runs(rbdn_image *i, uint64_t off, uint64_t len, rbdn_run *out, uint32_t max)
{
    _Static_assert(sizeof(rbdn_run) == sizeof(struct run) && offsetof(rbdn_run, flags) == offsetof(struct run, flags),
                   "one layout");
    return image_runs(i, off, len, (struct run *)out, max);
}

int rbdn_image_copyup(rbdn_image *i, uint64_t objno)
{
    struct hold h;
    int rc = hold(&h, i, REQ_HOLD_WRITE);
    if (rc)
        return rc;
    struct view *v = h.req.epoch->view;
    if (v->read_only) {
        rc = -EROFS;
    } else if (view_parent_prefix(v, objno) == 0) {
        rc = 1;
    } else {
        struct store_op op = {.type = STORE_STAT, .objno = objno, .snap_id = STORE_NOSNAP};
        int64_t size = call(v->store, &op);
        rc = size >= 0 ? 1 : size == -ENOENT ? copyup_object(i, v, objno) : (int)size;
    }
    release(&h);
    return rc;
}
