/* A librados of our own under the store: a cluster in memory whose answers come on other threads, in any order between
 * objects and in order within one, late, never, or as errors. It checks what the store may never do: change data that
 * the object map does not know of, keep more in flight than allowed, write nothing. */
#ifndef FAKE_LIBRADOS_H
#define FAKE_LIBRADOS_H

#include "memory_store.h"
#include "store/store_rados_lib.h"

#define FAKE_OBJECTS 32
#define FAKE_ORDER 16
#define FAKE_SNAPS 16
#define FAKE_PREFIX "rbd_data.17"
#define FAKE_IMAGE "17"
#define FAKE_ASSERT "locked?"

struct fake_io {
    uint64_t snap;
    struct snapc *snapc; /* NULL: none */
};

enum fake_kind { FAKE_READ, FAKE_WRITE, FAKE_WRITE_FULL, FAKE_REMOVE, FAKE_STAT, FAKE_GUARD, FAKE_CREATE, FAKE_TRUNCATE,
                 FAKE_ZERO, FAKE_HINT, FAKE_EXEC, FAKE_COMPOUND };

struct fake_sub {
    uint8_t kind;
    uint8_t *data;
    char method[32];
    uint64_t off, len;
};

struct fake_op_list {
    unsigned count;
    struct fake_sub subs[8];
};

struct fake_completion {
    void *arg;
    rados_callback_t done;
    int result;
    _Atomic int refs;
    struct fake_flight *flight; /* fake.lock */
};

struct fake_flight {
    struct fake_flight *next;
    struct fake_completion *completion;
    char oid[96];
    uint64_t snap;
    struct snapc *snapc;
    struct fake_op_list ops;
    char *to;       /* READ */
    uint64_t *size; /* STAT */
    uint64_t bytes;
    bool cancelled;
};

static struct {
    pthread_mutex_t lock; /* guards all below but the atomics */
    pthread_cond_t wake;
    struct memory_store *objects;
    struct fake_flight *first;
    pthread_t threads[2];
    bool stopping, hold;
    uint64_t random;
    uint8_t head[FAKE_OBJECTS];               /* HEAD's object map */
    uint8_t snaps[FAKE_SNAPS][FAKE_OBJECTS];  /* by snapshot id */
    int snap_objects[FAKE_SNAPS];             /* how many its map has; 0: none */
    bool map_used, map_invalid, map_locked;
    uint32_t snap_invalid;                    /* bit per snapshot */
    char fail[32];                            /* beginning of the names of objects that fail */
    int fail_errno, fail_count;               /* the next so many */
    int submit_errno;                         /* the next submission fails at once */
    uint64_t ops, bytes, ops_most, bytes_most;/* in flight */
    uint64_t messages, map_updates, hints;
    const char *conf_ops, *conf_bytes;
} fake = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* --- applying; locked ---------------------------------------------------------------------------------------------- */

static uint64_t fake_u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

static int fake_map_update(const char *oid, const struct fake_sub *sub)
{
    uint64_t start = fake_u64(sub->data), end = fake_u64(sub->data + 8);
    uint8_t to = sub->data[16], has = sub->data[17], *map = fake.head;
    unsigned count = FAKE_OBJECTS;
    assert(sub->len == 18u + has && start < end);
    const char *dot = strchr(oid + strlen("rbd_object_map."), '.');
    if (dot) {
        uint64_t id = strtoull(dot + 1, NULL, 16);
        assert(id < FAKE_SNAPS);
        map = fake.snaps[id];
        count = fake.snap_objects[id];
        if (!count)
            return -ENOENT;
    } else {
        fake.map_updates++;
    }
    if (end > count)
        return -ERANGE;
    for (uint64_t n = start; n < end; n++)
        if (!has || map[n] == sub->data[18] || (map[n] == 3 && sub->data[18] == 1))
            map[n] = to;
    return 0;
}

