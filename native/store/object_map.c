/* See object_map.h. An object has an entry here only while somebody uses it or waits for it. */
#include "store/object_map.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#define BUCKETS 256
#define CHANGES_MAX 4 /* sent at once: neighbours that come meanwhile are sent as one */
#define SPARE_MAX 64

enum change_step { CHANGE_NONE, CHANGE_QUEUED, CHANGE_SENT };

struct map_object {
    struct map_object *next; /* of the bucket, or spare */
    uint64_t objno;
    uint32_t users;   /* writers between begin and end */
    bool removing;    /* a remover is */
    uint8_t step;     /* enum change_step */
    uint8_t to, from; /* of the change */
    struct map_object *queue_next, *queue_prev; /* QUEUED: of the map's queue; SENT: of its change (next only) */
    struct map_ticket *first, **last;           /* waiting, in order */
};

struct object_map {
    struct object_map_target target;
    uint64_t count;
    pthread_mutex_t lock; /* guards all below; `states` is read without */
    bool broken, invalidating;
    int fence;
    unsigned sent; /* changes */
    uint64_t entries;
    struct map_object *queue, *queue_end, *spare;
    unsigned spares;
    struct map_object *buckets[BUCKETS];
    _Atomic uint8_t states[]; /* four objects a byte, the first lowest */
};

struct work { /* to be done without the lock */
    struct map_ticket *go, **go_last;
    struct map_change *changes;
    bool invalidate;
    int err;
};

static uint8_t state_of(const struct object_map *m, uint64_t objno)
{
    if (objno >= m->count)
        return OBJECT_ANY;
    return atomic_load_explicit(&m->states[objno / 4], memory_order_acquire) >> (objno % 4 * 2) & 3;
}

/* Locked. */
static void state_set(struct object_map *m, uint64_t objno, uint8_t state)
{
    unsigned shift = objno % 4 * 2;
    uint8_t byte = atomic_load_explicit(&m->states[objno / 4], memory_order_relaxed);
    atomic_store_explicit(&m->states[objno / 4], (byte & ~(3u << shift)) | state << shift, memory_order_release);
}

struct object_map *object_map_new(const struct object_map_target *target, const uint8_t *states, uint64_t count)
{
    struct object_map *m = calloc(1, sizeof *m + (count + 3) / 4);
    if (!m)
        return NULL;
    pthread_mutex_init(&m->lock, NULL);
    m->target = *target;
    m->count = count;
    for (uint64_t n = 0; n < count; n++)
        state_set(m, n, states[n] & 3);
    return m;
}

void object_map_free(struct object_map *m)
{
    for (struct map_object *o = m->spare, *next; o; o = next) {
        next = o->next;
        free(o);
    }
    pthread_mutex_destroy(&m->lock);
    free(m);
}

/* --- entries; all locked ------------------------------------------------------------------------------------------- */

static struct map_object **find(struct object_map *m, uint64_t objno)
{
    struct map_object **link = &m->buckets[objno * 0x9e3779b97f4a7c15u >> 56];
    while (*link && (*link)->objno != objno)
        link = &(*link)->next;
    return link;
}

static struct map_object *get(struct object_map *m, uint64_t objno)
{
    struct map_object **link = find(m, objno), *o = *link;
    if (o)
        return o;
    o = m->spare;
    if (o) {
        m->spare = o->next;
        m->spares--;
    } else if (!(o = malloc(sizeof *o))) {
        return NULL;
    }
    *o = (struct map_object){.objno = objno};
    o->last = &o->first;
    *link = o;
    m->entries++;
    return o;
}

static void put(struct object_map *m, struct map_object *o)
{
    if (o->users || o->removing || o->step != CHANGE_NONE || o->first)
        return;
    *find(m, o->objno) = o->next;
    m->entries--;
    if (m->spares >= SPARE_MAX) {
        free(o);
        return;
    }
    o->next = m->spare;
    m->spare = o;
    m->spares++;
}

static void queue_add(struct object_map *m, struct map_object *o, uint8_t to, uint8_t from)
{
    o->step = CHANGE_QUEUED;
    o->to = to;
    o->from = from;
    o->queue_next = NULL;
    o->queue_prev = m->queue_end;
    if (m->queue_end)
        m->queue_end->queue_next = o;
    else
        m->queue = o;
    m->queue_end = o;
}

