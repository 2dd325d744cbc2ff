/* Synchronous object operations on any store (ffi/api_store.h). */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "ffi/api_store.h"
#include "store/store.h"

struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool done; /* under lock */
};

static void wake(struct store_op *op)
{
    struct waiter *w = op->owner;
    pthread_mutex_lock(&w->lock);
    w->done = true;
    pthread_cond_signal(&w->cond);
    pthread_mutex_unlock(&w->lock);
}

static int64_t run(rbdn_store *s, struct store_op *op)
{
    struct waiter w = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, false};
    op->owner = &w;
    op->done = wake;
    int64_t r = store_submit(s, op);
    if (r != STORE_PENDING)
        return r;
    pthread_mutex_lock(&w.lock);
    while (!w.done)
        pthread_cond_wait(&w.cond, &w.lock);
    pthread_mutex_unlock(&w.lock);
    return op->result;
}

/* With the snap context of a write; seq 0 and no ids mean none. */
static int run_write(rbdn_store *s, struct store_op *op, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps)
{
    struct snapc *snapc = NULL;
    if (seq || nsnaps) {
        snapc = malloc(sizeof *snapc + nsnaps * sizeof snapc->ids[0]);
        if (!snapc)
            return -ENOMEM;
        snapc->seq = seq;
        snapc->count = nsnaps;
        if (nsnaps)
            memcpy(snapc->ids, snaps, nsnaps * sizeof snaps[0]);
    }
    op->snapc = snapc;
    int64_t r = run(s, op);
    free(snapc);
    return (int)r;
}

int64_t rbdn_obj_read(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, void *buf, uint64_t len)
{
    struct iovec v = {buf, len};
    struct store_op op = {.type = STORE_READ, .objno = objno, .snap_id = snap_id, .off = off, .len = len,
                          .iov = &v, .iovcnt = 1};
    return run(s, &op);
}

int rbdn_obj_write(rbdn_store *s, uint64_t objno, uint64_t off, const void *buf, uint64_t len, uint64_t seq,
                   const uint64_t *snaps, uint32_t nsnaps)
{
    struct iovec v = {(void *)buf, len};
    struct store_op op = {.type = STORE_WRITE, .objno = objno, .off = off, .len = len, .iov = &v, .iovcnt = 1};
    return run_write(s, &op, seq, snaps, nsnaps);
}

int rbdn_obj_zero(rbdn_store *s, uint64_t objno, uint64_t off, uint64_t len, uint64_t seq, const uint64_t *snaps,
                  uint32_t nsnaps)
{
    struct store_op op = {.type = STORE_ZERO, .objno = objno, .off = off, .len = len};
    return run_write(s, &op, seq, snaps, nsnaps);
}

int rbdn_obj_truncate(rbdn_store *s, uint64_t objno, uint64_t size, int create, uint64_t seq, const uint64_t *snaps,
                      uint32_t nsnaps)
{
    struct store_op op = {.type = STORE_TRUNCATE, .flags = create ? STORE_CREATE : 0, .objno = objno, .off = size};
    return run_write(s, &op, seq, snaps, nsnaps);
}

int rbdn_obj_remove(rbdn_store *s, uint64_t objno, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps)
{
    struct store_op op = {.type = STORE_REMOVE, .objno = objno};
    return run_write(s, &op, seq, snaps, nsnaps);
}

int rbdn_obj_copyup(rbdn_store *s, uint64_t objno, const void *buf, uint64_t len)
{
    struct iovec v = {(void *)buf, len};
    struct store_op op = {.type = STORE_COPYUP, .objno = objno, .len = len, .iov = &v, .iovcnt = 1};
    return (int)run(s, &op);
}

int64_t rbdn_obj_stat(rbdn_store *s, uint64_t objno, uint64_t snap_id)
{
    struct store_op op = {.type = STORE_STAT, .objno = objno, .snap_id = snap_id};
    return run(s, &op);
}

int rbdn_obj_extents(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, uint64_t len, uint64_t *pairs,
                     uint32_t max)
{
    _Static_assert(sizeof(struct store_extent) == 2 * sizeof(uint64_t), "pairs are extents");
    struct store_op op = {.type = STORE_EXTENTS, .objno = objno, .snap_id = snap_id, .off = off, .len = len,
                          .extents = (struct store_extent *)pairs, .max_extents = max};
    return (int)run(s, &op);
}

int rbdn_store_flush(rbdn_store *s)
{
    struct store_op op = {.type = STORE_FLUSH};
    return (int)run(s, &op);
}

void rbdn_store_close(rbdn_store *s)
{
    if (s)
        s->ops->close(s);
}
