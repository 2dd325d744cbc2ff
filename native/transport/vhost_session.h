/* One connected front end: its messages, its memory, its rings. Everything here runs on the export's reactor.
 *
 * READING --command--> WAITING (nothing is read until all queues answered) --> READING
 * any --end of connection, violation, stop--> ABANDONING (no queue touches shared memory after it answered)
 *     --> DRAINING (requests in flight finish; they write to private copies of the guest's memory) --> freed
 * A session that drains is no longer the export's live one: the next front end is accepted and may negotiate, but its
 * rings start only when the old session is gone, so an old write can never overtake a new one.
 */
#ifndef RBDN_VHOST_SESSION_H
#define RBDN_VHOST_SESSION_H

#include "transport/vhost_msg.h"
#include "transport/vhost_queue.h"

#define VHOST_QUEUES_MAX 64
#define VHOST_DRAIN_MS 20000  /* GET_VRING_BASE: after this the image is fenced, so that parked requests fail */
#define VHOST_FENCED_MS 5000  /* and after this the connection is ended with the request still in the store */
/* How long a switch-over waits for Python to offer the lock. Nothing is wrong afterwards: the lock is still ours, and the
 * guest's next host asks for it. The guest stands still meanwhile, and so does QEMU's monitor. */
#define VHOST_OFFER_MS 5000
#define VHOST_WAITING_MAX 8   /* connected sockets that wait for the present front end to leave */

struct vhost_session;

struct vhost_export {
    struct export base;
    struct blk_device device;
    struct blk_settings settings;
    uint64_t protocol; /* features offered */
    bool writeback; /* cache mode chosen by the driver */
    _Atomic unsigned drain_ms, fenced_ms, offer_ms; /* tests change them */
    struct reactor *reactor;
    struct fd_watch listener; /* fd -1 = closed */
    bool listening;           /* watched */
    struct fd_watch timer;    /* timerfd: deadline of a drain or a switch-over, or a pause after accept failed */
    struct vhost_session *live, *draining;
    int waiting[VHOST_WAITING_MAX]; /* sockets brought by rbdn_vhost_serve(), eldest first */
    unsigned waiting_count;
    bool closed;              /* stopped: nobody is served any more who is not yet */
    int64_t switchovers;      /* begun so far */
    bool switched;            /* one since rings were last started */
    struct post changed_post, go_on_post, free_post;
};

enum session_state { SESSION_READING, SESSION_WAITING, SESSION_ABANDONING, SESSION_DRAINING };

struct vhost_session {
    struct vhost_export *export;
    enum session_state state;
    struct fd_watch socket;
    struct vhost_reader in;
    uint64_t features, protocol;
    bool protocol_said; /* SET_PROTOCOL_FEATURES was seen in this session */
    struct ring_config rings[VHOST_QUEUES_MAX];
    bool addressed[VHOST_QUEUES_MAX];          /* SET_VRING_ADDR was seen */
    struct vhost_queue *queues[VHOST_QUEUES_MAX]; /* running ones */
    bool stopping[VHOST_QUEUES_MAX];           /* QUEUE_STOP was sent */
    struct guest_region *regions[GUEST_REGIONS_MAX];
    unsigned region_count;
    struct guest_memory *mem;
    struct dirty_log *log;
    bool unlogged; /* rings were started that should have been logged from the start, and the log is still to come */
    struct shm inflight;
    int backend; /* socket for our own messages; -1 = none */

    /* a command under way */
    unsigned unanswered; /* START, UPDATE, ABANDON */
    unsigned undrained;  /* STOP */
    void (*then)(struct vhost_session *);
    unsigned losses; /* shm_losses() when last looked at by vhost_handle() */
    bool fenced; /* the first deadline has passed */
    bool holding; /* a switch-over is waiting for its answer; the state is WAITING */
    /* replaced by the command: let go when it is answered */
    int old_fd;
    struct guest_memory *old_mem;
    struct dirty_log *old_log;
};

/* Takes fd over. 0 or -errno. */
int vhost_session_new(struct vhost_export *, int fd);
/* Ends the connection; violation: counted as such. The session frees itself when its requests are done. */
void vhost_session_close(struct vhost_session *, bool violation);
void vhost_session_deadline(struct vhost_session *); /* the export's timer fired */
void vhost_session_go_on(struct vhost_session *); /* a switch-over has waited long enough */
void vhost_session_start_rings(struct vhost_session *); /* those that waited for an older session to end */
void vhost_session_config_changed(struct vhost_session *);
/* The export's part: s is about to be freed. */
void vhost_export_session_gone(struct vhost_export *, struct vhost_session *);
void vhost_export_timer(struct vhost_export *, unsigned ms); /* 0 = off */

/* Between vhost_session.c and vhost_handle.c. */

/* Judges and carries out the message in s->in. */
enum handled {
    HANDLED,  /* acknowledge if asked to */
    REPLIED,
    REFUSED,  /* acknowledge with an error if asked to; the connection lives on */
    WAITING,  /* s->then goes on */
    VIOLATION
};
enum handled vhost_handle(struct vhost_session *);
/* Sends a command to the running ones of some queues (a bit each). False: none runs, nothing to wait for. */
#define SESSION_ALL_QUEUES UINT64_MAX
bool session_command(struct vhost_session *, uint64_t which, enum queue_command, void (*then)(struct vhost_session *));
bool session_stop_queue(struct vhost_session *, unsigned index, void (*then)(struct vhost_session *));
bool session_stop_all(struct vhost_session *, void (*then)(struct vhost_session *));
/* Starts the rings that can: kick set, addresses known, no older session draining. 1: wait for s->then; 0: nothing to
 * start; -EPROTO: addresses that are not in the memory. */
int session_start_ready(struct vhost_session *, void (*then)(struct vhost_session *));
void session_reap(struct vhost_session *, unsigned index); /* after its QUEUE_STOP was answered */
/* The front end cut a file short that we have mapped. */
bool session_lost(const struct vhost_session *);
/* Ends of a wait: with an acknowledgement if asked for; without, the message was replied to. */
void session_acknowledge(struct vhost_session *);
void session_read_on(struct vhost_session *);

#endif
