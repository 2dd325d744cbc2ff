/* Operation lists of librados for Python: built, sent, waited for (ffi/api_rados.h). */
#include <errno.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ffi/api_rados.h"
#include "store/rados_python.h"

_Static_assert(sizeof(time_t) == sizeof(long), "rbdn_out.mtime is a time_t");

#define READ_MAX (128ULL << 20) /* bytes of one READ: osd_max_object_size */

struct rbdn_oplist {
    _Atomic int refs; /* Python's, and librados' while in flight */
    rados_write_op_t write;
    rados_read_op_t read;
    rados_ioctx_t io;              /* NULL: not sent */
    rados_completion_t completion; /* of what was sent, or tried to */
    rbdn_out *first, **last;
    pthread_mutex_t lock;          /* guards all below */
    pthread_cond_t ended;
    bool done;
    int result;
    uint64_t version;
};

static void out_free(rbdn_out *o)
{
    switch (o->kind) {
    case RBDN_OP_READ:
        free(o->data);
        break;
    case RBDN_OP_EXEC:
        if (o->data)
            RADOS(buffer_free)(o->data);
        break;
    case RBDN_OP_XATTRS:
        if (o->rows)
            RADOS(getxattrs_end)(o->rows);
        break;
    case RBDN_OP_OMAP_VALS:
    case RBDN_OP_OMAP_KEYS:
        if (o->rows)
            RADOS(omap_get_end)(o->rows);
        break;
    }
    free(o);
}

static void put(rbdn_oplist *l)
{
    if (atomic_fetch_sub(&l->refs, 1) > 1)
        return;
    for (rbdn_out *o = l->first, *next; o; o = next) {
        next = o->next;
        out_free(o);
    }
    if (l->write)
        RADOS(release_write_op)(l->write);
    if (l->read)
        RADOS(release_read_op)(l->read);
    if (l->completion)
        RADOS(aio_release)(l->completion);
    pthread_cond_destroy(&l->ended);
    pthread_mutex_destroy(&l->lock);
    free(l);
}

static rbdn_oplist *new_list(void)
{
    rbdn_oplist *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&l->ended, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&l->lock, NULL);
    l->last = &l->first;
    l->refs = 1;
    return l;
}

rbdn_oplist *rbdn_oplist_new(int writes)
{
    rbdn_oplist *l = new_list();
    if (!l)
        return NULL;
    if (writes)
        l->write = RADOS(create_write_op)();
    else
        l->read = RADOS(create_read_op)();
    return l;
}

/* --- building ----------------------------------------------------------------------------------------------------- */

static int add_write(rados_write_op_t w, const rbdn_op *op)
{
    switch (op->kind) {
    case RBDN_OP_ASSERT_EXISTS:
        RADOS(write_op_assert_exists)(w);
        return 0;
    case RBDN_OP_ASSERT_VERSION:
        RADOS(write_op_assert_version)(w, op->number);
        return 0;
    case RBDN_OP_CMPXATTR:
        RADOS(write_op_cmpxattr)(w, op->name, (uint8_t)op->relation, op->data, op->data_len);
        return 0;
    case RBDN_OP_OMAP_CMP:
        RADOS(write_op_omap_cmp2)(w, op->key, (uint8_t)op->relation, op->data, op->key_len, op->data_len, NULL);
        return 0;
    case RBDN_OP_CMPEXT:
        RADOS(write_op_cmpext)(w, op->data, op->data_len, op->number, NULL);
        return 0;
    case RBDN_OP_CREATE:
        RADOS(write_op_create)(w, op->number != 0, NULL);
        return 0;
    case RBDN_OP_WRITE:
        RADOS(write_op_write)(w, op->data, op->data_len, op->number);
        return 0;
    case RBDN_OP_WRITE_FULL:
        RADOS(write_op_write_full)(w, op->data, op->data_len);
        return 0;
    case RBDN_OP_APPEND:
        RADOS(write_op_append)(w, op->data, op->data_len);
        return 0;
    case RBDN_OP_WRITESAME:
        RADOS(write_op_writesame)(w, op->data, op->data_len, op->length, op->number);
        return 0;
    case RBDN_OP_ZERO:
        RADOS(write_op_zero)(w, op->number, op->length);
        return 0;
    case RBDN_OP_TRUNCATE:
        RADOS(write_op_truncate)(w, op->number);
        return 0;
    case RBDN_OP_REMOVE:
        RADOS(write_op_remove)(w);
        return 0;
    case RBDN_OP_SETXATTR:
        RADOS(write_op_setxattr)(w, op->name, op->data, op->data_len);
        return 0;
    case RBDN_OP_RMXATTR:
        RADOS(write_op_rmxattr)(w, op->name);
        return 0;
    case RBDN_OP_OMAP_RM_RANGE:
        RADOS(write_op_omap_rm_range2)(w, op->key, op->key_len, op->data, op->data_len);
        return 0;
    case RBDN_OP_OMAP_CLEAR:
        RADOS(write_op_omap_clear)(w);
        return 0;
    case RBDN_OP_ALLOC_HINT:
        RADOS(write_op_set_alloc_hint)(w, op->number, op->length);
        return 0;
    case RBDN_OP_CALL:
        RADOS(write_op_exec)(w, op->name, op->method, op->data, op->data_len, NULL);
        return 0;
    }
    return -EINVAL;
}

