/* Copy-on-write for snapshots, and its end: trimming clones that no snapshot needs. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

int clone_entry_write(int idx, uint64_t objno, const struct clone_entry *e)
{
    struct iovec v = {(void *)e, sizeof *e};
    return file_write(idx, &v, 1, sizeof *e, objno * sizeof *e);
}

/* Kernel byte 0 keeps trimming (other processes) away from copying; threads share the one lock that the open file
 * description can have, hence the count. In this process clones_lock does the same. */
static int copying_begin(struct layout *l)
{
    int r = 0;
    pthread_mutex_lock(&l->copying_lock);
    if (l->copying == 0)
        r = layout_range_lock(l, F_RDLCK, 0, 1);
    if (r == 0)
        l->copying++;
    pthread_mutex_unlock(&l->copying_lock);
    return r;
}

static void copying_end(struct layout *l)
{
    pthread_mutex_lock(&l->copying_lock);
    if (--l->copying == 0)
        layout_range_lock(l, F_UNLCK, 0, 1);
    pthread_mutex_unlock(&l->copying_lock);
}

/* The newest clone that holds the object, if newer than `seq`: whoever made it died before he could raise the head
 * entry. 0 none. */
static int newest_holder(struct layout *l, uint64_t objno, uint64_t seq, uint64_t *newest)
{
    uint64_t ids[64], after = seq;
    uint32_t n;
    int r = clones_load(l);
    if (r < 0)
        return r;
    *newest = 0;
    while ((n = clones_ids(l, after, ids, 64)) > 0) {
        for (uint32_t k = 0; k < n; k++) {
            struct clone_entry e;
            uint32_t i;
            r = clones_lock_open(l, ids[k], false, &i);
            if (r == -ENOENT)
                continue;
            if (r < 0)
                return r;
            r = clone_entry_read(l->clones[i].idx, objno, false, &e);
            pthread_rwlock_unlock(&l->clones_lock);
            if (r < 0)
                return r;
            if (r > 0)
                *newest = ids[k];
        }
        after = ids[n - 1];
    }
    return 0;
}

/* The order is the promise: data durable, entry durable, and only then may the caller change HEAD. */
static int copy_object(struct layout *l, uint64_t objno, uint32_t size, uint64_t lo, const struct clone *c)
{
    struct clone_entry entry = {.lo = lo, .size = size, .present = 1};
    uint32_t seg = layout_seg(l, objno);
    uint64_t pos = layout_pos(l, objno), data, hole;
    bool close_it, copied = false;
    int head = head_open(l, seg, false);
    if (head < 0 && head != -ENOENT)
        return head;
    int fd = clone_data_fd(l, c, seg, true, &close_it);
    if (fd < 0)
        return fd;
    int r = 0;
    bool stray = file_data(fd, pos, pos + layout_object_size(l), &data, &hole); /* an attempt that was cut short */
    if (stray)
        r = file_punch(fd, pos, layout_object_size(l));
    if (r == 0 && head >= 0)
        r = file_copy(head, pos, fd, pos, size, &copied);
    if (r == 0 && (stray || copied))
        r = layout_fdatasync(l, fd);
    if (r == 0)
        r = clone_entry_write(c->idx, objno, &entry);
    if (r == 0)
        r = layout_fdatasync(l, c->idx);
    else if (copied)
        file_punch(fd, pos, layout_object_size(l)); /* a full disk gets its space back */
    if (close_it)
        close(fd);
    return r;
}

int clones_preserve(struct layout *l, uint64_t objno, struct entry *e, const struct snapc *snapc)
{
    if (!snapc)
        return 0;
    uint64_t seq = atomic_load(&e->seq), word = atomic_load(&e->word), newest;
    if (word_state(word) == ENTRY_EXISTS && snapc->count && snapc->ids[0] > seq) {
        int r = newest_holder(l, objno, seq, &newest);
        if (r < 0)
            return r;
        if (newest < snapc->ids[0]) {
            uint32_t i;
            for (;;) {
                if ((r = clones_load(l)) < 0 || (r = clones_lock_open(l, snapc->seq, true, &i)) < 0)
                    return r;
                r = copying_begin(l);
                if (r < 0 || l->clone_gen == atomic_load(&layout_header(l)->clone_gen))
                    break;
                /* The file may have been unlinked since the list was read. */
                copying_end(l);
                pthread_rwlock_unlock(&l->clones_lock);
            }
            if (r == 0) {
                r = copy_object(l, objno, word_size(word), newest > seq ? newest : seq, &l->clones[i]);
                copying_end(l);
            }
            pthread_rwlock_unlock(&l->clones_lock);
            if (r < 0)
                return r;
        }
    }
    if (snapc->seq > seq)
        entry_set_seq(l, e, snapc->seq);
    return 0;
}

