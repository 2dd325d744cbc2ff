/* The data objects of one image on RADOS, through librados' asynchronous calls. See store_rados.h for the way of a call.
 *
 * What is acknowledged is durable, so a flush has nothing to do. Nothing times out: while the cluster is in trouble
 * requests wait. They end before only when the client is blocklisted: the first -ESHUTDOWN, or rbdn_store_fence(), fails
 * everything, also what waits for an OSD that is down.
 */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/store_rados.h"

#define SPARE_MAX 128
#define CONTEXTS_MAX 16 /* kept without users */

/* --- librados operations ------------------------------------------------------------------------------------------- */

/* Locked. */
static void unlist(struct rados_aio *a)
{
    *a->link = a->next;
    if (a->next)
        a->next->link = a->link;
}

static void landed(rados_completion_t completion, void *arg)
{
    struct rados_aio *a = arg;
    struct rados_store *s = a->store;
    int result = RADOS(aio_get_return_value)(completion);
    atomic_fetch_add_explicit(&s->inside, 1, memory_order_acquire); /* close waits, though its last request is through */
    pthread_mutex_lock(&s->lock);
    unlist(a);
    pthread_mutex_unlock(&s->lock);
    RADOS(aio_release)(completion);
    if (result == -ESHUTDOWN) /* blocklisted: nothing of ours will be let in again */
        rados_fence(s, result);
    else if (result == -ECANCELED && atomic_load(&s->fence)) /* by cancel_all() */
        result = atomic_load(&s->fence);
    a->done(a, result);
    atomic_fetch_sub_explicit(&s->inside, 1, memory_order_release);
}

int rados_aio_begin(struct rados_store *s, struct rados_aio *a)
{
    a->store = s;
    if (RADOS(aio_create_completion2)(a, landed, &a->completion) < 0)
        return -ENOMEM;
    pthread_mutex_lock(&s->lock);
    int fence = atomic_load_explicit(&s->fence, memory_order_relaxed);
    if (!fence) {
        a->next = s->running;
        a->link = &s->running;
        if (a->next)
            a->next->link = &a->next;
        s->running = a;
    }
    pthread_mutex_unlock(&s->lock);
    if (fence)
        RADOS(aio_release)(a->completion);
    return fence;
}

/* Locked. librados completes them with -ECANCELED, elsewhere. */
static void cancel_all(struct rados_store *s)
{
    for (struct rados_aio *a = s->running; a; a = a->next)
        RADOS(aio_cancel)(s->base.io, a->completion);
}

void rados_aio_sent(struct rados_store *s, struct rados_aio *a, int rc)
{
    if (rc < 0) {
        pthread_mutex_lock(&s->lock);
        unlist(a);
        pthread_mutex_unlock(&s->lock);
        RADOS(aio_release)(a->completion);
        a->done(a, rc);
    } else if (atomic_load_explicit(&s->fence, memory_order_acquire)) {
        /* The fence may have looked before librados knew of this one (which may be gone by now). */
        pthread_mutex_lock(&s->lock);
        cancel_all(s);
        pthread_mutex_unlock(&s->lock);
    }
}

void rados_fence(struct rados_store *s, int err)
{
    struct call *waiting = NULL, *queued = NULL;
    struct object_map *m = NULL;
    pthread_mutex_lock(&s->lock);
    if (!atomic_load_explicit(&s->fence, memory_order_relaxed)) {
        atomic_store_explicit(&s->fence, err, memory_order_release);
        waiting = rados_stream_drop(s);
        queued = rados_client_drop(s->client, s);
        cancel_all(s);
        m = atomic_load(&s->map);
        if (m)
            atomic_fetch_add(&s->map_users, 1);
    }
    pthread_mutex_unlock(&s->lock);
    if (m) {
        object_map_fence(m, err);
        atomic_fetch_sub(&s->map_users, 1);
    }
    for (struct call *c = waiting, *next; c; c = next) {
        next = c->next;
        rados_call_end(c, err);
    }
    for (struct call *c = queued, *next; c; c = next) {
        next = c->next;
        rados_call_end(c, err);
    }
}

