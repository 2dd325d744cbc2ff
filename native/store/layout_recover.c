/* Repair after a crash: nobody uses the layout, and who used it last did not close it.
 *
 * What a cut may leave: a clone that is durable while the head entry still has the older seq (the overwrite may be
 * durable too); data in the range of an object that does not exist or ends before it. Everything else is excluded by
 * the order of writing. Nothing here needs a sync: it can be done again until the layout is closed cleanly. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "store/layout.h"

static int raise_entries(struct layout *l, uint64_t id, int idx)
{
    struct clone_entry c;
    struct entry *e;
    int64_t o;
    for (o = clone_entry_next(idx, 0, &c); o >= 0; o = clone_entry_next(idx, (uint64_t)o + 1, &c)) {
        if (!clone_entry_valid(l, id, &c))
            continue; /* damage is for the check to report */
        int r = index_make(l, (uint64_t)o, &e);
        if (r < 0)
            return r;
        entry_set_seq(l, e, id);
    }
    return o == -ENOENT ? 0 : (int)o;
}

static int raise_all(struct layout *l)
{
    uint64_t ids[64], after = 0;
    uint32_t n, i;
    while ((n = clones_ids(l, after, ids, 64)) > 0)
        for (uint32_t k = 0; k < n; k++) {
            after = ids[k];
            int r = clones_lock_open(l, ids[k], false, &i);
            if (r < 0)
                return r;
            r = raise_entries(l, ids[k], l->clones[i].idx);
            pthread_rwlock_unlock(&l->clones_lock);
            if (r < 0)
                return r;
        }
    return 0;
}

/* [from, to) of segment `seg` holds data: punch what no object may have there. */
static int clip(struct layout *l, int fd, uint32_t seg, uint64_t from, uint64_t to)
{
    uint64_t size = layout_object_size(l), punch_from = 0, punch_to = 0;
    for (uint64_t pos = from - from % size; pos < to; pos += size) {
        struct entry *e = index_find(l, (((uint64_t)seg << LAYOUT_SEG_SHIFT) + pos) >> l->order);
        uint64_t word = e ? atomic_load(&e->word) : 0;
        uint64_t valid = word_state(word) == ENTRY_EXISTS ? word_size(word) : 0;
        if (valid >= size)
            continue;
        if (pos + valid == punch_to) {
            punch_to = pos + size; /* neighbours go in one call */
            continue;
        }
        int r = file_punch(fd, punch_from, punch_to - punch_from);
        if (r < 0)
            return r;
        punch_from = pos + valid;
        punch_to = pos + size;
    }
    return file_punch(fd, punch_from, punch_to - punch_from);
}

static int clip_all(struct layout *l)
{
    for (uint32_t seg = 0; seg < l->head_count; seg++) {
        uint64_t pos = 0, from, to;
        int fd = head_open(l, seg, false);
        if (fd == -ENOENT)
            continue;
        if (fd < 0)
            return fd;
        while (file_data(fd, pos, LAYOUT_SEG_SIZE, &from, &to)) {
            int r = clip(l, fd, seg, from, to);
            if (r < 0)
                return r;
            pos = to;
        }
        atomic_store(&l->heads[seg].dirty, true);
    }
    return 0;
}

/* Data files whose index is gone: trimmed, but for the last step. */
static int drop_orphans(struct layout *l)
{
    int fd = openat(l->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;
    if (!d) {
        int err = -errno;
        if (fd >= 0)
            close(fd);
        return err;
    }
    while ((e = readdir(d))) {
        uint64_t id;
        char idx[48];
        size_t len = strlen(e->d_name);
        if (sscanf(e->d_name, "clone.%" SCNu64, &id) != 1 || (len > 4 && strcmp(e->d_name + len - 4, ".idx") == 0))
            continue;
        snprintf(idx, sizeof idx, "clone.%" PRIu64 ".idx", id);
        if (faccessat(l->dir, idx, F_OK, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT)
            unlinkat(l->dir, e->d_name, 0);
    }
    closedir(d);
    return 0;
}

int layout_recover(struct layout *l)
{
    int r = drop_orphans(l);
    if (r == 0)
        r = clones_load(l);
    if (r == 0)
        r = raise_all(l);
    if (r == 0)
        r = clip_all(l);
    if (r < 0)
        return r;
    struct entry *e;
    for (uint64_t o = 0; (e = index_find(l, o)); o = (o + 1) % 256 ? o + 1 : index_skip_hole(l, o + 1)) {
        uint64_t word = atomic_load_explicit(&e->word, memory_order_relaxed);
        if (word_state(word) == ENTRY_STRAY || word_state(word) == ENTRY_REMOVED)
            entry_set_word(l, e, word_make(0, ENTRY_ABSENT, word_map(word)));
    }
    return 0;
}
