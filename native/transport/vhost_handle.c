/* What each vhost-user message does. Facts from QEMU's docs/interop/vhost-user.rst and its front end's habits. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/vhost_types.h>
#include <linux/virtio_config.h>
#include <linux/virtio_blk.h>

#include "engine/event.h"
#include "transport/vhost_session.h"

#define BIT(n) (1ULL << (n))
#define F_PROTOCOL_FEATURES 30

static uint64_t offered(const struct vhost_session *s)
{
    return blk_features(&s->export->device, &s->export->settings) | BIT(VHOST_F_LOG_ALL) |
           BIT(VIRTIO_RING_F_INDIRECT_DESC) | BIT(VIRTIO_RING_F_EVENT_IDX) | BIT(F_PROTOCOL_FEATURES) |
           BIT(VIRTIO_F_VERSION_1);
}

static bool any_running(const struct vhost_session *s)
{
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        if (s->queues[n])
            return true;
    return false;
}

static enum handled reply(struct vhost_session *s, const void *payload, uint32_t size, int fd)
{
    return vhost_write(s->socket.fd, s->in.msg.header.request, VHOST_REPLY, payload, size, fd) ? VIOLATION : REPLIED;
}

static enum handled reply_u64(struct vhost_session *s, uint64_t value)
{
    return reply(s, &value, sizeof value, -1);
}

/* The ring a message names, or NULL. */
static struct ring_config *ring_of(struct vhost_session *s, uint32_t index)
{
    return index < s->export->settings.num_queues ? &s->rings[index] : NULL;
}

static int take_fd(struct vu_msg *m, unsigned n)
{
    int fd = m->fds[n];
    m->fds[n] = -1;
    return fd;
}

/* After a change of what queues use: tell those that run. */
static enum handled update(struct vhost_session *s, uint64_t which)
{
    return session_command(s, which, QUEUE_UPDATE, session_acknowledge) ? WAITING : HANDLED;
}

/* ---- features ---- */

static void set_cache_mode(struct vhost_session *s)
{
    struct vhost_export *e = s->export;
    bool back = e->settings.write_cache && s->features & BIT(VIRTIO_BLK_F_FLUSH);
    if (e->settings.write_cache && s->features & BIT(VIRTIO_BLK_F_CONFIG_WCE))
        back = e->writeback;
    atomic_store(&e->device.write_through, !back);
}

static void share_log(struct vhost_session *s)
{
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        s->rings[n].log = s->features & BIT(VHOST_F_LOG_ALL) ? s->log : NULL;
}

static enum handled set_features(struct vhost_session *s, uint64_t features)
{
    if (features & ~offered(s))
        return VIOLATION;
    if (any_running(s) && (features ^ s->features) & ~(BIT(VHOST_F_LOG_ALL) | BIT(F_PROTOCOL_FEATURES)))
        return VIOLATION; /* only logging may change under a running ring */
    s->features = features;
    /* QEMU 7.2 does not notice a back end that comes back while its guest is still on the way from another host: it goes
     * on where it was, with what it negotiated with the one before, which offered what we offer. */
    if (features & BIT(F_PROTOCOL_FEATURES) && !s->protocol_said)
        s->protocol = s->export->protocol;
    if (!(features & BIT(F_PROTOCOL_FEATURES)))
        for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
            s->rings[n].enabled = true;
    set_cache_mode(s);
    share_log(s);
    return update(s, SESSION_ALL_QUEUES);
}

static enum handled set_protocol_features(struct vhost_session *s, uint64_t features)
{
    if (features & ~s->export->protocol || (any_running(s) && features != s->protocol))
        return VIOLATION;
    s->protocol = features;
    s->protocol_said = true;
    return HANDLED;
}

/* ---- memory ---- */

