/* write(2) to an eventfd blocks when its counter is full, unless O_NONBLOCK is set: a flag of the open file, which the
 * front end shares and may clear at any moment, also between a check of ours and the write. RWF_NOWAIT is not taken for
 * writes to eventfds. What never blocks is the kernel's own eventfd_signal(), by which asynchronous I/O announces
 * completions. So an I/O that does nothing is done: a NOP in an io_uring (0.15 us dearer than the write), or, where
 * io_uring is forbidden, an AIO read that fails (0.7 us dearer).
 */
#include "transport/vhost_call.h"

#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- AIO ---- */

/* What an aio_context_t points to. */
struct aio_ring {
    uint32_t id, count;
    _Atomic uint32_t head, tail; /* head is ours */
    uint32_t magic, features[3];
};
#define AIO_RING_MAGIC 0xa10a10a1u

#define THREAD static __thread __attribute__((tls_model("initial-exec")))
THREAD struct aio_ring *aio;
THREAD bool tried;

static void aio_prepare(void)
{
    aio_context_t made = 0;
    tried = true;
    if (syscall(SYS_io_setup, 1, &made))
        return;
    aio = (struct aio_ring *)made;
    if (aio->magic != AIO_RING_MAGIC) {
        aio = NULL;
        syscall(SYS_io_destroy, made);
    }
}

void vhost_signal(int fd)
{
    if (fd < 0)
        return;
    if (!tried)
        aio_prepare();
    if (aio) {
        struct iocb cb = {.aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)fd, /* fails: nothing to read into */
                          .aio_flags = IOCB_FLAG_RESFD, .aio_resfd = (uint32_t)fd}, *list[] = {&cb};
        long sent = syscall(SYS_io_submit, (aio_context_t)aio, 1, list);
        atomic_store_explicit(&aio->head, atomic_load_explicit(&aio->tail, memory_order_acquire), memory_order_release);
        if (sent == 1)
            return;
    }
    /* Neither is allowed here: as good as it gets. */
    uint64_t one = 1;
    fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK);
    if (write(fd, &one, sizeof one) < 0)
        return; /* full: a signal is pending already */
}

/* ---- io_uring ---- */

static void ring_close(struct vhost_call *c)
{
    if (c->map)
        munmap(c->map, c->map_len);
    if (c->ring >= 0)
        close(c->ring);
    c->map = NULL;
    c->ring = -1;
}

static void ring_open(struct vhost_call *c)
{
    struct io_uring_params p;
    memset(&p, 0, sizeof p);
    c->ring = (int)syscall(SYS_io_uring_setup, 1, &p);
    if (c->ring < 0)
        return;
    size_t submit = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
    size_t complete = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
    c->map_len = submit > complete ? submit : complete;
    void *map = MAP_FAILED, *entries = MAP_FAILED;
    if (p.features & IORING_FEAT_SINGLE_MMAP) {
        map = mmap(NULL, c->map_len, PROT_READ | PROT_WRITE, MAP_SHARED, c->ring, IORING_OFF_SQ_RING);
        entries = mmap(NULL, p.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED, c->ring,
                       IORING_OFF_SQES);
    }
    if (entries != MAP_FAILED) { /* written once: the one entry says NOP for ever */
        memset(entries, 0, p.sq_entries * sizeof(struct io_uring_sqe));
        ((struct io_uring_sqe *)entries)->opcode = IORING_OP_NOP;
        munmap(entries, p.sq_entries * sizeof(struct io_uring_sqe));
    }
    if (map != MAP_FAILED) {
        c->map = map;
        memset(c->map + p.sq_off.array, 0, p.sq_entries * sizeof(uint32_t));
        c->sq_tail = (_Atomic uint32_t *)(c->map + p.sq_off.tail);
        c->cq_head = (_Atomic uint32_t *)(c->map + p.cq_off.head);
        c->cq_tail = (_Atomic uint32_t *)(c->map + p.cq_off.tail);
    }
    if (map == MAP_FAILED || entries == MAP_FAILED ||
        syscall(SYS_io_uring_register, c->ring, IORING_REGISTER_EVENTFD, &c->fd, 1) < 0)
        ring_close(c);
}

void vhost_call_set(struct vhost_call *c, int fd)
{
    ring_close(c);
    c->fd = fd;
    if (fd >= 0)
        ring_open(c);
}

void vhost_call_signal(struct vhost_call *c)
{
    if (c->ring < 0) {
        vhost_signal(c->fd);
        return;
    }
    atomic_store_explicit(c->sq_tail, atomic_load_explicit(c->sq_tail, memory_order_relaxed) + 1, memory_order_release);
    if (syscall(SYS_io_uring_enter, c->ring, 1, 0, 0, NULL, 0) != 1) {
        ring_close(c); /* not seen to happen, but a signal must not get lost */
        vhost_signal(c->fd);
        return;
    }
    atomic_store_explicit(c->cq_head, atomic_load_explicit(c->cq_tail, memory_order_acquire), memory_order_release);
}
