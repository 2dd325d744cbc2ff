/* See piece.h. */
#include "engine/piece.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CACHE_MAX 64 /* pieces kept by a thread: the single-object path allocates nothing */

/* --- the thread's cache -------------------------------------------------------------------------------------------- */

/* initial-exec: one instruction instead of a call; a few bytes of the static TLS reserve are what this library takes */
static __thread struct piece *cache __attribute__((tls_model("initial-exec")));
static __thread unsigned cached __attribute__((tls_model("initial-exec")));
static __thread bool registered __attribute__((tls_model("initial-exec")));
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void cache_drop(void *unused)
{
    for (struct piece *p = cache, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    cache = NULL;
    cached = CACHE_MAX; /* whatever is freed by later destructors goes to free() */
}

static void key_make(void)
{
    pthread_key_create(&key, cache_drop);
}

static void piece_op_done(struct store_op *op);
static void piece_job(struct job *j);

struct piece *piece_new(struct image *i, struct view *v, struct req *r)
{
    struct piece *p = cache;
    if (p) {
        cache = p->next;
        cached--;
    } else if (!(p = malloc(sizeof *p))) {
        return NULL;
    }
    p->op.done = piece_op_done;
    p->op.owner = p;
    p->op.iov = p->iovs = p->inline_iovs;
    p->op.iovcnt = 0;
    p->iov_room = PIECE_IOVS;
    p->image = i;
    p->view = v;
    p->req = r;
    p->finish = piece_finish_req;
    p->blocking = false;
    return p;
}

void piece_free(struct piece *p)
{
    if (p->iovs != p->inline_iovs)
        free(p->iovs);
    if (cached >= CACHE_MAX) {
        free(p);
        return;
    }
    if (!registered) {
        registered = true;
        pthread_once(&once, key_make);
        pthread_setspecific(key, &cache); /* not NULL: the destructor runs when the thread ends */
    }
    p->next = cache;
    cache = p;
    cached++;
}

/* --- running ------------------------------------------------------------------------------------------------------- */

static bool submit(struct piece *p)
{
    p->op.flags = p->blocking ? p->op.flags & ~STORE_NOWAIT : p->op.flags | STORE_NOWAIT;
    int64_t r = store_submit(p->view->store, &p->op);
    if (r == STORE_PENDING)
        return false; /* and may be gone already */
    if (r == -EAGAIN && !p->blocking) {
        p->job.run = piece_job;
        p->job.owner = p;
        pool_run(&p->job);
        return false;
    }
    p->op.result = r;
    return true;
}

static inline enum step_outcome result(struct piece *p, int *err)
{
    return p->step == PIECE_READ ? read_result(p, err) : write_result(p, err);
}

void piece_go(struct piece *p, enum step_outcome next, int err)
{
    while (next == STEP_AGAIN) {
        if (!submit(p))
            return;
        next = result(p, &err);
    }
    if (next == STEP_DONE)
        p->finish(p, err);
}

static void piece_op_done(struct store_op *op)
{
    struct piece *p = op->owner;
    int err = 0;
    p->blocking = false; /* the store's own thread */
    enum step_outcome next = result(p, &err);
    piece_go(p, next, err);
}

static void piece_job(struct job *j)
{
    struct piece *p = j->owner;
    p->blocking = true;
    piece_go(p, STEP_AGAIN, 0);
}

void piece_finish_req(struct piece *p, int err)
{
    struct req *r = p->req;
    piece_free(p);
    req_finish(r, err);
}

int piece_error(struct piece *p, int64_t result)
{
    int err = result < -4095 || result == -EAGAIN ? -EIO : (int)result;
    image_store_error(p->image, p->req && p->req->type == REQ_READ, err);
    return err;
}

/* --- iovecs -------------------------------------------------------------------------------------------------------- */

int piece_add_iov(struct piece *p, void *base, size_t len)
{
    uint32_t n = p->op.iovcnt;
    if (n && (uint8_t *)p->iovs[n - 1].iov_base + p->iovs[n - 1].iov_len == base) {
        p->iovs[n - 1].iov_len += len;
        return 0;
    }
    if (n == p->iov_room) {
        struct iovec *more = malloc(2 * n * sizeof *more);
        if (!more)
            return -ENOMEM;
        memcpy(more, p->iovs, n * sizeof *more);
        if (p->iovs != p->inline_iovs)
            free(p->iovs);
        p->op.iov = p->iovs = more;
        p->iov_room = 2 * n;
    }
    p->iovs[n].iov_base = base;
    p->iovs[n].iov_len = len;
    p->op.iovcnt = n + 1;
    return 0;
}

void data_list(struct data *d, const struct iovec *iov, uint32_t count)
{
    *d = (struct data){.iov = iov, .count = count};
}

void data_pattern(struct data *d, const void *pattern, uint64_t len)
{
    *d = (struct data){.pattern = pattern, .pattern_len = len};
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static int gather_pattern(struct piece *p, const struct data *d, uint64_t off, uint64_t len)
{
    int rc = 0;
    for (uint64_t at = off % d->pattern_len; len && !rc; at = 0) {
        uint64_t n = least(len, d->pattern_len - at);
        rc = piece_add_iov(p, (uint8_t *)d->pattern + at, n);
        len -= n;
    }
    return rc;
}

int piece_gather(struct piece *p, struct data *d, uint64_t off, uint64_t len)
{
    if (!d->iov)
        return gather_pattern(p, d, off, len);
    if (off < d->hint_off)
        d->hint = d->hint_off = 0;
    while (d->hint < d->count && off - d->hint_off >= d->iov[d->hint].iov_len)
        d->hint_off += d->iov[d->hint++].iov_len;
    uint64_t at = off - d->hint_off;
    int rc = 0;
    for (uint32_t n = d->hint; len && n < d->count && !rc; n++, at = 0) {
        uint64_t part = least(len, d->iov[n].iov_len - at);
        if (part)
            rc = piece_add_iov(p, (uint8_t *)d->iov[n].iov_base + at, part);
        len -= part;
    }
    return rc ? rc : len ? -EINVAL : 0;
}