static int add_read(rados_read_op_t r, const rbdn_op *op)
{
    switch (op->kind) {
    case RBDN_OP_ASSERT_EXISTS:
        RADOS(read_op_assert_exists)(r);
        return 0;
    case RBDN_OP_ASSERT_VERSION:
        RADOS(read_op_assert_version)(r, op->number);
        return 0;
    case RBDN_OP_CMPXATTR:
        RADOS(read_op_cmpxattr)(r, op->name, (uint8_t)op->relation, op->data, op->data_len);
        return 0;
    case RBDN_OP_OMAP_CMP:
        RADOS(read_op_omap_cmp2)(r, op->key, (uint8_t)op->relation, op->data, op->key_len, op->data_len, NULL);
        return 0;
    case RBDN_OP_CMPEXT:
        RADOS(read_op_cmpext)(r, op->data, op->data_len, op->number, NULL);
        return 0;
    }
    return -EINVAL;
}

int rbdn_oplist_add(rbdn_oplist *l, const rbdn_op *op)
{
    return l->write ? add_write(l->write, op) : add_read(l->read, op);
}

static rbdn_out *add_out(rbdn_oplist *l, int kind)
{
    rbdn_out *o = calloc(1, sizeof *o);
    if (o) {
        o->kind = kind;
        *l->last = o;
        l->last = &o->next;
    }
    return o;
}

rbdn_out *rbdn_oplist_get(rbdn_oplist *l, const rbdn_op *op, int *err)
{
    *err = -EINVAL;
    if (!l->read || op->kind < RBDN_OP_STAT || op->kind > RBDN_OP_OMAP_KEYS
        || (op->kind == RBDN_OP_READ && op->length > READ_MAX))
        return NULL;
    *err = -ENOMEM;
    char *buffer = NULL;
    if (op->kind == RBDN_OP_READ && !(buffer = malloc(op->length ? op->length : 1)))
        return NULL;
    rbdn_out *o = add_out(l, op->kind);
    if (!o) {
        free(buffer);
        return NULL;
    }
    *err = 0;
    switch (op->kind) {
    case RBDN_OP_STAT:
        RADOS(read_op_stat)(l->read, &o->size, &o->mtime, &o->result);
        break;
    case RBDN_OP_READ:
        o->data = buffer;
        RADOS(read_op_read)(l->read, op->number, op->length, buffer, &o->len, &o->result);
        break;
    case RBDN_OP_EXEC:
        RADOS(read_op_exec)(l->read, op->name, op->method, op->data, op->data_len, &o->data, &o->len, &o->result);
        break;
    case RBDN_OP_XATTRS:
        RADOS(read_op_getxattrs)(l->read, &o->rows, &o->result);
        break;
    case RBDN_OP_OMAP_VALS:
        RADOS(read_op_omap_get_vals2)(l->read, op->name, op->method, op->number, &o->rows, &o->more, &o->result);
        break;
    case RBDN_OP_OMAP_KEYS:
        RADOS(read_op_omap_get_keys2)(l->read, op->name, op->number, &o->rows, &o->more, &o->result);
        break;
    }
    return o;
}

int rbdn_oplist_omap_set(rbdn_oplist *l, const char **keys, const size_t *key_lens, const char **values,
                         const size_t *lens, size_t count)
{
    if (!l->write)
        return -EINVAL;
    RADOS(write_op_omap_set2)(l->write, keys, values, key_lens, lens, count);
    return 0;
}

int rbdn_oplist_omap_rm(rbdn_oplist *l, const char **keys, const size_t *key_lens, size_t count)
{
    if (!l->write)
        return -EINVAL;
    RADOS(write_op_omap_rm_keys2)(l->write, keys, key_lens, count);
    return 0;
}

rbdn_out *rbdn_oplist_omap_get(rbdn_oplist *l, const char **keys, const size_t *key_lens, size_t count, int *err)
{
    *err = -EINVAL;
    if (!l->read)
        return NULL;
    *err = -ENOMEM;
    rbdn_out *o = add_out(l, RBDN_OP_OMAP_VALS);
    if (!o)
        return NULL;
    *err = 0;
    RADOS(read_op_omap_get_vals_by_keys2)(l->read, keys, count, key_lens, &o->rows, &o->result);
    return o;
}

