/* All that the NBD server asks of the operating system about one connection. The fuzz target links its own. */
#ifndef RBDN_NBD_SOCKET_H
#define RBDN_NBD_SOCKET_H

#include <stdbool.h>
#include <sys/types.h>
#include <sys/uio.h>

/* Never block, never raise SIGPIPE. Bytes moved, 0 = end of stream (receive), or -errno (-EAGAIN: later). */
ssize_t nbd_socket_receive(int fd, struct iovec *iov, unsigned count);
ssize_t nbd_socket_send(int fd, struct iovec *iov, unsigned count);
/* Can nbd_socket_unread tell? */
bool nbd_socket_tells_unread(int fd);
/* What was sent and the peer has not read, in bytes of kernel memory: a buffer counts until all of it is read. */
size_t nbd_socket_unread(int fd);
/* Non-blocking, buffers, TCP options. 0, or -errno when this is no stream socket. */
int nbd_socket_prepare(int fd);
void nbd_socket_close(int fd);
/* A descriptor that becomes readable once after `ms` milliseconds; 0 = not armed. -errno. */
int nbd_timer_new(int ms);
void nbd_timer_arm(int fd, int ms);
void nbd_timer_clear(int fd); /* reads the expiry away */

#endif
