/* Write-like requests on one object: which store operation, and what to do when the object is absent in a clone.
 *
 *   write                guarded where a parent shows through: -ENOENT -> copy-up, then again
 *   whole object written the same, but its own data is the copy-up (durable before the object is seen to exist), unless
 *                        snapshots of the clone would see it
 *   whole object dropped REMOVE; where a parent shows through: an empty object (tombstone) instead, and copy-up before
 *                        when the clone has snapshots: they show the parent's data, and flatten counts on their having it
 *   end dropped          TRUNCATE;  inside: ZERO.  Absent: copy-up first where a parent shows through, as librbd
 *   zeroes, kept space   a write of zeros;  small and sparse: a write of zeros only if the object exists
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/piece.h"

static const uint8_t zeros[PATTERN_BYTES] __attribute__((aligned(4096)));

static bool lazy_zeroes(const struct piece *p)
{
    return p->req->type == REQ_WRITE_ZEROES && p->req->flags & REQ_UNMAP;
}

static enum step_outcome prepare_zeros(struct piece *p, bool guard, int *err)
{
    struct data d;
    data_pattern(&d, zeros, sizeof zeros);
    p->op.type = STORE_WRITE;
    p->op.flags = guard ? STORE_GUARD : 0;
    *err = piece_gather(p, &d, 0, p->op.len);
    return *err ? STEP_DONE : STEP_AGAIN;
}

/* DISCARD, and WRITE_ZEROES that may deallocate. `end`: what the image has of the object. */
static enum step_outcome prepare_drop(struct piece *p, uint64_t end, uint64_t prefix, int *err)
{
    const struct req *r = p->req;
    uint64_t from = p->op.off, to = from + p->op.len, grain = p->view->discard_granularity;
    if (r->type == REQ_DISCARD && !(r->flags & REQ_EXACT) && grain) {
        from = (from + grain - 1) & ~(grain - 1);
        if (to < end)
            to &= ~(grain - 1);
        if (from >= to)
            return STEP_DONE;
        p->op.off = from;
        p->op.len = to - from;
    }
    bool whole = from == 0 && to >= end;
    if (r->type == REQ_WRITE_ZEROES && !whole && p->op.len <= PATTERN_BYTES)
        return prepare_zeros(p, true, err); /* punching holes costs a hundred times more */
    if (whole)
        p->op.type = prefix ? STORE_TRUNCATE : STORE_REMOVE;
    else
        p->op.type = to >= end ? STORE_TRUNCATE : STORE_ZERO;
    bool seen = p->view->fetch || (p->op.snapc && p->op.snapc->count > 0);
    p->op.flags = whole && prefix && !seen ? STORE_CREATE : 0;
    return STEP_AGAIN;
}

static enum step_outcome prepare(struct piece *p, uint64_t objno, uint64_t off, uint64_t len, int *err)
{
    const struct view *v = p->view;
    uint64_t prefix = view_parent_prefix(v, objno);
    *err = 0;
    p->step = PIECE_CHANGE;
    p->op.objno = objno;
    p->op.off = off;
    p->op.len = len;
    p->op.snapc = v->snapc;
    if (p->req->type == REQ_DISCARD || lazy_zeroes(p))
        return prepare_drop(p, striping_prefix(&v->striping, objno, v->size), prefix, err);
    if (p->req->type == REQ_WRITE_ZEROES)
        return prepare_zeros(p, prefix > 0, err);
    p->op.type = STORE_WRITE;
    p->op.flags = prefix ? STORE_GUARD : 0;
    return STEP_AGAIN;
}

/* What Python brings comes version by version: until it is known that all of them are here, a write asks, and waits. */
enum step_outcome write_prepare(struct piece *p, uint64_t objno, uint64_t off, uint64_t len, int *err)
{
    enum step_outcome next = prepare(p, objno, off, len, err);
    if (next != STEP_AGAIN || !p->view->fetch || !view_parent_prefix(p->view, objno) || copyup_asked(p))
        return next;
    copyup_join(p);
    return STEP_WAITS;
}

