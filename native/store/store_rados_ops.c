/* Calls as librados operations: the same ones that librbd sends. What is written is copied by librados before its call
 * returns, so a guest that changes a buffer in flight spoils no checksum; what is read lands in the guest's buffer when
 * that is in one piece. The C interface has no sparse reads and no way to ask for an object's extents. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "store/store_rados.h"

#define BLOCK 4096u /* bytes; how finely a copy from the parent leaves out zeros */

static void oid_of(const struct rados_store *s, uint64_t objno, char oid[RADOS_OID_MAX])
{
    size_t at = strlen(s->prefix);
    memcpy(oid, s->prefix, at);
    oid[at++] = '.';
    for (int shift = 60; shift >= 0; shift -= 4)
        oid[at++] = "0123456789abcdef"[objno >> shift & 15];
    oid[at] = 0;
}

static void gather(const struct call *group, uint8_t *to)
{
    for (const struct call *c = group; c; c = c->member)
        for (uint32_t n = 0; n < c->op->iovcnt; n++) {
            memcpy(to, c->op->iov[n].iov_base, c->op->iov[n].iov_len);
            to += c->op->iov[n].iov_len;
        }
}

static bool one_piece(const struct call *c)
{
    return !c->member && c->op->iovcnt == 1;
}

static int send_read(struct call *c, const char *oid)
{
    void *to;
    if (one_piece(c))
        to = c->op->iov[0].iov_base;
    else
        to = c->buffer = malloc(c->bytes);
    if (!to)
        return -ENOMEM;
    return RADOS(aio_read)(c->context->io, oid, c->aio.completion, to, c->bytes, c->off);
}

static int send_op(struct call *c, const char *oid, rados_write_op_t op)
{
    int rc = RADOS(aio_write_op_operate)(op, c->context->io, c->aio.completion, oid, NULL, 0);
    RADOS(release_write_op)(op);
    return rc;
}

static void add_hint(struct call *c, rados_write_op_t op)
{
    uint64_t size = c->aio.store->object_size;
    RADOS(write_op_set_alloc_hint)(op, size, size);
}

static int send_data(struct call *c, const char *oid, const char *data)
{
    rados_ioctx_t io = c->context->io;
    bool whole = c->bytes == c->aio.store->object_size, guard = c->op->flags & STORE_GUARD;
    if (!guard && !c->hint)
        return whole ? RADOS(aio_write_full)(io, oid, c->aio.completion, data, c->bytes)
                     : RADOS(aio_write)(io, oid, c->aio.completion, data, c->bytes, c->off);
    rados_write_op_t op = RADOS(create_write_op)();
    if (!op)
        return -ENOMEM;
    if (guard)
        RADOS(write_op_assert_exists)(op);
    if (c->hint)
        add_hint(c, op);
    if (whole)
        RADOS(write_op_write_full)(op, data, c->bytes);
    else
        RADOS(write_op_write)(op, data, c->bytes, c->off);
    return send_op(c, oid, op);
}

static int send_write(struct call *c, const char *oid)
{
    if (one_piece(c))
        return send_data(c, oid, c->op->iov[0].iov_base);
    uint8_t *data = malloc(c->bytes);
    if (!data)
        return -ENOMEM;
    gather(c, data);
    int rc = send_data(c, oid, (char *)data);
    free(data);
    return rc;
}

static void put(uint8_t **at, uint64_t value, unsigned bytes)
{
    for (unsigned n = 0; n < bytes; n++)
        *(*at)++ = value >> 8 * n;
}

static bool is_zero(const uint8_t *data, uint64_t len)
{
    return data[0] == 0 && memcmp(data, data + 1, len - 1) == 0;
}

static uint64_t block_at(uint64_t off, uint64_t len)
{
    return len - off < BLOCK ? len - off : BLOCK;
}

/* The next run of blocks that hold something: true, [*off, *end). */
static bool next_run(const uint8_t *data, uint64_t len, uint64_t *off, uint64_t *end)
{
    uint64_t at = *end;
    while (at < len && is_zero(data + at, block_at(at, len)))
        at += block_at(at, len);
    *off = at;
    while (at < len && !is_zero(data + at, block_at(at, len)))
        at += block_at(at, len);
    *end = at;
    return *off < at;
}

