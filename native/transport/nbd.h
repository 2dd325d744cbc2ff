/* Inside the NBD server: who owns what.
 *
 *   nbd_server.c     listening sockets, the table of exports, the list of connections, stopping
 *   nbd_negotiate.c  handshake and options: bytes in, bytes out, no I/O
 *   nbd_command.c    transmission: requests to the engine, results to replies; no I/O
 *   nbd_conn.c       one connection: receiving, buffers, back-pressure, life and death
 *   nbd_send.c       its replies: in batches, and when
 *   nbd_buffer.c     recycled memory; nbd_socket.c: system calls
 *
 * A connection belongs to one reactor and everything in `struct nbd_conn` is touched by that reactor's thread only,
 * except what is marked "server's lock". Completions from other threads come in through the slot's `post`.
 * Lock order: server, then export. */
#ifndef RBDN_NBD_H
#define RBDN_NBD_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "engine/reactor.h"
#include "engine/request.h"
#include "transport/export.h"
#include "transport/nbd_buffer.h"
#include "transport/nbd_wire.h"

#define NBD_HANDSHAKE_MS 10000
#ifdef NBD_SMALL_LIMITS /* for fuzzing: back-pressure within a few bytes of input */
#define NBD_OPTION_MAX 512u
#define NBD_IN_SIZE 2048u
#define NBD_IN_ROOM 1024u
#define NBD_HELD_MAX (200u << 10)
#define NBD_MEMORY_MAX (150u << 10)
#define NBD_SHARE (16u << 10)
#define NBD_SLOTS_MAX 6
#else
#define NBD_OPTION_MAX (64u << 10) /* bytes of one option that we read; longer ones are skipped and refused */
#define NBD_IN_SIZE (256u << 10)   /* bytes of a receive buffer */
#define NBD_IN_ROOM (64u << 10)    /* bytes free in it, else it is compacted or replaced */
#define NBD_HELD_MAX (60u << 20)   /* bytes of buffers per connection; then we stop reading */
#define NBD_MEMORY_MAX (512u << 20) /* of all connections together */
#define NBD_SHARE (2u << 20)       /* what a connection may hold all the same */
#define NBD_SLOTS_MAX 512          /* requests per connection; then we stop reading */
#endif
extern _Atomic size_t nbd_memory_max; /* bytes; tests change it */
#define NBD_BATCH_COUNT 8          /* replies of a batch; also what vhost-user publishes at once */
#define NBD_BATCH_BYTES (32u << 10)
#define NBD_OPTION_SKIP_MAX (16u << 20)   /* beyond: disconnect */
#define NBD_OPTIONS_MAX 4096              /* per connection */
#define NBD_WRITE_SKIP_MAX (64u << 20) /* a refused WRITE's payload is read and dropped up to here; else disconnect */
#define NBD_RUNS_MAX 4096                 /* extents of one block status reply */
#define NBD_META_ALLOCATION 1             /* id of base:allocation */

struct nbd_export {
    struct export base; /* first */
    struct nbd_server *server;
    struct nbd_export *next;  /* server's lock */
    bool listed;              /* server's lock */
    uint64_t serial;          /* never reused within a server: tells a re-added export of the same name apart */
    bool read_only;           /* configured */
    _Atomic uint64_t size;    /* bytes, as the image's */
    _Atomic bool image_read_only;
    uint32_t name_size;       /* bytes */
    char *name, *description; /* description NULL or NUL-terminated */
};

struct nbd_listener {
    struct nbd_listener *next;
    struct nbd_server *server;
    struct fd_watch watch, retry_watch; /* retry: a timer, armed while we are out of descriptors or memory */
    struct post stop;
};

struct nbd_server {
    pthread_mutex_t lock;
    pthread_cond_t changed;         /* a socket was closed */
    struct nbd_export *exports;     /* lock; newest first */
    struct nbd_listener *listeners; /* lock */
    struct nbd_conn *conns;         /* lock */
    unsigned max_connections;
    unsigned count;                 /* lock; connections not freed */
    unsigned sockets;               /* lock; open ones: connections' and listeners' */
    unsigned refs;                  /* lock; the owner, connections, exports */
    uint64_t next_serial;           /* lock */
    bool stopping;                  /* lock */
};

/* One request from its header to the last byte of its reply. */
struct nbd_slot {
    struct nbd_slot *next; /* in a list: free, waiting for the pool, or to be sent */
    struct nbd_conn *conn;
    struct req req;
    struct iovec iov;
    struct nbd_buffer *buffer; /* payload; for a small WRITE a reference to the receive buffer; or NULL */
    size_t held;               /* bytes counted in conn->held for `buffer` */
    uint8_t *reply;            /* what to send: in `head`, or in the buffer */
    uint32_t reply_size;       /* bytes */
    uint16_t command, flags;
    uint64_t cookie;
    struct post post;          /* back to the reactor from the thread that completed it */
    struct job job;            /* BLOCK_STATUS */
    uint8_t head[112];
};

enum nbd_state {
    NBD_HANDSHAKE,    /* the client's flags are awaited */
    NBD_OPTIONS,
    NBD_TRANSMISSION,
    NBD_DRAINING,     /* nothing more is read; replies that are due are sent, then the socket is closed */
    NBD_CLOSED,       /* no socket; waits for requests in flight, then is freed */
};

struct nbd_conn {
    struct nbd_conn *next, **link; /* server's lock */
    struct nbd_server *server;
    struct nbd_export *export;     /* written under the server's lock; set in TRANSMISSION until freed */
    struct image *image;           /* the export's */
    struct reactor *reactor;
    struct nbd_cache *cache;
    struct fd_watch watch, deadline; /* deadline.fd -1: none */
    uint32_t interest;             /* epoll events asked for */
    enum nbd_state state;
    bool running;                  /* nbd_conn_run is on the stack */
    bool stalled;                  /* a request waits for memory or a slot */
    bool send_blocked;
    bool flush_queued;
    bool violated;                 /* ended for a violation of the protocol */
    struct post flush;
    struct poller hold;            /* added while `holding`: replies wait for more */
    bool holding, tells_unread;