static enum step_outcome absent(struct piece *p, int *err)
{
    uint64_t prefix = view_parent_prefix(p->view, p->op.objno);
    *err = 0;
    if (p->op.type == STORE_WRITE) {
        if (!prefix) /* guarded all the same: zeroes where nothing is */
            return STEP_DONE;
        if (p->op.off == 0 && p->op.len >= prefix && !p->view->fetch && (!p->op.snapc || p->op.snapc->count == 0)) {
            p->step = PIECE_OWN_COPYUP;
            p->op.type = STORE_COPYUP;
            p->op.flags = 0;
            return STEP_AGAIN;
        }
    } else if (prefix <= p->op.off) {
        return STEP_DONE;
    }
    copyup_join(p);
    return STEP_WAITS;
}

enum step_outcome write_result(struct piece *p, int *err)
{
    int64_t r = p->op.result;
    if (r == -ENOENT && p->step == PIECE_CHANGE && p->op.type != STORE_COPYUP &&
        (p->op.type != STORE_WRITE || p->op.flags & STORE_GUARD))
        return absent(p, err);
    *err = r < 0 ? piece_error(p, r) : 0;
    if (r >= 0 && p->step == PIECE_OWN_COPYUP) { /* it may have come too late: only a write is sure to be seen */
        p->step = PIECE_CHANGE;
        p->op.type = STORE_WRITE;
        p->op.flags = STORE_GUARD;
        return STEP_AGAIN;
    }
    return STEP_DONE;
}

void write_copied(struct piece *p, int err, bool parent_is_zero)
{
    enum step_outcome next = err || !p->req ? STEP_DONE : STEP_AGAIN;
    if (!p->req) { /* copyup_object: the copy is all there is to do */
        err = err ? err : parent_is_zero;
    } else if (!err && parent_is_zero) {
        /* The object is still absent, and reads as zeros all over. */
        if (p->op.type == STORE_WRITE && !lazy_zeroes(p))
            p->op.flags &= ~STORE_GUARD;
        else
            next = STEP_DONE;
    }
    piece_go(p, next, err);
}

/* WRITESAME: the pattern, repeated up to PATTERN_BYTES so that few iovecs are needed. */
static int pattern_data(const struct req *r, struct data *d, void **buffer)
{
    uint64_t len = iov_total(r->iov, r->iovcnt), copies = len < PATTERN_BYTES ? PATTERN_BYTES / len : 1;
    if (copies > r->len / len)
        copies = r->len / len;
    uint8_t *b = malloc(len * copies), *at = b;
    if (!b)
        return -ENOMEM;
    for (uint32_t n = 0; n < r->iovcnt; at += r->iov[n++].iov_len)
        memcpy(at, r->iov[n].iov_base, r->iov[n].iov_len);
    for (uint64_t c = 1; c < copies; c++)
        memcpy(b + c * len, b, len);
    data_pattern(d, b, len * copies);
    *buffer = b;
    return 0;
}

void write_image(struct image *i, struct req *r)
{
    struct view *v = r->epoch->view;
    struct stripe_extent e;
    struct data d;
    void *buffer = NULL;
    int err = 0;
    data_list(&d, r->iov, r->iovcnt);
    if (r->type == REQ_WRITESAME)
        err = pattern_data(r, &d, &buffer);
    struct piece *p = NULL;
    if (!err && r->type != REQ_WRITESAME && stripe_single(&v->striping, r->off, r->len, &e)) {
        p = piece_new(i, v, r);
        err = p ? 0 : -ENOMEM;
    }
    if (err) {
        req_finish(r, err);
        return;
    }
    if (!p) {
        split_run(i, r, &d, buffer);
        return;
    }
    if (r->type == REQ_WRITE) {
        p->op.iov = r->iov;
        p->op.iovcnt = r->iovcnt;
    }
    p->blocking = r->flags & REQ_MAY_BLOCK;
    enum step_outcome next = write_prepare(p, e.objno, e.off, e.len, &err);
    piece_go(p, next, err);
}