static void queue_take(struct object_map *m, struct map_object *o)
{
    if (o->queue_prev)
        o->queue_prev->queue_next = o->queue_next;
    else
        m->queue = o->queue_next;
    if (o->queue_next)
        o->queue_next->queue_prev = o->queue_prev;
    else
        m->queue_end = o->queue_prev;
}

/* --- deciding; all locked ------------------------------------------------------------------------------------------ */

static int hold(struct map_object *o, struct map_ticket *t)
{
    t->held = true;
    if (t->want == MAP_REMOVE)
        o->removing = true;
    else
        o->users++;
    return 0;
}

/* What becomes of the first in line; MAP_WAITS: a change was begun, or others have the object. */
static int decide(struct object_map *m, struct map_object *o, struct map_ticket *t)
{
    if (m->fence)
        return m->fence;
    if (o->removing || o->step != CHANGE_NONE || m->invalidating)
        return MAP_WAITS;
    uint8_t state = m->broken ? OBJECT_ANY : state_of(m, o->objno);
    switch (t->want) {
    case MAP_REMOVE:
        if (o->users)
            return MAP_WAITS;
        if (state == OBJECT_NONEXISTENT)
            return -ENOENT;
        if (state == OBJECT_ANY || state == OBJECT_PENDING)
            return hold(o, t);
        queue_add(m, o, OBJECT_PENDING, OBJECT_ANY);
        return MAP_WAITS;
    case MAP_FORGET:
        if (state != OBJECT_PENDING)
            return 0;
        queue_add(m, o, OBJECT_NONEXISTENT, OBJECT_PENDING);
        return MAP_WAITS;
    default:
        if (state == OBJECT_ANY || state == OBJECT_EXISTS || (t->want == MAP_COPY && state == OBJECT_CLEAN))
            return hold(o, t);
        queue_add(m, o, t->want == MAP_COPY ? t->copy_state : OBJECT_EXISTS, OBJECT_ANY);
        return MAP_WAITS;
    }
}

/* Lets those go on who can, and drops the entry when nobody is left. */
static void serve(struct object_map *m, struct map_object *o, struct work *w)
{
    struct map_ticket *t;
    while ((t = o->first)) {
        int rc = decide(m, o, t);
        if (rc == MAP_WAITS)
            return;
        o->first = t->next;
        if (!o->first)
            o->last = &o->first;
        t->result = rc;
        t->next = NULL;
        *w->go_last = t;
        w->go_last = &t->next;
    }
    put(m, o);
}

static void serve_all(struct object_map *m, struct work *w)
{
    for (unsigned b = 0; b < BUCKETS; b++)
        for (struct map_object *o = m->buckets[b], *next; o; o = next) {
            next = o->next;
            serve(m, o, w);
        }
}

static bool joins(const struct map_object *o, const struct map_change *c)
{
    return o && o->step == CHANGE_QUEUED && o->to == c->to && o->from == c->from;
}

static void change_add(struct object_map *m, struct map_change *c, struct map_object *o)
{
    queue_take(m, o);
    o->step = CHANGE_SENT;
    o->queue_next = c->objects;
    c->objects = o;
}

static void lost(struct object_map *m, struct work *w, int err)
{
    if (!m->broken) {
        m->broken = m->invalidating = true;
        w->invalidate = true;
        w->err = err;
    }
    for (struct map_object *o; (o = m->queue);) { /* their users are served when the header says it */
        queue_take(m, o);
        o->step = CHANGE_NONE;
    }
}

static void pump(struct object_map *m, struct work *w)
{
    while (m->queue && m->sent < CHANGES_MAX && !m->fence) {
        struct map_change *c = calloc(1, sizeof *c);
        struct map_object *o = m->queue;
        if (!c) {
            lost(m, w, -ENOMEM);
            return;
        }
        c->map = m;
        c->start = o->objno;
        c->end = o->objno + 1;
        c->to = o->to;
        c->from = o->from;
        change_add(m, c, o);
        while (joins(o = *find(m, c->end), c)) {
            change_add(m, c, o);
            c->end++;
        }
        while (c->start > 0 && joins(o = *find(m, c->start - 1), c)) {
            change_add(m, c, o);
            c->start--;
        }
        m->sent++;
        c->next = w->changes;
        w->changes = c;
    }
}

