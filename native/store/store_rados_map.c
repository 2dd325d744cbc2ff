/* The object map of an image on RADOS: when calls ask it, and how its changes are sent.
 *
 * HEAD's map: lock.assert_locked and rbd.object_map_update in one operation, so that nobody who lost the lock changes it.
 * A copy from the parent appears in every snapshot, so their maps are changed before, the oldest first: the copy counts
 * as a change in the first snapshot that has the object, and as none in those after it.
 */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/store_rados.h"

#define MAP_INVALID 1u       /* flags of the header */
#define FAST_DIFF_INVALID 2u

struct map_aio { /* one operation on a map or on the header */
    struct rados_aio aio; /* first */
    struct map_change *change;
    struct object_map *map;
    struct call *call;
    rados_write_op_t op;
};

static uint8_t *put(uint8_t *at, uint64_t value, unsigned bytes)
{
    for (unsigned n = 0; n < bytes; n++)
        *at++ = value >> 8 * n;
    return at;
}

static void update(rados_write_op_t op, uint64_t start, uint64_t end, uint8_t to, uint8_t from)
{
    uint8_t in[19], *at = put(put(put(in, start, 8), end, 8), to, 1);
    at = put(at, from != OBJECT_ANY, 1);
    if (from != OBJECT_ANY)
        at = put(at, from, 1);
    RADOS(write_op_exec)(op, "rbd", "object_map_update", (char *)in, at - in, NULL);
}

static struct map_aio *map_aio_new(void (*done)(struct rados_aio *, int))
{
    struct map_aio *a = calloc(1, sizeof *a);
    if (a && !(a->op = RADOS(create_write_op)())) {
        free(a);
        return NULL;
    }
    if (a)
        a->aio.done = done;
    return a;
}

/* done() follows, perhaps here. */
static void map_aio_send(struct rados_store *s, struct map_aio *a, const char *oid)
{
    rados_write_op_t op = a->op;
    int rc = rados_aio_begin(s, &a->aio);
    if (rc)
        a->aio.done(&a->aio, rc);
    else
        rados_aio_sent(s, &a->aio,
                       RADOS(aio_write_op_operate)(op, s->map_store.io, a->aio.completion, oid, NULL, 0));
    RADOS(release_write_op)(op);
}

/* --- HEAD's map ---------------------------------------------------------------------------------------------------- */

static void change_done(struct rados_aio *aio, int result)
{
    struct map_aio *a = (struct map_aio *)aio;
    struct map_change *change = a->change;
    free(a);
    object_map_sent(change, result);
}

static void change_send(void *owner, struct map_change *change)
{
    struct rados_store *s = owner;
    char oid[RADOS_OID_MAX];
    struct map_aio *a = map_aio_new(change_done);
    if (!a) {
        object_map_sent(change, -ENOMEM);
        return;
    }
    a->change = change;
    RADOS(write_op_exec)(a->op, "lock", "assert_locked", (char *)s->map_store.assert_locked, s->map_store.assert_len,
                         NULL);
    update(a->op, change->start, change->end, change->to, change->from);
    snprintf(oid, sizeof oid, "rbd_object_map.%s", s->map_store.image_id);
    map_aio_send(s, a, oid);
}

/* --- the header's flags -------------------------------------------------------------------------------------------- */

static void flags_done(struct rados_aio *aio, int result)
{
    struct map_aio *a = (struct map_aio *)aio;
    struct object_map *m = a->map;
    free(a);
    if (m) /* whatever came of it: the requests that wait are older than the trouble with the map */
        object_map_invalidated(m);
}

static void flags_send(struct rados_store *s, uint64_t snap_id, struct object_map *m)
{
    char oid[RADOS_OID_MAX];
    uint8_t in[24];
    struct map_aio *a = map_aio_new(flags_done);
    if (!a) {
        if (m)
            object_map_invalidated(m);
        return;
    }
    a->map = m;
    put(put(put(in, MAP_INVALID | FAST_DIFF_INVALID, 8), MAP_INVALID | FAST_DIFF_INVALID, 8), snap_id, 8);
    RADOS(write_op_exec)(a->op, "rbd", "set_flags", (char *)in, sizeof in, NULL);
    snprintf(oid, sizeof oid, "rbd_header.%s", s->map_store.image_id);
    map_aio_send(s, a, oid);
}

static void invalidate(void *owner, struct object_map *m, int err)
{
    flags_send(owner, STORE_NOSNAP, m);
}

/* --- the snapshots' maps ------------------------------------------------------------------------------------------- */

static void snapshot_next(struct call *c);

