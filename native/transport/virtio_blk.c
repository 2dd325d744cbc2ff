#include "transport/virtio_blk.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

#include <linux/virtio_blk.h>

#define SECTOR 512
#define BIT(n) (1ULL << (n))

_Static_assert(sizeof(struct blk_range) == sizeof(struct virtio_blk_discard_write_zeroes), "as on the wire");
_Static_assert(offsetof(struct virtio_blk_config, wce) == BLK_CONFIG_WCE, "as on the wire");

uint64_t blk_features(const struct blk_device *d, const struct blk_settings *s)
{
    uint64_t f = BIT(VIRTIO_BLK_F_SIZE_MAX) | BIT(VIRTIO_BLK_F_SEG_MAX) | BIT(VIRTIO_BLK_F_BLK_SIZE) |
                 BIT(VIRTIO_BLK_F_TOPOLOGY);
    if (s->num_queues > 1)
        f |= BIT(VIRTIO_BLK_F_MQ);
    if (s->write_cache)
        f |= BIT(VIRTIO_BLK_F_FLUSH) | BIT(VIRTIO_BLK_F_CONFIG_WCE);
    if (d->read_only)
        f |= BIT(VIRTIO_BLK_F_RO);
    else
        f |= BIT(VIRTIO_BLK_F_DISCARD) | BIT(VIRTIO_BLK_F_WRITE_ZEROES);
    return f;
}

void blk_config(const struct blk_device *d, const struct blk_settings *s, bool writeback, uint8_t out[BLK_CONFIG_SIZE])
{
    uint32_t object = image_object_size(d->image);
    struct virtio_blk_config c = {
        .capacity = image_size(d->image) / SECTOR,
        .size_max = 4 << 20,
        .seg_max = s->queue_size_max > 2 ? s->queue_size_max - 2 : 1,
        .blk_size = s->block_size,
        .min_io_size = 1,
        .opt_io_size = object / s->block_size,
        .wce = writeback,
        .num_queues = s->num_queues,
        .max_discard_sectors = BLK_DISCARD_MAX,
        .max_discard_seg = BLK_RANGES_MAX,
        .discard_sector_alignment = BLK_DISCARD_ALIGN,
        .max_write_zeroes_sectors = BLK_ZEROES_MAX,
        .max_write_zeroes_seg = BLK_RANGES_MAX,
        .write_zeroes_may_unmap = 1,
    };
    memset(out, 0, BLK_CONFIG_SIZE);
    memcpy(out, &c, sizeof c);
}

/* Takes up to len bytes off the front of a list of buffers, however they are cut. Returns how many. */
static uint32_t take(struct iovec **iov, unsigned *count, void *to, uint32_t len)
{
    uint32_t got = 0;
    while (*count && got < len) {
        uint32_t part = len - got < (*iov)->iov_len ? len - got : (uint32_t)(*iov)->iov_len;
        memcpy((uint8_t *)to + got, (*iov)->iov_base, part);
        got += part;
        (*iov)->iov_base = (uint8_t *)(*iov)->iov_base + part;
        (*iov)->iov_len -= part;
        if ((*iov)->iov_len == 0) {
            ++*iov;
            --*count;
        }
    }
    return got;
}

static uint32_t put(struct iovec *iov, unsigned count, const void *from, uint32_t len)
{
    uint32_t done = 0;
    for (; count && done < len; iov++, count--) {
        uint32_t part = len - done < iov->iov_len ? len - done : (uint32_t)iov->iov_len;
        memcpy(iov->iov_base, (const uint8_t *)from + done, part);
        done += part;
    }
    return done;
}

static int read_write(const struct blk_device *d, struct blk_request *r, uint8_t type, uint64_t sector,
                      struct iovec *iov, unsigned count, uint64_t len)
{
    uint64_t end;
    if (len % SECTOR || sector > UINT64_MAX / SECTOR || __builtin_add_overflow(sector * SECTOR, len, &end))
        return VIRTIO_BLK_S_IOERR;
    if (end > image_size(d->image))
        return VIRTIO_BLK_S_IOERR;
    if (len == 0)
        return VIRTIO_BLK_S_OK;
    r->req.type = type;
    r->req.off = sector * SECTOR;
    r->req.len = len;
    r->req.iov = iov;
    r->req.iovcnt = count;
    return BLK_SUBMIT;
}

/* r->range_list[r->range] becomes the request to submit. */
static void next_range(struct blk_request *r)
{
    const struct blk_range *g = &r->range_list[r->range++];
    r->req.off = g->sector * SECTOR;
    r->req.len = (uint64_t)g->sectors * SECTOR;
    r->req.flags = (r->req.flags & ~REQ_UNMAP) | (g->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP ? REQ_UNMAP : 0);
    r->req.iov = NULL;
    r->req.iovcnt = 0;
}

