/* Transmission: one validator for requests, and the way from an engine's result to a reply. */
#include <errno.h>

#include "transport/nbd.h"

struct refusal {
    uint32_t error; /* enum nbd_error; 0 = none */
    const char *why;
};

static void reply_simple(struct nbd_conn *c, struct nbd_slot *s, uint32_t error)
{
    struct nbd_simple_reply head = {.magic = htobe32(NBD_SIMPLE_REPLY_MAGIC), .error = htobe32(error),
                                    .cookie = s->cookie};
    memcpy(s->head, &head, sizeof head);
    s->reply = s->head;
    s->reply_size = sizeof head;
    nbd_conn_reply(c, s);
}

static void put_chunk(uint8_t *p, struct nbd_slot *s, uint16_t type, uint32_t length)
{
    struct nbd_chunk head = {.magic = htobe32(NBD_STRUCTURED_REPLY_MAGIC), .flags = htobe16(NBD_REPLY_FLAG_DONE),
                             .type = htobe16(type), .cookie = s->cookie, .length = htobe32(length)};
    memcpy(p, &head, sizeof head);
}

static void reply_error(struct nbd_conn *c, struct nbd_slot *s, struct refusal r)
{
    nbd_conn_drop_buffer(c, s);
    if (!c->structured) {
        reply_simple(c, s, r.error);
        return;
    }
    uint32_t size = strlen(r.why), room = sizeof s->head - sizeof(struct nbd_chunk) - 6;
    if (size > room)
        size = room;
    put_chunk(s->head, s, NBD_REPLY_TYPE_ERROR, 6 + size);
    uint8_t *p = s->head + sizeof(struct nbd_chunk);
    nbd_put32(p, r.error);
    nbd_put16(p + 4, size);
    memcpy(p + 6, r.why, size);
    s->reply = s->head;
    s->reply_size = sizeof(struct nbd_chunk) + 6 + size;
    nbd_conn_reply(c, s);
}

static void reply_read(struct nbd_conn *c, struct nbd_slot *s)
{
    uint32_t size = s->req.len;
    if (size == 0 && c->structured) { /* a data chunk must not be empty */
        put_chunk(s->head, s, NBD_REPLY_TYPE_NONE, 0);
        s->reply = s->head;
        s->reply_size = sizeof(struct nbd_chunk);
    } else if (size == 0) {
        reply_simple(c, s, 0);
        return;
    } else if (c->structured) {
        s->reply = nbd_buffer_data(s->buffer) - sizeof(struct nbd_chunk) - 8;
        s->reply_size = sizeof(struct nbd_chunk) + 8 + size;
        put_chunk(s->reply, s, NBD_REPLY_TYPE_OFFSET_DATA, 8 + size);
        nbd_put64(s->reply + sizeof(struct nbd_chunk), s->req.off);
    } else {
        struct nbd_simple_reply head = {.magic = htobe32(NBD_SIMPLE_REPLY_MAGIC), .cookie = s->cookie};
        s->reply = nbd_buffer_data(s->buffer) - sizeof head;
        s->reply_size = sizeof head + size;
        memcpy(s->reply, &head, sizeof head);
    }
    nbd_conn_reply(c, s);
}

static struct refusal refusal_of(int64_t result)
{
    switch (-result) {
    case EPERM:
    case EROFS:
        return (struct refusal){NBD_EPERM, "the image is read-only"};
    case ENOMEM:
        return (struct refusal){NBD_ENOMEM, "the server is out of memory"};
    case EINVAL:
        return (struct refusal){NBD_EINVAL, "the request does not fit the image"};
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return (struct refusal){NBD_ENOSPC, "the store is full"};
    case ESHUTDOWN:
        return (struct refusal){NBD_ESHUTDOWN, "the server no longer owns the image"};
    default:
        return (struct refusal){NBD_EIO, "the store failed"};
    }
}

void nbd_command_finish(struct nbd_conn *c, struct nbd_slot *s)
{
    if (s->req.result < 0) {
        reply_error(c, s, refusal_of(s->req.result));
    } else if (s->command == NBD_CMD_READ) {
        reply_read(c, s);
    } else if (s->command == NBD_CMD_BLOCK_STATUS) {
        nbd_conn_reply(c, s); /* nbd_status_run made it */
    } else {
        nbd_conn_drop_buffer(c, s);
        reply_simple(c, s, 0);
    }
}

static void request_done(struct req *r)
{
    nbd_conn_completed(r->owner);
}

static bool sent_here(const struct req *r, const void *conn)
{
    return r->done == request_done && ((const struct nbd_slot *)r->owner)->conn == conn;
}

void nbd_command_drop(struct nbd_conn *c)
{
    image_drop(c->image, sent_here, c);
}

static void submit(struct nbd_conn *c, struct nbd_slot *s, enum req_type type, unsigned flags)
{
    s->req.type = type;
    s->req.flags = flags | (s->flags & NBD_CMD_FLAG_FUA && type != REQ_READ && type != REQ_FLUSH ? REQ_FUA : 0);
    s->req.iov = &s->iov;
    s->req.iovcnt = type == REQ_READ || type == REQ_WRITE ? 1 : 0;
    s->req.done = request_done;
    s->req.owner = s;
    c->in_flight++;
    if (s->req.len == 0 && type != REQ_FLUSH) {
        s->req.result = 0;
        nbd_conn_completed(s);
        return;
    }
    image_submit(c->image, &s->req);
}