/* Publishes s->regions as the memory of all rings. */
static enum handled change_memory(struct vhost_session *s)
{
    int err;
    struct guest_memory *mem = guest_memory_new(s->regions, s->region_count, &err);
    if (!mem)
        return VIOLATION;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++) {
        struct split_ring probe = {.num = s->rings[n].num};
        if (s->queues[n] && ring_map(&probe, mem, &s->rings[n].addresses)) {
            guest_memory_put(mem); /* took the memory away from under a running ring */
            return VIOLATION;
        }
    }
    s->old_mem = s->mem;
    s->mem = mem;
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        s->rings[n].mem = mem;
    enum handled rc = update(s, SESSION_ALL_QUEUES);
    if (rc != WAITING) {
        guest_memory_put(s->old_mem);
        s->old_mem = NULL;
    }
    return rc;
}

static enum handled set_mem_table(struct vhost_session *s, struct vu_msg *m)
{
    uint32_t count = m->table.count;
    if (count > VHOST_REGIONS_PER_TABLE || m->fd_count != count ||
        m->header.size != 8 + count * sizeof(struct vhost_mem_region))
        return VIOLATION;
    for (unsigned n = 0; n < s->region_count; n++)
        guest_region_put(s->regions[n]); /* the table in use has its own references */
    s->region_count = 0;
    for (uint32_t n = 0; n < count; n++) {
        const struct vhost_mem_region *r = &m->table.regions[n];
        if (guest_region_map(r->guest, r->user, r->size, r->offset, take_fd(m, n), &s->regions[n]))
            return VIOLATION;
        s->region_count++;
    }
    return change_memory(s);
}

static enum handled add_mem_reg(struct vhost_session *s, struct vu_msg *m)
{
    const struct vhost_mem_region *r = &m->one.region;
    if (s->region_count == GUEST_REGIONS_MAX ||
        guest_region_map(r->guest, r->user, r->size, r->offset, take_fd(m, 0), &s->regions[s->region_count]))
        return VIOLATION;
    s->region_count++;
    return change_memory(s);
}

static enum handled rem_mem_reg(struct vhost_session *s, struct vu_msg *m)
{
    const struct vhost_mem_region *r = &m->one.region;
    for (unsigned n = 0; n < s->region_count; n++) {
        struct guest_region *g = s->regions[n];
        if (g->guest == r->guest && g->user == r->user && g->size == r->size) {
            s->regions[n] = s->regions[--s->region_count];
            enum handled rc = change_memory(s);
            guest_region_put(g);
            return rc;
        }
    }
    return VIOLATION;
}

/* ---- dirty log ---- */

/* QEMU starts rings first and sends its log afterwards when they start in the middle of a migration: after a reset of the
 * guest, or when our predecessor died, whose log QEMU has thrown away without reading it to the end. What was written
 * since it last read one nobody knows. */
static void log_what_was_not(struct vhost_session *s)
{
    if (s->unlogged)
        dirty_log_mark_all(s->log, s->mem);
    s->unlogged = false;
}

static void log_switched(struct vhost_session *s)
{
    log_what_was_not(s);
    if (reply_u64(s, 0) == REPLIED)
        session_read_on(s);
    else
        vhost_session_close(s, true);
}

static enum handled set_log_base(struct vhost_session *s, struct vu_msg *m)
{
    struct dirty_log *log;
    if (dirty_log_map(take_fd(m, 0), m->log.offset, m->log.size, &s->export->base.dirty_pages, &log))
        return VIOLATION;
    if (s->mem && !dirty_log_covers(log, guest_memory_end(s->mem))) {
        dirty_log_put(log);
        return VIOLATION;
    }
    s->old_log = s->log;
    s->log = log;
    share_log(s);
    /* Answered when no queue marks the old log any more: the front end then reads that one for the last time. */
    if (session_command(s, SESSION_ALL_QUEUES, QUEUE_UPDATE, log_switched))
        return WAITING;
    dirty_log_put(s->old_log);
    s->old_log = NULL;
    log_what_was_not(s);
    return reply_u64(s, 0);
}

/* ---- rings ---- */

