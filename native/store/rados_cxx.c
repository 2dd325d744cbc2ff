/* Two calls that only librados' C++ interface has: list-watchers and list-snaps. Their symbols are looked up by their
 * mangled names and called with libstdc++'s layouts of string, list and vector, which are part of its ABI since GCC 5.
 * librados::IoCtx is one pointer: the rados_ioctx_t. Its version namespace is v14_2_0 since Ceph 14.
 */
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "ffi/api_rados.h"
#include "store/rados_python.h"

#define STRING "NSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
#define LIST_WATCHERS "_ZN8librados7v14_2_05IoCtx13list_watchersERK" STRING "PNS2_4listI11obj_watch_tSaISB_EEE"
#define LIST_SNAPS "_ZN8librados7v14_2_05IoCtx10list_snapsERK" STRING "PNS_10snap_set_tE"
#define DELETE "_ZdlPv"

#define ROWS_MAX 65536 /* of a reply */
#define SNAP_DIR UINT64_MAX

struct string { /* std::string; only read by who gets it */
    const char *data;
    size_t size;
    size_t capacity, unused;
};

struct node { /* std::list<obj_watch_t> */
    struct node *next, *prev;
    struct { /* obj_watch_t */
        char addr[256];
        int64_t watcher_id;
        uint64_t cookie;
        uint32_t timeout_seconds;
    } watcher;
};

struct list {
    struct node *next, *prev;
    size_t size;
};

struct vector {
    void *begin, *end, *storage_end;
};

struct clone_info {
    uint64_t id;
    struct vector snaps;   /* uint64_t */
    struct vector overlap; /* pair of uint64_t */
    uint64_t size;
};

struct snap_set {
    struct vector clones;
    uint64_t seq;
};

typedef void (*delete_fn)(void *);

int rbdn_ioctx_watchers(rbdn_ioctx *c, const char *oid, rbdn_watcher *out, int max)
{
    int (*list_watchers)(rados_ioctx_t *, const struct string *, struct list *);
    delete_fn delete;
    *(void **)&list_watchers = rados_lib_symbol(LIST_WATCHERS);
    *(void **)&delete = rados_lib_symbol(DELETE);
    if (!list_watchers || !delete)
        return -EOPNOTSUPP;
    struct string name = {oid, strlen(oid), strlen(oid), 0};
    struct list found = {(struct node *)&found, (struct node *)&found, 0};
    int rc = list_watchers(&c->io, &name, &found);
    int count = 0;
    for (struct node *n = found.next, *next; n != (struct node *)&found; n = next) {
        next = n->next;
        if (rc >= 0 && count < ROWS_MAX) {
            if (count < max) {
                rbdn_watcher *w = &out[count];
                memcpy(w->address, n->watcher.addr, sizeof w->address);
                w->address[sizeof w->address - 1] = 0;
                w->gid = n->watcher.watcher_id;
                w->cookie = n->watcher.cookie;
                w->timeout = n->watcher.timeout_seconds;
            }
            count++;
        }
        delete(n);
    }
    return rc < 0 ? rc : count;
}

struct numbers {
    uint64_t *to;
    int64_t count, max;
};

static void put(struct numbers *n, uint64_t value)
{
    if (n->count < n->max)
        n->to[n->count] = value;
    n->count++;
}

static size_t size_of(const struct vector *v, size_t element)
{
    return (size_t)((char *)v->end - (char *)v->begin) / element;
}

int64_t rbdn_ioctx_snapset(rbdn_ioctx *c, const char *oid, uint64_t *out, int64_t max)
{
    int (*list_snaps)(rados_ioctx_t *, const struct string *, struct snap_set *);
    delete_fn delete;
    *(void **)&list_snaps = rados_lib_symbol(LIST_SNAPS);
    *(void **)&delete = rados_lib_symbol(DELETE);
    if (!list_snaps || !delete)
        return -EOPNOTSUPP;
    int rc;
    rados_ioctx_t io = rbdn_ioctx_own(c, &rc);
    if (!io)
        return rc;
    RADOS(ioctx_snap_set_read)(io, SNAP_DIR);
    struct string name = {oid, strlen(oid), strlen(oid), 0};
    struct snap_set found = {{NULL, NULL, NULL}, 0};
    rc = list_snaps(&io, &name, &found);
    RADOS(ioctx_destroy)(io);
    struct numbers n = {out, 0, max};
    struct clone_info *clones = found.clones.begin;
    size_t count = size_of(&found.clones, sizeof *clones);
    put(&n, found.seq);
    put(&n, count);
    for (size_t i = 0; i < count; i++) {
        size_t snaps = size_of(&clones[i].snaps, 8), pairs = size_of(&clones[i].overlap, 16);
        put(&n, clones[i].id);
        put(&n, clones[i].size);
        put(&n, snaps);
        for (size_t at = 0; at < snaps; at++)
            put(&n, ((uint64_t *)clones[i].snaps.begin)[at]);
        put(&n, pairs);
        for (size_t at = 0; at < 2 * pairs; at++)
            put(&n, ((uint64_t *)clones[i].overlap.begin)[at]);
        delete(clones[i].snaps.begin);
        delete(clones[i].overlap.begin);
    }
    delete(clones);
    return rc < 0 ? rc : n.count;
}