void nbd_command_submit(struct nbd_conn *c, struct nbd_slot *s)
{
    submit(c, s, REQ_WRITE, 0);
}

/* On a thread that may block. Fills the reply: neighbours of equal state are one extent, and the last one ends with
 * the request at the latest. */
void nbd_status_run(struct job *j)
{
    struct nbd_slot *s = j->owner;
    struct run *runs = (struct run *)nbd_buffer_data(s->buffer);
    uint64_t left = s->req.len;
    int n = image_runs(s->conn->image, s->req.off, left, runs, NBD_RUNS_MAX);
    uint8_t *extents = nbd_buffer_data(s->buffer);
    uint32_t count = 0, last_flags = 0, last_size = 0;
    for (int i = 0; i < n && left; i++) {
        struct run r = runs[i]; /* extents overwrite runs, never one that was not read yet */
        uint32_t size = r.len < left ? r.len : left, flags = r.flags & (RUN_HOLE | RUN_ZERO);
        if (size == 0)
            continue;
        left -= size;
        if (count && flags == last_flags) {
            last_size += size;
        } else {
            if (count && s->flags & NBD_CMD_FLAG_REQ_ONE)
                break;
            count++;
            last_flags = flags;
            last_size = size;
        }
        nbd_put32(extents + 8 * (count - 1), last_size);
        nbd_put32(extents + 8 * (count - 1) + 4, last_flags);
    }
    s->req.result = n < 0 ? n : count ? 0 : -EIO;
    if (s->req.result == 0) {
        s->reply = extents - sizeof(struct nbd_chunk) - 4;
        s->reply_size = sizeof(struct nbd_chunk) + 4 + 8 * count;
        put_chunk(s->reply, s, NBD_REPLY_TYPE_BLOCK_STATUS, 4 + 8 * count);
        nbd_put32(s->reply + sizeof(struct nbd_chunk), NBD_META_ALLOCATION);
    }
    nbd_conn_completed(s);
}

static bool read_only(struct nbd_conn *c)
{
    return c->read_only || atomic_load_explicit(&c->export->image_read_only, memory_order_relaxed);
}

static struct refusal refuse(uint32_t error, const char *why)
{
    return (struct refusal){error, why};
}

/* Everything a request may do wrong short of its magic. Which error is the specification's choice. */
static struct refusal validate(struct nbd_conn *c, uint16_t command, uint16_t flags, uint64_t off, uint32_t len)
{
    uint16_t known = NBD_CMD_FLAG_FUA;
    bool writes = false;
    switch (command) {
    case NBD_CMD_READ:
        known |= c->structured ? NBD_CMD_FLAG_DF : 0;
        if (len > NBD_PAYLOAD_MAX)
            return refuse(c->structured ? NBD_EOVERFLOW : NBD_EINVAL, "the request is longer than 33554432 bytes");
        break;
    case NBD_CMD_CACHE:
        if (len > NBD_PAYLOAD_MAX)
            return refuse(NBD_EOVERFLOW, "the request is longer than 33554432 bytes");
        break;
    case NBD_CMD_WRITE:
        writes = true;
        if (len > NBD_PAYLOAD_MAX)
            return refuse(NBD_EINVAL, "the request is longer than 33554432 bytes");
        break;
    case NBD_CMD_TRIM:
        writes = true;
        break;
    case NBD_CMD_WRITE_ZEROES:
        known |= NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
        writes = true;
        break;
    case NBD_CMD_FLUSH:
        if (off || len)
            return refuse(NBD_EINVAL, "a flush has no offset and no length");
        break;
    case NBD_CMD_BLOCK_STATUS:
        known |= NBD_CMD_FLAG_REQ_ONE;
        if (!c->meta)
            return refuse(NBD_EINVAL, "no metadata context was negotiated");
        if (len == 0)
            return refuse(NBD_EINVAL, "the range is empty");
        break;
    default:
        return refuse(NBD_EINVAL, "the server does not know the command");
    }
    if (flags & ~known)
        return refuse(NBD_EINVAL, "the command does not have that flag");
    if (writes && read_only(c))
        return refuse(NBD_EPERM, "the export is read-only");
    uint64_t size = atomic_load_explicit(&c->export->size, memory_order_relaxed);
    if (off > size || len > size - off)
        return refuse(command == NBD_CMD_WRITE || command == NBD_CMD_WRITE_ZEROES ? NBD_ENOSPC : NBD_EINVAL,
                      "the range ends behind the end of the export");
    /* Space that stays allocated is written: not faster than a write. */
    if ((flags & (NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO)) == (NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO))
        return refuse(NBD_ENOTSUP, "zeroing without a hole is not fast");
    return refuse(0, NULL);
}

