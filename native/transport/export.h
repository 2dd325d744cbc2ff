/* What vhost-user and NBD exports share: identity, the image they hold, counters, and the way they end.
 *
 * States: SERVING -> STOPPING (rbdn_export_stop: no new clients) -> STOPPED (no client left, EVENT_EXPORT_STOPPED
 * posted once) -> freed. Only the implementation moves SERVING/STOPPING on; export_client_left() moves to STOPPED.
 */
#ifndef RBDN_EXPORT_H
#define RBDN_EXPORT_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "engine/request.h"
#include "ffi/api_export.h"

enum export_state { EXPORT_SERVING, EXPORT_STOPPING, EXPORT_STOPPED };

struct export;
struct export_ops {
    const char *name;                    /* "vhost-user-blk", "nbd" */
    void (*stop)(struct export *, bool hard); /* close the listener of a vhost export; hard: drop clients */
    void (*free)(struct export *);
    int (*serve)(struct export *, int fd);          /* NULL: -EINVAL */
    int (*go_on)(struct export *, int64_t which);   /* the same */
};

/* First member of every implementation. */
struct export {
    const struct export_ops *ops;
    uint64_t id;
    struct image *image;
    struct image_user user; /* user.changed is set by the implementation before export_init */
    pthread_mutex_t lock;   /* guards state and clients */
    enum export_state state;
    uint32_t clients;
    _Atomic uint64_t accepted, broken, resubmitted, resumed, dirty_pages;
    _Atomic int64_t held; /* the switch-over that waits; 0 = none. Who sets it to 0 lets it go on, nobody else */
    _Atomic uint32_t rings;
};

int export_init(struct export *, const struct export_ops *, uint64_t id, struct image *);
/* A client came: false when the export is stopping (drop the client). Posts EVENT_EXPORT_CONNECTED. */
bool export_client_came(struct export *);
/* Posts EVENT_EXPORT_DISCONNECTED, and EVENT_EXPORT_STOPPED when it was the last of a stopping export. */
void export_client_left(struct export *);
void export_broken(struct export *, int64_t queue); /* counts and posts EVENT_EXPORT_BROKEN */

#endif
