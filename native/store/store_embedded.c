/* The embedded store's operations on objects.
 *
 * The hot path: an in-place read is one entry load and one copy, or preadv2; an in-place write one try-lock, two loads,
 * one copy, or pwritev, two flag loads. What changes existence, or needs a snapshot's copy first, is exclusive and never inline.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "store/layout.h"

/* In-place writing found that it may not: do it again exclusively. */
#define NEED_EXCLUSIVE 1

/* Sizes, map byte and seq of an object that is about to be written in place, or plainly created. -> 0, -errno or
 * NEED_EXCLUSIVE. Entry before data: an object that exists and reads as zeros is a legal state for whom may create
 * without a copy-up. */
static int begin_write(struct layout *l, const struct store_op *op, struct entry **found)
{
    struct entry *e = index_find(l, op->objno);
    uint64_t end = op->off + op->len;
    uint64_t word = e ? atomic_load_explicit(&e->word, memory_order_acquire) : 0;
    for (;;) {
        uint64_t seq = e ? atomic_load_explicit(&e->seq, memory_order_relaxed) : 0;
        uint32_t size = word_size(word);
        if (word_state(word) == ENTRY_EXISTS) {
            if (op->snapc && op->snapc->seq > seq) {
                if (op->snapc->count && op->snapc->ids[0] > seq)
                    return NEED_EXCLUSIVE; /* a snapshot needs the old content */
                entry_set_seq(l, e, op->snapc->seq);
            }
        } else {
            if (op->flags & STORE_GUARD)
                return -ENOENT;
            bool raises = op->snapc && op->snapc->seq > seq;
            if (word_state(word) != ENTRY_ABSENT && (word_state(word) != ENTRY_REMOVED || raises))
                return NEED_EXCLUSIVE;
            if (!e || !index_allocated(l, op->objno))
                return NEED_EXCLUSIVE;
            if (raises)
                entry_set_seq(l, e, op->snapc->seq);
        }
        uint64_t next = word_make(end > size ? (uint32_t)end : size, ENTRY_EXISTS,
                                  index_map_byte(l, op->objno, true, word_map(word)));
        if (next == word || atomic_compare_exchange_strong(&e->word, &word, next)) {
            if (next != word)
                atomic_store(&l->index_dirty, true);
            *found = e;
            return 0;
        }
    }
}

static int write_data(struct layout *l, const struct store_op *op)
{
    uint32_t seg = layout_seg(l, op->objno);
    if (op->len == 0)
        return 0;
    int fd = head_open(l, seg, true);
    if (fd < 0)
        return fd;
    uint64_t pos = layout_pos(l, op->objno) + op->off;
    int r = 0;
    bool direct = __builtin_expect(atomic_load_explicit(&l->past_cache, memory_order_relaxed), 0) &&
                  !(op->flags & STORE_NOWAIT) && direct_write(l, seg, op, pos);
    if (!direct && !window_write(l, seg, op, pos)) {
        r = file_write(fd, op->iov, op->iovcnt, op->len, pos);
        if (r == 0)
            window_wrote(l, seg, fd, pos, op->len);
    }
    head_dirty(l, seg); /* also after a failure: part may have been written */
    return r;
}

static int clear_stray(struct layout *l, uint64_t objno, struct entry *e)
{
    uint64_t word = atomic_load(&e->word);
    if (word_state(word) != ENTRY_STRAY)
        return 0;
    int r = head_punch(l, objno, 0, layout_object_size(l));
    if (r == 0)
        entry_set_word(l, e, word_make(0, ENTRY_REMOVED, word_map(word)));
    else
        atomic_store(&l->untidy, true);
    return r;
}

int object_settle(struct layout *l, uint64_t objno, struct entry *e, uint64_t seq, bool always)
{
    int r = clear_stray(l, objno, e);
    uint64_t word = atomic_load(&e->word);
    if (r < 0 || word_state(word) != ENTRY_REMOVED)
        return r;
    bool raises = seq > atomic_load(&e->seq);
    entry_set_seq(l, e, seq);
    if (raises || always)
        r = layout_fdatasync(l, l->index);
    if (r == 0)
        atomic_compare_exchange_strong(&e->word, &word, word_make(0, ENTRY_ABSENT, word_map(word)));
    return r;
}