static void snapshot_done(struct rados_aio *aio, int result)
{
    struct map_aio *a = (struct map_aio *)aio;
    struct call *c = a->call;
    struct rados_store *s = a->aio.store;
    free(a);
    if (result >= 0)
        c->first_snap_done = true;
    else if (result != -ENOENT && result != -ERANGE && result != -ESHUTDOWN) /* the first two: no map, smaller then */
        flags_send(s, c->op->snapc->ids[c->snap_at], NULL);
    if (result == -ESHUTDOWN)
        rados_call_end(c, result);
    else
        snapshot_next(c);
}

static void snapshot_next(struct call *c)
{
    struct rados_store *s = c->aio.store;
    char oid[RADOS_OID_MAX];
    if (c->snap_at == 0) {
        rados_call_run(c);
        return;
    }
    struct map_aio *a = map_aio_new(snapshot_done);
    if (!a) {
        rados_call_end(c, -ENOMEM);
        return;
    }
    a->call = c;
    c->snap_at--;
    update(a->op, c->op->objno, c->op->objno + 1,
           c->first_snap_done && s->map_store.fast_diff ? OBJECT_CLEAN : OBJECT_EXISTS, OBJECT_ANY);
    snprintf(oid, sizeof oid, "rbd_object_map.%s.%016llx", s->map_store.image_id,
             (unsigned long long)c->op->snapc->ids[c->snap_at]);
    map_aio_send(s, a, oid);
}

/* --- calls --------------------------------------------------------------------------------------------------------- */

bool rados_map_says_absent(struct rados_store *s, const struct store_op *op)
{
    switch (op->type) {
    case STORE_READ:
    case STORE_STAT:
    case STORE_EXTENTS:
        if (op->snap_id != STORE_NOSNAP)
            return false;
        break;
    case STORE_WRITE:
        if (!(op->flags & STORE_GUARD))
            return false;
        break;
    case STORE_TRUNCATE:
        if (op->flags & STORE_CREATE)
            return false;
        break;
    case STORE_ZERO:
        break;
    default:
        return false;
    }
    if (!atomic_load_explicit(&s->map, memory_order_relaxed))
        return false;
    pthread_mutex_lock(&s->lock); /* a read may come while the map is taken away */
    struct object_map *m = atomic_load_explicit(&s->map, memory_order_relaxed);
    bool absent = m && object_map_absent(m, op->objno);
    pthread_mutex_unlock(&s->lock);
    return absent;
}

static void granted(struct map_ticket *t)
{
    struct call *c = t->owner;
    c->result = t->result;
    if (t->result)
        rados_call_complete(c);
    else
        snapshot_next(c);
}

static void forgotten(struct map_ticket *t)
{
    struct call *c = t->owner;
    if (t->result)
        c->result = t->result;
    rados_call_complete(c);
}

/* Without a map nobody knows whether an object is new: the hint goes with the first write that we see. */
static bool first_seen(struct rados_store *s, uint64_t objno)
{
    uint8_t *seen = &s->hinted[objno % sizeof s->hinted], is = 1 + objno / sizeof s->hinted % 255;
    bool first = __atomic_load_n(seen, __ATOMIC_RELAXED) != is;
    if (first)
        __atomic_store_n(seen, is, __ATOMIC_RELAXED);
    return first;
}

int rados_map_begin(struct call *c)
{
    struct rados_store *s = c->aio.store;
    const struct store_op *op = c->op;
    bool snapshots = false;
    switch (op->type) {
    case STORE_READ:
    case STORE_STAT:
    case STORE_EXTENTS:
        return 0;
    case STORE_COPYUP:
        c->ticket.want = MAP_COPY;
        snapshots = op->snapc && op->snapc->count;
        c->ticket.copy_state =
            snapshots && op->flags & STORE_CLEAN && s->map_store.fast_diff ? OBJECT_CLEAN : OBJECT_EXISTS;
        break;
    case STORE_REMOVE:
        c->ticket.want = MAP_REMOVE;
        break;
    default:
        c->ticket.want = MAP_WRITE;
    }
    struct object_map *m = atomic_load_explicit(&s->map, memory_order_acquire); /* it stays while a write is in flight */
    if (!m) {
        c->hint = op->type == STORE_WRITE && first_seen(s, op->objno);
        return 0;
    }
    uint8_t state = object_map_state(m, op->objno);
    c->hint = op->type == STORE_WRITE && (state == OBJECT_NONEXISTENT || state == OBJECT_PENDING);
    c->ticket.objno = op->objno;
    c->ticket.go = granted;
    c->ticket.owner = c;
    c->snap_at = snapshots ? op->snapc->count : 0;
    c->map = m;
    int rc = object_map_begin(m, &c->ticket);
    if (rc == 0 && snapshots) {
        snapshot_next(c);
        return MAP_WAITS;
    }
    return rc;
}

