/* Copy-up: before a clone's object is changed in part for the first time, it gets the parent's data.
 *
 * Writers of one absent object share one copy-up: the first starts it, the others wait, and all of them try their own
 * operation again afterwards. The buffers of all copy-ups of the process are bounded: more of them wait their turn.
 *
 * Of a view with `fetch` it is Python that brings the object, with all its snapshots; readers wait for it too, where
 * there is no parent to read from.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/event.h"
#include "engine/piece.h"

#define BUFFERS_MAX (64ULL << 20) /* bytes; one copy-up may always run */

struct copyup {
    struct copyup *next;    /* image->copyups, or the budget's queue before it began */
    struct image *image;
    struct view *view;      /* a waiter's, so it lives as long as waiters do */
    struct piece *waiters;  /* image->copyup_lock */
    struct copyup *queued;  /* the budget's queue; budget.lock */
    struct job job;
    uint64_t objno, len;    /* bytes of the object that the parent covers */
    uint8_t *buffer;
    bool zero;              /* the parent has nothing but zeros */
    bool fetch, taken;      /* Python brings it; knows of it (image->copyup_lock) */
    const uint8_t *given;   /* by Python, for those who read */
    uint64_t given_len;
    bool only;              /* it was begun by a flatten, not by a write */
    bool blocking;          /* the thread that starts it may block */
};

static struct {
    pthread_mutex_t lock;
    uint64_t bytes;
    struct copyup *first, **last;
} budget = {.lock = PTHREAD_MUTEX_INITIALIZER, .last = &budget.first};

/* False: it waits, and a later end starts it. */
static bool budget_take(struct copyup *c)
{
    pthread_mutex_lock(&budget.lock);
    bool go = budget.bytes == 0 || (!budget.first && budget.bytes + c->len <= BUFFERS_MAX);
    if (go) {
        budget.bytes += c->len;
    } else {
        c->queued = NULL;
        *budget.last = c;
        budget.last = &c->queued;
    }
    pthread_mutex_unlock(&budget.lock);
    return go;
}

static void budget_give(uint64_t len)
{
    pthread_mutex_lock(&budget.lock);
    budget.bytes -= len;
    struct copyup *c;
    while ((c = budget.first) && (budget.bytes == 0 || budget.bytes + c->len <= BUFFERS_MAX)) {
        budget.first = c->queued;
        if (!budget.first)
            budget.last = &budget.first;
        budget.bytes += c->len;
        pool_run(&c->job);
    }
    pthread_mutex_unlock(&budget.lock);
}

/* The waiters go on; the image may be gone when the last one is through. */
static void end(struct copyup *c, int err, bool blocking)
{
    struct image *i = c->image;
    pthread_mutex_lock(&i->copyup_lock);
    struct copyup **link = &i->copyups;
    while (*link != c)
        link = &(*link)->next;
    *link = c->next;
    if (c->fetch)
        atomic_fetch_add_explicit(&i->fetches, 1, memory_order_release);
    struct piece *p = c->waiters;
    pthread_mutex_unlock(&i->copyup_lock);
    bool zero = c->zero;
    const uint8_t *given = c->given;
    uint64_t given_len = c->given_len;
    free(c->buffer);
    if (!c->fetch)
        budget_give(c->len);
    free(c);
    for (struct piece *next; p; p = next) {
        next = p->next;
        p->blocking = blocking;
        if (p->step == PIECE_READ && p->req)
            read_fetched(p, err, zero, given, given_len);
        else
            write_copied(p, err, zero);
    }
}

static void written(struct piece *p, int err)
{
    struct copyup *c = p->owner;
    bool blocking = p->blocking;
    piece_free(p);
    end(c, err, blocking);
}

static uint64_t without_zeros_at_end(const uint8_t *b, uint64_t len)
{
    static const uint64_t block = 4096;
    while (len >= block && b[len - block] == 0 && memcmp(b + len - block, b + len - block + 1, block - 1) == 0)
        len -= block;
    while (len && b[len - 1] == 0 && len % block)
        len--;
    return len;
}

static void parent_read(struct piece *p, int err)
{
    struct copyup *c = p->owner;
    uint64_t len = err ? 0 : without_zeros_at_end(c->buffer, c->len);
    if (err || len == 0) {
        c->zero = !err;
        written(p, err);
        return;
    }
    p->finish = written;
    p->view = c->view;
    p->step = PIECE_CHANGE;
    p->op.type = STORE_COPYUP;
    p->op.flags = c->only ? STORE_CLEAN : 0;
    p->op.objno = c->objno;
    p->op.off = 0;
    p->op.len = len;
    p->op.snapc = c->view->snapc;
    p->op.iov = p->iovs;
    p->op.iovcnt = 0;
    piece_add_iov(p, c->buffer, len); /* the first one always fits */
    piece_go(p, STEP_AGAIN, 0);
}

static void begin(struct copyup *c)
{
    struct piece *p = piece_new(c->image, c->view, NULL);
    c->buffer = malloc(c->len);
    if (!p || !c->buffer) {
        if (p)
            piece_free(p);
        end(c, -ENOMEM, c->blocking);
        return;
    }
    int err = 0;
    p->owner = c;
    p->finish = parent_read;
    p->blocking = c->blocking;
    piece_add_iov(p, c->buffer, c->len);
    read_prepare(p, c->objno, 0, c->len);
    enum step_outcome next = read_absent(p, &err);
    piece_go(p, next, err);
}

static void begin_job(struct job *j)
{
    struct copyup *c = j->owner;
    c->blocking = true;
    begin(c);
}