/* Unlocked. */
static void work_do(struct object_map *m, struct work *w)
{
    struct object_map_target target = m->target; /* with the last of these the map may go */
    if (w->invalidate)
        target.invalidate(target.owner, m, w->err);
    for (struct map_change *c = w->changes, *next; c; c = next) {
        next = c->next;
        target.send(target.owner, c);
    }
    for (struct map_ticket *t = w->go, *next; t; t = next) {
        next = t->next;
        t->go(t);
    }
}

static void work_init(struct work *w)
{
    *w = (struct work){.go = NULL};
    w->go_last = &w->go;
}

/* --- the ways in --------------------------------------------------------------------------------------------------- */

int object_map_begin(struct object_map *m, struct map_ticket *t)
{
    struct work w;
    work_init(&w);
    t->held = false;
    t->next = NULL;
    pthread_mutex_lock(&m->lock);
    struct map_object *o = get(m, t->objno);
    int rc = !o ? -ENOMEM : o->first ? MAP_WAITS : decide(m, o, t);
    if (rc == MAP_WAITS) {
        *o->last = t;
        o->last = &t->next;
        pump(m, &w);
    } else if (o) {
        put(m, o);
    }
    pthread_mutex_unlock(&m->lock);
    work_do(m, &w);
    return rc;
}

void object_map_end(struct object_map *m, struct map_ticket *t)
{
    struct work w;
    if (!t->held)
        return;
    work_init(&w);
    pthread_mutex_lock(&m->lock);
    struct map_object *o = *find(m, t->objno);
    t->held = false;
    if (t->want == MAP_REMOVE)
        o->removing = false;
    else
        o->users--;
    serve(m, o, &w);
    pump(m, &w);
    pthread_mutex_unlock(&m->lock);
    work_do(m, &w);
}

void object_map_sent(struct map_change *c, int result)
{
    struct object_map *m = c->map;
    struct work w;
    work_init(&w);
    pthread_mutex_lock(&m->lock);
    m->sent--;
    if (result == -ESHUTDOWN)
        m->fence = result;
    else if (result < 0)
        lost(m, &w, result);
    for (struct map_object *o = c->objects, *next; o; o = next) {
        next = o->queue_next;
        o->step = CHANGE_NONE;
        if (result >= 0)
            state_set(m, o->objno, c->to);
        serve(m, o, &w);
    }
    if (m->fence)
        serve_all(m, &w);
    pump(m, &w);
    pthread_mutex_unlock(&m->lock);
    free(c);
    work_do(m, &w);
}

void object_map_invalidated(struct object_map *m)
{
    struct work w;
    work_init(&w);
    pthread_mutex_lock(&m->lock);
    m->invalidating = false;
    serve_all(m, &w);
    pthread_mutex_unlock(&m->lock);
    work_do(m, &w);
}

void object_map_fence(struct object_map *m, int err)
{
    struct work w;
    work_init(&w);
    pthread_mutex_lock(&m->lock);
    m->fence = err;
    for (struct map_object *o; (o = m->queue);) {
        queue_take(m, o);
        o->step = CHANGE_NONE;
    }
    serve_all(m, &w);
    pthread_mutex_unlock(&m->lock);
    work_do(m, &w);
}

/* --- questions ----------------------------------------------------------------------------------------------------- */

bool object_map_idle(struct object_map *m)
{
    pthread_mutex_lock(&m->lock);
    bool idle = m->entries == 0 && m->sent == 0 && !m->invalidating;
    pthread_mutex_unlock(&m->lock);
    return idle;
}

bool object_map_broken(struct object_map *m)
{
    pthread_mutex_lock(&m->lock);
    bool broken = m->broken;
    pthread_mutex_unlock(&m->lock);
    return broken;
}

uint8_t object_map_state(struct object_map *m, uint64_t objno)
{
    uint8_t state = state_of(m, objno);
    return object_map_broken(m) ? OBJECT_ANY : state;
}

bool object_map_absent(struct object_map *m, uint64_t objno)
{
    return object_map_state(m, objno) == OBJECT_NONEXISTENT;
}
