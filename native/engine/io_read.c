/* Reads. An absent object shows the parent's bytes within the overlap, and zeros beyond; so does the parent's own. While
 * one object extent maps to one extent of the parent, the piece itself moves up the chain: no allocation, no recursion. */
#include <errno.h>
#include <string.h>

#include "engine/piece.h"

static void zero(const struct iovec *iov, uint32_t count, uint64_t from, uint64_t to)
{
    uint64_t at = 0;
    for (uint32_t n = 0; n < count && at < to; at += iov[n++].iov_len) {
        uint64_t begin = from > at ? from - at : 0, end = to - at < iov[n].iov_len ? to - at : iov[n].iov_len;
        if (begin < end)
            memset((uint8_t *)iov[n].iov_base + begin, 0, end - begin);
    }
}

/* op.iov must hold exactly op.len bytes: make it the first `len`. */
static int shorten(struct piece *p, uint64_t len)
{
    const struct iovec *iov = p->op.iov;
    uint32_t count = p->op.iovcnt;
    p->op.len = len;
    if (iov != p->iovs) { /* the request's own must not be changed */
        struct data d;
        data_list(&d, iov, count);
        p->op.iov = p->iovs;
        p->op.iovcnt = 0;
        return piece_gather(p, &d, 0, len);
    }
    uint32_t n = 0;
    while (len > p->iovs[n].iov_len)
        len -= p->iovs[n++].iov_len;
    p->iovs[n].iov_len = len;
    p->op.iovcnt = n + 1;
    return 0;
}

void read_prepare(struct piece *p, uint64_t objno, uint64_t off, uint64_t len)
{
    p->step = PIECE_READ;
    p->op.type = STORE_READ;
    p->op.flags = 0;
    p->op.objno = objno;
    p->op.off = off;
    p->op.len = len;
    p->op.snap_id = p->view->snap_id;
    p->fetches = atomic_load_explicit(&p->image->fetches, memory_order_acquire);
}

enum step_outcome read_absent(struct piece *p, int *err)
{
    struct view *v = p->view;
    uint64_t prefix = view_parent_prefix(v, p->op.objno), off = p->op.off;
    uint64_t len = prefix > off ? prefix - off : 0;
    *err = 0;
    if (len < p->op.len) {
        zero(p->op.iov, p->op.iovcnt, len, p->op.len);
        if (len == 0)
            return STEP_DONE;
        *err = shorten(p, len);
        if (*err)
            return STEP_DONE;
    } else {
        len = p->op.len;
    }
    if (!v->parent && copyup_in_vain(p)) {
        zero(p->op.iov, p->op.iovcnt, 0, p->op.len);
        return STEP_DONE;
    }
    if (!v->parent) {
        copyup_join(p);
        return STEP_WAITS;
    }
    struct stripe_extent e;
    if (v->striping.count == 1 &&
        stripe_single(&v->parent->striping, (p->op.objno << v->striping.order) + off, len, &e)) {
        p->view = v->parent;
        read_prepare(p, e.objno, e.off, len);
        return STEP_AGAIN;
    }
    split_parent(p, len);
    return STEP_WAITS;
}

static void fill(const struct iovec *iov, uint32_t count, const uint8_t *from, uint64_t len)
{
    for (uint32_t n = 0; n < count && len; n++) {
        uint64_t take = len < iov[n].iov_len ? len : iov[n].iov_len;
        memcpy(iov[n].iov_base, from, take);
        from += take;
        len -= take;
    }
}

void read_fetched(struct piece *p, int err, bool zeros, const uint8_t *buf, uint64_t len)
{
    uint64_t have = 0;
    if (!err && buf && len > p->op.off) {
        have = len - p->op.off < p->op.len ? len - p->op.off : p->op.len;
        fill(p->op.iov, p->op.iovcnt, buf + p->op.off, have);
    }
    if (!err && (buf || zeros))
        zero(p->op.iov, p->op.iovcnt, have, p->op.len);
    p->fetches = atomic_load_explicit(&p->image->fetches, memory_order_acquire);
    piece_go(p, err || buf || zeros ? STEP_DONE : STEP_AGAIN, err);
}

enum step_outcome read_result(struct piece *p, int *err)
{
    int64_t got = p->op.result;
    if (got == -ENOENT)
        return read_absent(p, err);
    if (got >= 0 && p->view->fetch) {
        int crossed = copyup_crossed(p);
        if (crossed == 2)
            return STEP_WAITS;
        if (crossed) {
            p->fetches = atomic_load_explicit(&p->image->fetches, memory_order_acquire);
            return STEP_AGAIN;
        }
    }
    *err = got < 0 ? piece_error(p, got) : 0;
    if (got >= 0 && (uint64_t)got < p->op.len)
        zero(p->op.iov, p->op.iovcnt, got, p->op.len);
    return STEP_DONE;
}

void read_image(struct image *i, struct req *r)
{
    struct view *v = r->epoch->view;
    struct stripe_extent e;
    if (!stripe_single(&v->striping, r->off, r->len, &e)) {
        struct data d;
        data_list(&d, r->iov, r->iovcnt);
        split_run(i, r, &d, NULL);
        return;
    }
    struct piece *p = piece_new(i, v, r);
    if (!p) {
        req_finish(r, -ENOMEM);
        return;
    }
    p->op.iov = r->iov;
    p->op.iovcnt = r->iovcnt;
    p->blocking = r->flags & REQ_MAY_BLOCK;
    read_prepare(p, e.objno, e.off, e.len);
    piece_go(p, STEP_AGAIN, 0);
}
