/* Verification: every rule of layout.h that can be seen from outside, one line for each breach. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

struct report {
    struct layout *l;
    char *text;
    size_t size, used; /* bytes of text, always NUL-terminated */
    int findings;      /* also those that did not fit */
};

__attribute__((format(printf, 2, 3))) static void finding(struct report *r, const char *format, ...)
{
    va_list args;
    char line[256];
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 1, format, args);
    va_end(args);
    if (n < 0 || n >= (int)sizeof line - 1)
        n = (int)strlen(line);
    line[n++] = '\n';
    r->findings++;
    if (r->used + (size_t)n < r->size) {
        memcpy(r->text + r->used, line, (size_t)n);
        r->used += (size_t)n;
        r->text[r->used] = 0;
    }
}

static void check_entry(struct report *r, uint64_t o, const struct entry *e, uint64_t map_count)
{
    struct layout *l = r->l;
    uint64_t word = atomic_load(&e->word);
    uint32_t size = word_size(word);
    uint8_t state = word_state(word), map = word_map(word);
    bool exists = state == ENTRY_EXISTS;
    if (state > ENTRY_REMOVED)
        finding(r, "object %" PRIu64 ": state %u is not one of 0 to 3", o, state);
    if (state == ENTRY_STRAY)
        finding(r, "object %" PRIu64 ": being created or removed; cleared when the layout is next opened alone", o);
    if (size > layout_object_size(l))
        finding(r, "object %" PRIu64 ": size %u is more than the object size %" PRIu64, o, size,
                layout_object_size(l));
    if (!exists && size)
        finding(r, "object %" PRIu64 ": does not exist but has size %u", o, size);
    if (word >> 48)
        finding(r, "object %" PRIu64 ": reserved bits 0x%x are set", o, (unsigned)(word >> 48));
    if (map > 3)
        finding(r, "object %" PRIu64 ": object map state %u is not one of 0 to 3", o, map);
    else if (o < map_count && exists && map == 0)
        finding(r, "object %" PRIu64 ": exists but the object map says it does not", o);
    else if (o < map_count && !exists && (map == 1 || map == 3))
        finding(r, "object %" PRIu64 ": does not exist but the object map says it does", o);
}

static void check_index(struct report *r)
{
    struct layout *l = r->l;
    uint64_t map = atomic_load(&layout_header(l)->map_plus1), map_count = map ? map - 1 : 0;
    if (map > LAYOUT_MAX_OBJECTS + 1)
        finding(r, "index: object map of %" PRIu64 " objects is impossible", map_count);
    struct entry *e;
    for (uint64_t o = 0; (e = index_find(l, o)); o = (o + 1) % 256 ? o + 1 : index_skip_hole(l, o + 1))
        check_entry(r, o, e, map_count);
}

/* Data where no object may have any. Partial blocks cannot be seen as holes, so their bytes are read. */
static void check_data(struct report *r, uint32_t seg, int fd)
{
    struct layout *l = r->l;
    uint64_t size = layout_object_size(l), pos = 0, from, to;
    while (file_data(fd, pos, LAYOUT_SEG_SIZE, &from, &to)) {
        for (uint64_t start = from - from % size; start < to; start += size) {
            uint64_t o = (((uint64_t)seg << LAYOUT_SEG_SHIFT) + start) >> l->order;
            struct entry *e = index_find(l, o);
            uint64_t word = e ? atomic_load(&e->word) : 0;
            uint64_t valid = word_state(word) == ENTRY_EXISTS ? word_size(word) : 0;
            uint64_t a = start + valid > from ? start + valid : from, b = start + size < to ? start + size : to;
            char buf[4096];
            bool clean = true;
            for (; clean && a < b; a += sizeof buf) {
                ssize_t n = pread(fd, buf, b - a < sizeof buf ? b - a : sizeof buf, (off_t)a);
                for (ssize_t i = 0; i < n && clean; i++)
                    clean = buf[i] == 0;
            }
            if (!clean)
                finding(r, "object %" PRIu64 ": data %s", o,
                        valid ? "behind the object's end" : "in the range of an object that does not exist");
        }
        pos = to;
    }
}

