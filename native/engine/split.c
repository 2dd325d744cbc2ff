/* A request over several objects, or a read of a parent over several: cut into one piece per object, SPLIT_WINDOW of them
 * at the store at once.
 *
 * What an image extent covers of one object is always contiguous in it: the bytes at or behind the extent's begin are a
 * suffix of the object, those before its end a prefix (striping_prefix). With striping its data lies scattered in the
 * buffer, one unit here and one there, so the piece gathers it.
 */
#include <errno.h>
#include <stdlib.h>

#include "engine/piece.h"

struct cursor {
    const struct striping *s;
    uint64_t pos, end;        /* image bytes still to be cut, whole object sets at a time */
    uint64_t from, to;        /* the part of one object set being cut */
    uint64_t set_first;       /* number of the set's first object */
    uint64_t index, left;     /* next object in the set, how many still */
    uint64_t image_base, buf_base; /* image byte image_base lies at buf_base in the data */
};

struct split {
    pthread_mutex_t lock; /* guards all but the fields set once */
    struct image *image;  /* set once, as the next five */
    struct view *view;    /* whose objects are addressed */
    struct req *req;      /* NULL only for a copy-up's read */
    struct piece *above;  /* NULL: the request itself is what we finish */
    void *to_free;
    struct data data;
    struct cursor cursor;
    struct unstripe_iter extents; /* above: image extents to read, one after the other */
    unsigned active;              /* pieces under way */
    bool pumping;                 /* somebody hands out pieces */
    int err;                      /* first error */
};

static void cursor_set(struct cursor *c, uint64_t pos, uint64_t len, uint64_t buf_base)
{
    c->pos = c->image_base = pos;
    c->end = pos + len;
    c->buf_base = buf_base;
    c->left = 0;
}

static bool cursor_next(struct cursor *c, uint64_t *objno, uint64_t *off, uint64_t *len)
{
    const struct striping *s = c->s;
    for (;;) {
        if (c->left == 0) {
            if (c->pos >= c->end)
                return false;
            uint64_t set_bytes = s->count << s->order, set = c->pos / set_bytes;
            uint64_t set_end = (set + 1) * set_bytes;
            c->from = c->pos;
            c->to = c->end < set_end ? c->end : set_end;
            c->pos = c->to;
            c->set_first = set * s->count;
            c->index = c->from / s->unit % s->count;
            uint64_t units = (c->to - 1) / s->unit - c->from / s->unit + 1;
            c->left = units < s->count ? units : s->count;
        }
        *objno = c->set_first + c->index;
        c->index = c->index + 1 == s->count ? 0 : c->index + 1;
        c->left--;
        *off = striping_prefix(s, *objno, c->from);
        *len = striping_prefix(s, *objno, c->to) - *off;
        if (*len)
            return true;
    }
}

/* Locked. */
static bool next_extent(struct split *s, uint64_t *objno, uint64_t *off, uint64_t *len)
{
    if (s->err)
        return false;
    while (!cursor_next(&s->cursor, objno, off, len)) {
        struct stripe_extent e;
        if (!s->above || !unstripe_next(&s->extents, &e))
            return false;
        cursor_set(&s->cursor, e.pos, e.len, e.off - s->above->op.off);
    }
    return true;
}

static int gather(struct split *s, struct piece *p, uint64_t objno, uint64_t off, uint64_t len)
{
    struct unstripe_iter u;
    struct stripe_extent e;
    unstripe_begin(&u, s->cursor.s, objno, off, len);
    while (unstripe_next(&u, &e)) {
        int rc = piece_gather(p, &s->data, e.pos - s->cursor.image_base + s->cursor.buf_base, e.len);
        if (rc)
            return rc;
    }
    return 0;
}

static void pump(struct split *s);

static void piece_finished(struct piece *p, int err)
{
    struct split *s = p->owner;
    piece_free(p);
    pthread_mutex_lock(&s->lock);
    if (err && !s->err)
        s->err = err;
    s->active--;
    if (s->pumping) {
        pthread_mutex_unlock(&s->lock);
        return;
    }
    s->pumping = true;
    pump(s);
}

/* Locked; unlocks. */
static void finish(struct split *s)
{
    struct req *r = s->req;
    struct piece *above = s->above;
    int err = s->err;
    pthread_mutex_unlock(&s->lock);
    pthread_mutex_destroy(&s->lock);
    free(s->to_free);
    free(s);
    if (above)
        above->finish(above, err);
    else
        req_finish(r, err);
}

/* Locked, pumping; unlocks. Hands out pieces until the window is full or nothing is left. */
static void pump(struct split *s)
{
    uint64_t objno, off, len;
    while (s->active < SPLIT_WINDOW && next_extent(s, &objno, &off, &len)) {
        bool read = s->above || s->req->type == REQ_READ;
        struct piece *p = piece_new(s->image, s->view, s->req);
        int err = p ? 0 : -ENOMEM;
        if (p && (read || s->req->type == REQ_WRITE || s->req->type == REQ_WRITESAME))
            err = gather(s, p, objno, off, len);
        if (err) {
            if (p)
                piece_free(p);
            s->err = err;
            break;
        }
        p->finish = piece_finished;
        p->owner = s;
        s->active++;
        pthread_mutex_unlock(&s->lock);
        enum step_outcome next = STEP_AGAIN;
        if (read)
            read_prepare(p, objno, off, len);
        else
            next = write_prepare(p, objno, off, len, &err);
        piece_go(p, next, err);
        pthread_mutex_lock(&s->lock);
    }
    s->pumping = false;
    if (s->active) /* the last one to finish finds nothing left and comes here again */
        pthread_mutex_unlock(&s->lock);
    else
        finish(s);
}

static struct split *split_new(struct image *i, struct view *v, struct req *r)
{
    struct split *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    pthread_mutex_init(&s->lock, NULL);
    s->image = i;
    s->view = v;
    s->req = r;
    s->cursor.s = &v->striping;
    s->pumping = true;
    return s;
}

void split_run(struct image *i, struct req *r, const struct data *d, void *to_free)
{
    struct split *s = split_new(i, r->epoch->view, r);
    if (!s) {
        free(to_free);
        req_finish(r, -ENOMEM);
        return;
    }
    s->data = *d;
    s->to_free = to_free;
    cursor_set(&s->cursor, r->off, r->len, 0);
    pthread_mutex_lock(&s->lock);
    pump(s);
}

void split_parent(struct piece *above, uint64_t len)
{
    struct split *s = split_new(above->image, above->view->parent, above->req);
    if (!s) {
        above->finish(above, -ENOMEM);
        return;
    }
    s->above = above;
    above->blocking = false; /* it goes on in the thread that finishes last */
    data_list(&s->data, above->op.iov, above->op.iovcnt);
    unstripe_begin(&s->extents, &above->view->striping, above->op.objno, above->op.off, len);
    pthread_mutex_lock(&s->lock);
    pump(s);
}