int rbdn_store_fence(rbdn_store *store, int err)
{
    if (err >= 0 || err < -4095)
        return -EINVAL;
    store_fence(store, err);
    return 0;
}

/* --- contexts; all under the store's lock -------------------------------------------------------------------------- */

rados_ioctx_t rados_ioctx_for(struct rados_store *s, int64_t pool_id, int *err)
{
    rados_ioctx_t io = NULL;
    *err = RADOS(ioctx_create2)(s->client->cluster, pool_id, &io);
    if (*err < 0)
        return NULL;
    RADOS(ioctx_set_namespace)(io, s->namespace);
    RADOS(set_pool_full_try)(io); /* a full pool or quota is an error of the request, not an endless wait */
    return io;
}

static bool same(const struct snapc *a, const struct snapc *b)
{
    return a == b || (a && b && a->seq == b->seq && a->count == b->count &&
                      memcmp(a->ids, b->ids, a->count * sizeof a->ids[0]) == 0);
}

static void context_free(struct rados_context *x)
{
    RADOS(ioctx_destroy)(x->io);
    free(x->snapc);
    free(x);
}

static void contexts_trim(struct rados_store *s)
{
    unsigned kept = 0;
    for (struct rados_context **link = &s->contexts, *x; (x = *link);) {
        if (x->uses || kept++ < CONTEXTS_MAX) {
            link = &x->next;
            continue;
        }
        *link = x->next;
        context_free(x);
    }
}

static struct rados_context *context_new(struct rados_store *s, uint64_t snap_id, const struct snapc *snapc)
{
    struct rados_context *x = calloc(1, sizeof *x);
    size_t size = snapc ? sizeof *snapc + snapc->count * sizeof snapc->ids[0] : 0;
    int err = 0;
    if (!x || (size && !(x->snapc = malloc(size))) || !(x->io = rados_ioctx_for(s, s->pool_id, &err))) {
        if (x)
            free(x->snapc);
        free(x);
        return NULL;
    }
    x->snap_id = snap_id;
    if (snapc) {
        memcpy(x->snapc, snapc, size);
        err = RADOS(ioctx_selfmanaged_snap_set_write_ctx)(x->io, snapc->seq, x->snapc->ids, snapc->count);
    } else {
        RADOS(ioctx_snap_set_read)(x->io, snap_id);
    }
    if (err < 0) {
        context_free(x);
        return NULL;
    }
    contexts_trim(s);
    x->next = s->contexts;
    s->contexts = x;
    return x;
}

static struct rados_context *context_get(struct rados_store *s, const struct store_op *op)
{
    bool read = op->type == STORE_READ || op->type == STORE_STAT || op->type == STORE_EXTENTS;
    uint64_t snap_id = read ? op->snap_id : STORE_NOSNAP;
    /* A copy from the parent belongs to every snapshot: it is made as if there were none. */
    const struct snapc *snapc = read || op->type == STORE_COPYUP ? NULL : op->snapc;
    if (snapc && snapc->seq == 0 && snapc->count == 0)
        snapc = NULL;
    struct rados_context *x = &s->base;
    if (snapc || snap_id != STORE_NOSNAP) {
        x = s->contexts;
        while (x && (x->snap_id != snap_id || !same(x->snapc, snapc)))
            x = x->next;
        if (!x)
            x = context_new(s, snap_id, snapc);
    }
    if (x)
        x->uses++;
    return x;
}

/* --- calls --------------------------------------------------------------------------------------------------------- */

static struct call *call_new(struct rados_store *s, struct store_op *op)
{
    pthread_mutex_lock(&s->lock);
    struct call *c = s->spare;
    if (c) {
        s->spare = c->next;
        s->spares--;
    }
    pthread_mutex_unlock(&s->lock);
    if (!c && !(c = malloc(sizeof *c)))
        return NULL;
    *c = (struct call){.op = op, .aio.store = s};
    return c;
}