    /* control from other threads: server's lock */
    bool control_queued, kill;
    struct post control;
    bool dead;                     /* this thread: to be freed when the queued control post has run */

    /* input */
    struct nbd_buffer *in;         /* NULL when nothing is buffered */
    uint32_t in_at, in_end;        /* unread bytes of `in` */
    struct nbd_slot *payload;      /* a WRITE whose payload is coming in */
    uint32_t payload_have;         /* bytes */
    uint32_t skip;                 /* bytes to drop, of a refused WRITE or of an option that is too long */
    struct nbd_slot *refused;      /* the WRITE; its answer waits for the last byte dropped */
    uint32_t refused_error;        /* enum nbd_error */
    const char *refused_why;

    /* negotiation */
    uint32_t options;              /* seen */
    uint32_t skipped_option, asked; /* asked: of the INFO being answered, a bit per enum nbd_info */
    bool fixed, no_zeroes, structured;
    uint64_t meta_serial;          /* export that SET_META_CONTEXT selected base:allocation for; 0 none */
    bool meta;                     /* in TRANSMISSION: block status is allowed */
    bool read_only;                /* as told to the client */
    uint8_t *text;                 /* option replies to be sent; malloc */
    size_t text_at, text_end, text_size;
    bool text_failed;              /* no memory */

    /* transmission */
    uint32_t slots;                /* in use */
    uint32_t in_flight;            /* given to the engine or the pool */
    size_t held;                   /* bytes of buffers */
    struct nbd_slot *out, **out_last;
    uint32_t out_sent;             /* bytes of out's reply already sent */
    uint32_t out_count;
    size_t out_bytes;
    size_t unread, unread_each;    /* bytes, as the socket counts: the peer has not read; a reply adds. 0 unknown */
    uint32_t last_batch;           /* replies of the last send */
    struct nbd_slot *status_waiting; /* BLOCK_STATUS: one at a time on the pool */
    bool status_running;
};

/* What a parser wants after looking at the unread bytes. */
enum nbd_want {
    NBD_AGAIN, /* progress was made: call again */
    NBD_BYTES, /* more input */
    NBD_STALL, /* memory, a slot, or room in the socket */
    NBD_DRAIN, /* the client said goodbye */
    NBD_VIOLATION,
};

/* nbd_server.c */
/* Runs `use` on the export of that name under the server's lock; false when there is none. */
bool nbd_server_find(struct nbd_server *, const uint8_t *name, uint32_t size,
                     void (*use)(struct nbd_conn *, struct nbd_export *), struct nbd_conn *);
void nbd_server_each(struct nbd_server *, void (*use)(struct nbd_conn *, struct nbd_export *), struct nbd_conn *);
void nbd_server_socket_closed(struct nbd_server *);
/* Unlinks; false when a control post is queued, which will come back for the memory. */
bool nbd_server_forget(struct nbd_conn *);
void nbd_server_unref(struct nbd_server *);

/* nbd_negotiate.c */
int nbd_greet(struct nbd_conn *);
enum nbd_want nbd_negotiate(struct nbd_conn *);
/* The skipped bytes of an option are gone. */
bool nbd_option_skipped(struct nbd_conn *);

/* nbd_command.c */
enum nbd_want nbd_command(struct nbd_conn *);
void nbd_command_skipped(struct nbd_conn *);                   /* the payload of c->refused is gone */
void nbd_status_run(struct job *);
void nbd_command_submit(struct nbd_conn *, struct nbd_slot *); /* a WRITE whose payload is complete */
void nbd_command_drop(struct nbd_conn *); /* who sent them is gone: what waits at the gate is not done */

/* nbd_conn.c */
int nbd_conn_new(struct nbd_server *, int fd); /* takes fd, closes it on failure */
void nbd_conn_kill(struct nbd_conn *);         /* under the server's lock, any thread */
void nbd_conn_turn(struct nbd_conn *, bool may_hold); /* parse and send; it may be gone afterwards */
struct nbd_slot *nbd_conn_slot(struct nbd_conn *);         /* NULL: stall */
int nbd_conn_buffer(struct nbd_conn *, struct nbd_slot *, size_t size); /* -EAGAIN: stall; -ENOMEM */
void nbd_conn_drop_buffer(struct nbd_conn *, struct nbd_slot *);
void nbd_conn_drop_slot(struct nbd_conn *, struct nbd_slot *);
/* The engine or the pool is done with it; any thread. */
void nbd_conn_completed(struct nbd_slot *);
/* On the reactor's thread: turns the result into a reply. nbd_command.c */
void nbd_command_finish(struct nbd_conn *, struct nbd_slot *);

/* nbd_send.c */
void nbd_conn_reply(struct nbd_conn *, struct nbd_slot *); /* queue its reply; the slot is freed when it is sent */
bool nbd_batch_full(const struct nbd_conn *);
int nbd_send(struct nbd_conn *);      /* all that the socket takes; 1, 0 = nothing sent, -errno = the peer is gone */
bool nbd_hold(struct nbd_conn *);     /* true: do not send now; somebody will */
void nbd_hold_end(struct nbd_conn *);

static inline uint32_t nbd_unread(const struct nbd_conn *c)
{
    return c->in_end - c->in_at;
}

static inline uint8_t *nbd_input(const struct nbd_conn *c)
{
    return c->in ? nbd_buffer_data(c->in) + c->in_at : NULL;
}

#endif