/* A refused WRITE: its payload must be read and dropped before the next request can be found. */
static enum nbd_want refuse_write(struct nbd_conn *c, struct nbd_slot *s, struct refusal r, uint32_t len)
{
    c->skip = len;
    s->req.result = 0;
    c->refused = s;
    c->refused_error = r.error;
    c->refused_why = r.why;
    return NBD_AGAIN;
}

void nbd_command_skipped(struct nbd_conn *c)
{
    struct nbd_slot *s = c->refused;
    c->refused = NULL;
    reply_error(c, s, refuse(c->refused_error, c->refused_why));
}

static enum nbd_want write_begin(struct nbd_conn *c, struct nbd_slot *s, uint32_t len)
{
    uint32_t have = nbd_unread(c) - sizeof(struct nbd_request);
    if (have >= len) { /* all of it is here: the engine takes it from the receive buffer */
        c->in_at += sizeof(struct nbd_request);
        s->buffer = c->in;
        s->buffer->refs++;
        s->iov = (struct iovec){.iov_base = nbd_input(c), .iov_len = len};
        c->in_at += len;
        nbd_command_submit(c, s);
        return NBD_AGAIN;
    }
    int rc = nbd_conn_buffer(c, s, len);
    if (rc == -EAGAIN) {
        nbd_conn_drop_slot(c, s);
        return NBD_STALL;
    }
    c->in_at += sizeof(struct nbd_request);
    if (rc)
        return refuse_write(c, s, refusal_of(rc), len);
    memcpy(nbd_buffer_data(s->buffer), nbd_input(c), have);
    c->in_at += have;
    s->iov = (struct iovec){.iov_base = nbd_buffer_data(s->buffer), .iov_len = len};
    c->payload = s;
    c->payload_have = have;
    return NBD_AGAIN;
}

static void status_begin(struct nbd_conn *c, struct nbd_slot *s)
{
    s->job = (struct job){.run = nbd_status_run, .owner = s};
    c->in_flight++;
    if (c->status_running) { /* one at a time: a client must not fill the pool that everybody shares */
        struct nbd_slot **last = &c->status_waiting;
        while (*last)
            last = &(*last)->next;
        s->next = NULL;
        *last = s;
        return;
    }
    c->status_running = true;
    pool_run(&s->job);
}

/* Buffer for READ, CACHE and BLOCK_STATUS, then off it goes. */
static enum nbd_want read_begin(struct nbd_conn *c, struct nbd_slot *s)
{
    bool status = s->command == NBD_CMD_BLOCK_STATUS;
    size_t size = status ? NBD_RUNS_MAX * sizeof(struct run) : s->req.len;
    int rc = size ? nbd_conn_buffer(c, s, size) : 0;
    if (rc == -EAGAIN) {
        nbd_conn_drop_slot(c, s);
        return NBD_STALL;
    }
    c->in_at += sizeof(struct nbd_request);
    if (rc) {
        reply_error(c, s, refusal_of(rc));
    } else if (status) {
        status_begin(c, s);
    } else {
        s->iov = (struct iovec){.iov_base = s->buffer ? nbd_buffer_data(s->buffer) : NULL, .iov_len = size};
        submit(c, s, REQ_READ, 0);
    }
    return NBD_AGAIN;
}

enum nbd_want nbd_command(struct nbd_conn *c)
{
    struct nbd_request r;
    if (nbd_unread(c) < sizeof r)
        return NBD_BYTES;
    memcpy(&r, nbd_input(c), sizeof r);
    uint16_t command = be16toh(r.type), flags = be16toh(r.flags);
    uint32_t len = be32toh(r.length);
    if (be32toh(r.magic) != NBD_REQUEST_MAGIC || (command == NBD_CMD_WRITE && len > NBD_WRITE_SKIP_MAX))
        return NBD_VIOLATION;
    if (command == NBD_CMD_DISC) {
        c->in_at += sizeof r;
        return NBD_DRAIN;
    }
    struct nbd_slot *s = nbd_conn_slot(c);
    if (!s)
        return NBD_STALL;
    s->command = command;
    s->flags = flags;
    s->cookie = r.cookie; /* stays as it came */
    s->req.off = be64toh(r.offset);
    s->req.len = len;
    struct refusal refusal = validate(c, command, flags, s->req.off, len);
    if (!refusal.error && (command == NBD_CMD_READ || command == NBD_CMD_CACHE || command == NBD_CMD_BLOCK_STATUS))
        return read_begin(c, s);
    if (!refusal.error && command == NBD_CMD_WRITE)
        return write_begin(c, s, len);
    c->in_at += sizeof r;
    if (refusal.error && command == NBD_CMD_WRITE && len)
        return refuse_write(c, s, refusal, len);
    if (refusal.error)
        reply_error(c, s, refusal);
    else if (command == NBD_CMD_FLUSH)
        submit(c, s, REQ_FLUSH, 0);
    else if (command == NBD_CMD_TRIM)
        submit(c, s, REQ_DISCARD, 0);
    else
        submit(c, s, REQ_WRITE_ZEROES, flags & NBD_CMD_FLAG_NO_HOLE ? 0 : REQ_UNMAP);
    return NBD_AGAIN;
}