/* --- sending ------------------------------------------------------------------------------------------------------ */

static void completed(rados_completion_t completion, void *arg)
{
    rbdn_oplist *l = arg;
    pthread_mutex_lock(&l->lock);
    l->result = RADOS(aio_get_return_value)(completion);
    l->version = RADOS(aio_get_version)(completion);
    l->done = true;
    pthread_cond_broadcast(&l->ended);
    pthread_mutex_unlock(&l->lock);
    put(l);
}

/* What librados answered to the submission: < 0, there will be no callback. */
static int sent(rbdn_oplist *l, int rc)
{
    if (rc < 0) {
        l->io = NULL;
        put(l); /* the one for the callback */
    }
    return rc;
}

static int begin(rbdn_oplist *l, rbdn_ioctx *c)
{
    if (l->completion)
        return -EINVAL;
    int rc = RADOS(aio_create_completion2)(l, completed, &l->completion);
    if (rc < 0)
        return rc;
    l->io = c->io;
    atomic_fetch_add(&l->refs, 1);
    return 0;
}

int rbdn_oplist_send(rbdn_oplist *l, rbdn_ioctx *c, const char *oid, uint64_t snap, uint64_t seq, uint64_t *snaps,
                     int count)
{
    int rc = begin(l, c);
    if (rc < 0)
        return rc;
    pthread_mutex_lock(&c->lock);
    RADOS(ioctx_snap_set_read)(c->io, snap);
    if (l->write) {
        rc = RADOS(ioctx_selfmanaged_snap_set_write_ctx)(c->io, seq, snaps, count);
        if (rc >= 0)
            rc = RADOS(aio_write_op_operate)(l->write, c->io, l->completion, oid, NULL, 0);
    } else {
        rc = RADOS(aio_read_op_operate)(l->read, c->io, l->completion, oid, 0);
    }
    pthread_mutex_unlock(&c->lock);
    return sent(l, rc);
}

rbdn_oplist *rbdn_notify_send(rbdn_ioctx *c, const char *oid, const void *payload, size_t len, uint64_t timeout_ms,
                              rbdn_out **out, int *err)
{
    *err = -EMSGSIZE;
    if (len > INT_MAX)
        return NULL;
    *err = -ENOMEM;
    rbdn_oplist *l = new_list();
    if (!l)
        return NULL;
    *out = add_out(l, RBDN_OP_EXEC);
    if (*out)
        *err = begin(l, c);
    if (*err == 0) {
        pthread_mutex_lock(&c->lock);
        RADOS(ioctx_snap_set_read)(c->io, UINT64_MAX - 1); /* HEAD */
        int rc = RADOS(aio_notify)(c->io, oid, l->completion, payload, (int)len, timeout_ms, &(*out)->data,
                                   &(*out)->len);
        pthread_mutex_unlock(&c->lock);
        *err = sent(l, rc);
    }
    if (*err < 0) {
        put(l);
        return NULL;
    }
    return l;
}

int rbdn_oplist_wait(rbdn_oplist *l, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    int rc = 0;
    pthread_mutex_lock(&l->lock);
    while (!l->done && rc == 0)
        rc = pthread_cond_timedwait(&l->ended, &l->lock, &until);
    bool done = l->done;
    pthread_mutex_unlock(&l->lock);
    return !done;
}

int rbdn_oplist_result(rbdn_oplist *l)
{
    pthread_mutex_lock(&l->lock);
    int result = l->done ? l->result : -EINPROGRESS;
    pthread_mutex_unlock(&l->lock);
    return result;
}

uint64_t rbdn_oplist_version(rbdn_oplist *l)
{
    pthread_mutex_lock(&l->lock);
    uint64_t version = l->version;
    pthread_mutex_unlock(&l->lock);
    return version;
}

void rbdn_oplist_free(rbdn_oplist *l)
{
    if (l->io && rbdn_oplist_wait(l, 0))
        RADOS(aio_cancel)(l->io, l->completion);
    put(l);
}

int rbdn_out_row(rbdn_out *o, const char **key, size_t *key_len, const char **value, size_t *len)
{
    *key = NULL;
    if (!o->rows)
        return 0;
    if (o->kind == RBDN_OP_XATTRS) {
        int rc = RADOS(getxattrs_next)(o->rows, key, value, len);
        if (rc < 0)
            return rc;
        *key_len = *key ? strlen(*key) : 0;
    } else {
        int rc = RADOS(omap_get_next2)(o->rows, (char **)key, (char **)value, key_len, len);
        if (rc < 0)
            return rc;
    }
    return *key != NULL;
}