bool object_mark_stray(struct layout *l, struct entry *e)
{
    uint64_t word = atomic_load(&e->word);
    bool absent = word_state(word) == ENTRY_ABSENT || word_state(word) == ENTRY_REMOVED;
    atomic_store(&l->index_dirty, true);
    return absent && atomic_compare_exchange_strong(&e->word, &word, word_make(0, ENTRY_STRAY, word_map(word)));
}

/* suspect: bytes may have been written into the range of an absent object. */
static int write_exclusive(struct layout *l, const struct store_op *op, bool suspect)
{
    struct entry *e;
    int r = index_make(l, op->objno, &e);
    if (r < 0)
        return r;
    if (suspect && object_mark_stray(l, e))
        r = clear_stray(l, op->objno, e);
    if (r == 0 && word_state(atomic_load(&e->word)) != ENTRY_EXISTS)
        r = op->flags & STORE_GUARD ? -ENOENT
                                    : object_settle(l, op->objno, e, op->snapc ? op->snapc->seq : 0, false);
    if (r == 0)
        r = clones_preserve(l, op->objno, e, op->snapc);
    if (r == 0)
        r = begin_write(l, op, &e);
    if (r == NEED_EXCLUSIVE)
        r = -EIO; /* a state that does not exist */
    return r < 0 ? r : write_data(l, op);
}

static int64_t do_write(struct layout *l, const struct store_op *op)
{
    pthread_rwlock_t *lock = &layout_stripe(l, op->objno)->lock;
    bool nowait = op->flags & STORE_NOWAIT, suspect = false;
    struct entry *e = NULL;
    if (!nowait)
        pthread_rwlock_rdlock(lock);
    else if (pthread_rwlock_tryrdlock(lock) != 0)
        return -EAGAIN;
    int r = begin_write(l, op, &e);
    if (r == 0) {
        r = write_data(l, op);
        /* Removed meanwhile by another process: our bytes must not stay behind in a range without an object. */
        suspect = word_state(atomic_load(&e->word)) != ENTRY_EXISTS;
        if (r == 0 && suspect)
            r = NEED_EXCLUSIVE;
    }
    pthread_rwlock_unlock(lock);
    if (r != NEED_EXCLUSIVE)
        return r;
    if (nowait)
        return -EAGAIN;
    object_lock(l, op->objno);
    r = write_exclusive(l, op, suspect);
    object_unlock(l, op->objno);
    return r;
}

static int64_t read_head(struct layout *l, const struct store_op *op, uint64_t word)
{
    uint32_t size = word_size(word), seg = layout_seg(l, op->objno);
    if (op->off >= size)
        return 0;
    uint64_t len = op->len < size - op->off ? op->len : size - op->off;
    uint64_t pos = layout_pos(l, op->objno) + op->off;
    if (len == 0 || window_read(l, seg, op, pos, len))
        return (int64_t)len;
    int fd = head_open(l, seg, false);
    if (__builtin_expect(fd < 0, 0)) {
        if (fd != -ENOENT)
            return fd;
        iov_zero(op->iov, op->iovcnt, 0, len); /* an object nothing was written to, alone in its segment */
        return (int64_t)len;
    }
    int r = file_read(fd, op->iov, op->iovcnt, len, pos, op->flags & STORE_NOWAIT);
    if (r < 0)
        return r;
    window_saw(l, seg, fd, pos, len);
    return (int64_t)len;
}

static int64_t extents_of(struct layout *l, struct store_op *op, int fd, uint32_t size)
{
    uint64_t base = layout_pos(l, op->objno), end = op->off + op->len < size ? op->off + op->len : size;
    uint64_t from, to, pos = op->off;
    uint32_t n = 0;
    if (op->max_extents == 0)
        return -EINVAL;
    while (fd >= 0 && pos < end && file_data(fd, base + pos, base + end, &from, &to)) {
        if (n == op->max_extents) {
            op->extents[n - 1].len = end - op->extents[n - 1].off;
            break;
        }
        op->extents[n++] = (struct store_extent){from - base, to - from};
        pos = to - base;
    }
    return n;
}