void copyup_join(struct piece *p)
{
    struct image *i = p->image;
    const struct view *v = p->view;
    pthread_mutex_lock(&i->copyup_lock);
    struct copyup *c = i->copyups;
    while (c && (c->objno != p->op.objno || c->view->parent != v->parent || c->view->overlap != v->overlap))
        c = c->next;
    bool first = !c;
    if (first && (c = calloc(1, sizeof *c))) {
        c->image = i;
        c->view = p->view;
        c->objno = p->op.objno;
        c->len = view_parent_prefix(v, c->objno);
        c->blocking = p->blocking;
        c->only = !p->req;
        c->fetch = v->fetch;
        c->job.run = begin_job;
        c->job.owner = c;
        c->next = i->copyups;
        i->copyups = c;
        if (c->fetch)
            atomic_fetch_add_explicit(&i->fetches, 1, memory_order_release);
    }
    if (c) {
        p->next = c->waiters;
        c->waiters = p;
    }
    bool fetch = v->fetch; /* from here on somebody else may finish the piece, and the view with it */
    uint64_t id = i->id;
    pthread_mutex_unlock(&i->copyup_lock);
    if (!c && p->step == PIECE_READ && p->req)
        read_fetched(p, -ENOMEM, false, NULL, 0);
    else if (!c)
        write_copied(p, -ENOMEM, false);
    else if (first && fetch)
        event_post(EVENT_OBJECT_WANTED, id, 0);
    else if (first && budget_take(c))
        begin(c);
}

int copyup_crossed(struct piece *p)
{
    struct image *i = p->image;
    int found = 0;
    if (copyup_asked(p))
        return 0;
    pthread_mutex_lock(&i->copyup_lock);
    struct copyup *c = i->copyups;
    while (c && (!c->fetch || c->objno != p->op.objno))
        c = c->next;
    if (c) {
        found = 2;
        p->next = c->waiters;
        c->waiters = p;
    } else if (atomic_load_explicit(&i->fetches, memory_order_relaxed) != p->fetches) {
        found = 1;
    }
    pthread_mutex_unlock(&i->copyup_lock);
    return found;
}

enum { ASKED = 1, NOTHING = 2 };

static bool brought(const struct piece *p, unsigned what)
{
    const struct brought *b = atomic_load_explicit(&p->image->brought, memory_order_acquire);
    uint64_t objno = p->op.objno;
    return b && p->view->snap_id == STORE_NOSNAP && objno < b->objects &&
           atomic_load_explicit(&b->bits[objno / 4], memory_order_acquire) & what << 2 * (objno % 4);
}

bool copyup_in_vain(const struct piece *p)
{
    return brought(p, NOTHING);
}

bool copyup_asked(const struct piece *p)
{
    return brought(p, ASKED);
}

/* Locked. No memory: it is asked for again. */
static void remember(struct image *i, const struct copyup *c, unsigned what)
{
    if (c->view->snap_id != STORE_NOSNAP)
        return;
    struct brought *b = atomic_load_explicit(&i->brought, memory_order_relaxed);
    if (!b) {
        uint64_t objects = (c->view->size >> c->view->striping.order) + c->view->striping.count + 1;
        b = calloc(1, sizeof *b + objects / 4 + 1);
        if (!b)
            return;
        b->objects = objects;
        atomic_store_explicit(&i->brought, b, memory_order_release);
    }
    if (c->objno < b->objects)
        atomic_fetch_or_explicit(&b->bits[c->objno / 4], what << 2 * (c->objno % 4), memory_order_release);
}

int rbdn_image_wanted(rbdn_image *i, uint64_t *objno, uint64_t *token)
{
    struct copyup *oldest = NULL;
    pthread_mutex_lock(&i->copyup_lock);
    for (struct copyup *c = i->copyups; c; c = c->next)
        if (c->fetch && !c->taken)
            oldest = c;
    if (oldest) {
        oldest->taken = true;
        *objno = oldest->objno;
        *token = (uintptr_t)oldest;
    }
    pthread_mutex_unlock(&i->copyup_lock);
    return oldest != NULL;
}

int rbdn_image_fetched(rbdn_image *i, uint64_t token, int what, const void *buf, uint64_t len)
{
    static const uint8_t nothing;
    pthread_mutex_lock(&i->copyup_lock);
    struct copyup *c = i->copyups;
    while (c && ((uintptr_t)c != token || !c->taken))
        c = c->next;
    if (c && (what == 0 || what == 1))
        remember(i, c, (c->view->read_only || c->view->need_lock ? 0 : ASKED) |
                           (what == 1 && !c->view->parent ? NOTHING : 0));
    pthread_mutex_unlock(&i->copyup_lock);
    if (!c)
        return -ENOENT;
    c->zero = what == 1;
    if (what == 2) {
        c->given = len ? buf : &nothing;
        c->given_len = len;
    }
    if (what < 0)
        image_store_error(i, true, what);
    end(c, what < 0 ? what : 0, true);
    return 0;
}

struct object_wait {
    struct flag flag;
    int result;
};

static void object_finished(struct piece *p, int result)
{
    struct object_wait *w = p->owner;
    w->result = result;
    piece_free(p);
    flag_set(&w->flag);
}

int copyup_object(struct image *i, struct view *v, uint64_t objno)
{
    struct object_wait w = {.result = 0};
    struct piece *p = piece_new(i, v, NULL);
    if (!p)
        return -ENOMEM;
    p->finish = object_finished;
    p->owner = &w;
    p->blocking = true;
    p->op.objno = objno;
    copyup_join(p);
    flag_wait(&w.flag);
    return w.result;
}