static int fake_sparse_copyup(struct store_op *op, const struct fake_sub *sub)
{
    static uint8_t object[1 << FAKE_ORDER];
    uint32_t runs, bytes;
    memcpy(&runs, sub->data, 4);
    const uint8_t *at = sub->data + 4, *data = at + 16 * runs + 4;
    memcpy(&bytes, data - 4, 4);
    assert(sub->len == 4 + 16 * runs + 4 + bytes);
    memset(object, 0, sizeof object);
    uint64_t end = 0;
    for (uint32_t n = 0; n < runs; n++, at += 16) {
        uint64_t off = fake_u64(at), len = fake_u64(at + 8);
        assert(off >= end && len);
        memcpy(object + off, data, len);
        data += len;
        end = off + len;
    }
    struct iovec v = {object, end};
    *op = (struct store_op){.type = STORE_COPYUP, .objno = op->objno, .len = end, .iov = &v, .iovcnt = 1};
    return memory_apply(fake.objects, op);
}

static int fake_data_sub(struct fake_flight *f, uint64_t objno, const struct fake_sub *sub)
{
    struct iovec v = {sub->data, sub->len};
    struct store_op op = {.objno = objno, .off = sub->off, .len = sub->len, .iov = &v, .iovcnt = 1, .snapc = f->snapc};
    struct memory_content *head = &fake.objects->objects[objno].head;
    bool exists = head->exists;
    uint8_t state = fake.map_used && !fake.map_invalid ? fake.head[objno] : 0xff;
    switch (sub->kind) {
    case FAKE_GUARD:
        return exists ? 0 : -ENOENT;
    case FAKE_HINT:
        fake.hints++;
        return 0;
    case FAKE_CREATE:
        return 0; /* with TRUNCATE */
    case FAKE_WRITE:
    case FAKE_WRITE_FULL:
        assert(sub->len && (state == 1 || state == 0xff));
        op.type = STORE_WRITE;
        return memory_apply(fake.objects, &op);
    case FAKE_ZERO:
    case FAKE_TRUNCATE:
        assert(state == 1 || state == 0xff || !exists);
        op.type = sub->kind == FAKE_ZERO ? STORE_ZERO : STORE_TRUNCATE;
        op.flags = STORE_CREATE;
        return memory_apply(fake.objects, &op);
    case FAKE_REMOVE:
        assert(state == 2 || state == 0xff || !exists);
        op.type = STORE_REMOVE;
        return memory_apply(fake.objects, &op);
    case FAKE_EXEC:
        assert(!strcmp(sub->method, "rbd.sparse_copyup") && !f->snapc);
        assert(state == 1 || state == 3 || state == 0xff);
        return fake_sparse_copyup(&op, sub);
    }
    abort();
}

static int fake_exec(struct fake_flight *f, const struct fake_sub *sub)
{
    if (!strcmp(sub->method, "lock.assert_locked")) {
        assert(sub->len == strlen(FAKE_ASSERT) && !memcmp(sub->data, FAKE_ASSERT, sub->len));
        return fake.map_locked ? 0 : -EBUSY;
    }
    if (!strcmp(sub->method, "rbd.object_map_update"))
        return fake_map_update(f->oid, sub);
    assert(!strcmp(sub->method, "rbd.set_flags") && !strcmp(f->oid, "rbd_header." FAKE_IMAGE));
    uint64_t snap = fake_u64(sub->data + 16);
    assert(fake_u64(sub->data) == 3 && fake_u64(sub->data + 8) == 3);
    if (snap == STORE_NOSNAP)
        fake.map_invalid = true;
    else
        fake.snap_invalid |= 1u << snap;
    return 0;
}

static int fake_apply(struct fake_flight *f)
{
    if (f->cancelled)
        return -ECANCELED;
    if (fake.fail_count && !strncmp(f->oid, fake.fail, strlen(fake.fail))) {
        if (fake.fail_count > 0)
            fake.fail_count--;
        return fake.fail_errno;
    }
    bool data = !strncmp(f->oid, FAKE_PREFIX ".", strlen(FAKE_PREFIX) + 1);
    uint64_t objno = data ? strtoull(f->oid + strlen(FAKE_PREFIX) + 1, NULL, 16) : 0;
    struct fake_sub *first = &f->ops.subs[0];
    if (first->kind == FAKE_READ || first->kind == FAKE_STAT) {
        struct iovec v = {f->to, first->len};
        struct store_op op = {.type = first->kind == FAKE_READ ? STORE_READ : STORE_STAT, .objno = objno,
                              .off = first->off, .len = first->len, .iov = &v, .iovcnt = 1, .snap_id = f->snap};
        int64_t r = memory_apply(fake.objects, &op);
        if (f->size && r >= 0) {
            *f->size = r;
            r = 0;
        }
        return r;
    }
    if (first->kind == FAKE_REMOVE && !fake.objects->objects[objno].head.exists)
        return -ENOENT;
    for (unsigned n = 0; n < f->ops.count; n++) {
        int rc = data ? fake_data_sub(f, objno, &f->ops.subs[n]) : fake_exec(f, &f->ops.subs[n]);
        if (rc < 0)
            return rc;
    }
    return 0;
}