static enum handled set_vring_num(struct vhost_session *s, uint32_t index, uint32_t num)
{
    struct ring_config *c = ring_of(s, index);
    if (!c || s->queues[index] || num == 0 || num > RING_SIZE_MAX || num & (num - 1))
        return VIOLATION;
    c->num = (uint16_t)num;
    return HANDLED;
}

static enum handled set_vring_base(struct vhost_session *s, uint32_t index, uint32_t base)
{
    struct ring_config *c = ring_of(s, index);
    if (!c || s->queues[index] || base > UINT16_MAX)
        return VIOLATION;
    c->base = (uint16_t)base;
    return HANDLED;
}

static enum handled set_vring_addr(struct vhost_session *s, struct vu_msg *m)
{
    struct ring_config *c = ring_of(s, m->addr.index);
    struct ring_addresses a = {.desc = m->addr.desc, .avail = m->addr.avail, .used = m->addr.used};
    if (!c || m->addr.flags & ~BIT(VHOST_VRING_F_LOG) || a.desc % 16 || a.avail % 2 || a.used % 4)
        return VIOLATION;
    if (s->queues[m->addr.index] && memcmp(&a, &c->addresses, sizeof a))
        return VIOLATION; /* of a running ring only the logging changes */
    c->addresses = a;
    c->log_used = m->addr.flags & BIT(VHOST_VRING_F_LOG);
    c->log_addr = m->addr.log;
    s->addressed[m->addr.index] = true;
    return update(s, BIT(m->addr.index));
}

static bool is_eventfd(int fd)
{
    /* Anything else could block or raise SIGPIPE where an eventfd does not. */
    char path[32], target[32] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof target - 1);
    return n < 0 ? errno == ENOENT && access("/proc/self", F_OK) != 0 : strcmp(target, "anon_inode:[eventfd]") == 0;
}

enum ring_fd { RING_KICK, RING_CALL, RING_ERR };

static enum handled set_vring_fd(struct vhost_session *s, struct vu_msg *m, enum ring_fd which)
{
    uint64_t index = m->u64 & 0xff;
    bool none = m->u64 & 0x100;
    struct ring_config *c = ring_of(s, (uint32_t)index);
    if (!c || m->u64 & ~0x1ffULL || m->fd_count != !none)
        return VIOLATION;
    if (which == RING_KICK && none)
        return VIOLATION; /* a ring that must be polled for ever: not offered */
    int fd = -1;
    if (!none) {
        if (!is_eventfd(m->fds[0]) || fcntl(m->fds[0], F_SETFL, O_NONBLOCK | O_RDWR))
            return VIOLATION;
        fd = take_fd(m, 0);
    }
    int *slot = which == RING_KICK ? &c->kick : which == RING_CALL ? &c->call : &c->err;
    s->old_fd = *slot;
    *slot = fd;
    if (s->queues[index])
        return update(s, BIT(index)); /* which closes the old one */
    if (s->old_fd >= 0)
        close(s->old_fd);
    s->old_fd = -1;
    return HANDLED;
}

static enum handled set_vring_enable(struct vhost_session *s, uint32_t index, uint32_t on)
{
    struct ring_config *c = ring_of(s, index);
    if (!c || on > 1 || !(s->features & BIT(F_PROTOCOL_FEATURES)))
        return VIOLATION;
    c->enabled = on;
    return update(s, BIT(index));
}

static void forget_kick(struct ring_config *c)
{
    if (c->kick >= 0)
        close(c->kick);
    c->kick = -1;
}

static void answer_base(struct vhost_session *s)
{
    uint32_t index = s->in.msg.state.index;
    struct {
        uint32_t index, num;
    } state = {index, s->rings[index].base};
    if (reply(s, &state, sizeof state, -1) == REPLIED)
        session_read_on(s);
    else
        vhost_session_close(s, true);
}

/* The guest is moving: a front end that logs our writes has stopped the last ring. (One that does not log stops the
 * firmware's rings, or pauses.) With the answer the guest may run elsewhere, so first Python offers the lock. A guest that
 * is reset during a migration comes here, too: its rings start again, and the lock is taken back. */