static void call_free(struct call *c)
{
    struct rados_store *s = c->aio.store;
    pthread_mutex_lock(&s->lock);
    bool keep = s->spares < SPARE_MAX;
    if (keep) {
        c->next = s->spare;
        s->spare = c;
        s->spares++;
    }
    pthread_mutex_unlock(&s->lock);
    if (!keep)
        free(c);
}

void rados_call_complete(struct call *c)
{
    struct store_op *op = c->op;
    op->result = c->result;
    call_free(c);
    op->done(op);
}

static void member_end(struct call *c)
{
    if (c->map) {
        object_map_end(c->map, &c->ticket);
        if (c->op->type == STORE_REMOVE && (c->result >= 0 || c->result == -ENOENT) && rados_map_forget(c))
            return;
    }
    rados_call_complete(c);
}

static void call_landed(struct rados_aio *a, int result)
{
    rados_call_end((struct call *)a, result);
}

static void call_send(struct call *c)
{
    struct rados_store *s = c->aio.store;
    c->sent = true;
    c->aio.done = call_landed;
    int rc = rados_aio_begin(s, &c->aio);
    if (rc)
        rados_call_end(c, rc);
    else
        rados_aio_sent(s, &c->aio, rados_call_send(c));
}

static void call_fly(struct call *c)
{
    if (rados_client_take(c->aio.store->client, c))
        call_send(c);
}

void rados_call_run(struct call *c)
{
    struct rados_store *s = c->aio.store;
    c->off = c->op->off;
    c->bytes = c->op->type == STORE_READ || c->op->type == STORE_WRITE || c->op->type == STORE_COPYUP ? c->op->len : 0;
    pthread_mutex_lock(&s->lock);
    int err = atomic_load_explicit(&s->fence, memory_order_relaxed);
    c->context = err ? NULL : context_get(s, c->op);
    if (!err && !c->context)
        err = -ENOMEM;
    bool waits = !err && rados_stream_join(s, c);
    pthread_mutex_unlock(&s->lock);
    if (waits) /* and may be done and gone */
        return;
    if (err)
        rados_call_end(c, err);
    else
        call_fly(c);
}

/* Who waits for this one goes first: what is done with the results may take a while. */
void rados_call_end(struct call *group, int result)
{
    struct rados_store *s = group->aio.store;
    struct call *follows = NULL, *turn = NULL;
    pthread_mutex_lock(&s->lock);
    if (group->stream)
        follows = rados_stream_next(s, group->stream);
    for (struct call *c = group; c; c = c->member)
        if (c->context)
            c->context->uses--;
    pthread_mutex_unlock(&s->lock);
    if (group->sent)
        turn = rados_client_give(s->client, group->bytes);
    if (follows)
        call_fly(follows);
    for (struct call *c = turn, *next; c; c = next) {
        next = c->next;
        call_send(c);
    }
    uint64_t at = 0;
    for (struct call *c = group; c; at += c->op->len, c = c->member)
        rados_call_result(group, c, at, result);
    free(group->buffer);
    for (struct call *c = group, *next; c; c = next) {
        next = c->member;
        member_end(c);
    }
}

/* --- the store ----------------------------------------------------------------------------------------------------- */

static int check(const struct rados_store *s, const struct store_op *op)
{
    if (op->off > s->object_size || op->len > s->object_size - op->off)
        return -EINVAL;
    if (op->type == STORE_EXTENTS && op->max_extents == 0)
        return -EINVAL;
    return atomic_load_explicit(&s->fence, memory_order_acquire);
}

static bool nothing(const struct store_op *op) /* an OSD never answers a write of nothing */
{
    switch (op->type) {
    case STORE_FLUSH: /* what was acknowledged is durable */
        return true;
    case STORE_READ:
    case STORE_WRITE:
    case STORE_ZERO:
    case STORE_EXTENTS:
        return op->len == 0;
    }
    return false;
}

