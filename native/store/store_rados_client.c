/* Room in a cluster handle. librados blocks the thread that submits beyond objecter_inflight_ops or _op_bytes, and such
 * a thread may be a reactor; so we stay below and queue the rest. The limits are read once, from the handle. */
#include <errno.h>
#include <stdlib.h>

#include "store/store_rados.h"

#define SHARE 2 /* our part of librados' limits is 1/SHARE: Python's own operations use the same handle */
#define OPS_DEFAULT 1024
#define BYTES_DEFAULT (100ULL << 20)

static struct {
    pthread_mutex_t lock;
    struct rados_client *first;
} clients = {.lock = PTHREAD_MUTEX_INITIALIZER};

static uint64_t limit(rados_t cluster, const char *option, uint64_t otherwise)
{
    char text[32];
    if (RADOS(conf_get)(cluster, option, text, sizeof text) < 0)
        return otherwise / SHARE;
    uint64_t value = strtoull(text, NULL, 10);
    return value == 0 ? UINT64_MAX / 2 : value < SHARE ? 1 : value / SHARE;
}

struct rados_client *rados_client_get(rados_t cluster)
{
    pthread_mutex_lock(&clients.lock);
    struct rados_client *c = clients.first;
    while (c && c->cluster != cluster)
        c = c->next;
    if (!c && (c = calloc(1, sizeof *c))) {
        pthread_mutex_init(&c->lock, NULL);
        c->cluster = cluster;
        c->ops_max = limit(cluster, "objecter_inflight_ops", OPS_DEFAULT);
        c->bytes_max = limit(cluster, "objecter_inflight_op_bytes", BYTES_DEFAULT);
        c->last = &c->first;
        c->next = clients.first;
        clients.first = c;
    }
    if (c)
        c->users++;
    pthread_mutex_unlock(&clients.lock);
    return c;
}

void rados_client_put(struct rados_client *c)
{
    pthread_mutex_lock(&clients.lock);
    if (--c->users == 0) {
        struct rados_client **link = &clients.first;
        while (*link != c)
            link = &(*link)->next;
        *link = c->next;
        pthread_mutex_destroy(&c->lock);
        free(c);
    }
    pthread_mutex_unlock(&clients.lock);
}

int rbdn_rados_progress(void *cluster, uint64_t *running, uint64_t *ended)
{
    pthread_mutex_lock(&clients.lock);
    struct rados_client *c = clients.first;
    while (c && c->cluster != cluster)
        c = c->next;
    if (c) {
        pthread_mutex_lock(&c->lock);
        *running = c->ops;
        *ended = c->ended;
        pthread_mutex_unlock(&c->lock);
    }
    pthread_mutex_unlock(&clients.lock);
    return c ? 0 : -ENOENT;
}

/* Locked. One operation may always run. */
static bool fits(const struct rados_client *c, uint64_t bytes)
{
    return c->ops == 0 || (c->ops < c->ops_max && c->bytes + bytes <= c->bytes_max);
}

bool rados_client_take(struct rados_client *c, struct call *call)
{
    pthread_mutex_lock(&c->lock);
    bool go = !c->first && fits(c, call->bytes);
    if (go) {
        c->ops++;
        c->bytes += call->bytes;
    } else {
        call->next = NULL;
        *c->last = call;
        c->last = &call->next;
    }
    pthread_mutex_unlock(&c->lock);
    return go;
}

struct call *rados_client_give(struct rados_client *c, uint64_t bytes)
{
    struct call *go = NULL, **last = &go;
    pthread_mutex_lock(&c->lock);
    c->ops--;
    c->ended++;
    c->bytes -= bytes;
    for (struct call *next; (next = c->first) && fits(c, next->bytes);) {
        c->first = next->next;
        if (!c->first)
            c->last = &c->first;
        c->ops++;
        c->bytes += next->bytes;
        next->next = NULL;
        *last = next;
        last = &next->next;
    }
    pthread_mutex_unlock(&c->lock);
    return go;
}

struct call *rados_client_drop(struct rados_client *c, struct rados_store *s)
{
    struct call *dropped = NULL;
    pthread_mutex_lock(&c->lock);
    struct call **link = &c->first;
    for (struct call *call; (call = *link);) {
        if (call->aio.store != s) {
            link = &call->next;
            continue;
        }
        *link = call->next;
        call->next = dropped;
        dropped = call;
    }
    c->last = link;
    pthread_mutex_unlock(&c->lock);
    return dropped;
}