static int ranges(const struct blk_device *d, struct blk_request *r, uint8_t type, struct iovec *iov, unsigned count,
                  uint64_t len)
{
    struct blk_range list[BLK_RANGES_MAX]; /* r->range_list shares its memory with the buffers read here */
    if (len == 0 || len % sizeof list[0] || len > sizeof list)
        return VIRTIO_BLK_S_IOERR;
    if (take(&iov, &count, list, (uint32_t)len) != len)
        return VIRTIO_BLK_S_IOERR;
    uint64_t sectors = image_size(d->image) / SECTOR;
    uint32_t limit = type == REQ_DISCARD ? BLK_DISCARD_MAX : BLK_ZEROES_MAX;
    uint32_t known = type == REQ_DISCARD ? 0 : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    uint8_t used = 0;
    for (unsigned n = 0; n < len / sizeof list[0]; n++) {
        if (list[n].flags & ~known)
            return VIRTIO_BLK_S_UNSUPP;
        if (list[n].sectors > limit || list[n].sector > sectors || list[n].sectors > sectors - list[n].sector)
            return VIRTIO_BLK_S_IOERR;
        if (list[n].sectors)
            r->range_list[used++] = list[n];
    }
    if (used == 0)
        return VIRTIO_BLK_S_OK;
    r->req.type = type;
    r->range = 0;
    r->ranges = used;
    next_range(r);
    return BLK_SUBMIT;
}

int blk_parse(const struct blk_device *d, struct blk_request *r, struct ring_chain *c)
{
    struct virtio_blk_outhdr h;
    struct iovec *out = c->iov, *in = c->iov + c->out;
    unsigned outs = c->out, ins = c->in;
    r->status = c->last;
    r->written = 1;
    r->range = r->ranges = 0;
    r->req.flags = 0;
    r->filled = 0;
    if (c->fault || !c->last || c->out_len < sizeof h)
        return VIRTIO_BLK_S_IOERR;
    if (outs && out->iov_len >= sizeof h) { /* all drivers do */
        memcpy(&h, out->iov_base, sizeof h);
        out->iov_base = (uint8_t *)out->iov_base + sizeof h;
        out->iov_len -= sizeof h;
        if (out->iov_len == 0) {
            out++;
            outs--;
        }
    } else {
        take(&out, &outs, &h, sizeof h);
    }
    /* The memory h came from may change; h may not be read from it again. */
    __asm__ volatile("" ::: "memory");
    uint64_t out_len = c->out_len - sizeof h, in_len = c->in_len - 1;
    if (--in[ins - 1].iov_len == 0)
        ins--;
    switch (h.type) {
    case VIRTIO_BLK_T_IN: {
        int rc = read_write(d, r, REQ_READ, h.sector, in, ins, in_len);
        if (rc == BLK_SUBMIT) {
            r->written = in_len + 1 > UINT32_MAX ? UINT32_MAX : (uint32_t)(in_len + 1);
            r->fill = in;
            r->filled = ins;
        }
        return rc;
    }
    case VIRTIO_BLK_T_OUT:
        if (d->read_only)
            return VIRTIO_BLK_S_IOERR;
        if (atomic_load_explicit(&d->write_through, memory_order_relaxed))
            r->req.flags = REQ_FUA;
        return read_write(d, r, REQ_WRITE, h.sector, out, outs, out_len);
    case VIRTIO_BLK_T_FLUSH:
        r->req.type = REQ_FLUSH;
        r->req.off = r->req.len = 0;
        r->req.iov = NULL;
        r->req.iovcnt = 0;
        return BLK_SUBMIT;
    case VIRTIO_BLK_T_GET_ID:
        r->written = put(in, ins, d->serial, sizeof d->serial) + 1;
        r->fill = in;
        r->filled = ins;
        return VIRTIO_BLK_S_OK;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        if (d->read_only)
            return VIRTIO_BLK_S_IOERR;
        if (atomic_load_explicit(&d->write_through, memory_order_relaxed))
            r->req.flags = REQ_FUA;
        return ranges(d, r, h.type == VIRTIO_BLK_T_DISCARD ? REQ_DISCARD : REQ_WRITE_ZEROES, out, outs, out_len);
    default:
        return VIRTIO_BLK_S_UNSUPP;
    }
}

int blk_finish(struct blk_request *r)
{
    if (blk_more(r)) {
        next_range(r);
        return BLK_SUBMIT;
    }
    if (r->req.result == 0)
        return VIRTIO_BLK_S_OK;
    r->written = 1;
    return r->req.result == -EOPNOTSUPP ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
}
