/* Handshake and options. Every length is checked here, once: an option is looked at only when all of it is in the
 * receive buffer, and too long ones never get there. */
#include <errno.h>
#include <stdlib.h>

#include "transport/nbd.h"

#define BASE_ALLOCATION "base:allocation"
#define TEXT_SPARE (16u << 10) /* unsent option replies beyond which no further option is looked at */

static uint8_t *text_add(struct nbd_conn *c, size_t size)
{
    if (c->text_end + size > c->text_size) {
        size_t bigger = (c->text_end + size) * 2;
        uint8_t *text = realloc(c->text, bigger);
        if (!text) {
            c->text_failed = true;
            return NULL;
        }
        c->text = text;
        c->text_size = bigger;
    }
    uint8_t *p = c->text + c->text_end;
    c->text_end += size;
    return p;
}

/* Room for `size` bytes of payload behind the reply's header; NULL without memory. */
static uint8_t *answer(struct nbd_conn *c, uint32_t option, uint32_t reply, uint32_t size)
{
    uint8_t *p = text_add(c, sizeof(struct nbd_option_reply) + size);
    if (!p)
        return NULL;
    struct nbd_option_reply head = {.magic = htobe64(NBD_OPTION_REPLY_MAGIC), .option = htobe32(option),
                                    .reply = htobe32(reply), .length = htobe32(size)};
    memcpy(p, &head, sizeof head);
    return p + sizeof head;
}

static enum nbd_want say(struct nbd_conn *c, uint32_t option, uint32_t reply, const char *why)
{
    uint32_t size = why ? strlen(why) : 0;
    uint8_t *p = answer(c, option, reply, size);
    if (!p)
        return NBD_VIOLATION; /* no memory for thirty bytes: end it */
    if (size)
        memcpy(p, why, size);
    return NBD_AGAIN;
}

static enum nbd_want invalid(struct nbd_conn *c, uint32_t option, const char *why)
{
    return say(c, option, NBD_REP_ERR_INVALID, why);
}

int nbd_greet(struct nbd_conn *c)
{
    uint8_t *p = text_add(c, 18);
    if (!p)
        return -ENOMEM;
    nbd_put64(p, NBD_MAGIC);
    nbd_put64(p + 8, NBD_OPTION_MAGIC);
    nbd_put16(p + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    return 0;
}

static uint16_t transmission_flags(const struct nbd_conn *c, bool read_only)
{
    uint16_t flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_CAN_MULTI_CONN |
                     NBD_FLAG_SEND_CACHE;
    if (c->structured)
        flags |= NBD_FLAG_SEND_DF;
    return flags | (read_only ? NBD_FLAG_READ_ONLY
                              : NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO);
}

static bool read_only_now(const struct nbd_export *e)
{
    return e->read_only || atomic_load(&e->image_read_only);
}

static void enter(struct nbd_conn *c, struct nbd_export *e)
{
    if (!export_client_came(&e->base))
        return; /* stopping: the caller sees that there is no export */
    c->export = e;
    c->image = e->base.image;
    c->read_only = read_only_now(e);
    c->meta = c->structured && c->meta_serial == e->serial;
}

static enum nbd_want export_name(struct nbd_conn *c, const uint8_t *data, uint32_t size)
{
    if (size > NBD_STRING_MAX)
        return NBD_VIOLATION;
    nbd_server_find(c->server, data, size, enter, c);
    if (!c->export)
        return NBD_DRAIN; /* this option has no way to say no */
    uint32_t zeroes = c->no_zeroes ? 0 : 124;
    uint8_t *p = text_add(c, 10 + zeroes);
    if (!p)
        return NBD_VIOLATION;
    nbd_put64(p, atomic_load(&c->export->size));
    nbd_put16(p + 8, transmission_flags(c, c->read_only));
    memset(p + 10, 0, zeroes);
    c->state = NBD_TRANSMISSION;
    return NBD_AGAIN;
}

static void list_one(struct nbd_conn *c, struct nbd_export *e)
{
    uint32_t description = e->description ? strlen(e->description) : 0;
    uint8_t *p = answer(c, NBD_OPT_LIST, NBD_REP_SERVER, 4 + e->name_size + description);
    if (!p)
        return;
    nbd_put32(p, e->name_size);
    memcpy(p + 4, e->name, e->name_size);
    if (description)
        memcpy(p + 4 + e->name_size, e->description, description);
}

/* What INFO and GO share: asked is a bit per nbd_info. */
struct wanted {
    uint32_t option, asked;
    const uint8_t *name;
    uint32_t name_size;
};

static const char *parse_wanted(struct wanted *w, const uint8_t *data, uint32_t size)
{
    if (size < 6)
        return "the option is too short";
    w->name_size = nbd_get32(data);
    if (w->name_size > size - 6)
        return "the export name is longer than the option";
    if (w->name_size > NBD_STRING_MAX)
        return "the export name is longer than 4096 bytes";
    w->name = data + 4;
    data += 4 + w->name_size;
    size -= 6 + w->name_size;
    uint32_t count = nbd_get16(data);
    if (size != count * 2)
        return "the number of information requests does not fit the option's length";
    w->asked = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint16_t info = nbd_get16(data + 2 + 2 * i);
        if (info <= NBD_INFO_BLOCK_SIZE)
            w->asked |= 1u << info;
    }
    return NULL;
}

