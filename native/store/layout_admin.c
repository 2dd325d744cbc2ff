/* Operations on whole layouts, and those on objects that guests have no request for. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

/* Lowest object >= from and < below that a clone holds; `below` when none does. */
static int64_t next_in_clones(struct layout *l, uint64_t from, uint64_t below)
{
    uint64_t ids[64], after = 0;
    uint32_t n, i;
    int r = clones_load(l);
    if (r < 0)
        return r;
    while ((n = clones_ids(l, after, ids, 64)) > 0)
        for (uint32_t k = 0; k < n; k++) {
            struct clone_entry e;
            after = ids[k];
            r = clones_lock_open(l, ids[k], false, &i);
            if (r == -ENOENT)
                continue;
            if (r < 0)
                return r;
            int64_t o = clone_entry_next(l->clones[i].idx, from, &e);
            pthread_rwlock_unlock(&l->clones_lock);
            if (o < 0 && o != -ENOENT)
                return o;
            if (o >= 0 && (uint64_t)o < below)
                below = (uint64_t)o;
        }
    return (int64_t)below;
}

int64_t rbdn_layout_next(rbdn_store *s, uint64_t from, int clones)
{
    struct layout *l = layout_of(s);
    struct entry *e;
    if (!l)
        return -EOPNOTSUPP;
    if (from >= LAYOUT_MAX_OBJECTS)
        return -ENOENT;
    uint64_t o = from;
    while ((e = index_find(l, o)) && word_state(atomic_load(&e->word)) != ENTRY_EXISTS)
        if (++o % 256 == 0)
            o = index_skip_hole(l, o);
    if (!e)
        o = UINT64_MAX >> 1;
    if (clones) {
        int64_t c = next_in_clones(l, from, o);
        if (c < 0)
            return c;
        o = (uint64_t)c;
    }
    return o == UINT64_MAX >> 1 ? -ENOENT : (int64_t)o;
}

int rbdn_layout_clones(rbdn_store *s, uint64_t objno, uint64_t *rows, uint32_t max)
{
    struct layout *l = layout_of(s);
    uint64_t ids[64], after = 0;
    uint32_t n, i, found = 0;
    if (!l)
        return -EOPNOTSUPP;
    if (objno >= LAYOUT_MAX_OBJECTS)
        return 0;
    int r = clones_load(l);
    if (r < 0)
        return r;
    while (found < max && (n = clones_ids(l, after, ids, 64)) > 0)
        for (uint32_t k = 0; k < n && found < max; k++) {
            struct clone_entry e;
            after = ids[k];
            r = clones_lock_open(l, ids[k], false, &i);
            if (r == -ENOENT)
                continue;
            if (r < 0)
                return r;
            r = clone_entry_read(l->clones[i].idx, objno, false, &e);
            pthread_rwlock_unlock(&l->clones_lock);
            if (r < 0)
                return r;
            if (r == 0)
                continue;
            rows[found * 3] = ids[k];
            rows[found * 3 + 1] = e.lo;
            rows[found * 3 + 2] = e.size;
            found++;
        }
    return (int)found;
}

uint64_t rbdn_layout_snap_seq(rbdn_store *s, uint64_t objno)
{
    struct layout *l = layout_of(s);
    struct entry *e = l ? index_find(l, objno) : NULL;
    return e ? atomic_load(&e->seq) : 0;
}

/* HEAD of an object that exists is rewritten in place; one that does not is made like a copy-up, durable first. */
static int copy_back(struct layout *l, uint64_t objno, struct entry *e, const struct clone_source *src, uint64_t seq)
{
    uint64_t pos = layout_pos(l, objno), word = atomic_load(&e->word);
    uint32_t seg = layout_seg(l, objno);
    bool copied, exists = word_state(word) == ENTRY_EXISTS;
    int fd = head_open(l, seg, true), r = 0;
    if (fd < 0)
        return fd;
    if (!exists && ((r = object_settle(l, objno, e, seq, true)) < 0 || !object_mark_stray(l, e)))
        return r < 0 ? r : -EBUSY;
    if (exists)
        r = file_punch(fd, pos, layout_object_size(l));
    if (r == 0 && src->fd >= 0)
        r = file_copy(src->fd, pos, fd, pos, src->entry.size, &copied);
    head_dirty(l, seg);
    if (r == 0 && !exists)
        r = layout_sync_data(l);
    if (r < 0) {
        if (!exists)
            atomic_store(&l->untidy, true);
        return r;
    }
    entry_set_seq(l, e, seq);
    entry_set_word(l, e, word_make(src->entry.size, ENTRY_EXISTS, index_map_byte(l, objno, true, word_map(word))));
    return 0;
}

