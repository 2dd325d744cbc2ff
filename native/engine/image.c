/* Images: their making and end, the way of a request in and out, who uses them. */
#include <errno.h>
#include <stdlib.h>

#include "engine/event.h"
#include "engine/image.h"
#include "engine/piece.h"

#define DATA_MAX (32 << 20) /* bytes that COMPARE_AND_WRITE compares, that WRITESAME repeats: both are copied */

/* --- requests ------------------------------------------------------------------------------------------------------ */

int64_t iov_total(const struct iovec *iov, uint32_t count)
{
    uint64_t total = 0;
    for (uint32_t n = 0; n < count; n++) {
        if (iov[n].iov_len > INT64_MAX - total)
            return -EINVAL;
        total += iov[n].iov_len;
    }
    return total;
}

int image_check(const struct view *v, const struct req *r)
{
    if (r->off > v->size || r->len > v->size - r->off)
        return -EINVAL;
    int64_t total;
    switch (r->type) {
    case REQ_READ:
        return iov_total(r->iov, r->iovcnt) == (int64_t)r->len ? 0 : -EINVAL;
    case REQ_WRITE:
        if (iov_total(r->iov, r->iovcnt) != (int64_t)r->len)
            return -EINVAL;
        break;
    case REQ_WRITESAME:
        total = iov_total(r->iov, r->iovcnt);
        if (total <= 0 || total > DATA_MAX || r->len % total)
            return -EINVAL;
        break;
    case REQ_COMPARE_AND_WRITE:
        if (r->len > DATA_MAX || iov_total(r->iov, r->iovcnt) != 2 * (int64_t)r->len)
            return -EINVAL;
        break;
    }
    return v->read_only ? -EROFS : 0;
}

void image_run(struct image *i, struct req *r)
{
    switch (r->type) {
    case REQ_FLUSH:
        if (r->epoch->view->snap_id == STORE_NOSNAP)
            flush_join(r);
        else
            req_finish(r, 0); /* a snapshot: never written */
        return;
    case REQ_COMPARE_AND_WRITE:
        caw_run(r->work);
        return;
    case REQ_HOLD_READ:
    case REQ_HOLD_WRITE:
        r->done(r);
        return;
    }
    int err = image_check(r->epoch->view, r);
    if (err || r->len == 0)
        req_finish(r, err);
    else if (r->type == REQ_READ)
        read_image(i, r);
    else
        write_image(i, r);
}

void image_submit(struct image *i, struct req *r)
{
    r->image = i;
    r->epoch = NULL;
    r->work = NULL;
    r->mismatch = 0;
    r->started_ns = now_ns();
    r->flags &= ~REQ_INTERNAL;
    int err = r->type >= REQ_TYPES ? -EINVAL : 0;
    if (r->type == REQ_COMPARE_AND_WRITE)
        err = caw_prepare(r);
    if (err)
        req_refuse(r, err);
    else if (gate_enter(i, r))
        image_run(i, r);
}

void req_refuse(struct req *r, int err)
{
    if (r->type == REQ_COMPARE_AND_WRITE)
        caw_refuse(r);
    r->result = err;
    if (r->type < REQ_TYPES) {
        uint64_t now = now_ns();
        stats_count(r->image, r->type, 0, err, now - r->started_ns, now);
    }
    r->done(r);
}

void req_complete(struct req *r, int64_t result)
{
    struct image *i = r->image;
    struct epoch *e = r->epoch;
    uint64_t unit = gate_unit(r->type), now = now_ns();
    r->result = result;
    stats_count(i, r->type, result < 0 ? 0 : r->len, result == -EILSEQ ? 0 : result, now - r->started_ns, now);
    r->done(r);
    gate_leave(i, e, unit);
}

