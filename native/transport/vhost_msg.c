#define _GNU_SOURCE /* MSG_CMSG_CLOEXEC */
#include "transport/vhost_msg.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEADER ((uint32_t)sizeof(struct vhost_header))

static const struct rule {
    const char *name;
    uint16_t size_min, size_max;
    uint8_t fds_min, fds_max;
    int8_t feature;
} rules[] = {
#define RULE(number, name, ...) [number] = {#name, __VA_ARGS__},
    VHOST_MESSAGES(RULE)
#undef RULE
};

static const struct rule *rule_of(uint32_t request)
{
    return request < sizeof rules / sizeof rules[0] && rules[request].name ? &rules[request] : NULL;
}

const char *vhost_message_name(uint32_t request)
{
    const struct rule *r = rule_of(request);
    return r ? r->name : NULL;
}

static bool header_fits(const struct vhost_header *h, uint64_t negotiated)
{
    const struct rule *r = rule_of(h->request);
    if (!r || (h->flags & 3) != VHOST_VERSION || h->flags & VHOST_REPLY)
        return false;
    if (h->size < r->size_min || h->size > r->size_max)
        return false;
    return r->feature < 0 || negotiated >> r->feature & 1;
}

static bool fds_fit(const struct vu_msg *m)
{
    const struct rule *r = rule_of(m->header.request);
    return m->fd_count >= r->fds_min && m->fd_count <= r->fds_max;
}

/* Keeps the descriptors of one recvmsg. False: more than any message may bring. */
static bool keep_fds(struct vu_msg *m, struct msghdr *h)
{
    bool fits = !(h->msg_flags & MSG_CTRUNC);
    for (struct cmsghdr *c = CMSG_FIRSTHDR(h); c; c = CMSG_NXTHDR(h, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t n = 0; n < count; n++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + n * sizeof fd, sizeof fd);
            if (m->fd_count < VHOST_REGIONS_PER_TABLE) {
                m->fds[m->fd_count++] = fd;
            } else {
                close(fd);
                fits = false;
            }
        }
    }
    return fits;
}

int vhost_read(int fd, struct vhost_reader *r, uint64_t negotiated)
{
    struct vu_msg *m = &r->msg;
    for (;;) {
        uint32_t want = HEADER;
        if (r->got >= HEADER) {
            want = HEADER + m->header.size;
            if (r->got == want)
                return fds_fit(m) ? 1 : -EPROTO;
        }
        union {
            struct cmsghdr align;
            char buf[CMSG_SPACE(VHOST_REGIONS_PER_TABLE * sizeof(int))];
        } control;
        uint8_t *to = r->got < HEADER ? (uint8_t *)&m->header + r->got : m->bytes + (r->got - HEADER);
        struct iovec iov = {to, want - r->got};
        struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control.buf};
        ssize_t n = recvmsg(fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return errno == EAGAIN ? 0 : -errno;
        if (!keep_fds(m, &h))
            return -EPROTO;
        if (n == 0)
            return -ECONNRESET;
        r->got += (uint32_t)n;
        if (r->got == HEADER && !header_fits(&m->header, negotiated))
            return -EPROTO;
    }
}

void vhost_msg_drop(struct vhost_reader *r)
{
    for (unsigned n = 0; n < r->msg.fd_count; n++)
        if (r->msg.fds[n] >= 0)
            close(r->msg.fds[n]);
    r->msg.fd_count = 0;
    r->got = 0;
    memset(r->msg.bytes, 0, sizeof r->msg.bytes); /* a shorter next message must not show what this one said */
}

int vhost_write(int fd, uint32_t request, uint32_t flags, const void *payload, uint32_t size, int pass_fd)
{
    struct vhost_header header = {request, flags | VHOST_VERSION, size};
    struct iovec iov[2] = {{&header, sizeof header}, {(void *)payload, size}};
    struct msghdr h = {.msg_iov = iov, .msg_iovlen = size ? 2 : 1};
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int))];
    } control;
    if (pass_fd >= 0) {
        memset(&control, 0, sizeof control);
        h.msg_control = control.buf;
        h.msg_controllen = sizeof control.buf;
        struct cmsghdr *c = CMSG_FIRSTHDR(&h);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(c), &pass_fd, sizeof pass_fd);
    }
    ssize_t n;
    do
        n = sendmsg(fd, &h, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return -errno;
    return (size_t)n == sizeof header + size ? 0 : -EAGAIN;
}
