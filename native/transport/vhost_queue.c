#define _GNU_SOURCE /* preadv2 */
#include "transport/vhost_queue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/event.h"
#include "transport/vhost_call.h"
#include "transport/vhost_order.h"

/* Finished in one drain: tell the guest, which needs 25 us to wake and may work on while we go on. Sooner would only be
 * more signals: with 16 KiB writes are slower again. */
#define PUBLISH_BYTES (32u << 10)
#define PUBLISH_REQUESTS 8
#define STRADDLES 64 /* pieces a request may have beyond its descriptors, because buffers reach over regions */

struct slot {
    struct blk_request blk;
    struct vhost_queue *queue;
    struct slot *next;        /* in the list of completions from other threads */
    struct guest_memory *mem; /* the table its buffers were found in; NULL = done */
    uint16_t head;
    bool busy;                /* from being read to being shown as used */
} __attribute__((aligned(64)));

struct vhost_queue {
    /* hot, this queue's reactor only */
    struct split_ring ring;
    struct slot *slots; /* one per head */
    struct blk_device *device;
    struct iovec *wide;   /* iov_max entries a head, for chains longer than a slot's own; touched when needed */
    unsigned iov_max;
    unsigned in_flight;
    struct publish_order order;
    bool reading;  /* started, enabled, not broken, not stopped */
    bool broken, abandoned, polling;
    unsigned losses; /* shm_losses() when last looked at */
    struct vhost_call call; /* the file is the session's, and so is this one: */
    int err;                /* -1 = none */
    struct poller poller;

    struct export *export;
    unsigned index;
    const struct ring_config *config;
    struct reactor *reactor;
    struct fd_watch kick; /* fd -1 = not watched */
    size_t wide_bytes;
    uint16_t *heads; /* to submit again at the start */

    _Atomic unsigned commands; /* bit per enum queue_command */
    bool stopping; /* QUEUE_STOP waits for in_flight */
    struct post command_post;
    struct post answers[QUEUE_COMMANDS]; /* to `home` */
    struct reactor *home;
    void (*answered)(void *, enum queue_command);
    void *owner;

    /* completions from other threads */
    _Atomic(struct slot *) completed __attribute__((aligned(64)));
    struct post completed_post;
};

/* The queue whose ring this thread is reading: its requests that complete meanwhile need no detour. */
static __thread struct vhost_queue *reading_now __attribute__((tls_model("initial-exec")));

/* ---- completion ---- */

static void log_request(struct vhost_queue *q, const struct slot *s)
{
    for (unsigned n = 0; n < s->blk.filled; n++)
        dirty_log_mark_host(q->ring.log, s->mem, s->blk.fill[n].iov_base, s->blk.fill[n].iov_len);
    if (s->blk.status)
        dirty_log_mark_host(q->ring.log, s->mem, s->blk.status, 1);
}

static inline void show(struct vhost_queue *q, uint16_t head, uint32_t written)
{
    ring_push(&q->ring, head, written);
    q->slots[head].busy = false;
}

static void show_in_order(struct vhost_queue *q)
{
    for (int head; (head = order_next(&q->order)) >= 0;)
        show(q, (uint16_t)head, q->order.slots[head].written);
}

/* On the queue's reactor. The caller publishes. */
static inline void finish(struct vhost_queue *q, struct slot *s, uint8_t status)
{
    if (!q->abandoned) {
        uint32_t written = 0;
        if (s->blk.status) {
            *s->blk.status = status;
            written = s->blk.written;
        }
        if (__builtin_expect(q->ring.log != NULL, 0))
            log_request(q, s);
        if (__builtin_expect(q->order.on, 0)) {
            order_done(&q->order, s->head, written);
            show_in_order(q);
        } else {
            show(q, s->head, written);
        }
    }
    if (__builtin_expect(s->mem != q->ring.mem, 0))
        guest_memory_put(s->mem); /* counted when the queue's memory was changed */
    s->mem = NULL;
    q->in_flight--;
}

static void answer(struct vhost_queue *q, enum queue_command command)
{
    reactor_post(q->home, &q->answers[command]);
}

/* Every access to shared memory is followed by this on the queue's reactor. */
static void publish(struct vhost_queue *q)
{
    if (q->abandoned)
        return;
    bool news = q->ring.used != q->ring.signalled;
    ring_publish(&q->ring);
    if (news && ring_wants_signal(&q->ring))
        vhost_call_signal(&q->call);
    unsigned losses = shm_losses();
    if (__builtin_expect(losses != q->losses, 0)) {
        q->losses = losses;
        answer(q, QUEUE_LOSS);
    }
}

