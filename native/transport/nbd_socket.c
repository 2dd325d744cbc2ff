#include "transport/nbd_socket.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define SOCKET_BUFFER (4 << 20) /* bytes; the default of 208 KiB holds some 40 replies of 4 KiB and then stalls us */

ssize_t nbd_socket_receive(int fd, struct iovec *iov, unsigned count)
{
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t n;
    do
        n = count == 1 ? recv(fd, iov->iov_base, iov->iov_len, MSG_DONTWAIT) : recvmsg(fd, &m, MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

ssize_t nbd_socket_send(int fd, struct iovec *iov, unsigned count)
{
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t n;
    do
        n = count == 1 ? send(fd, iov->iov_base, iov->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
                       : sendmsg(fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

bool nbd_socket_tells_unread(int fd)
{
    int domain = 0;
    socklen_t size = sizeof domain;
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

size_t nbd_socket_unread(int fd)
{
    int n = 0;
    return ioctl(fd, SIOCOUTQ, &n) == 0 && n > 0 ? n : 0;
}

static void set(int fd, int level, int name, int value)
{
    setsockopt(fd, level, name, &value, sizeof value); /* all of them only make it better: failure is no error */
}

/* Beyond net.core.wmem_max only for who has CAP_NET_ADMIN. */
static void set_buffer(int fd, int forced, int plain)
{
    int value = SOCKET_BUFFER;
    if (setsockopt(fd, SOL_SOCKET, forced, &value, sizeof value))
        set(fd, SOL_SOCKET, plain, value);
}

int nbd_socket_prepare(int fd)
{
    int type = 0, domain = 0;
    socklen_t size = sizeof type;
    if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size))
        return -errno;
    size = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size))
        return -errno;
    if (type != SOCK_STREAM)
        return -EPROTOTYPE;
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
        return -errno;
    if (domain == AF_UNIX) {
        set_buffer(fd, SO_SNDBUFFORCE, SO_SNDBUF);
        set_buffer(fd, SO_RCVBUFFORCE, SO_RCVBUF);
        return 0;
    }
    /* TCP tunes its buffers itself, further than setsockopt may. A peer that vanished without a word is noticed. */
    set(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    set(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    set(fd, IPPROTO_TCP, TCP_KEEPIDLE, 30);
    set(fd, IPPROTO_TCP, TCP_KEEPINTVL, 10);
    set(fd, IPPROTO_TCP, TCP_KEEPCNT, 6);
    set(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 90000);
    return 0;
}

void nbd_socket_close(int fd)
{
    close(fd);
}

int nbd_timer_new(int ms)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    if (ms)
        nbd_timer_arm(fd, ms);
    return fd;
}

void nbd_timer_arm(int fd, int ms)
{
    struct itimerspec t = {.it_value = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L}};
    timerfd_settime(fd, 0, &t, NULL);
}

void nbd_timer_clear(int fd)
{
    uint64_t count;
    ssize_t n = read(fd, &count, sizeof count);
    (void)n; /* nonblocking: nothing to read is as good */
}
