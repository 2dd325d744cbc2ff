/* A store of nothing, for measuring what lies above: every object exists, everything completes at once. A read leaves
 * the caller's buffers as they are; never serve it to anybody who may not see this process's memory. */
#include <errno.h>
#include <stdlib.h>

#include "ffi/api_store.h"
#include "store/store.h"

struct null_store {
    struct store store; /* first */
    uint64_t object_size;
};

static int64_t null_submit(struct store *s, struct store_op *op)
{
    struct null_store *n = (struct null_store *)s;
    if (op->off > n->object_size || op->len > n->object_size - op->off)
        return -EINVAL;
    switch (op->type) {
    case STORE_READ:
        return (int64_t)op->len;
    case STORE_STAT:
        return (int64_t)n->object_size;
    case STORE_EXTENTS:
        if (op->max_extents == 0)
            return -EINVAL;
        op->extents[0] = (struct store_extent){op->off, op->len};
        return op->len != 0;
    default:
        return 0;
    }
}

static void null_close(struct store *s)
{
    free(s);
}

static const struct store_ops null_store_ops = {
    .name = "null",
    .caps = STORE_KEEPS_OBJECT_MAP,
    .submit = null_submit,
    .close = null_close,
};

rbdn_store *rbdn_null_open(unsigned order, int *err)
{
    struct null_store *n = order < 12 || order > 25 ? NULL : calloc(1, sizeof *n);
    if (err)
        *err = n ? 0 : order < 12 || order > 25 ? -EINVAL : -ENOMEM;
    if (!n)
        return NULL;
    n->store.ops = &null_store_ops;
    n->object_size = 1ULL << order;
    return &n->store;
}