static int rollback(struct layout *l, uint64_t objno, uint64_t snap_id, const struct snapc *snapc)
{
    struct clone_source src;
    struct entry *e;
    int r = index_make(l, objno, &e);
    if (r < 0 || snap_id > atomic_load(&e->seq))
        return r; /* HEAD is what it was then */
    r = clones_preserve(l, objno, e, snapc);
    if (r == 0)
        r = clones_find(l, objno, snap_id, false, &src);
    if (r == -ENOENT)
        return word_state(atomic_load(&e->word)) == ENTRY_EXISTS ? object_remove(l, objno, e) : 0;
    if (r < 0)
        return r;
    r = copy_back(l, objno, e, &src, snapc->seq);
    clones_done(l, &src);
    return r;
}

int rbdn_layout_rollback(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t seq, const uint64_t *snaps,
                         uint32_t nsnaps)
{
    struct layout *l = layout_of(s);
    if (!l)
        return -EOPNOTSUPP;
    if (objno >= LAYOUT_MAX_OBJECTS)
        return -EFBIG;
    if (nsnaps && snaps[0] > seq)
        return -EINVAL;
    struct snapc *snapc = malloc(sizeof *snapc + nsnaps * sizeof snapc->ids[0]);
    if (!snapc)
        return -ENOMEM;
    snapc->seq = seq;
    snapc->count = nsnaps;
    for (uint32_t i = 0; i < nsnaps; i++)
        snapc->ids[i] = snaps[i];
    int r = layout_make_ready(l);
    if (r == 0) {
        object_lock(l, objno);
        r = rollback(l, objno, snap_id, snapc);
        object_unlock(l, objno);
    }
    free(snapc);
    return r;
}

int64_t rbdn_layout_map_get(rbdn_store *s, uint8_t *states, uint64_t max)
{
    struct layout *l = layout_of(s);
    if (!l)
        return -EOPNOTSUPP;
    uint64_t count = atomic_load(&layout_header(l)->map_plus1);
    if (count == 0)
        return -ENOENT;
    count--;
    for (uint64_t o = 0; o < count && o < max; o++) {
        struct entry *e = index_find(l, o);
        states[o] = e ? word_map(atomic_load(&e->word)) : 0;
    }
    return (int64_t)count;
}

static void set_map_byte(struct layout *l, struct entry *e, uint8_t state)
{
    uint64_t word = atomic_load(&e->word);
    while (word_map(word) != state &&
           !atomic_compare_exchange_weak(&e->word, &word, word_make(word_size(word), word_state(word), state)))
        ;
    atomic_store_explicit(&l->index_dirty, true, memory_order_seq_cst);
}

/* Durable on return, like any write of an object's data through RADOS. */
int rbdn_layout_map_set(rbdn_store *s, const uint8_t *states, int64_t count)
{
    struct layout *l = layout_of(s);
    struct entry *e;
    if (!l)
        return -EOPNOTSUPP;
    if (count < -1)
        return -EINVAL;
    if (count > (int64_t)LAYOUT_MAX_OBJECTS)
        return -EFBIG;
    for (int64_t i = 0; i < count; i++)
        if (states[i] > 3)
            return -EINVAL;
    int r = layout_make_ready(l);
    uint64_t o = 0;
    for (; r == 0 && count > 0 && o < (uint64_t)count; o++) {
        e = index_find(l, o);
        if (states[o] && (!e || !index_allocated(l, o)))
            r = index_make(l, o, &e);
        if (r == 0 && e && word_map(atomic_load(&e->word)) != states[o])
            set_map_byte(l, e, states[o]);
    }
    for (; r == 0 && (e = index_find(l, o)); o++) {
        if (word_map(atomic_load(&e->word)))
            set_map_byte(l, e, 0);
        if (o % 256 == 255)
            o = index_skip_hole(l, o + 1) - 1;
    }
    if (r < 0)
        return r;
    atomic_store(&layout_header(l)->map_plus1, (uint64_t)(count + 1));
    return layout_fdatasync(l, l->index);
}