/* READ, STAT or EXTENTS of what HEAD holds now. */
static int64_t inspect_head(struct layout *l, struct store_op *op, uint64_t word)
{
    if (word_state(word) != ENTRY_EXISTS)
        return -ENOENT;
    if (op->type == STORE_READ)
        return read_head(l, op, word);
    if (op->type == STORE_STAT)
        return word_size(word);
    if (op->flags & STORE_NOWAIT)
        return -EAGAIN;
    int fd = head_open(l, layout_seg(l, op->objno), false);
    return fd < 0 && fd != -ENOENT ? fd : extents_of(l, op, fd, word_size(word));
}

static int64_t inspect_clone(struct layout *l, struct store_op *op)
{
    struct clone_source src;
    int64_t r = clones_find(l, op->objno, op->snap_id, op->flags & STORE_NOWAIT, &src);
    if (r < 0)
        return r;
    if (op->type == STORE_STAT) {
        r = src.entry.size;
    } else if (op->type == STORE_EXTENTS) {
        r = op->flags & STORE_NOWAIT ? -EAGAIN : extents_of(l, op, src.fd, src.entry.size);
    } else {
        uint64_t size = src.entry.size;
        uint64_t len = op->off >= size ? 0 : op->len < size - op->off ? op->len : size - op->off;
        if (src.fd < 0)
            iov_zero(op->iov, op->iovcnt, 0, len);
        else
            r = file_read(src.fd, op->iov, op->iovcnt, len, layout_pos(l, op->objno) + op->off,
                          op->flags & STORE_NOWAIT);
        if (r == 0)
            r = (int64_t)len;
    }
    clones_done(l, &src);
    return r;
}

static int64_t inspect(struct layout *l, struct store_op *op)
{
    struct entry *e = index_find(l, op->objno);
    if (op->snap_id == STORE_NOSNAP)
        return e ? inspect_head(l, op, atomic_load_explicit(&e->word, memory_order_acquire)) : -ENOENT;
    if (e && op->snap_id <= atomic_load_explicit(&e->seq, memory_order_acquire))
        return inspect_clone(l, op);
    int64_t r = e ? inspect_head(l, op, atomic_load_explicit(&e->word, memory_order_acquire)) : -ENOENT;
    /* HEAD may have been saved for the snapshot and overwritten while we read it. */
    atomic_thread_fence(memory_order_seq_cst);
    if (!e)
        e = index_find(l, op->objno);
    if (e && r != -EAGAIN && op->snap_id <= atomic_load(&e->seq))
        return inspect_clone(l, op);
    return r;
}

int object_create(struct layout *l, uint64_t objno, struct entry *e, uint64_t size, uint64_t seq)
{
    int r = object_settle(l, objno, e, seq, false);
    if (r < 0)
        return r;
    entry_set_seq(l, e, seq);
    entry_set_word(l, e, word_make((uint32_t)size, ENTRY_EXISTS,
                                   index_map_byte(l, objno, true, word_map(atomic_load(&e->word)))));
    return 0;
}

int object_remove(struct layout *l, uint64_t objno, struct entry *e)
{
    uint8_t map = index_map_byte(l, objno, false, word_map(atomic_load(&e->word)));
    entry_set_word(l, e, word_make(0, ENTRY_STRAY, map));
    return clear_stray(l, objno, e);
}

/* The data is durable before the entry says that it is there, or a cut could show zeros instead of the parent. */
static int copyup(struct layout *l, const struct store_op *op, struct entry *e)
{
    int r = object_settle(l, op->objno, e, 0, true);
    if (r < 0)
        return r;
    uint64_t word = atomic_load(&e->word);
    if (!object_mark_stray(l, e))
        return 0; /* created in between, by a process that does not share our locks */
    r = write_data(l, op);
    if (r == 0 && op->len)
        r = layout_sync_data(l);
    if (r < 0) {
        clear_stray(l, op->objno, e);
        return r;
    }
    uint8_t map = index_map_byte(l, op->objno, true, word_map(word));
    if (map == MAP_EXISTS && op->flags & STORE_CLEAN && op->snapc && op->snapc->count)
        map = MAP_CLEAN;
    entry_set_word(l, e, word_make((uint32_t)op->len, ENTRY_EXISTS, map));
    return 0;
}