static void hold_switchover(struct vhost_session *s)
{
    struct vhost_export *e = s->export;
    s->holding = true;
    e->switched = true;
    atomic_store(&e->base.held, ++e->switchovers);
    vhost_export_timer(e, e->offer_ms);
    event_post(EVENT_EXPORT_SWITCHOVER, e->base.id, e->switchovers);
}

static void base_drained(struct vhost_session *s)
{
    uint32_t index = s->in.msg.state.index;
    struct ring_config *c = &s->rings[index];
    if (s->queues[index]) {
        c->base = vhost_queue_base(s->queues[index]);
        session_reap(s, index);
    }
    forget_kick(c);
    if (!any_running(s) && s->log && s->features & BIT(VHOST_F_LOG_ALL))
        hold_switchover(s);
    else
        answer_base(s);
}

void vhost_session_go_on(struct vhost_session *s)
{
    vhost_export_timer(s->export, 0);
    s->holding = false;
    answer_base(s);
}

static enum handled get_vring_base(struct vhost_session *s, uint32_t index)
{
    struct ring_config *c = ring_of(s, index);
    if (!c)
        return VIOLATION;
    if (session_stop_queue(s, index, base_drained))
        return WAITING;
    forget_kick(c);
    struct {
        uint32_t index, num;
    } state = {index, c->base};
    return reply(s, &state, sizeof state, -1);
}

static void rings_forgotten(struct vhost_session *s)
{
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++) {
        if (s->queues[n])
            s->rings[n].base = vhost_queue_base(s->queues[n]);
        session_reap(s, n);
        forget_kick(&s->rings[n]);
        s->rings[n].enabled = !(s->features & BIT(F_PROTOCOL_FEATURES));
    }
}

static void reset_drained(struct vhost_session *s)
{
    rings_forgotten(s);
    session_acknowledge(s);
}

static enum handled reset(struct vhost_session *s)
{
    if (session_stop_all(s, reset_drained))
        return WAITING;
    rings_forgotten(s);
    return HANDLED;
}

/* ---- in-flight table ---- */

static enum handled get_inflight(struct vhost_session *s, struct vu_msg *m)
{
    uint16_t queues = m->inflight.num_queues, size = m->inflight.queue_size;
    if (queues == 0 || queues > s->export->settings.num_queues || size == 0 || size > RING_SIZE_MAX)
        return VIOLATION;
    m->inflight.size = queues * inflight_size(size);
    m->inflight.offset = 0;
    int fd = shm_create("vhost-inflight", m->inflight.size);
    if (fd < 0) {
        m->inflight.size = 0; /* as much as to say: none */
        return reply(s, m->bytes, m->header.size, -1);
    }
    enum handled rc = reply(s, m->bytes, m->header.size, fd);
    close(fd);
    return rc;
}

static enum handled set_inflight(struct vhost_session *s, struct vu_msg *m)
{
    uint16_t queues = m->inflight.num_queues, size = m->inflight.queue_size;
    if (any_running(s) || queues == 0 || queues > s->export->settings.num_queues || size == 0 || size > RING_SIZE_MAX ||
        m->inflight.offset % 64 || m->inflight.size < queues * inflight_size(size))
        return VIOLATION;
    shm_unmap(&s->inflight);
    for (unsigned n = 0; n < VHOST_QUEUES_MAX; n++)
        s->rings[n].inflight = NULL;
    if (shm_map(&s->inflight, take_fd(m, 0), m->inflight.offset, queues * inflight_size(size)))
        return VIOLATION;
    for (unsigned n = 0; n < queues; n++) {
        s->rings[n].inflight = (struct inflight_queue *)(s->inflight.base + n * inflight_size(size));
        s->rings[n].inflight_num = size;
    }
    return HANDLED;
}

/* ---- configuration space ---- */

static enum handled get_config(struct vhost_session *s, struct vu_msg *m)
{
    uint8_t space[BLK_CONFIG_SIZE];
    uint32_t offset = m->config.offset, size = m->config.size;
    if (size != m->header.size - 12 || offset > sizeof space || size > sizeof space - offset)
        return VIOLATION;
    blk_config(&s->export->device, &s->export->settings, s->export->writeback, space);
    memcpy(m->config.data, space + offset, size);
    return reply(s, m->bytes, m->header.size, -1);
}