/* --- flights ------------------------------------------------------------------------------------------------------- */

static void fake_put(struct fake_completion *c)
{
    if (atomic_fetch_sub(&c->refs, 1) == 1)
        free(c);
}

/* Locked. One that may be answered now: random, but the oldest of its object; any that is cancelled. */
static struct fake_flight **fake_pick(void)
{
    unsigned count = 0;
    for (struct fake_flight **link = &fake.first; *link; link = &(*link)->next) {
        if ((*link)->cancelled)
            return link;
        count++;
    }
    if (!count || fake.hold)
        return NULL;
    struct fake_flight *f = fake.first, **link = &fake.first;
    for (unsigned n = memory_random(&fake.random) % count; n; n--)
        f = f->next;
    while (strcmp((*link)->oid, f->oid))
        link = &(*link)->next;
    return link;
}

static void *fake_thread(void *unused)
{
    pthread_mutex_lock(&fake.lock);
    for (;;) {
        struct fake_flight **link = fake_pick(), *f;
        if (!link) {
            if (fake.stopping)
                break;
            pthread_cond_wait(&fake.wake, &fake.lock);
            continue;
        }
        f = *link;
        *link = f->next;
        struct fake_completion *c = f->completion;
        c->result = fake_apply(f);
        c->flight = NULL;
        fake.ops--;
        fake.bytes -= f->bytes;
        pthread_mutex_unlock(&fake.lock);
        for (unsigned n = 0; n < f->ops.count; n++)
            free(f->ops.subs[n].data);
        free(f->snapc);
        free(f);
        c->done(c, c->arg);
        fake_put(c);
        pthread_mutex_lock(&fake.lock);
    }
    pthread_mutex_unlock(&fake.lock);
    return NULL;
}

static struct snapc *fake_snapc(const struct snapc *s)
{
    size_t size = s ? sizeof *s + s->count * sizeof s->ids[0] : 0;
    return s ? memcpy(malloc(size), s, size) : NULL;
}

static int fake_fly(void *io, const char *oid, void *completion, struct fake_op_list ops, char *to, uint64_t *size,
                    uint64_t bytes)
{
    struct fake_io *x = io;
    struct fake_completion *c = completion;
    struct fake_flight *f = calloc(1, sizeof *f), **last = &fake.first;
    snprintf(f->oid, sizeof f->oid, "%s", oid);
    f->completion = c;
    f->snap = x->snap;
    f->snapc = fake_snapc(x->snapc);
    f->ops = ops;
    f->to = to;
    f->size = size;
    f->bytes = bytes;
    pthread_mutex_lock(&fake.lock);
    int rc = fake.submit_errno;
    fake.submit_errno = 0;
    if (!rc) {
        atomic_fetch_add(&c->refs, 1);
        c->flight = f;
        while (*last)
            last = &(*last)->next;
        *last = f;
        fake.messages++;
        fake.ops++;
        fake.bytes += bytes;
        if (!strncmp(oid, FAKE_PREFIX, strlen(FAKE_PREFIX))) {
            fake.ops_most = fake.ops > fake.ops_most ? fake.ops : fake.ops_most;
            fake.bytes_most = fake.bytes > fake.bytes_most ? fake.bytes : fake.bytes_most;
        }
        pthread_cond_signal(&fake.wake);
    }
    pthread_mutex_unlock(&fake.lock);
    if (rc) {
        for (unsigned n = 0; n < f->ops.count; n++)
            free(f->ops.subs[n].data);
        free(f->snapc);
        free(f);
    }
    return rc;
}