static int truncate_object(struct layout *l, const struct store_op *op, struct entry *e)
{
    uint64_t word = atomic_load(&e->word);
    if (word_state(word) != ENTRY_EXISTS)
        return object_create(l, op->objno, e, op->off, op->snapc ? op->snapc->seq : 0);
    if (op->off < word_size(word)) {
        int r = head_punch(l, op->objno, op->off, word_size(word) - op->off);
        if (r < 0)
            return r;
    }
    entry_set_word(l, e, word_make((uint32_t)op->off, ENTRY_EXISTS,
                                   index_map_byte(l, op->objno, true, word_map(word))));
    return 0;
}

static int zero_object(struct layout *l, const struct store_op *op, struct entry *e)
{
    uint64_t word = atomic_load(&e->word), size = word_size(word);
    uint64_t end = op->off + op->len < size ? op->off + op->len : size;
    uint64_t marked = word_make((uint32_t)size, ENTRY_EXISTS, index_map_byte(l, op->objno, true, word_map(word)));
    if (marked != word)
        entry_set_word(l, e, marked);
    return op->off < end ? head_punch(l, op->objno, op->off, end - op->off) : 0;
}

/* ZERO, TRUNCATE, REMOVE, COPYUP. */
static int64_t do_exclusive(struct layout *l, const struct store_op *op)
{
    struct entry *e = index_find(l, op->objno);
    bool exists = e && word_state(atomic_load(&e->word)) == ENTRY_EXISTS;
    bool creates = op->type == STORE_COPYUP || (op->type == STORE_TRUNCATE && (op->flags & STORE_CREATE));
    if (!exists && !creates)
        return -ENOENT;
    if (exists && op->type == STORE_COPYUP)
        return 0;
    if (op->flags & STORE_NOWAIT)
        return -EAGAIN;
    object_lock(l, op->objno);
    int r = index_make(l, op->objno, &e);
    if (r == 0) {
        exists = word_state(atomic_load(&e->word)) == ENTRY_EXISTS;
        if (!exists && !creates)
            r = -ENOENT;
        else if (exists && op->type != STORE_COPYUP)
            r = clones_preserve(l, op->objno, e, op->snapc);
    }
    if (r == 0 && op->type == STORE_COPYUP && !exists)
        r = copyup(l, op, e);
    else if (r == 0 && op->type == STORE_TRUNCATE)
        r = truncate_object(l, op, e);
    else if (r == 0 && op->type == STORE_ZERO)
        r = zero_object(l, op, e);
    else if (r == 0 && op->type == STORE_REMOVE)
        r = object_remove(l, op->objno, e);
    object_unlock(l, op->objno);
    return r;
}

static int64_t embedded_submit(struct store *s, struct store_op *op)
{
    struct layout *l = (struct layout *)s;
    if (op->type == STORE_FLUSH)
        return op->flags & STORE_NOWAIT ? -EAGAIN : layout_flush(l);
    if (op->off > layout_object_size(l) || op->len > layout_object_size(l) - op->off)
        return -EINVAL;
    if (op->type == STORE_READ || op->type == STORE_STAT || op->type == STORE_EXTENTS)
        return inspect(l, op);
    if (op->objno >= LAYOUT_MAX_OBJECTS)
        return -EFBIG;
    if (op->snapc && op->snapc->count && op->snapc->ids[0] > op->snapc->seq)
        return -EINVAL;
    if (__builtin_expect(!atomic_load_explicit(&l->ready, memory_order_acquire), 0)) {
        if ((op->flags & STORE_NOWAIT) && !atomic_load(&l->failed))
            return -EAGAIN;
        int r = layout_make_ready(l);
        if (r < 0)
            return r;
    }
    switch (op->type) {
    case STORE_WRITE:
        return do_write(l, op);
    case STORE_COPYUP:
        if (op->off != 0)
            return -EINVAL;
        /* fall through */
    case STORE_ZERO:
    case STORE_TRUNCATE:
    case STORE_REMOVE:
        return do_exclusive(l, op);
    default:
        return -EOPNOTSUPP;
    }
}

const struct store_ops layout_store_ops = {
    .name = "embedded",
    .caps = STORE_KEEPS_OBJECT_MAP,
    .submit = embedded_submit,
    .close = layout_close,
};