/* A live snapshot in (lo, id]. */
static bool needed(const uint64_t *live, uint32_t n, uint64_t lo, uint64_t id)
{
    uint32_t a = 0, b = n;
    while (a < b) {
        uint32_t mid = a + (b - a) / 2;
        if (live[mid] <= lo)
            a = mid + 1;
        else
            b = mid;
    }
    return a < n && live[a] <= id;
}

static int unlink_clone(struct layout *l, uint64_t id)
{
    char name[64];
    snprintf(name, sizeof name, "clone.%" PRIu64 ".idx", id);
    if (unlinkat(l->dir, name, 0) < 0)
        return -errno;
    atomic_fetch_add(&layout_header(l)->clone_gen, 1);
    if (fsync(l->dir) < 0) /* an index without its data would be damage, the reverse is only garbage */
        return -errno;
    for (uint32_t seg = 0; seg < l->head_count; seg++) {
        if (seg == 0)
            snprintf(name, sizeof name, "clone.%" PRIu64, id);
        else
            snprintf(name, sizeof name, "clone.%" PRIu64 ".%u", id, seg);
        if (unlinkat(l->dir, name, 0) < 0 && errno != ENOENT)
            return -errno;
    }
    return 0;
}

/* clones_lock exclusive, byte 0 exclusive. */
static int trim_clone(struct layout *l, struct clone *c, const uint64_t *live, uint32_t nlive)
{
    struct clone_entry e, none = {0};
    int64_t o;
    bool keep = false;
    for (o = clone_entry_next(c->idx, 0, &e); o >= 0 && !keep; o = clone_entry_next(c->idx, (uint64_t)o + 1, &e))
        keep = needed(live, nlive, e.lo, c->id);
    if (o < 0 && o != -ENOENT)
        return (int)o;
    if (!keep)
        return unlink_clone(l, c->id);
    for (o = clone_entry_next(c->idx, 0, &e); o >= 0; o = clone_entry_next(c->idx, (uint64_t)o + 1, &e)) {
        bool close_it;
        if (needed(live, nlive, e.lo, c->id))
            continue;
        int r = clone_entry_write(c->idx, (uint64_t)o, &none);
        int fd = r < 0 ? r : clone_data_fd(l, c, layout_seg(l, (uint64_t)o), false, &close_it);
        if (fd >= 0) {
            r = file_punch(fd, layout_pos(l, (uint64_t)o), layout_object_size(l));
            if (close_it)
                close(fd);
        } else if (fd != -ENOENT) {
            r = fd;
        }
        if (r < 0)
            return r;
    }
    return o == -ENOENT ? 0 : (int)o;
}

int rbdn_layout_trim(rbdn_store *s, const uint64_t *live, uint32_t nlive)
{
    struct layout *l = layout_of(s);
    uint64_t ids[64], after = 0;
    uint32_t n, i;
    if (!l)
        return -EOPNOTSUPP;
    for (i = 1; i < nlive; i++)
        if (live[i] <= live[i - 1])
            return -EINVAL;
    if (nlive == 0)
        return 0;
    int r = layout_make_ready(l); /* a half-removed clone is for recovery to find */
    if (r == 0)
        r = clones_load(l);
    while (r == 0 && (n = clones_ids(l, after, ids, 64)) > 0) {
        for (uint32_t k = 0; k < n && r == 0; k++) {
            after = ids[k];
            if (ids[k] >= live[nlive - 1]) /* perhaps needed by a snapshot the caller does not know yet */
                continue;
            r = clones_lock_open(l, ids[k], false, &i);
            if (r == -ENOENT) {
                r = 0;
                continue;
            }
            if (r < 0)
                break;
            pthread_rwlock_unlock(&l->clones_lock);
            pthread_rwlock_wrlock(&l->clones_lock);
            for (i = 0; i < l->clone_count && l->clones[i].id != ids[k]; i++)
                ;
            if (i < l->clone_count && l->clones[i].data >= 0 && (r = layout_range_lock(l, F_WRLCK, 0, 1)) == 0) {
                r = trim_clone(l, &l->clones[i], live, nlive);
                layout_range_lock(l, F_UNLCK, 0, 1);
                if (r == -ENOENT)
                    r = 0; /* another process was faster */
            }
            pthread_rwlock_unlock(&l->clones_lock);
        }
    }
    return r;
}
