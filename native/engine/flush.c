/* FLUSH and the flush of FUA. One STORE_FLUSH runs at a time; who comes while it runs waits for the next, which all of
 * them share: it begins after their writes were completed. After a failed flush nobody may believe that what he wrote is
 * or will be durable: the image is fenced, and those who waited fail too. */
#include <errno.h>

#include "engine/event.h"
#include "engine/image.h"

/* Locked. The next batch: everybody who waits for the same store as the first. */
static void take_batch(struct image *i)
{
    i->flush_running = NULL;
    struct req **from = &i->flush_waiting, **to = &i->flush_running;
    struct store *store = *from ? (*from)->epoch->view->store : NULL;
    i->flush.store = store;
    while (*from) {
        struct req *r = *from;
        if (r->epoch->view->store != store) {
            from = &r->next;
            continue;
        }
        *from = r->next;
        r->next = NULL;
        *to = r;
        to = &r->next;
    }
}

/* True: another batch is to be run. The image may be gone otherwise. */
static bool batch_done(struct flush *f, int64_t result)
{
    struct image *i = f->image;
    int err = result >= 0 ? 0 : result < -4095 || result == -EAGAIN ? -EIO : (int)result;
    if (err) {
        event_post(EVENT_IO_ERROR, i->id, err);
        if (err == -ESHUTDOWN)
            gate_fence_stores(i, err);
        else
            gate_fence(i, -EIO);
    }
    pthread_mutex_lock(&i->lock);
    struct req *done = i->flush_running, *failed = NULL;
    if (err) {
        failed = i->flush_waiting;
        i->flush_waiting = NULL;
    }
    take_batch(i);
    bool more = i->flush_running;
    pthread_mutex_unlock(&i->lock);
    for (struct req *next; done; done = next) {
        next = done->next;
        req_complete(done, err);
    }
    for (struct req *next; failed; failed = next) {
        next = failed->next;
        req_complete(failed, err);
    }
    return more;
}

static void flush_job(struct job *j);

static void run(struct flush *f, bool blocking)
{
    int64_t r;
    do {
        f->op.flags = blocking ? 0 : STORE_NOWAIT;
        r = store_submit(f->store, &f->op);
        if (r == STORE_PENDING)
            return;
        if (r == -EAGAIN && !blocking) {
            f->job.run = flush_job;
            f->job.owner = f;
            pool_run(&f->job);
            return;
        }
    } while (batch_done(f, r));
}

static void flush_job(struct job *j)
{
    run(j->owner, true);
}

static void flush_op_done(struct store_op *op)
{
    struct flush *f = op->owner;
    if (batch_done(f, op->result))
        run(f, false);
}

void flush_join(struct req *r)
{
    struct image *i = r->image;
    pthread_mutex_lock(&i->lock);
    int fence = i->fence;
    bool start = false;
    if (!fence) {
        struct req **last = &i->flush_waiting;
        while (*last)
            last = &(*last)->next;
        r->next = NULL;
        *last = r;
        start = !i->flush_running;
        if (start)
            take_batch(i);
    }
    pthread_mutex_unlock(&i->lock);
    if (fence) {
        req_complete(r, fence);
    } else if (start) {
        i->flush.op.type = STORE_FLUSH;
        i->flush.op.done = flush_op_done;
        i->flush.op.owner = &i->flush;
        i->flush.image = i;
        run(&i->flush, r->flags & REQ_MAY_BLOCK);
    }
}
