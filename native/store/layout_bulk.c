/* Much data at once, as imports and exports bring it: room on the disk taken ahead, and writes past the page cache.
 *
 * Who writes a gigabyte and waits until it is durable gains nothing from the page cache: each byte is copied once more,
 * into memory that nobody used before, and then written all the same. Writes to blocks that are allocated already go
 * side by side; those that allocate wait for each other. Unwritten blocks read as zeros and count as holes, so taking room
 * changes no object; what stays unused is given back.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

#define DIRECT_MIN (128u << 10) /* bytes: less is written faster through the page cache */

static bool suits(const struct store_op *op, uint64_t pos)
{
    uint64_t bits = pos | op->len;
    if (op->len < DIRECT_MIN)
        return false;
    for (uint32_t i = 0; i < op->iovcnt; i++)
        bits |= (uintptr_t)op->iov[i].iov_base | op->iov[i].iov_len;
    return bits % LAYOUT_PAGE == 0;
}

/* A descriptor of its own: O_DIRECT belongs to the open file, and others write it in other sizes. */
static int direct_open(struct layout *l, uint32_t seg)
{
    struct head *h = &l->heads[seg];
    int fd = atomic_load_explicit(&h->direct_plus1, memory_order_acquire) - 1;
    if (fd >= 0)
        return fd;
    pthread_mutex_lock(&l->lock);
    fd = atomic_load(&h->direct_plus1) - 1;
    if (fd < 0) {
        char name[32];
        snprintf(name, sizeof name, "/proc/self/fd/%d", atomic_load(&h->fd_plus1) - 1);
        fd = open(name, O_WRONLY | O_DIRECT | O_CLOEXEC);
        if (fd >= 0)
            atomic_store_explicit(&h->direct_plus1, fd + 1, memory_order_release);
    }
    pthread_mutex_unlock(&l->lock);
    return fd;
}

/* What it cannot do goes through the page cache, where the error, if it is one, gets its name. */
bool direct_write(struct layout *l, uint32_t seg, const struct store_op *op, uint64_t pos)
{
    if (!suits(op, pos))
        return false;
    int fd = direct_open(l, seg);
    ssize_t n = fd < 0 ? -1 : pwritev(fd, op->iov, (int)op->iovcnt, (off_t)pos);
    if (n == (ssize_t)op->len)
        return true;
    if (fd < 0 || (n < 0 && errno == EINVAL))
        atomic_store(&l->past_cache, false); /* not on this file system */
    return false;
}

int rbdn_layout_past_cache(rbdn_store *s, int on)
{
    struct layout *l = layout_of(s);
    if (!l)
        return -EOPNOTSUPP;
    atomic_store(&l->past_cache, on != 0);
    return 0;
}

int rbdn_file_reserve(int fd, uint64_t pos, uint64_t len)
{
    return len && fallocate(fd, 0, (off_t)pos, (off_t)len) < 0 ? -errno : 0;
}

int rbdn_file_give_back(int fd, uint64_t pos, uint64_t len)
{
    uint64_t end = pos + len, from, to;
    int r = 0;
    while (r == 0 && pos < end) {
        if (!file_data(fd, pos, end, &from, &to))
            from = to = end;
        r = file_punch(fd, pos, from - pos);
        pos = to;
    }
    return r;
}

/* The part of the range that lies in one segment. */
static uint64_t in_segment(struct layout *l, uint64_t objno, uint64_t count)
{
    uint64_t left = (LAYOUT_SEG_SIZE - layout_pos(l, objno)) >> l->order;
    return count < left ? count : left;
}

int rbdn_layout_reserve(rbdn_store *s, uint64_t objno, uint64_t count)
{
    struct layout *l = layout_of(s);
    int r = l ? 0 : -EOPNOTSUPP;
    if (l && (objno > LAYOUT_MAX_OBJECTS || count > LAYOUT_MAX_OBJECTS - objno))
        return -EFBIG;
    for (uint64_t n; r == 0 && count; objno += n, count -= n) {
        n = in_segment(l, objno, count);
        int fd = head_open(l, layout_seg(l, objno), true);
        r = fd < 0 ? fd : rbdn_file_reserve(fd, layout_pos(l, objno), n << l->order);
    }
    return r;
}

/* Object by object, and none is written meanwhile: what was a hole when it was looked for must still be one. */
int rbdn_layout_give_back(rbdn_store *s, uint64_t objno, uint64_t count)
{
    struct layout *l = layout_of(s);
    int r = l ? 0 : -EOPNOTSUPP;
    if (l && (objno > LAYOUT_MAX_OBJECTS || count > LAYOUT_MAX_OBJECTS - objno))
        return -EFBIG;
    for (; r == 0 && count; objno++, count--) {
        int fd = head_open(l, layout_seg(l, objno), false);
        if (fd < 0)
            return fd == -ENOENT ? 0 : fd;
        object_lock(l, objno);
        r = rbdn_file_give_back(fd, layout_pos(l, objno), layout_object_size(l));
        object_unlock(l, objno);
    }
    return r;
}