static void *fake_copy(const void *data, size_t len)
{
    return memcpy(malloc(len ? len : 1), data, len);
}

/* --- the functions ------------------------------------------------------------------------------------------------- */

static int fake_conf_get(rados_t c, const char *option, char *buf, size_t len)
{
    const char *value = strstr(option, "bytes") ? fake.conf_bytes : fake.conf_ops;
    if (!value)
        return -ENOENT;
    snprintf(buf, len, "%s", value);
    return 0;
}

static int fake_ioctx_create2(rados_t c, int64_t pool, rados_ioctx_t *io)
{
    struct fake_io *x = calloc(1, sizeof *x);
    x->snap = STORE_NOSNAP;
    *io = x;
    return pool == 7 ? 0 : (free(x), -ENOENT);
}

static void fake_ioctx_destroy(rados_ioctx_t io)
{
    free(((struct fake_io *)io)->snapc);
    free(io);
}

static void fake_ioctx_set_namespace(rados_ioctx_t io, const char *name) {}
static void fake_ioctx_locator_set_key(rados_ioctx_t io, const char *key) {}
static void fake_set_pool_full_try(rados_ioctx_t io) {}

static void fake_ioctx_snap_set_read(rados_ioctx_t io, uint64_t snap)
{
    ((struct fake_io *)io)->snap = snap;
}

static int fake_ioctx_selfmanaged_snap_set_write_ctx(rados_ioctx_t io, uint64_t seq, uint64_t *snaps, int count)
{
    struct snapc *s = malloc(sizeof *s + count * sizeof s->ids[0]);
    s->seq = seq;
    s->count = count;
    memcpy(s->ids, snaps, count * sizeof s->ids[0]);
    ((struct fake_io *)io)->snapc = s;
    return 0;
}

static int fake_aio_create_completion2(void *arg, rados_callback_t done, rados_completion_t *out)
{
    struct fake_completion *c = calloc(1, sizeof *c);
    c->arg = arg;
    c->done = done;
    c->refs = 1;
    *out = c;
    return 0;
}

static int fake_aio_get_return_value(rados_completion_t c)
{
    return ((struct fake_completion *)c)->result;
}

static void fake_aio_release(rados_completion_t c)
{
    fake_put(c);
}

static int fake_aio_cancel(rados_ioctx_t io, rados_completion_t completion)
{
    struct fake_completion *c = completion;
    pthread_mutex_lock(&fake.lock);
    int rc = c->flight ? 0 : -ENOENT;
    if (c->flight)
        c->flight->cancelled = true;
    pthread_cond_broadcast(&fake.wake);
    pthread_mutex_unlock(&fake.lock);
    return rc;
}

static int fake_aio_read(rados_ioctx_t io, const char *oid, rados_completion_t c, char *buf, size_t len, uint64_t off)
{
    return fake_fly(io, oid, c, (struct fake_op_list){1, {{.kind = FAKE_READ, .off = off, .len = len}}}, buf, NULL, len);
}

static int fake_aio_write(rados_ioctx_t io, const char *oid, rados_completion_t c, const char *buf, size_t len,
                          uint64_t off)
{
    struct fake_op_list ops = {1, {{.kind = FAKE_WRITE, .off = off, .len = len, .data = fake_copy(buf, len)}}};
    return fake_fly(io, oid, c, ops, NULL, NULL, len);
}

static int fake_aio_write_full(rados_ioctx_t io, const char *oid, rados_completion_t c, const char *buf, size_t len)
{
    struct fake_op_list ops = {1, {{.kind = FAKE_WRITE_FULL, .len = len, .data = fake_copy(buf, len)}}};
    return fake_fly(io, oid, c, ops, NULL, NULL, len);
}

static int fake_aio_remove(rados_ioctx_t io, const char *oid, rados_completion_t c)
{
    return fake_fly(io, oid, c, (struct fake_op_list){1, {{.kind = FAKE_REMOVE}}}, NULL, NULL, 0);
}

static int fake_aio_stat(rados_ioctx_t io, const char *oid, rados_completion_t c, uint64_t *size, time_t *mtime)
{
    return fake_fly(io, oid, c, (struct fake_op_list){1, {{.kind = FAKE_STAT}}}, NULL, size, 0);
}

