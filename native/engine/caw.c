/* COMPARE_AND_WRITE: atomic against other writes of this image. The gate gives it its range (gate.c): writes that overlap
 * wait, those admitted before are through. Then it is a read, a comparison and a write. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/image.h"

int caw_prepare(struct req *r)
{
    r->work = calloc(1, sizeof(struct caw));
    if (!r->work)
        return -ENOMEM;
    ((struct caw *)r->work)->req = r;
    return 0;
}

void caw_refuse(struct req *r)
{
    free(r->work);
    r->work = NULL;
}

static void finish(struct caw *c, int64_t result)
{
    struct req *r = c->req;
    gate_exclusive_end(r->image, c);
    free(c->data);
    free(c->write_iov);
    free(c);
    r->work = NULL;
    req_finish(r, result);
}

/* The first byte at which the request's data differs from what was read; len: none does. */
static uint64_t difference(const struct req *r, const uint8_t *data)
{
    uint64_t at = 0;
    for (uint32_t n = 0; at < r->len; n++) {
        const uint8_t *want = r->iov[n].iov_base;
        uint64_t len = r->iov[n].iov_len < r->len - at ? r->iov[n].iov_len : r->len - at;
        if (memcmp(want, data + at, len) != 0)
            for (uint64_t b = 0; b < len; b++)
                if (want[b] != data[at + b])
                    return at + b;
        at += len;
    }
    return r->len;
}

static void written(struct req *part)
{
    finish(part->owner, part->result);
}

static void compared(struct req *part)
{
    struct caw *c = part->owner;
    struct req *r = c->req;
    if (part->result < 0) {
        finish(c, part->result);
        return;
    }
    uint64_t at = difference(r, c->data);
    if (at < r->len) {
        r->mismatch = at;
        finish(c, -EILSEQ);
        return;
    }
    c->write_iov = malloc(r->iovcnt * sizeof *c->write_iov);
    if (!c->write_iov) {
        finish(c, -ENOMEM);
        return;
    }
    uint64_t skip = r->len;
    part->iovcnt = 0;
    for (uint32_t n = 0; n < r->iovcnt; n++) {
        uint64_t cut = skip < r->iov[n].iov_len ? skip : r->iov[n].iov_len;
        skip -= cut;
        if (cut == r->iov[n].iov_len)
            continue;
        c->write_iov[part->iovcnt].iov_base = (uint8_t *)r->iov[n].iov_base + cut;
        c->write_iov[part->iovcnt++].iov_len = r->iov[n].iov_len - cut;
    }
    part->type = REQ_WRITE;
    part->iov = c->write_iov;
    part->done = written;
    image_run(part->image, part);
}

void caw_run(struct caw *c)
{
    struct req *r = c->req, *part = &c->part;
    int err = image_check(r->epoch->view, r);
    if (!err && r->len && !(c->data = malloc(r->len)))
        err = -ENOMEM;
    if (err || r->len == 0) {
        finish(c, err);
        return;
    }
    c->iov.iov_base = c->data;
    c->iov.iov_len = r->len;
    part->type = REQ_READ;
    part->flags = REQ_INTERNAL;
    part->off = r->off;
    part->len = r->len;
    part->iov = &c->iov;
    part->iovcnt = 1;
    part->done = compared;
    part->owner = c;
    part->image = r->image;
    part->epoch = r->epoch;
    image_run(part->image, part);
}
