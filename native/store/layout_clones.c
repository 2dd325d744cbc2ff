/* Clones: what objects held before they were overwritten after a snapshot. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "store/layout.h"

static void clone_close(struct layout *l, struct clone *c)
{
    if (c->data < 0)
        return;
    close(c->data);
    close(c->idx);
    c->data = c->idx = -1;
    l->clone_open--;
}

void clones_free(struct layout *l)
{
    for (uint32_t i = 0; i < l->clone_count; i++)
        clone_close(l, &l->clones[i]);
    free(l->clones);
    l->clones = NULL;
    l->clone_count = 0;
}

static int by_id(const void *a, const void *b)
{
    uint64_t x = ((const struct clone *)a)->id, y = ((const struct clone *)b)->id;
    return x < y ? -1 : x > y;
}

/* First position with id >= `id`. */
static uint32_t clones_bound(struct layout *l, uint64_t id)
{
    uint32_t lo = 0, hi = l->clone_count;
    while (lo < hi) {
        uint32_t mid = lo + (hi - lo) / 2;
        if (l->clones[mid].id < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* "clone.<decimal id>.idx", written as we write it. The index of a clone is made after its data file. */
static bool clone_name(const char *name, uint64_t *id)
{
    char again[64];
    if (sscanf(name, "clone.%" SCNu64 ".idx", id) != 1 || *id == 0)
        return false;
    snprintf(again, sizeof again, "clone.%" PRIu64 ".idx", *id);
    return strcmp(name, again) == 0;
}

/* clones_lock held exclusive. Files that are open stay open. */
static int clones_reload(struct layout *l)
{
    uint64_t gen = atomic_load(&layout_header(l)->clone_gen);
    uint32_t count = 0, room = 0;
    struct clone *list = NULL;
    int fd = openat(l->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        int err = -errno;
        if (fd >= 0)
            close(fd);
        return err;
    }
    struct dirent *e;
    uint64_t id;
    int r = 0;
    while (errno = 0, (e = readdir(d))) {
        if (!clone_name(e->d_name, &id))
            continue;
        if (count == room) {
            struct clone *more = realloc(list, (room + 16) * 2 * sizeof *list);
            if (!more) {
                r = -ENOMEM;
                break;
            }
            list = more;
            room = (room + 16) * 2;
        }
        list[count++] = (struct clone){.id = id, .data = -1, .idx = -1};
    }
    if (r == 0)
        r = -errno;
    closedir(d);
    if (r < 0) {
        free(list);
        return r;
    }
    if (count)
        qsort(list, count, sizeof *list, by_id);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t old = clones_bound(l, list[i].id);
        if (old < l->clone_count && l->clones[old].id == list[i].id) {
            list[i] = l->clones[old];
            l->clones[old].data = -1;
        }
    }
    clones_free(l);
    l->clones = list;
    l->clone_count = count;
    l->clone_gen = gen;
    return 0;
}

int clones_load(struct layout *l)
{
    int r = 0;
    pthread_rwlock_wrlock(&l->clones_lock);
    if (l->clone_gen != atomic_load(&layout_header(l)->clone_gen))
        r = clones_reload(l);
    pthread_rwlock_unlock(&l->clones_lock);
    return r;
}

/* clones_lock held exclusive, list current. */
static int clone_open(struct layout *l, uint64_t id, bool create)
{
    char name[48], idx_name[48];
    uint32_t i = clones_bound(l, id);
    bool known = i < l->clone_count && l->clones[i].id == id;
    if (!known && !create)
        return -ENOENT;
    if (known && l->clones[i].data >= 0)
        return 0;
    if (l->clone_open >= LAYOUT_CLONE_FDS)
        for (uint32_t j = 0; j < l->clone_count; j++)
            clone_close(l, &l->clones[j]);
    snprintf(name, sizeof name, "clone.%" PRIu64, id);
    snprintf(idx_name, sizeof idx_name, "clone.%" PRIu64 ".idx", id);
    int data = file_open(l->dir, name, create);
    if (data < 0)
        return data == -ENOENT ? -EIO : data;
    int idx = file_open(l->dir, idx_name, create);
    if (idx < 0) {
        close(data);
        return idx == -ENOENT ? -EIO : idx;
    }
    posix_fadvise(data, 0, 0, POSIX_FADV_RANDOM);
    if (!known) {
        struct clone *more = realloc(l->clones, (l->clone_count + 1) * sizeof *more);
        if (!more) {
            close(data);
            close(idx);
            return -ENOMEM;
        }
        l->clones = more;
        memmove(&more[i + 1], &more[i], (l->clone_count - i) * sizeof *more);
        l->clone_count++;
        l->clones[i].id = id;
        /* Others look again. So do we: another process may have added one in between. */
        atomic_fetch_add(&layout_header(l)->clone_gen, 1);
    }
    l->clones[i].data = data;
    l->clones[i].idx = idx;
    l->clone_open++;
    return 0;
}

int clones_lock_open(struct layout *l, uint64_t id, bool create, uint32_t *i)
{
    for (;;) {
        pthread_rwlock_rdlock(&l->clones_lock);
        *i = clones_bound(l, id);
        if (*i < l->clone_count && l->clones[*i].id == id && l->clones[*i].data >= 0)
            return 0;
        pthread_rwlock_unlock(&l->clones_lock);
        pthread_rwlock_wrlock(&l->clones_lock);
        int r = l->clone_gen == atomic_load(&layout_header(l)->clone_gen) ? 0 : clones_reload(l);
        if (r == 0)
            r = clone_open(l, id, create);
        pthread_rwlock_unlock(&l->clones_lock);
        if (r < 0)
            return r;
    }
}

uint32_t clones_ids(struct layout *l, uint64_t after, uint64_t *ids, uint32_t max)
{
    uint32_t n = 0;
    pthread_rwlock_rdlock(&l->clones_lock);
    for (uint32_t i = clones_bound(l, after + 1); i < l->clone_count && n < max; i++)
        ids[n++] = l->clones[i].id;
    pthread_rwlock_unlock(&l->clones_lock);
    return n;
}

bool clone_entry_valid(const struct layout *l, uint64_t id, const struct clone_entry *e)
{
    return e->present == 1 && e->lo < id && e->size <= layout_object_size(l);
}

int clone_entry_read(int idx, uint64_t objno, bool nowait, struct clone_entry *e)
{
    struct iovec v = {e, sizeof *e};
    int r = file_read(idx, &v, 1, sizeof *e, objno * sizeof *e, nowait);
    return r < 0 ? r : e->present != 0;
}

int64_t clone_entry_next(int idx, uint64_t from, struct clone_entry *e)
{
    struct clone_entry block[256];
    uint64_t pos = from * sizeof *e, data, hole;
    while (file_data(idx, pos, INT64_MAX, &data, &hole)) {
        if (data > pos)
            pos = data - data % sizeof *e;
        ssize_t n = pread(idx, block, sizeof block, (off_t)pos);
        if (n < 0)
            return -errno;
        if (n < (ssize_t)sizeof *e)
            return -ENOENT;
        for (ssize_t i = 0; i < n / (ssize_t)sizeof *e; i++)
            if (block[i].present) {
                *e = block[i];
                return (int64_t)(pos / sizeof *e + (uint64_t)i);
            }
        pos += (uint64_t)n / sizeof *e * sizeof *e;
    }
    return -ENOENT;
}

int clone_data_fd(struct layout *l, const struct clone *c, uint32_t seg, bool create, bool *close_it)
{
    char name[64];
    *close_it = seg != 0;
    if (seg == 0)
        return c->data;
    snprintf(name, sizeof name, "clone.%" PRIu64 ".%u", c->id, seg);
    return file_open(l->dir, name, create);
}

int clones_find(struct layout *l, uint64_t objno, uint64_t snap, bool nowait, struct clone_source *src)
{
    uint64_t from = snap;
    for (;;) {
        int r = 0;
        bool reload;
        uint64_t missing = 0; /* a clone whose files must be opened first */
        if (!nowait)
            pthread_rwlock_rdlock(&l->clones_lock);
        else if (pthread_rwlock_tryrdlock(&l->clones_lock) != 0)
            return -EAGAIN;
        reload = l->clone_gen != atomic_load(&layout_header(l)->clone_gen);
        for (uint32_t i = clones_bound(l, from); !reload && r == 0 && i < l->clone_count; i++) {
            struct clone *c = &l->clones[i];
            if (c->data < 0) {
                missing = c->id;
                break;
            }
            r = clone_entry_read(c->idx, objno, nowait, &src->entry);
            if (r <= 0)
                continue;
            if (!clone_entry_valid(l, c->id, &src->entry))
                r = -EIO;
            else if (snap <= src->entry.lo)
                r = -ENOENT; /* made after the snapshot */
            else if (layout_seg(l, objno) != 0 && nowait)
                r = -EAGAIN;
            else if ((src->fd = clone_data_fd(l, c, layout_seg(l, objno), false, &src->close_it)) >= 0 ||
                     src->fd == -ENOENT)
                return 0; /* lock held */
            else
                r = src->fd;
        }
        pthread_rwlock_unlock(&l->clones_lock);
        if (!reload && !missing)
            return r < 0 ? r : -ENOENT;
        if (nowait)
            return -EAGAIN;
        if (reload) {
            from = snap;
            if ((r = clones_load(l)) < 0)
                return r;
            continue;
        }
        uint32_t i;
        from = missing; /* those before it have nothing; they are not looked at again, however many there are */
        r = clones_lock_open(l, missing, false, &i);
        if (r == 0)
            pthread_rwlock_unlock(&l->clones_lock);
        else if (r != -ENOENT) /* trimmed meanwhile */
            return r;
    }
}

void clones_done(struct layout *l, struct clone_source *src)
{
    if (src->fd >= 0 && src->close_it)
        close(src->fd);
    pthread_rwlock_unlock(&l->clones_lock);
}