static void on_answer(struct post *p)
{
    struct vhost_queue *q = p->owner;
    q->answered(q->owner, (enum queue_command)(p - q->answers));
}

/* May free q. */
static void answer_stop(struct vhost_queue *q)
{
    if (q->stopping && q->in_flight == 0) {
        q->stopping = false;
        answer(q, QUEUE_STOP);
    }
}

static void on_done(struct req *req)
{
    struct slot *s = req->owner;
    struct vhost_queue *q = s->queue;
    if (reading_now == q && !blk_more(&s->blk)) { /* a further range is submitted later: done() must not nest */
        finish(q, s, (uint8_t)blk_finish(&s->blk));
        return;
    }
    /* Only who makes the list non-empty posts, and only the post empties it: after its completion is taken the queue
     * may be freed while this thread still runs here. */
    struct reactor *reactor = q->reactor;
    struct post *post = &q->completed_post;
    struct slot *head = atomic_load_explicit(&q->completed, memory_order_relaxed);
    do
        s->next = head;
    while (!atomic_compare_exchange_weak_explicit(&q->completed, &head, s, memory_order_acq_rel, memory_order_relaxed));
    if (!head)
        reactor_post(reactor, post);
}

static void submit(struct vhost_queue *q, struct slot *s)
{
    s->blk.req.done = on_done;
    s->blk.req.owner = s;
    image_submit(q->device->image, &s->blk.req);
}

static void on_completed(struct post *p)
{
    struct vhost_queue *q = p->owner;
    struct slot *s = atomic_exchange_explicit(&q->completed, NULL, memory_order_acquire), *in_order = NULL;
    while (s) {
        struct slot *next = s->next;
        s->next = in_order;
        in_order = s;
        s = next;
    }
    while (in_order) {
        s = in_order;
        in_order = s->next;
        int status = q->abandoned ? (blk_more(&s->blk) ? 0 : blk_finish(&s->blk)) : blk_finish(&s->blk);
        if (status == BLK_SUBMIT) {
            reading_now = q;
            submit(q, s);
            reading_now = NULL;
        } else {
            finish(q, s, (uint8_t)status);
        }
    }
    publish(q);
    answer_stop(q);
}

/* ---- reading the ring ---- */

static void stop_reading(struct vhost_queue *q)
{
    q->reading = false;
    if (q->polling) {
        q->polling = false;
        reactor_remove_poller(q->reactor, &q->poller);
    }
    if (q->kick.fd >= 0) {
        reactor_unwatch(&q->kick);
        q->kick.fd = -1;
    }
}

static void break_queue(struct vhost_queue *q)
{
    if (q->broken)
        return;
    q->broken = true;
    stop_reading(q);
    export_broken(q->export, q->index);
    vhost_signal(q->err);
}

/* 0, or -EPROTO when the ring cannot be trusted any more. again: the in-flight table has it already. */
static int begin(struct vhost_queue *q, uint16_t head, bool again)
{
    struct slot *s = &q->slots[head];
    struct ring_chain c = {
        .iov = s->blk.iov, .iov_max = BLK_INLINE_IOV, .wide = q->wide + (size_t)head * q->iov_max, .wide_max = q->iov_max,
    };
    int rc = ring_fetch(&q->ring, head, &c);
    if (rc)
        return rc;
    if (!again)
        ring_track(&q->ring, head);
    order_read(&q->order, head);
    s->busy = true;
    s->mem = q->ring.mem;
    q->in_flight++;
    int status = blk_parse(q->device, &s->blk, &c);
    if (status == BLK_SUBMIT)
        submit(q, s);
    else
        finish(q, s, (uint8_t)status);
    return 0;
}

/* Reads what is available, at most a ring's worth: others want the reactor too. True when there was something. */
static bool read_ring(struct vhost_queue *q)
{
    unsigned budget = q->ring.num;
    uint64_t bytes = 0;     /* moved since the last publishing */
    unsigned requests = 0;  /* the same */
    bool worked = false, bad = false;
    reading_now = q;
    while (budget && !bad) {
        int n = ring_available(&q->ring);
        if (n <= 0) {
            bad = n < 0;
            break;
        }
        if ((unsigned)n > budget)
            n = (int)budget;
        budget -= (unsigned)n;
        worked = true;
        while (n-- > 0) {
            uint16_t head = ring_next_head(&q->ring);
            if (head >= q->ring.num || q->slots[head].busy) {
                bad = true;
                break;
            }
            if (begin(q, head, false)) {
                bad = true;
                break;
            }
            bytes += q->slots[head].blk.req.len;
            if (bytes >= PUBLISH_BYTES || ++requests >= PUBLISH_REQUESTS) {
                bytes = requests = 0;
                publish(q);
            }
        }
    }
    reading_now = NULL;
    publish(q);
    if (bad)
        break_queue(q);
    return worked;
}

