/* Events from the data plane to Python: a bounded list and one eventfd. Posting never blocks and never allocates:
 * equal (type, source) pairs that are still unread are merged, so the list is bounded by the number of sources. The
 * merged event has the place and the value of the last post (errors: the value of the first). */
#ifndef RBDN_EVENT_H
#define RBDN_EVENT_H
#include <stdint.h>

enum event_type {
    EVENT_LOCK_NEEDED = 1,  /* source = image id: a write waits at the gate */
    EVENT_IO_ERROR = 2,     /* source = image id, value = -errno: the store failed a write or a flush */
    EVENT_EXPORT_CONNECTED = 3,    /* source = export id, value = clients */
    EVENT_EXPORT_DISCONNECTED = 4, /* source = export id, value = clients left */
    EVENT_EXPORT_BROKEN = 5,       /* source = export id, value = queue index or -1: a hostile ring or message */
    EVENT_EXPORT_STOPPED = 6,      /* source = export id: all clients gone after rbdn_export_stop */
    EVENT_LOST = 7,                /* more unread events than the list holds: ask every source for its state */
    EVENT_READ_ERROR = 8,          /* source = image id, value = -errno: the store failed a read */
    /* Live migration, vhost-user. source = export id, value = number of the switch-over: the front end has stopped its last
     * running ring while it logs what we write, and waits for rbdn_export_go_on(). */
    EVENT_EXPORT_SWITCHOVER = 9,
    /* source = export id: a session's first ring starts; value = number of the switch-over since the last such event,
     * 0 when there was none. */
    EVENT_EXPORT_RINGS = 10,
    EVENT_OBJECT_WANTED = 11, /* source = image id: rbdn_image_wanted() has something */
    EVENT_EXPORT_STALE = 12, /* source = export id, value = queue index: the guest came with memory older than its state */
};
void event_post(int type, uint64_t source, int64_t value);
#endif
