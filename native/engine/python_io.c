/* I/O from Python: blocking, and asynchronous through one completion queue of the process. Works without reactors. */
#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine/image.h"

#define FLAGS (REQ_FUA | REQ_UNMAP | REQ_EXACT)

/* What `buf` must hold; -EINVAL for an unknown type. */
static int check(int type, uint64_t len, size_t buf_len, unsigned flags)
{
    if (type < 0 || type >= REQ_TYPES || flags & ~FLAGS)
        return -EINVAL;
    switch (type) {
    case REQ_READ:
    case REQ_WRITE:
        return buf_len == len ? 0 : -EINVAL;
    case REQ_COMPARE_AND_WRITE:
        return buf_len / 2 == len && buf_len % 2 == 0 ? 0 : -EINVAL;
    case REQ_WRITESAME:
        return buf_len > 0 && len % buf_len == 0 ? 0 : -EINVAL;
    }
    return 0;
}

static void fill(struct req *r, struct iovec *iov, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len,
                 unsigned flags)
{
    iov->iov_base = buf;
    iov->iov_len = buf_len;
    *r = (struct req){.type = type, .flags = flags, .off = off, .len = type == REQ_FLUSH ? 0 : len, .iov = iov,
                      .iovcnt = buf_len ? 1 : 0};
}

struct sync {
    struct req req;
    struct iovec iov;
    struct flag done;
};

static void sync_done(struct req *r)
{
    struct sync *s = r->owner;
    flag_set(&s->done);
}

int64_t rbdn_io(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags,
                uint64_t *mismatch)
{
    int rc = check(type, len, buf_len, flags);
    if (rc)
        return rc;
    struct sync s = {.done = {0}};
    fill(&s.req, &s.iov, type, off, len, buf, buf_len, flags | REQ_MAY_BLOCK);
    s.req.done = sync_done;
    s.req.owner = &s;
    image_submit(i, &s.req);
    flag_wait(&s.done);
    if (mismatch)
        *mismatch = s.req.mismatch;
    return s.req.result;
}

/* --- asynchronous -------------------------------------------------------------------------------------------------- */

struct aio {
    struct req req;
    struct iovec iov;
    struct aio *next;
    uint64_t token;
};

static struct {
    pthread_mutex_t lock; /* guards everything here */
    int fd;               /* -1 until asked for */
    struct aio *first, **last;
} finished = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1, .last = &finished.first};

static void signal_fd(void)
{
    uint64_t one = 1;
    while (finished.fd >= 0 && write(finished.fd, &one, sizeof one) < 0 && errno == EINTR)
        ;
}

static void aio_done(struct req *r)
{
    struct aio *a = r->owner;
    a->next = NULL;
    pthread_mutex_lock(&finished.lock);
    if (!finished.first)
        signal_fd();
    *finished.last = a;
    finished.last = &a->next;
    pthread_mutex_unlock(&finished.lock);
}

int rbdn_aio(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags,
             uint64_t token)
{
    int rc = check(type, len, buf_len, flags);
    if (rc)
        return rc;
    struct aio *a = malloc(sizeof *a);
    if (!a)
        return -ENOMEM;
    fill(&a->req, &a->iov, type, off, len, buf, buf_len, flags);
    a->token = token;
    a->req.done = aio_done;
    a->req.owner = a;
    image_submit(i, &a->req);
    return 0;
}

int rbdn_aio_fd(void)
{
    pthread_mutex_lock(&finished.lock);
    if (finished.fd < 0) {
        finished.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (finished.first)
            signal_fd();
    }
    int rc = finished.fd >= 0 ? finished.fd : -errno;
    pthread_mutex_unlock(&finished.lock);
    return rc;
}

int rbdn_aio_reap(rbdn_completion *out, int max)
{
    int n = 0;
    struct aio *reaped = NULL;
    pthread_mutex_lock(&finished.lock);
    while (n < max && finished.first) {
        struct aio *a = finished.first;
        finished.first = a->next;
        out[n].token = a->token;
        out[n].result = a->req.result;
        out[n++].mismatch = a->req.mismatch;
        a->next = reaped;
        reaped = a;
    }
    if (!finished.first) {
        uint64_t count;
        finished.last = &finished.first;
        while (finished.fd >= 0 && read(finished.fd, &count, sizeof count) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&finished.lock);
    for (struct aio *next; reaped; reaped = next) {
        next = reaped->next;
        free(reaped);
    }
    return n;
}
