/* One running queue: it belongs to one reactor, which reads its kicks, runs its ring and takes its completions.
 *
 * The session (vhost_session.h) owns what a queue uses - descriptors of files, memory, log, in-flight table - and
 * changes it only by a command that the queue has answered. While a command is under way the session does nothing
 * else, so `ring_config` may be read by the queue's reactor without a lock.
 */
#ifndef RBDN_VHOST_QUEUE_H
#define RBDN_VHOST_QUEUE_H

#include "engine/reactor.h"
#include "transport/export.h"
#include "transport/virtio_blk.h"

/* What the front end asked for. The session's. */
struct ring_config {
    uint16_t num, base;
    struct ring_addresses addresses;
    uint64_t log_addr;
    bool log_used;
    bool enabled;
    int kick, call, err; /* -1 = none */
    struct inflight_queue *inflight; /* NULL = not tracked */
    uint16_t inflight_num;           /* entries it has */
    /* the same for every ring of the session */
    bool event_idx, indirect;
    struct guest_memory *mem;
    struct dirty_log *log;
};

enum queue_command {
    QUEUE_START,   /* once */
    QUEUE_UPDATE,  /* memory, log, enabled, call, err, kick and log address have changed */
    QUEUE_ABANDON, /* read nothing more, and never touch ring or in-flight table again; answered at once. What has not
                    * reached the store never will: the in-flight table still has it, for who comes next */
    QUEUE_STOP,    /* read nothing more; answered when nothing is in flight */
    QUEUE_LOSS,    /* no command, only an answer: shared memory was lost somewhere in this process. Is it yours? */
    QUEUE_COMMANDS
};

struct vhost_queue;

/* Made stopped. answered() runs on the reactor `home`, once for every command, in their order; and with
 * QUEUE_LOSS at any time before that of QUEUE_STOP. */
struct vhost_queue *vhost_queue_new(struct export *, struct blk_device *, unsigned index, const struct ring_config *,
                                    struct reactor *home, void (*answered)(void *owner, enum queue_command), void *owner);
/* One at a time, but QUEUE_ABANDON may follow any, also an unanswered QUEUE_STOP. */
void vhost_queue_command(struct vhost_queue *, enum queue_command);
void vhost_queue_free(struct vhost_queue *); /* after every command was answered, QUEUE_STOP too */
uint16_t vhost_queue_base(const struct vhost_queue *); /* after QUEUE_STOP was answered: next entry to read */

#endif