static void tell_string(struct nbd_conn *c, uint32_t option, uint16_t info, const char *text, uint32_t size)
{
    uint8_t *p = answer(c, option, NBD_REP_INFO, 2 + size);
    if (!p)
        return;
    nbd_put16(p, info);
    memcpy(p + 2, text, size);
}

static void tell(struct nbd_conn *c, const struct nbd_export *e, bool read_only, uint32_t option, uint32_t asked)
{
    uint8_t *p = answer(c, option, NBD_REP_INFO, 12);
    if (!p)
        return;
    nbd_put16(p, NBD_INFO_EXPORT);
    nbd_put64(p + 2, atomic_load(&e->size));
    nbd_put16(p + 10, transmission_flags(c, read_only));
    if (asked & 1u << NBD_INFO_NAME)
        tell_string(c, option, NBD_INFO_NAME, e->name, e->name_size);
    if (asked & 1u << NBD_INFO_DESCRIPTION && e->description)
        tell_string(c, option, NBD_INFO_DESCRIPTION, e->description, strlen(e->description));
    if (asked & 1u << NBD_INFO_BLOCK_SIZE && (p = answer(c, option, NBD_REP_INFO, 14))) {
        nbd_put16(p, NBD_INFO_BLOCK_SIZE);
        nbd_put32(p + 2, 1);
        nbd_put32(p + 6, 4096);
        nbd_put32(p + 10, NBD_PAYLOAD_MAX);
    }
}

static void tell_info(struct nbd_conn *c, struct nbd_export *e)
{
    tell(c, e, read_only_now(e), NBD_OPT_INFO, c->asked);
}

static enum nbd_want info_or_go(struct nbd_conn *c, uint32_t option, const uint8_t *data, uint32_t size)
{
    struct wanted w;
    const char *why = parse_wanted(&w, data, size);
    if (why)
        return invalid(c, option, why);
    bool found;
    if (option == NBD_OPT_INFO) {
        c->asked = w.asked;
        found = nbd_server_find(c->server, w.name, w.name_size, tell_info, c);
    } else {
        nbd_server_find(c->server, w.name, w.name_size, enter, c);
        found = c->export != NULL;
        if (found)
            tell(c, c->export, c->read_only, option, w.asked);
    }
    if (!found)
        return say(c, option, NBD_REP_ERR_UNKNOWN, "there is no export of that name");
    if (option == NBD_OPT_GO)
        c->state = NBD_TRANSMISSION;
    return say(c, option, NBD_REP_ACK, NULL);
}

static void select_meta(struct nbd_conn *c, struct nbd_export *e)
{
    c->meta_serial = e->serial;
}

static void nothing(struct nbd_conn *c, struct nbd_export *e)
{
}

/* Syntax first, all of it: an error must not come behind half of the answer. */
static const char *parse_queries(uint32_t option, const uint8_t *p, uint32_t left, bool *matches)
{
    uint32_t count = nbd_get32(p);
    p += 4;
    left -= 4;
    *matches = option == NBD_OPT_LIST_META_CONTEXT && count == 0;
    for (; count; count--) {
        if (left < 4)
            return "a query is missing";
        uint32_t size = nbd_get32(p);
        p += 4;
        left -= 4;
        if (size > left)
            return "a query is longer than the option";
        if (size > NBD_STRING_MAX)
            return "a query is longer than 4096 bytes";
        if (size == strlen(BASE_ALLOCATION) && !memcmp(p, BASE_ALLOCATION, size))
            *matches = true;
        if (option == NBD_OPT_LIST_META_CONTEXT && size == 5 && !memcmp(p, "base:", 5))
            *matches = true;
        p += size;
        left -= size;
    }
    return left ? "there are bytes behind the last query" : NULL;
}

