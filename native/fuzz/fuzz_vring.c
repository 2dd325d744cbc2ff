/* A guest that writes what it likes into its rings: descriptors, indices, headers, indirect tables, between any two
 * steps of ours; with dirty log and in-flight table on, requests completing late and in any order, memory and log
 * changing under them, the back end dying and starting again.
 *
 * Memory of the guest ends in pages that fault; log and table are heap blocks of exactly their size.
 *
 * link: transport/vhost_queue.c transport/vhost_order.c transport/vring.c transport/virtio_blk.c
 * link: transport/guest_memory.c transport/vhost_log.c
 * link: transport/vhost_shm.c transport/export.c transport/vhost_call.c store/guard.c
 * seeds: seeds_vring.py
 */
#define _GNU_SOURCE /* memfd_create */
#include "one_thread.h"
#include "vhost_image.h"

#include <sys/eventfd.h>

#include "transport/vhost_queue.h"

#define REGIONS 3
#define REGION 16384
#define GUARD 4096
#define STEPS 400

struct input {
    const uint8_t *at, *end;
};

static uint64_t number(struct input *i, unsigned bytes)
{
    uint64_t v = 0;
    for (unsigned n = 0; n < bytes; n++)
        v |= (uint64_t)(i->at < i->end ? *i->at++ : 0) << 8 * n;
    return v;
}

/* Regions 0 and 1 touch each other in the guest, 2 is far up; addresses of the front end are others again. */
static const uint64_t guest_of[REGIONS] = {0, REGION, 1ULL << 40};
static uint8_t *host[REGIONS];
static struct guest_region region[REGIONS];
static struct image *image;
static int kick_fd;
static unsigned unanswered;

static void once(void)
{
    for (unsigned n = 0; n < REGIONS; n++) {
        uint8_t *p = mmap(NULL, REGION + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED || mprotect(p + GUARD, REGION, PROT_READ | PROT_WRITE))
            abort();
        host[n] = p + GUARD;
        region[n] = (struct guest_region){.refs = 1 << 30, .guest = guest_of[n], .user = 0x10000000ULL * (n + 1), .size = REGION};
        region[n].shm = (struct shm){.base = host[n], .len = REGION, .fd = -1};
    }
    image = fake_image_new(NULL, 1 << 20, 1 << 20);
    kick_fd = eventfd(0, EFD_NONBLOCK);
}

static void on_answer(void *owner, enum queue_command c)
{
    unanswered--;
}

static void command(struct vhost_queue *q, enum queue_command c)
{
    unanswered++;
    vhost_queue_command(q, c);
    run_posts();
}

/* An address near something interesting: small inputs reach the edges. */
static uint64_t address(struct input *i)
{
    uint8_t what = (uint8_t)number(i, 1);
    uint64_t off = number(i, 2);
    switch (what % 8) {
    case 0: case 1: case 2:
        return guest_of[what % 8] + off % REGION;
    case 3:
        return guest_of[what / 8 % REGIONS] + REGION - off % 64;
    case 4:
        return UINT64_MAX - off % 8192;
    case 5:
        return number(i, 8);
    default:
        return guest_of[0] + (off & ~15ULL) % REGION;
    }
}

static uint32_t length(struct input *i)
{
    uint8_t what = (uint8_t)number(i, 1);
    static const uint32_t some[] = {0, 1, 15, 16, 17, 20, 511, 512, 513, 4096, 16384, 32768, 0xFFFFFFFF, 0xFFFFFE00, 32, 48};
    return what < 64 ? some[what % 16] : what < 200 ? what : (uint32_t)number(i, 4);
}

