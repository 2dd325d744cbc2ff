/* Telling a front end something through an eventfd of its, without ever blocking, whatever it does to that file. */
#ifndef RBDN_VHOST_CALL_H
#define RBDN_VHOST_CALL_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Adds one to the counter of that eventfd; -1 = nobody to tell. Reactors only: what it needs is kept per thread. */
void vhost_signal(int fd);

/* The same for one that is signalled often. On one thread at a time. */
struct vhost_call {
    int fd;   /* borrowed; -1 = none */
    int ring; /* io_uring whose completions are announced on fd; -1 = none, vhost_signal() does it */
    uint8_t *map;
    size_t map_len;
    _Atomic uint32_t *sq_tail, *cq_head, *cq_tail;
};
#define VHOST_CALL_NONE ((struct vhost_call){.fd = -1, .ring = -1})

void vhost_call_set(struct vhost_call *, int fd); /* fd: an eventfd or -1 */
void vhost_call_signal(struct vhost_call *);

#endif