static enum nbd_want meta_context(struct nbd_conn *c, uint32_t option, const uint8_t *data, uint32_t size)
{
    bool set = option == NBD_OPT_SET_META_CONTEXT, matches;
    if (set)
        c->meta_serial = 0; /* replaced even when this one fails */
    if (!c->structured)
        return invalid(c, option, "structured replies must be negotiated first");
    if (size < 8)
        return invalid(c, option, "the option is too short");
    uint32_t name_size = nbd_get32(data);
    if (name_size > size - 8)
        return invalid(c, option, "the export name is longer than the option");
    if (name_size > NBD_STRING_MAX)
        return invalid(c, option, "the export name is longer than 4096 bytes");
    const char *why = parse_queries(option, data + 4 + name_size, size - 4 - name_size, &matches);
    if (why)
        return invalid(c, option, why);
    if (!nbd_server_find(c->server, data + 4, name_size, set && matches ? select_meta : nothing, c))
        return say(c, option, NBD_REP_ERR_UNKNOWN, "there is no export of that name");
    if (matches) {
        uint8_t *p = answer(c, option, NBD_REP_META_CONTEXT, 4 + strlen(BASE_ALLOCATION));
        if (!p)
            return NBD_VIOLATION;
        nbd_put32(p, set ? NBD_META_ALLOCATION : 0);
        memcpy(p + 4, BASE_ALLOCATION, strlen(BASE_ALLOCATION));
    }
    return say(c, option, NBD_REP_ACK, NULL);
}

static enum nbd_want option_complete(struct nbd_conn *c, uint32_t option, const uint8_t *data, uint32_t size)
{
    switch (option) {
    case NBD_OPT_EXPORT_NAME:
        return export_name(c, data, size);
    case NBD_OPT_ABORT:
        say(c, option, NBD_REP_ACK, NULL);
        return NBD_DRAIN;
    case NBD_OPT_LIST:
        if (size)
            return invalid(c, option, "the option has no data");
        nbd_server_each(c->server, list_one, c);
        return say(c, option, NBD_REP_ACK, NULL);
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        return info_or_go(c, option, data, size);
    case NBD_OPT_STRUCTURED_REPLY:
        if (size)
            return invalid(c, option, "the option has no data");
        c->structured = true;
        return say(c, option, NBD_REP_ACK, NULL);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        return meta_context(c, option, data, size);
    case NBD_OPT_STARTTLS:
        if (size)
            return invalid(c, option, "the option has no data");
        return say(c, option, NBD_REP_ERR_UNSUP, "this server has no TLS");
    default:
        return say(c, option, NBD_REP_ERR_UNSUP, "this server does not know the option");
    }
}

bool nbd_option_skipped(struct nbd_conn *c)
{
    uint32_t option = c->skipped_option;
    bool known = option && option <= NBD_OPT_SET_META_CONTEXT && option != 4 && option != NBD_OPT_STARTTLS;
    return say(c, option, known ? NBD_REP_ERR_TOO_BIG : NBD_REP_ERR_UNSUP,
               known ? "the option is longer than 65536 bytes" : "this server does not know the option") == NBD_AGAIN;
}

static enum nbd_want client_flags(struct nbd_conn *c)
{
    if (nbd_unread(c) < 4)
        return NBD_BYTES;
    uint32_t flags = nbd_get32(nbd_input(c));
    c->in_at += 4;
    if (flags & ~(uint32_t)(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES))
        return NBD_VIOLATION;
    c->fixed = flags & NBD_FLAG_FIXED_NEWSTYLE;
    c->no_zeroes = flags & NBD_FLAG_NO_ZEROES;
    c->state = NBD_OPTIONS;
    return NBD_AGAIN;
}

enum nbd_want nbd_negotiate(struct nbd_conn *c)
{
    if (c->state == NBD_HANDSHAKE)
        return client_flags(c);
    if (c->text_end - c->text_at > TEXT_SPARE)
        return NBD_STALL; /* it asks and asks and does not read the answers */
    struct nbd_option_header head;
    if (nbd_unread(c) < sizeof head)
        return NBD_BYTES;
    memcpy(&head, nbd_input(c), sizeof head);
    uint32_t option = be32toh(head.option), size = be32toh(head.length);
    if (be64toh(head.magic) != NBD_OPTION_MAGIC || (!c->fixed && option != NBD_OPT_EXPORT_NAME))
        return NBD_VIOLATION;
    if (size > NBD_OPTION_SKIP_MAX || c->options >= NBD_OPTIONS_MAX)
        return NBD_VIOLATION;
    if (size > NBD_OPTION_MAX) {
        if (option == NBD_OPT_EXPORT_NAME)
            return NBD_VIOLATION;
        if (option == NBD_OPT_SET_META_CONTEXT)
            c->meta_serial = 0;
        c->options++;
        c->in_at += sizeof head;
        c->skip = size;
        c->skipped_option = option;
        return NBD_AGAIN;
    }
    if (nbd_unread(c) - sizeof head < size)
        return NBD_BYTES;
    const uint8_t *data = nbd_input(c) + sizeof head;
    c->options++;
    c->in_at += sizeof head + size;
    enum nbd_want want = option_complete(c, option, data, size);
    return c->text_failed ? NBD_VIOLATION : want; /* half an answer is worse than none */
}
