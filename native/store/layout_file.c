/* Files of a layout and byte ranges in them. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/layout.h"

#define VEC 64 /* iovec entries of one call when a request must be cut */

int file_open(int dir, const char *name, bool create)
{
    /* O_NONBLOCK: somebody else's FIFO of that name must not hold us up before it is refused. */
    int flags = O_RDWR | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    int fd = openat(dir, name, flags, 0);
    if (fd < 0 && errno == ENOENT && create) {
        fd = openat(dir, name, flags | O_CREAT, 0600);
        if (fd >= 0 && fsync(dir) < 0) {
            int err = -errno;
            close(fd);
            return err;
        }
    }
    if (fd < 0)
        return -errno;
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode)) {
        close(fd);
        return -EIO;
    }
    return fd;
}

/* Walks an iovec that must not be changed. */
struct cursor {
    const struct iovec *iov;
    uint32_t left; /* entries */
    size_t skip;   /* bytes of the first that are done */
};

static void cursor_advance(struct cursor *c, uint64_t bytes)
{
    while (c->left && bytes >= c->iov->iov_len - c->skip) {
        bytes -= c->iov->iov_len - c->skip;
        c->iov++;
        c->left--;
        c->skip = 0;
    }
    c->skip += bytes;
}

/* The next at most `bytes` bytes in at most VEC entries -> entries. */
static int cursor_peek(const struct cursor *c, uint64_t bytes, struct iovec *out)
{
    size_t skip = c->skip;
    int n = 0;
    for (uint32_t i = 0; i < c->left && n < VEC && bytes; i++) {
        size_t len = c->iov[i].iov_len - skip;
        out[n].iov_base = (char *)c->iov[i].iov_base + skip;
        out[n].iov_len = len < bytes ? len : bytes;
        bytes -= out[n].iov_len;
        n += out[n].iov_len > 0;
        skip = 0;
    }
    return n;
}

int file_write(int fd, const struct iovec *iov, uint32_t iovcnt, uint64_t len, uint64_t pos)
{
    uint64_t done = 0;
    if (len <= LAYOUT_SLICE && iovcnt <= IOV_MAX) {
        ssize_t n = pwritev(fd, iov, (int)iovcnt, (off_t)pos);
        if (n == (ssize_t)len)
            return 0;
        if (n < 0 && errno != EINTR)
            return -errno;
        done = n < 0 ? 0 : (uint64_t)n;
    }
    struct cursor c = {iov, iovcnt, 0};
    cursor_advance(&c, done);
    while (done < len) {
        struct iovec part[VEC];
        uint64_t slice = LAYOUT_SLICE - (pos + done) % LAYOUT_SLICE;
        int cnt = cursor_peek(&c, slice < len - done ? slice : len - done, part);
        if (cnt == 0)
            return -EINVAL; /* the vector is shorter than len */
        ssize_t n = pwritev(fd, part, cnt, (off_t)(pos + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        cursor_advance(&c, (uint64_t)n);
        done += (uint64_t)n;
    }
    return 0;
}

void iov_zero(const struct iovec *iov, uint32_t iovcnt, uint64_t from, uint64_t to)
{
    struct cursor c = {iov, iovcnt, 0};
    cursor_advance(&c, from);
    while (from < to && c.left) {
        uint64_t n = c.iov->iov_len - c.skip;
        n = n < to - from ? n : to - from;
        memset((char *)c.iov->iov_base + c.skip, 0, n);
        cursor_advance(&c, n);
        from += n;
    }
}

int file_read(int fd, const struct iovec *iov, uint32_t iovcnt, uint64_t len, uint64_t pos, bool nowait)
{
    struct cursor c = {iov, iovcnt, 0};
    uint64_t done = 0;
    while (done < len) {
        struct iovec part[VEC];
        int cnt = cursor_peek(&c, len - done, part);
        if (cnt == 0)
            return -EINVAL;
        ssize_t n = preadv2(fd, part, cnt, (off_t)(pos + done), nowait ? RWF_NOWAIT : 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && nowait && errno == EOPNOTSUPP) {
            nowait = false; /* tmpfs: never waits anyway */
            continue;
        }
        if (n < 0)
            return -errno;
        if (n == 0) {
            iov_zero(iov, iovcnt, done, len);
            return 0;
        }
        cursor_advance(&c, (uint64_t)n);
        done += (uint64_t)n;
    }
    return 0;
}

int file_punch(int fd, uint64_t pos, uint64_t len)
{
    if (len == 0)
        return 0;
    while (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)pos, (off_t)len) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

bool file_data(int fd, uint64_t pos, uint64_t end, uint64_t *from, uint64_t *to)
{
    if (pos >= end)
        return false;
    off_t data = lseek(fd, (off_t)pos, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        return false;
    if (data < 0)
        data = (off_t)pos; /* unknown: everything is data */
    if ((uint64_t)data >= end)
        return false;
    off_t hole = lseek(fd, data, SEEK_HOLE);
    *from = (uint64_t)data;
    *to = hole <= data || (uint64_t)hole > end ? end : (uint64_t)hole;
    return true;
}

int file_copy(int from, uint64_t from_pos, int to, uint64_t to_pos, uint64_t len, bool *copied)
{
    char *buf = NULL;
    uint64_t at = 0, data, hole;
    int r = 0;
    *copied = false;
    while (r == 0 && file_data(from, from_pos + at, from_pos + len, &data, &hole)) {
        at = data - from_pos;
        uint64_t end = hole - from_pos;
        if (!buf && !(buf = malloc(LAYOUT_SLICE)))
            return -ENOMEM;
        while (r == 0 && at < end) {
            uint64_t n = LAYOUT_SLICE - (to_pos + at) % LAYOUT_SLICE;
            struct iovec v = {buf, n < end - at ? n : end - at};
            r = file_read(from, &v, 1, v.iov_len, from_pos + at, false);
            if (r == 0)
                r = file_write(to, &v, 1, v.iov_len, to_pos + at);
            at += v.iov_len;
            *copied = true;
        }
    }
    free(buf);
    return r;
}

int head_open(struct layout *l, uint32_t seg, bool create)
{
    if (seg >= l->head_count)
        return -EFBIG;
    int fd = atomic_load_explicit(&l->heads[seg].fd_plus1, memory_order_acquire) - 1;
    if (__builtin_expect(fd >= 0, 1))
        return fd;
    pthread_mutex_lock(&l->lock);
    fd = atomic_load(&l->heads[seg].fd_plus1) - 1;
    if (fd < 0) {
        char name[32];
        snprintf(name, sizeof name, "head.%u", seg);
        fd = file_open(l->dir, name, create);
        if (fd >= 0) {
            posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM);
            atomic_store_explicit(&l->heads[seg].fd_plus1, fd + 1, memory_order_release);
        }
    }
    pthread_mutex_unlock(&l->lock);
    return fd;
}

void head_dirty(struct layout *l, uint32_t seg)
{
    /* Looked at before it is written, so that the line stays shared between writers. */
    if (!atomic_load_explicit(&l->heads[seg].dirty, memory_order_seq_cst))
        atomic_store_explicit(&l->heads[seg].dirty, true, memory_order_seq_cst);
}

int head_punch(struct layout *l, uint64_t objno, uint64_t off, uint64_t len)
{
    int fd = head_open(l, layout_seg(l, objno), false);
    if (fd == -ENOENT || len == 0)
        return 0;
    if (fd < 0)
        return fd;
    int r = file_punch(fd, layout_pos(l, objno) + off, len);
    head_dirty(l, layout_seg(l, objno));
    return r;
}
