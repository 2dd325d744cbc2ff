/* Object maps of snapshots. A copy-up gives an object to every snapshot that there is, without a look at their maps: what
 * such a map lacks is found here, from the versions of the objects, when it is read. */
#include <stdlib.h>

#include "ffi/api_store.h"
#include "store/layout.h"

/* Which version of an object serves a snapshot: a clone's id, STORE_NOSNAP for HEAD, or: */
#define NO_VERSION 0
#define IN_CLONES UINT64_MAX /* HEAD does not: some clone does, or none */

/* HEAD is saved before it is changed, and its seq raised in between: who finds the lower seq before and after has seen
 * what the snapshot sees. */
static uint64_t version_in_head(struct entry *e, uint64_t snap)
{
    if (snap <= atomic_load(&e->seq))
        return IN_CLONES;
    uint8_t state = word_state(atomic_load(&e->word));
    if (snap <= atomic_load(&e->seq))
        return IN_CLONES;
    return state == ENTRY_EXISTS ? STORE_NOSNAP : NO_VERSION;
}

/* The first clone at or after the snapshot that holds the object serves it, or was made for later ones only. */
static int versions_in_clones(struct layout *l, uint64_t snap, uint64_t *versions, uint64_t count)
{
    uint64_t ids[64], after = snap - 1;
    uint32_t n, i;
    int r = clones_load(l);
    while (r == 0 && (n = clones_ids(l, after, ids, 64)) > 0)
        for (uint32_t k = 0; k < n && r == 0; k++) {
            struct clone_entry e;
            after = ids[k];
            r = clones_lock_open(l, ids[k], false, &i);
            if (r == -ENOENT) {
                r = 0; /* trimmed meanwhile: nobody needs it */
                continue;
            }
            if (r < 0)
                break;
            int64_t o = clone_entry_next(l->clones[i].idx, 0, &e);
            for (; o >= 0 && (uint64_t)o < count; o = clone_entry_next(l->clones[i].idx, (uint64_t)o + 1, &e)) {
                if (versions[o] != IN_CLONES)
                    continue;
                if (!clone_entry_valid(l, ids[k], &e)) {
                    r = -EIO;
                    break;
                }
                versions[o] = snap > e.lo ? ids[k] : NO_VERSION;
            }
            if (o < 0 && o != -ENOENT)
                r = (int)o;
            pthread_rwlock_unlock(&l->clones_lock);
        }
    return r;
}

/* For objects that `states` does not know of; NO_VERSION for all others. */
static int versions_at(struct layout *l, uint64_t snap, const uint8_t *states, uint64_t *versions, uint64_t count)
{
    bool look = false;
    for (uint64_t o = 0; o < count; o++) {
        struct entry *e = states[o] == MAP_NONEXISTENT ? index_find(l, o) : NULL;
        versions[o] = e ? version_in_head(e, snap) : NO_VERSION;
        look = look || versions[o] == IN_CLONES;
    }
    int r = look ? versions_in_clones(l, snap, versions, count) : 0;
    for (uint64_t o = 0; o < count; o++)
        if (versions[o] == IN_CLONES)
            versions[o] = NO_VERSION;
    return r;
}

int64_t rbdn_layout_snap_map(rbdn_store *s, uint64_t snap_id, uint64_t before, uint8_t *states, uint64_t count)
{
    struct layout *l = layout_of(s);
    int64_t found = 0;
    if (!l)
        return -EOPNOTSUPP;
    if (snap_id == 0 || snap_id >= STORE_NOSNAP || before >= snap_id)
        return -EINVAL;
    if (count && !index_find(l, count - 1) && count > atomic_load(&l->entries))
        count = atomic_load(&l->entries); /* beyond them no object ever was */
    if (count == 0)
        return 0;
    uint64_t *now = malloc(count * sizeof *now), *then = NULL;
    int r = now ? versions_at(l, snap_id, states, now, count) : -ENOMEM;
    for (uint64_t o = 0; r == 0 && o < count; o++)
        found += now[o] != NO_VERSION;
    if (r == 0 && found && before) {
        then = malloc(count * sizeof *then);
        r = then ? versions_at(l, before, states, then, count) : -ENOMEM;
    }
    for (uint64_t o = 0; r == 0 && o < count; o++)
        if (now[o] != NO_VERSION)
            states[o] = then && then[o] == now[o] ? MAP_CLEAN : MAP_EXISTS;
    free(now);
    free(then);
    return r < 0 ? r : found;
}