static int fake_aio_write_op_operate(rados_write_op_t op, rados_ioctx_t io, rados_completion_t c, const char *oid,
                                     time_t *mtime, int flags)
{
    struct fake_op_list *list = op, ops = *list;
    uint64_t bytes = 0;
    list->count = 0; /* the data goes along */
    for (unsigned n = 0; n < ops.count; n++)
        if (ops.subs[n].kind == FAKE_WRITE || ops.subs[n].kind == FAKE_WRITE_FULL)
            bytes += ops.subs[n].len;
    return fake_fly(io, oid, c, ops, NULL, NULL, bytes);
}

static rados_write_op_t fake_create_write_op(void)
{
    return calloc(1, sizeof(struct fake_op_list));
}

static void fake_release_write_op(rados_write_op_t op)
{
    struct fake_op_list *list = op;
    for (unsigned n = 0; n < list->count; n++)
        free(list->subs[n].data);
    free(list);
}

static void fake_add(void *op, struct fake_sub sub)
{
    struct fake_op_list *list = op;
    assert(list->count < 8);
    list->subs[list->count++] = sub;
}

static void fake_write_op_assert_exists(rados_write_op_t op) { fake_add(op, (struct fake_sub){.kind = FAKE_GUARD}); }

static void fake_write_op_create(rados_write_op_t op, int exclusive, const char *category)
{
    fake_add(op, (struct fake_sub){.kind = FAKE_CREATE});
}

static void fake_write_op_write(rados_write_op_t op, const char *buf, size_t len, uint64_t off)
{
    fake_add(op, (struct fake_sub){.kind = FAKE_WRITE, .off = off, .len = len, .data = fake_copy(buf, len)});
}

static void fake_write_op_write_full(rados_write_op_t op, const char *buf, size_t len)
{
    fake_add(op, (struct fake_sub){.kind = FAKE_WRITE_FULL, .len = len, .data = fake_copy(buf, len)});
}

static void fake_write_op_truncate(rados_write_op_t op, uint64_t size)
{
    fake_add(op, (struct fake_sub){.kind = FAKE_TRUNCATE, .off = size});
}

static void fake_write_op_zero(rados_write_op_t op, uint64_t off, uint64_t len)
{
    fake_add(op, (struct fake_sub){.kind = FAKE_ZERO, .off = off, .len = len});
}

static void fake_write_op_set_alloc_hint(rados_write_op_t op, uint64_t object_size, uint64_t write_size)
{
    assert(object_size == 1u << FAKE_ORDER && write_size == object_size);
    fake_add(op, (struct fake_sub){.kind = FAKE_HINT});
}

static void fake_write_op_exec(rados_write_op_t op, const char *cls, const char *method, const char *in, size_t len,
                               int *rc)
{
    struct fake_sub sub = {.kind = FAKE_EXEC, .len = len, .data = fake_copy(in, len)};
    snprintf(sub.method, sizeof sub.method, "%s.%s", cls, method);
    fake_add(op, sub);
}

/* --- life ---------------------------------------------------------------------------------------------------------- */

static void fake_start(void)
{
#define FAKE_FIELD(result, name, parameters) rados_lib.name = fake_##name;
    RADOS_FUNCTIONS(FAKE_FIELD)
#undef FAKE_FIELD
    fake.objects = memory_new(FAKE_ORDER, FAKE_OBJECTS, 1);
    fake.random = 88172645463325252ULL;
    fake.map_locked = true;
    for (unsigned n = 0; n < 2; n++)
        pthread_create(&fake.threads[n], NULL, fake_thread, NULL);
}

static void fake_hold(bool hold)
{
    pthread_mutex_lock(&fake.lock);
    fake.hold = hold;
    pthread_cond_broadcast(&fake.wake);
    pthread_mutex_unlock(&fake.lock);
}

static void fake_stop(void)
{
    pthread_mutex_lock(&fake.lock);
    fake.stopping = true;
    pthread_cond_broadcast(&fake.wake);
    pthread_mutex_unlock(&fake.lock);
    for (unsigned n = 0; n < 2; n++)
        pthread_join(fake.threads[n], NULL);
    assert(!fake.first && !fake.ops && !fake.bytes);
    memory_close(&fake.objects->store);
}

#endif