/* rbd.sparse_copyup: a map of offsets to lengths, then their bytes as one counted buffer. */
static int send_copyup(struct call *c, const char *oid)
{
    uint64_t len = c->op->len, runs = 0, bytes = 0, off, end = 0;
    uint8_t *data = malloc(len ? len : 1), *in, *at;
    if (!data)
        return -ENOMEM;
    gather(c, data);
    while (next_run(data, len, &off, &end)) {
        runs++;
        bytes += end - off;
    }
    rados_write_op_t op = RADOS(create_write_op)();
    in = at = op ? malloc(4 + 16 * runs + 4 + bytes) : NULL;
    if (!in) {
        if (op)
            RADOS(release_write_op)(op);
        free(data);
        return -ENOMEM;
    }
    put(&at, runs, 4);
    for (end = 0; next_run(data, len, &off, &end);) {
        put(&at, off, 8);
        put(&at, end - off, 8);
    }
    put(&at, bytes, 4);
    for (end = 0; next_run(data, len, &off, &end); at += end - off)
        memcpy(at, data + off, end - off);
    RADOS(write_op_exec)(op, "rbd", "sparse_copyup", (char *)in, at - in, NULL);
    add_hint(c, op);
    int rc = send_op(c, oid, op);
    free(in);
    free(data);
    return rc;
}

/* An OSD takes both for done when there is no object. */
static int send_cut(struct call *c, const char *oid)
{
    rados_write_op_t op = RADOS(create_write_op)();
    if (!op)
        return -ENOMEM;
    if (c->op->type == STORE_TRUNCATE && c->op->flags & STORE_CREATE)
        RADOS(write_op_create)(op, LIBRADOS_CREATE_IDEMPOTENT, NULL);
    else
        RADOS(write_op_assert_exists)(op);
    if (c->op->type == STORE_TRUNCATE)
        RADOS(write_op_truncate)(op, c->op->off);
    else
        RADOS(write_op_zero)(op, c->op->off, c->op->len);
    return send_op(c, oid, op);
}

int rados_call_send(struct call *c)
{
    char oid[RADOS_OID_MAX];
    oid_of(c->aio.store, c->op->objno, oid);
    switch (c->op->type) {
    case STORE_READ:
        return send_read(c, oid);
    case STORE_WRITE:
        return send_write(c, oid);
    case STORE_ZERO:
    case STORE_TRUNCATE:
        return send_cut(c, oid);
    case STORE_REMOVE:
        return RADOS(aio_remove)(c->context->io, oid, c->aio.completion);
    case STORE_COPYUP:
        return send_copyup(c, oid);
    case STORE_STAT:
    case STORE_EXTENTS:
        return RADOS(aio_stat)(c->context->io, oid, c->aio.completion, &c->size, &c->mtime);
    }
    return -EOPNOTSUPP;
}

/* Bytes [from, from + len) of the group's buffer belong to the member. */
static void scatter(const uint8_t *from, uint64_t len, const struct store_op *op)
{
    for (uint32_t n = 0; n < op->iovcnt && len; n++) {
        uint64_t part = op->iov[n].iov_len < len ? op->iov[n].iov_len : len;
        memcpy(op->iov[n].iov_base, from, part);
        from += part;
        len -= part;
    }
}

void rados_call_result(struct call *group, struct call *c, uint64_t at, int result)
{
    struct store_op *op = c->op;
    c->result = result < 0 ? result : 0;
    if (result < 0)
        return;
    switch (op->type) {
    case STORE_READ: {
        uint64_t got = (uint64_t)result > at ? result - at : 0;
        c->result = got < op->len ? got : op->len;
        if (group->buffer)
            scatter(group->buffer + at, c->result, op);
        break;
    }
    case STORE_STAT:
        c->result = c->size;
        break;
    case STORE_EXTENTS:
        if (c->size > op->off) {
            op->extents[0].off = op->off;
            op->extents[0].len = c->size - op->off < op->len ? c->size - op->off : op->len;
            c->result = 1;
        }
        break;
    }
}