static enum handled set_config(struct vhost_session *s, struct vu_msg *m)
{
    if (m->config.size != m->header.size - 12)
        return VIOLATION;
    if (m->config.offset != BLK_CONFIG_WCE || m->config.size != 1 || m->config.data[0] > 1 ||
        !s->export->settings.write_cache)
        return REFUSED; /* everything else is read-only to drivers */
    s->export->writeback = m->config.data[0];
    set_cache_mode(s);
    return HANDLED;
}

static enum handled set_backend_fd(struct vhost_session *s, struct vu_msg *m)
{
    struct stat st;
    if (fstat(m->fds[0], &st) || !S_ISSOCK(st.st_mode))
        return VIOLATION;
    if (s->backend >= 0)
        close(s->backend);
    s->backend = take_fd(m, 0);
    return HANDLED;
}

enum handled vhost_handle(struct vhost_session *s)
{
    struct vu_msg *m = &s->in.msg;
    if (shm_losses() != s->losses) {
        s->losses = shm_losses();
        if (session_lost(s))
            return VIOLATION;
    }
    switch ((enum vhost_message)m->header.request) {
    case VHOST_GET_FEATURES:
        return reply_u64(s, offered(s));
    case VHOST_SET_FEATURES:
        return set_features(s, m->u64);
    case VHOST_GET_PROTOCOL_FEATURES:
        return reply_u64(s, s->export->protocol);
    case VHOST_SET_PROTOCOL_FEATURES:
        return set_protocol_features(s, m->u64);
    case VHOST_SET_OWNER: /* a session has one owner from its first byte to its last */
    case VHOST_SET_LOG_FD: /* nobody waits for it: the log is found out by reading it. Closed */
        return HANDLED;
    case VHOST_RESET_OWNER: /* deprecated; "back-ends are recommended to use it to disable all rings" */
    case VHOST_RESET_DEVICE:
        return reset(s);
    case VHOST_SET_MEM_TABLE:
        return set_mem_table(s, m);
    case VHOST_ADD_MEM_REG:
        return add_mem_reg(s, m);
    case VHOST_REM_MEM_REG:
        return rem_mem_reg(s, m);
    case VHOST_GET_MAX_MEM_SLOTS:
        return reply_u64(s, GUEST_REGIONS_MAX);
    case VHOST_SET_LOG_BASE:
        return set_log_base(s, m);
    case VHOST_SET_VRING_NUM:
        return set_vring_num(s, m->state.index, m->state.num);
    case VHOST_SET_VRING_ADDR:
        return set_vring_addr(s, m);
    case VHOST_SET_VRING_BASE:
        return set_vring_base(s, m->state.index, m->state.num);
    case VHOST_GET_VRING_BASE:
        return get_vring_base(s, m->state.index);
    case VHOST_SET_VRING_KICK:
        return set_vring_fd(s, m, RING_KICK);
    case VHOST_SET_VRING_CALL:
        return set_vring_fd(s, m, RING_CALL);
    case VHOST_SET_VRING_ERR:
        return set_vring_fd(s, m, RING_ERR);
    case VHOST_SET_VRING_ENABLE:
        return set_vring_enable(s, m->state.index, m->state.num);
    case VHOST_GET_QUEUE_NUM:
        return reply_u64(s, s->export->settings.num_queues);
    case VHOST_SET_BACKEND_REQ_FD:
        return set_backend_fd(s, m);
    case VHOST_GET_CONFIG:
        return get_config(s, m);
    case VHOST_SET_CONFIG:
        return set_config(s, m);
    case VHOST_GET_INFLIGHT_FD:
        return get_inflight(s, m);
    case VHOST_SET_INFLIGHT_FD:
        return set_inflight(s, m);
    }
    return VIOLATION;
}