bool rados_map_forget(struct call *c)
{
    c->ticket.want = MAP_FORGET;
    c->ticket.go = forgotten;
    return object_map_begin(c->map, &c->ticket) == MAP_WAITS;
}

/* --- from Python --------------------------------------------------------------------------------------------------- */

int rbdn_map_stop(rbdn_store *store)
{
    struct rados_store *s = rados_store_of(store);
    if (!s)
        return -EOPNOTSUPP;
    pthread_mutex_lock(&s->lock);
    struct object_map *m = atomic_load(&s->map);
    bool busy = m && !object_map_idle(m);
    if (!busy)
        atomic_store(&s->map, NULL);
    pthread_mutex_unlock(&s->lock);
    if (busy)
        return -EBUSY;
    while (atomic_load(&s->map_users))
        sched_yield();
    if (m)
        object_map_free(m);
    if (s->map_store.io)
        RADOS(ioctx_destroy)(s->map_store.io);
    s->map_store.io = NULL;
    return 0;
}

int rbdn_map_start(rbdn_store *store, const rbdn_object_map *config)
{
    struct rados_store *s = rados_store_of(store);
    if (!s)
        return -EOPNOTSUPP;
    if (config->assert_len > sizeof s->map_store.assert_locked || strlen(config->image_id) >= sizeof s->map_store.image_id)
        return -EINVAL;
    int rc = rbdn_map_stop(store);
    if (rc)
        return rc;
    const struct object_map_target target = {change_send, invalidate, s};
    struct object_map *m = object_map_new(&target, config->states, config->count);
    if (!m)
        return -ENOMEM;
    s->map_store.io = rados_ioctx_for(s, config->pool_id, &rc);
    if (rc) {
        object_map_free(m);
        return rc;
    }
    strcpy(s->map_store.image_id, config->image_id);
    memcpy(s->map_store.assert_locked, config->assert_locked, config->assert_len);
    s->map_store.assert_len = config->assert_len;
    s->map_store.fast_diff = config->fast_diff;
    pthread_mutex_lock(&s->lock);
    int fence = atomic_load(&s->fence);
    if (!fence)
        atomic_store(&s->map, m);
    pthread_mutex_unlock(&s->lock);
    if (fence)
        object_map_free(m);
    return fence;
}

int rbdn_map_broken(rbdn_store *store)
{
    struct rados_store *s = rados_store_of(store);
    if (!s)
        return -EOPNOTSUPP;
    pthread_mutex_lock(&s->lock);
    struct object_map *m = atomic_load(&s->map);
    int rc = m ? object_map_broken(m) : -ENOENT;
    pthread_mutex_unlock(&s->lock);
    return rc;
}

struct waiter {
    struct map_ticket ticket;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool done; /* lock */
};

static void wake(struct map_ticket *t)
{
    struct waiter *w = t->owner;
    pthread_mutex_lock(&w->lock);
    w->done = true;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

int rbdn_map_change(rbdn_store *store, uint64_t objno, int state)
{
    struct rados_store *s = rados_store_of(store);
    if (!s)
        return -EOPNOTSUPP;
    struct waiter w = {.lock = PTHREAD_MUTEX_INITIALIZER, .cond = PTHREAD_COND_INITIALIZER};
    w.ticket.objno = objno;
    w.ticket.want = state == OBJECT_EXISTS ? MAP_WRITE : state == OBJECT_PENDING ? MAP_REMOVE : MAP_FORGET;
    w.ticket.go = wake;
    w.ticket.owner = &w;
    pthread_mutex_lock(&s->lock);
    struct object_map *m = atomic_load(&s->map);
    if (m)
        atomic_fetch_add(&s->map_users, 1);
    pthread_mutex_unlock(&s->lock);
    if (!m)
        return 0;
    int rc = object_map_begin(m, &w.ticket);
    if (rc == MAP_WAITS) {
        pthread_mutex_lock(&w.lock);
        while (!w.done)
            pthread_cond_wait(&w.cond, &w.lock);
        pthread_mutex_unlock(&w.lock);
        rc = w.ticket.result;
    }
    if (!rc)
        object_map_end(m, &w.ticket);
    atomic_fetch_sub(&s->map_users, 1);
    return rc == -ENOENT ? 0 : rc;
}