static int64_t submit(struct rados_store *s, struct store_op *op)
{
    int rc = check(s, op);
    if (rc || nothing(op))
        return rc;
    if (rados_map_says_absent(s, op))
        return -ENOENT;
    struct call *c = call_new(s, op);
    if (!c)
        return -ENOMEM;
    rc = rados_map_begin(c);
    if (rc < 0) {
        call_free(c);
        return rc;
    }
    if (rc != MAP_WAITS)
        rados_call_run(c);
    return STORE_PENDING;
}

static int64_t rados_submit(struct store *store, struct store_op *op)
{
    struct rados_store *s = (struct rados_store *)store;
    atomic_fetch_add_explicit(&s->inside, 1, memory_order_acquire);
    int64_t rc = submit(s, op);
    atomic_fetch_sub_explicit(&s->inside, 1, memory_order_release);
    return rc;
}

static void rados_close(struct store *store)
{
    struct rados_store *s = (struct rados_store *)store;
    pthread_mutex_lock(&s->lock);
    if (s->running) { /* flags of a snapshot whose map failed: no request waits for them */
        atomic_store(&s->fence, -ESHUTDOWN);
        cancel_all(s);
    }
    while (s->running) {
        pthread_mutex_unlock(&s->lock);
        sched_yield();
        pthread_mutex_lock(&s->lock);
    }
    pthread_mutex_unlock(&s->lock);
    while (atomic_load_explicit(&s->inside, memory_order_acquire)) /* threads on their way out */
        sched_yield();
    rbdn_map_stop(store);
    for (struct rados_context *x = s->contexts, *next; x; x = next) {
        next = x->next;
        context_free(x);
    }
    for (struct call *c = s->spare, *next; c; c = next) {
        next = c->next;
        free(c);
    }
    rados_streams_free(s);
    if (s->base.io)
        RADOS(ioctx_destroy)(s->base.io);
    if (s->client)
        rados_client_put(s->client);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static void rados_fence_op(struct store *store, int err)
{
    rados_fence((struct rados_store *)store, err);
}

static const struct store_ops rados_ops = {
    .name = "rados",
    .submit = rados_submit,
    .close = rados_close,
    .fence = rados_fence_op,
};

struct rados_store *rados_store_of(struct store *store)
{
    return store->ops == &rados_ops ? (struct rados_store *)store : NULL;
}

rbdn_store *rbdn_rados_open(void *cluster, int64_t pool_id, const char *name_space, const char *prefix, unsigned order,
                            int *err)
{
    struct rados_store *s = NULL;
    *err = !cluster || order < 12 || order > 25 ? -EINVAL : rados_lib_load();
    if (*err)
        return NULL;
    s = calloc(1, sizeof *s);
    if (!s) {
        *err = -ENOMEM;
        return NULL;
    }
    s->store.ops = &rados_ops;
    s->pool_id = pool_id;
    s->object_size = 1ULL << order;
    s->base.snap_id = STORE_NOSNAP;
    pthread_mutex_init(&s->lock, NULL);
    if ((size_t)snprintf(s->namespace, sizeof s->namespace, "%s", name_space) >= sizeof s->namespace ||
        (size_t)snprintf(s->prefix, sizeof s->prefix, "%s", prefix) >= sizeof s->prefix)
        *err = -ENAMETOOLONG;
    else if (!(s->client = rados_client_get(cluster)))
        *err = -ENOMEM;
    else
        s->base.io = rados_ioctx_for(s, pool_id, err);
    if (*err) {
        rados_close(&s->store);
        return NULL;
    }
    return &s->store;
}

int rbdn_rados_merged(rbdn_store *store, uint64_t *reads, uint64_t *writes)
{
    struct rados_store *s = rados_store_of(store);
    if (!s)
        return -EOPNOTSUPP;
    *reads = atomic_load(&s->merged[0]);
    *writes = atomic_load(&s->merged[1]);
    return 0;
}
