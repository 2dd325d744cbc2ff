/* Between an image and a file: import and export without the bytes passing through Python.
 *
 * A few threads each take the next piece, move it, and take another. A piece is small enough to stay in the CPU's cache
 * between the read and the write where the store is local, and an object where it is not: the caller says which.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/image.h"

#define THREADS_MAX 64
#define STEP_MAX (32u << 20)
#define SLICE (64u << 10) /* bytes written to a file at once: more makes large folios, which cost several times as much */
#define LOOK_MS 200 /* how long a pipe may be silent before the caller can look for signals */

struct pump {
    struct image *image;
    const rbdn_pump *what;
    pthread_mutex_t lock; /* guards next, moved, left_out, result, end; held while a pipe is read, which keeps its order */
    uint64_t next;        /* bytes given out */
    uint64_t moved, left_out;
    int result;
    int end; /* 1: the file ended; 2: the pipe has nothing just now */
};

struct waiting {
    struct req req;
    struct iovec iov;
    struct flag done;
};

static void io_done(struct req *r)
{
    struct waiting *w = r->owner;
    flag_set(&w->done);
}

static int image_io(struct image *i, int type, uint64_t off, char *buf, uint64_t len)
{
    struct waiting w = {.iov = {buf, len}, .done = {0}};
    w.req = (struct req){.type = type, .flags = REQ_MAY_BLOCK, .off = off, .len = len, .iov = &w.iov, .iovcnt = 1,
                         .done = io_done, .owner = &w};
    image_submit(i, &w.req);
    flag_wait(&w.done);
    return (int)w.req.result;
}

static bool is_zero(const char *p, uint64_t len)
{
    uint64_t head = len < 16 ? len : 16;
    for (uint64_t i = 0; i < head; i++)
        if (p[i])
            return false;
    return len <= 16 || memcmp(p, p + 16, len - 16) == 0;
}

static int file_out(int fd, const char *buf, uint64_t len, uint64_t pos)
{
    while (len) {
        ssize_t n = pwrite(fd, buf, len < SLICE ? len : SLICE, (off_t)pos);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        buf += n;
        len -= (uint64_t)n;
        pos += (uint64_t)n;
    }
    return 0;
}

/* -> bytes read, fewer than asked for at the file's end only; -errno */
static int64_t file_in(int fd, char *buf, uint64_t len, uint64_t pos)
{
    uint64_t done = 0;
    while (done < len) {
        ssize_t n = pread(fd, buf + done, len - done, (off_t)(pos + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (n == 0)
            break;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

/* Fewer than asked for at the end, or when nothing comes for a while: *end says which. */
static int64_t pipe_in(int fd, char *buf, uint64_t len, int *end)
{
    uint64_t done = 0;
    while (done < len) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (poll(&p, 1, LOOK_MS) == 0) {
            *end = 2;
            break;
        }
        ssize_t n = read(fd, buf + done, len - done);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (n < 0)
            return -errno;
        if (n == 0) {
            *end = 1;
            break;
        }
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

/* One piece's bytes that are not zeros of `grain` bytes, aligned in their chunk of the image. */
static int put_runs(struct pump *p, char *buf, uint64_t at, uint64_t len, uint64_t *left_out)
{
    const rbdn_pump *w = p->what;
    uint64_t grain = w->grain, begin = 0;
    for (uint64_t pos = 0; pos < len;) {
        uint64_t within = (w->off + at + pos) % w->chunk;
        uint64_t n = grain ? grain - within % grain : len;
        n = n < w->chunk - within ? n : w->chunk - within;
        n = n < len - pos ? n : len - pos;
        bool skip = grain && is_zero(buf + pos, n);
        if (!skip && pos + n < len) {
            pos += n;
            continue;
        }
        uint64_t stop = skip ? pos : pos + n;
        int r = 0;
        if (stop > begin)
            r = w->in ? image_io(p->image, REQ_WRITE, w->off + at + begin, buf + begin, stop - begin)
                      : file_out(w->fd, buf + begin, stop - begin, w->pos + at + begin);
        if (r < 0)
            return r;
        *left_out += skip ? n : 0;
        pos += n;
        begin = pos;
    }
    return 0;
}

/* The next piece, with its bytes when a pipe brings them: false when there is none. */
static bool take(struct pump *p, char *buf, uint64_t *at, uint64_t *len)
{
    const rbdn_pump *w = p->what;
    pthread_mutex_lock(&p->lock);
    bool more = !p->result && !p->end && p->next < w->len;
    if (more) {
        uint64_t step = w->step - (w->off + p->next) % w->step; /* so that pieces do not straddle objects */
        *at = p->next;
        *len = step < w->len - p->next ? step : w->len - p->next;
        if (w->stream) {
            int64_t n = pipe_in(w->fd, buf, *len, &p->end);
            if (n < 0)
                p->result = (int)n;
            *len = n < 0 ? 0 : (uint64_t)n;
            more = *len > 0;
        }
        p->next += *len;
    }
    pthread_mutex_unlock(&p->lock);
    return more;
}

static void *pump_main(void *arg)
{
    struct pump *p = arg;
    const rbdn_pump *w = p->what;
    char *buf = NULL;
    uint64_t at, len, left_out = 0;
    int r = posix_memalign((void **)&buf, 4096, w->step) ? -ENOMEM : 0;
    while (r == 0 && take(p, buf, &at, &len)) {
        int64_t n = (int64_t)len;
        if (!w->in)
            r = image_io(p->image, REQ_READ, w->off + at, buf, len);
        else if (!w->stream)
            n = file_in(w->fd, buf, len, w->pos + at);
        if (n < 0)
            r = (int)n;
        if (r == 0)
            r = put_runs(p, buf, at, (uint64_t)n, &left_out);
        pthread_mutex_lock(&p->lock);
        if (r == 0)
            p->moved += (uint64_t)n;
        if (r == 0 && (uint64_t)n < len)
            p->end = 1;
        pthread_mutex_unlock(&p->lock);
    }
    free(buf);
    pthread_mutex_lock(&p->lock);
    p->left_out += left_out;
    if (r < 0 && !p->result)
        p->result = r;
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

int64_t rbdn_image_pump(rbdn_image *i, const rbdn_pump *what, rbdn_pumped *out)
{
    if (!what->step || what->step > STEP_MAX || !what->threads || !what->chunk || what->threads > THREADS_MAX ||
        (what->stream && !what->in))
        return -EINVAL;
    struct pump p = {.image = i, .what = what, .lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_t threads[THREADS_MAX];
    uint64_t pieces = what->len / what->step + 1;
    uint32_t wanted = what->threads < pieces ? what->threads : (uint32_t)pieces, count = 0;
    while (count + 1 < wanted && thread_start(&threads[count], pump_main, &p) == 0)
        count++;
    pump_main(&p);
    for (uint32_t n = 0; n < count; n++)
        pthread_join(threads[n], NULL);
    *out = (rbdn_pumped){p.left_out, p.end == 1};
    return p.result ? p.result : (int64_t)p.moved;
}