static void check_clone(struct report *r, uint64_t id)
{
    struct layout *l = r->l;
    struct clone_entry c;
    uint32_t i;
    int err = clones_lock_open(l, id, false, &i);
    if (err < 0) {
        finding(r, "clone %" PRIu64 ": cannot be opened: %s", id, strerror(-err));
        return;
    }
    int idx = l->clones[i].idx;
    int64_t o;
    for (o = clone_entry_next(idx, 0, &c); o >= 0; o = clone_entry_next(idx, (uint64_t)o + 1, &c)) {
        struct entry *e = index_find(l, (uint64_t)o);
        uint64_t seq = e ? atomic_load(&e->seq) : 0;
        if (c.present != 1)
            finding(r, "clone %" PRIu64 ", object %" PRId64 ": presence %u is not 0 or 1", id, o, c.present);
        if (c.lo >= id)
            finding(r, "clone %" PRIu64 ", object %" PRId64 ": serves no snapshot (above %" PRIu64 ")", id, o, c.lo);
        if (c.size > layout_object_size(l))
            finding(r, "clone %" PRIu64 ", object %" PRId64 ": size %u is more than the object size", id, o, c.size);
        if (seq < id)
            finding(r, "clone %" PRIu64 ", object %" PRId64 ": newer than the object's own sequence %" PRIu64, id, o,
                    seq);
    }
    pthread_rwlock_unlock(&l->clones_lock);
    if (o != -ENOENT)
        finding(r, "clone %" PRIu64 ": its index cannot be read: %s", id, strerror((int)-o));
}

static bool known_name(const char *name)
{
    uint64_t id;
    char again[64];
    unsigned seg;
    if (!strcmp(name, ".") || !strcmp(name, "..") || !strcmp(name, "index") || !strcmp(name, "index.new"))
        return true;
    if (sscanf(name, "head.%u", &seg) == 1)
        snprintf(again, sizeof again, "head.%u", seg);
    else if (sscanf(name, "clone.%" SCNu64 ".%u", &id, &seg) == 2)
        snprintf(again, sizeof again, "clone.%" PRIu64 ".%u", id, seg);
    else if (sscanf(name, "clone.%" SCNu64, &id) == 1)
        snprintf(again, sizeof again, "clone.%" PRIu64 "%s", id, strstr(name, ".idx") ? ".idx" : "");
    else
        return false;
    return !strcmp(name, again);
}

static void check_folder(struct report *r)
{
    int fd = openat(r->l->dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *e;
    struct stat st;
    if (!d) {
        finding(r, "folder: cannot be read: %s", strerror(errno));
        if (fd >= 0)
            close(fd);
        return;
    }
    while ((e = readdir(d))) {
        uint64_t id;
        char idx[48];
        if (!known_name(e->d_name))
            finding(r, "folder: unknown file \"%.80s\"", e->d_name);
        else if (e->d_name[0] != '.' &&
                 (fstatat(r->l->dir, e->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(st.st_mode)))
            finding(r, "folder: \"%.80s\" is not a regular file", e->d_name);
        else if (sscanf(e->d_name, "clone.%" SCNu64, &id) == 1) {
            snprintf(idx, sizeof idx, "clone.%" PRIu64 ".idx", id);
            if (fstatat(r->l->dir, idx, &st, AT_SYMLINK_NOFOLLOW) < 0)
                finding(r, "clone %" PRIu64 ": data without an index", id);
        }
    }
    closedir(d);
}

int rbdn_layout_check(rbdn_store *s, char *text, size_t size)
{
    struct layout *l = layout_of(s);
    uint64_t ids[64], after = 0;
    uint32_t n;
    if (!l || !size)
        return l ? -EINVAL : -EOPNOTSUPP;
    struct report r = {.l = l, .text = text, .size = size};
    text[0] = 0;
    check_folder(&r);
    check_index(&r);
    for (uint32_t seg = 0; seg < l->head_count; seg++) {
        int fd = head_open(l, seg, false);
        if (fd >= 0)
            check_data(&r, seg, fd);
        else if (fd != -ENOENT)
            finding(&r, "head.%u: cannot be opened: %s", seg, strerror(-fd));
    }
    int err = clones_load(l);
    if (err < 0)
        finding(&r, "clones: cannot be listed: %s", strerror(-err));
    while ((n = clones_ids(l, after, ids, 64)) > 0) {
        for (uint32_t k = 0; k < n; k++)
            check_clone(&r, ids[k]);
        after = ids[n - 1];
    }
    return r.findings;
}