void req_finish(struct req *r, int64_t result)
{
    if (r->flags & REQ_INTERNAL) {
        r->result = result;
        r->done(r);
    } else if (result == 0 && r->flags & REQ_FUA && r->type != REQ_READ && r->type != REQ_FLUSH) {
        flush_join(r);
    } else {
        req_complete(r, result);
    }
}

void image_store_error(struct image *i, bool read, int err)
{
    event_post(read ? EVENT_READ_ERROR : EVENT_IO_ERROR, i->id, err);
    if (err == -ESHUTDOWN)
        gate_fence_stores(i, err);
}

/* --- images -------------------------------------------------------------------------------------------------------- */

static void set_facts(struct image *i, const struct view *v)
{
    atomic_store(&i->size, v->size);
    atomic_store(&i->object_size, 1u << v->striping.order);
    atomic_store(&i->read_only, v->read_only);
}

static void image_free(struct image *i)
{
    gate_destroy(i);
    stats_free(i);
    free(atomic_load_explicit(&i->brought, memory_order_relaxed));
    pthread_mutex_destroy(&i->copyup_lock);
    pthread_mutex_destroy(&i->users_lock);
    free(i);
}

rbdn_image *rbdn_image_new(uint64_t id, rbdn_view *v, int *err)
{
    *err = v ? 0 : -EINVAL;
    if (*err)
        return NULL;
    struct image *i = calloc(1, sizeof *i);
    if (!i) {
        *err = -ENOMEM;
        return NULL;
    }
    i->id = id;
    i->made_ns = now_ns();
    pthread_mutex_init(&i->copyup_lock, NULL);
    pthread_mutex_init(&i->users_lock, NULL);
    set_facts(i, v);
    *err = gate_init(i, v);
    if (*err) {
        image_free(i);
        return NULL;
    }
    return i;
}

int rbdn_image_publish(rbdn_image *i, rbdn_view *v)
{
    if (!v)
        return -EINVAL;
    pthread_mutex_lock(&i->users_lock);
    bool changed = i->size != v->size || i->read_only != v->read_only;
    int rc = gate_publish(i, v);
    if (!rc) {
        set_facts(i, v);
        for (struct image_user *u = i->users; changed && u; u = u->next)
            if (u->changed)
                u->changed(u);
    }
    pthread_mutex_unlock(&i->users_lock);
    return rc;
}

int rbdn_image_users(rbdn_image *i)
{
    int count = 0;
    pthread_mutex_lock(&i->users_lock);
    for (struct image_user *u = i->users; u; u = u->next)
        count++;
    pthread_mutex_unlock(&i->users_lock);
    return count;
}

int rbdn_image_shut(rbdn_image *i)
{
    if (rbdn_image_users(i))
        return -EBUSY;
    gate_shut(i);
    return 0;
}

void rbdn_image_free(rbdn_image *i)
{
    pthread_mutex_lock(&i->lock);
    bool shut = i->shut;
    pthread_mutex_unlock(&i->lock);
    if (shut && !rbdn_image_users(i))
        image_free(i);
}

int rbdn_image_close(rbdn_image *i)
{
    int rc = rbdn_image_shut(i);
    if (!rc)
        rbdn_image_free(i);
    return rc;
}

void image_get(struct image *i, struct image_user *u)
{
    pthread_mutex_lock(&i->users_lock);
    u->next = i->users;
    i->users = u;
    pthread_mutex_unlock(&i->users_lock);
}

void image_put(struct image *i, struct image_user *u)
{
    pthread_mutex_lock(&i->users_lock);
    struct image_user **link = &i->users;
    while (*link && *link != u)
        link = &(*link)->next;
    if (*link)
        *link = u->next;
    pthread_mutex_unlock(&i->users_lock);
}

uint64_t image_size(struct image *i)
{
    return atomic_load(&i->size);
}

bool image_read_only(struct image *i)
{
    return atomic_load(&i->read_only);
}

uint32_t image_object_size(struct image *i)
{
    return atomic_load(&i->object_size);
}