static struct vring_desc *host_desc(uint8_t *table, unsigned n)
{
    return (struct vring_desc *)(table + 16 * (n % (REGION / 16)));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    if (!image)
        once();
    for (unsigned n = 0; n < REGIONS; n++)
        memset(host[n], 0, REGION);
    uint8_t mode = (uint8_t)number(&in, 1);
    uint16_t num = (uint16_t)(1u << number(&in, 1) % 8);
    image->async = mode & 1;
    image->fence = 0;
    struct export export = {.id = 1, .image = image};
    struct blk_device device = {.image = image, .read_only = mode & 64, .write_through = mode & 128};
    int err;
    struct guest_region *list[REGIONS] = {&region[0], &region[1], &region[2]};
    struct guest_memory *mem = guest_memory_new(list, REGIONS, &err);
    size_t log_size = 1 + number(&in, 1) % 4, table_size = inflight_size(num);
    struct dirty_log log = {.refs = 2, .marked = &export.dirty_pages};
    log.shm = (struct shm){.base = malloc(log_size), .len = log_size, .fd = -1};
    memset(log.shm.base, 0, log_size);
    struct inflight_queue *table = aligned_alloc(64, table_size);
    memset(table, 0, table_size);
    if (mode & 32) /* a table of lies */
        for (size_t n = 0; n < table_size && in.at < in.end; n += 8)
            ((uint8_t *)table)[n] = (uint8_t)number(&in, 1);
    uint64_t used_off = mode & 16 ? 4096 : 8192; /* the used ring over the avail ring, or apart */
    struct ring_config config = {
        .num = num, .enabled = true, .kick = kick_fd, .call = -1, .err = -1, .mem = mem,
        .addresses = {.desc = region[0].user, .avail = region[0].user + 4096, .used = region[0].user + used_off},
        .log_used = true, .log_addr = number(&in, 1) % 2 ? UINT64_MAX - 4096 : used_off, .log = &log,
        .event_idx = mode & 2, .indirect = mode & 4, .inflight = mode & 8 ? table : NULL,
    };
    struct vhost_queue *q = vhost_queue_new(&export, &device, 0, &config, &the_reactor, on_answer, NULL);
    if (!mem || !q)
        abort();
    command(q, QUEUE_START);
    uint16_t *avail = (uint16_t *)(host[0] + 4096);
    for (unsigned step = 0; step < STEPS && in.at < in.end; step++) {
        uint8_t what = (uint8_t)number(&in, 1);
        switch (what % 16) {
        case 0: case 1: case 2: case 3: { /* a descriptor of the ring or of a table anywhere */
            bool in_ring = what % 16 < 2;
            uint8_t *to = in_ring ? host[0] : host[what / 16 % REGIONS] + number(&in, 1) * 64 % (REGION - 64);
            unsigned index = (unsigned)number(&in, 1) % (in_ring ? 128 : 4);
            uint64_t addr = address(&in);
            uint32_t len = length(&in);
            uint16_t flags = (uint16_t)number(&in, 1);
            uint16_t next = flags & 128 ? (uint16_t)(index + 1) : (uint16_t)number(&in, 2);
            *host_desc(to, index) = (struct vring_desc){addr, len, flags % 8, next};
            break;
        }
        case 4: case 5: { /* offer a head */
            uint16_t head = (uint16_t)number(&in, 1);
            avail[2 + (avail[1] & (num - 1))] = head;
            avail[1]++;
            break;
        }
        case 6: /* any bytes anywhere */
            for (unsigned n = (unsigned)number(&in, 1) % 24, at = (unsigned)number(&in, 2); n > 0; n--)
                host[what / 16 % REGIONS][at++ % REGION] = (uint8_t)number(&in, 1);
            break;
        case 7: { /* a header */
            struct { uint32_t type, priority; uint64_t sector; } h = {
                (uint32_t)number(&in, 1) % 16, 0, what & 128 ? number(&in, 8) : number(&in, 2)};
            memcpy(host[what / 16 % REGIONS] + number(&in, 2) % (REGION - 16), &h, sizeof h);
            break;
        }
        case 8:
            avail[1] = (uint16_t)number(&in, 2);
            break;
        case 9: case 10: { /* kick */
            uint64_t kick = 1;
            if (write(kick_fd, &kick, sizeof kick) == sizeof kick)
                run_files(1);
            break;
        }
        case 11:
            run_job(what / 16);
            break;
        case 12:
            sleep_all();
            break;
        case 13:
            poll_all();
            break;
        case 14: /* something changes under the running ring; as in a session every table is a new one */
            config.mem = guest_memory_new(list, what & 16 ? 1 : REGIONS, &err);
            config.log = what & 32 ? &log : NULL;
            config.enabled = what & 64;
            command(q, QUEUE_UPDATE);
            guest_memory_put(mem);
            mem = config.mem;
            break;
        case 15: /* the back end dies, or the ring is stopped, and starts again */
            command(q, what & 16 ? QUEUE_ABANDON : QUEUE_STOP);
            if (what & 16)
                command(q, QUEUE_STOP);
            run_jobs();
            if (unanswered)
                abort(); /* a command was lost */
            config.base = vhost_queue_base(q);
            vhost_queue_free(q);
            q = vhost_queue_new(&export, &device, 0, &config, &the_reactor, on_answer, NULL);
            command(q, QUEUE_START);
            break;
        }
    }
    command(q, QUEUE_STOP);
    run_jobs();
    if (unanswered || the_reactor.watches || the_reactor.pollers)
        abort();
    vhost_queue_free(q);
    guest_memory_put(mem);
    if (region[0].refs != 1 << 30)
        abort(); /* a request kept a table, or let one go that it did not have */
    free(log.shm.base);
    free(table);
    return 0;
}