static bool on_poll(struct poller *p)
{
    return read_ring(p->owner);
}

static bool on_sleep(struct poller *p)
{
    struct vhost_queue *q = p->owner;
    if (ring_kicks_on(&q->ring)) {
        ring_kicks_off(&q->ring);
        read_ring(q);
        return true;
    }
    q->polling = false;
    reactor_remove_poller(q->reactor, p);
    return false;
}

/* Look at the ring now, and again until the reactor sleeps. */
static void wake(struct vhost_queue *q)
{
    if (!q->reading)
        return;
    if (!q->polling) {
        q->polling = true;
        ring_kicks_off(&q->ring);
        reactor_add_poller(q->reactor, &q->poller);
    }
    read_ring(q);
}

static void on_kick(struct fd_watch *w, uint32_t events)
{
    struct vhost_queue *q = w->owner;
    uint64_t count;
    struct iovec iov = {&count, sizeof count};
    /* Never blocks, whatever the peer does to the file's flags. */
    if (preadv2(w->fd, &iov, 1, -1, RWF_NOWAIT) < 0 && errno != EAGAIN && errno != EINTR) {
        break_queue(q);
        return;
    }
    wake(q);
}

/* ---- commands ---- */

static void watch_kick(struct vhost_queue *q)
{
    q->kick.fd = q->config->kick;
    if (q->kick.fd >= 0 && reactor_watch(q->reactor, &q->kick, EPOLLIN)) {
        q->kick.fd = -1;
        break_queue(q);
    }
}

static void set_order(struct vhost_queue *q, bool on)
{
    if (on == q->order.on)
        return;
    if (!on) {
        order_end(&q->order);
        if (!q->abandoned)
            show_in_order(q);
        return;
    }
    uint16_t pending[RING_SIZE_MAX], count = 0;
    for (uint16_t n = 0; n < q->ring.num; n++)
        if (q->slots[n].busy)
            pending[count++] = n;
    order_begin(&q->order, pending, count);
}

static void take_config(struct vhost_queue *q)
{
    const struct ring_config *c = q->config;
    set_order(q, c->log != NULL);
    q->ring.log = c->log;
    q->ring.log_used = c->log_used;
    q->ring.log_addr = c->log_addr;
    if (q->call.fd != c->call)
        vhost_call_set(&q->call, c->call);
    q->err = c->err;
}

static void start(struct vhost_queue *q)
{
    const struct ring_config *c = q->config;
    take_config(q);
    q->losses = shm_losses();
    q->ring.num = c->num;
    q->ring.mask = c->num - 1;
    q->ring.event_idx = c->event_idx;
    q->ring.indirect = c->indirect;
    q->ring.inflight = c->inflight;
    int count = ring_map(&q->ring, c->mem, &c->addresses);
    if (count == 0)
        count = ring_start(&q->ring, c->base, q->heads);
    else
        q->abandoned = true; /* there is no ring to touch */
    if (count < 0) {
        break_queue(q);
        return;
    }
    watch_kick(q);
    if (q->broken)
        return;
    atomic_fetch_add(&q->export->resubmitted, (uint64_t)count);
    if (q->ring.stale)
        event_post(EVENT_EXPORT_STALE, q->export->id, q->index);
    reading_now = q;
    for (int n = 0; n < count && !q->broken; n++)
        if (begin(q, q->heads[n], true))
            break_queue(q);
    reading_now = NULL;
    publish(q);
    if (q->broken)
        return;
    vhost_call_signal(&q->call); /* one before the start may have been lost with our predecessor */
    q->reading = c->enabled;
    wake(q);
}

static void change_memory(struct vhost_queue *q)
{
    struct guest_memory *old = q->ring.mem;
    for (unsigned n = 0; n < q->ring.num; n++)
        if (q->slots[n].busy && q->slots[n].mem == old)
            guest_memory_get(old); /* until this request is finished */
    if (ring_map(&q->ring, q->config->mem, &q->config->addresses)) {
        /* finish() must still see that those requests use another table than the queue. */
        q->ring.mem = q->config->mem;
        q->abandoned = true;
        break_queue(q);
    }
}

