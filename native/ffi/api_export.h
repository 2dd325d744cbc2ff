/* Exports: vhost-user-blk and NBD. The caller makes the listening socket (permissions, owner) and passes it; the
 * export dups it. Everything from a client is checked in C, by one validator per wire. Return: >= 0 or -errno.
 * Needs rbdn_runtime_start() before. */
#ifndef RBDN_API_EXPORT_H
#define RBDN_API_EXPORT_H
#include <stdint.h>
#include "ffi/api_engine.h"

typedef struct export rbdn_export;

typedef struct {
    uint16_t num_queues;      /* offered, 1..64 */
    uint16_t queue_size_max;  /* 2..1024, power of two; seg_max is this minus 2 */
    int read_only;            /* even if the image is not */
    int write_cache;          /* offer VIRTIO_BLK_F_FLUSH/CONFIG_WCE (1) or every write is FUA (0) */
    char serial[21];          /* VIRTIO_BLK_T_GET_ID, NUL-terminated */
    uint32_t logical_block_size;
    /* Have the whole memory table told each time, 8 regions at most, instead of one region at a time. QEMU 7.2 does not
     * notice that the back end of a suspended guest was replaced: it believes the new one to know the regions already. */
    int whole_memory;
} rbdn_vhost_config;

/* Serves one front end at a time on listen_fd (a second one is accepted after the first left). listen_fd -1: only those
 * that rbdn_vhost_serve() brings. */
rbdn_export *rbdn_vhost_start(uint64_t id, rbdn_image *i, int listen_fd, const rbdn_vhost_config *c, int *err);
/* One already connected stream socket; ownership passes to the export, also on failure. It is served at once, or when the
 * front end before it has left; of those that wait, eight at most, the eldest come first. -EINVAL: not a vhost-user
 * export, or no socket of that kind; -EAGAIN: too many wait; -ESHUTDOWN: the export is stopping. */
int rbdn_vhost_serve(rbdn_export *e, int fd);
/* Ends the wait of switch-over `which` (the value of EVENT_EXPORT_SWITCHOVER): the front end gets its answer, and the
 * guest may run elsewhere. -ESTALE: it got it already (it was kept waiting for too long) or is gone. */
int rbdn_export_go_on(rbdn_export *e, int64_t which);

/* NBD: one server = one or more listening sockets, a table of exports by name. */
typedef struct nbd_server rbdn_nbd_server;
rbdn_nbd_server *rbdn_nbd_server_new(unsigned max_connections, int *err);
int rbdn_nbd_listen(rbdn_nbd_server *s, int listen_fd);
/* One already connected socket, e.g. a socketpair; ownership passes to the server. */
int rbdn_nbd_serve(rbdn_nbd_server *s, int fd);
typedef struct {
    int read_only;
    const char *description; /* NULL or UTF-8, copied */
} rbdn_nbd_config;
/* name: 0..4096 bytes of UTF-8, copied; "" is the default export. -EEXIST. */
rbdn_export *rbdn_nbd_export(rbdn_nbd_server *s, uint64_t id, rbdn_image *i, const char *name, const rbdn_nbd_config *c, int *err);
int rbdn_nbd_server_stop(rbdn_nbd_server *s); /* closes sockets and clients, frees; exports must have been stopped */

typedef struct {
    uint32_t clients;       /* now */
    uint64_t accepted;      /* connections ever */
    uint64_t broken;        /* connections or queues ended for a violation */
    uint64_t resubmitted;   /* requests found in flight at a reconnect */
    uint64_t resumed;       /* rings started with the in-flight table of a back end before: the VM ran on this host */
    uint64_t dirty_pages;   /* marked in a migration log */
    int64_t switchover;     /* the one that waits for rbdn_export_go_on() now; 0 = none */
    uint32_t rings;         /* running now */
} rbdn_export_stats;
int rbdn_export_stats_get(rbdn_export *e, rbdn_export_stats *out);
/* No new clients. hard: drop the present ones too. EVENT_EXPORT_STOPPED follows when none is left. */
int rbdn_export_stop(rbdn_export *e, int hard);
/* Frees; -EBUSY before EVENT_EXPORT_STOPPED was posted. */
int rbdn_export_free(rbdn_export *e);
#endif