static void update(struct vhost_queue *q)
{
    int call = q->call.fd;
    take_config(q);
    if (q->abandoned)
        return;
    publish(q); /* what had waited for its turn */
    if (q->config->mem != q->ring.mem)
        change_memory(q);
    if (q->broken)
        return;
    if (q->config->kick != q->kick.fd) {
        if (q->kick.fd >= 0)
            reactor_unwatch(&q->kick);
        watch_kick(q);
    }
    q->reading = q->config->enabled && !q->broken;
    if (q->call.fd != call)
        vhost_call_signal(&q->call); /* what was signalled on the old one may never have been seen */
    if (q->reading) {
        wake(q);
    } else if (q->polling) {
        q->polling = false;
        reactor_remove_poller(q->reactor, &q->poller);
    }
}

static bool sent_here(const struct req *r, const void *queue)
{
    return r->done == on_done && ((const struct slot *)r->owner)->queue == queue;
}

static void on_command(struct post *p)
{
    struct vhost_queue *q = p->owner;
    unsigned commands = atomic_exchange(&q->commands, 0);
    if (commands & 1u << QUEUE_START) {
        start(q);
        answer(q, QUEUE_START);
    }
    if (commands & 1u << QUEUE_UPDATE) {
        update(q);
        answer(q, QUEUE_UPDATE);
    }
    if (commands & 1u << QUEUE_ABANDON) {
        stop_reading(q);
        q->abandoned = true;
        image_drop(q->device->image, sent_here, q);
        answer(q, QUEUE_ABANDON);
    }
    if (commands & 1u << QUEUE_STOP) {
        stop_reading(q);
        publish(q);
        q->stopping = true;
        answer_stop(q);
    }
}

void vhost_queue_command(struct vhost_queue *q, enum queue_command command)
{
    atomic_fetch_or(&q->commands, 1u << command);
    reactor_post(q->reactor, &q->command_post);
}

struct vhost_queue *vhost_queue_new(struct export *e, struct blk_device *d, unsigned index, const struct ring_config *c,
                                    struct reactor *home, void (*answered)(void *, enum queue_command), void *owner)
{
    struct vhost_queue *q = aligned_alloc(64, (sizeof *q + 63) & ~63UL);
    if (!q)
        return NULL;
    memset(q, 0, sizeof *q);
    q->call = VHOST_CALL_NONE;
    q->iov_max = c->num + STRADDLES;
    q->wide_bytes = (size_t)c->num * q->iov_max * sizeof(struct iovec);
    q->wide = mmap(NULL, q->wide_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    q->slots = aligned_alloc(64, c->num * sizeof *q->slots);
    int no_order = order_init(&q->order, c->num);
    q->heads = malloc(c->num * sizeof *q->heads);
    q->reactor = reactor_pick();
    if (q->wide == MAP_FAILED || !q->slots || no_order || !q->heads || !q->reactor) {
        vhost_queue_free(q);
        return NULL;
    }
    memset(q->slots, 0, c->num * sizeof *q->slots);
    for (unsigned n = 0; n < c->num; n++) {
        q->slots[n].queue = q;
        q->slots[n].head = (uint16_t)n;
    }
    q->export = e;
    q->device = d;
    q->index = index;
    q->config = c;
    q->err = -1;
    q->kick = (struct fd_watch){.fd = -1, .ready = on_kick, .owner = q};
    q->poller = (struct poller){.poll = on_poll, .sleep = on_sleep, .owner = q};
    q->command_post = (struct post){.run = on_command, .owner = q};
    q->completed_post = (struct post){.run = on_completed, .owner = q};
    for (unsigned n = 0; n < QUEUE_COMMANDS; n++)
        q->answers[n] = (struct post){.run = on_answer, .owner = q};
    q->home = home;
    q->answered = answered;
    q->owner = owner;
    return q;
}

void vhost_queue_free(struct vhost_queue *q)
{
    if (q->wide && q->wide != MAP_FAILED)
        munmap(q->wide, q->wide_bytes);
    if (q->reactor)
        reactor_release(q->reactor);
    vhost_call_set(&q->call, -1);
    order_free(&q->order);
    free(q->slots);
    free(q->heads);
    free(q);
}

uint16_t vhost_queue_base(const struct vhost_queue *q)
{
    return q->ring.last_avail;
}
