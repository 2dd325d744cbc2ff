/* See event.h. A hash finds the unread event to merge with, a list keeps the order; both live in fixed arrays. */
#include "engine/event.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ffi/api_engine.h"

#define EVENTS 8192u  /* unread ones at most; pages of the array are touched only when used */
#define BUCKETS 1024u
#define NONE 0        /* slot 0 is the list's head, never an event */

struct slot {
    uint64_t source;
    int64_t value;
    uint32_t type;
    uint32_t older, newer; /* the list, a ring through slot 0; `newer` also links free slots */
    uint32_t chain;        /* next slot of the same bucket */
};

static struct {
    pthread_mutex_t lock; /* guards everything here */
    int fd;               /* -1 until Python asks */
    bool lost;
    uint32_t used;        /* slots ever taken from the array */
    uint32_t freed;       /* chain of slots given back */
    uint32_t buckets[BUCKETS];
    struct slot slots[EVENTS + 1];
} events = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static uint32_t *bucket_of(uint32_t type, uint64_t source)
{
    uint64_t h = (source * 8 + type) * 0x9e3779b97f4a7c15ULL;
    return &events.buckets[h >> 54];
}

static void signal_fd(void)
{
    uint64_t one = 1;
    if (events.fd >= 0)
        while (write(events.fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
}

static void list_append(uint32_t n)
{
    struct slot *s = events.slots;
    s[n].older = s[0].older;
    s[n].newer = 0;
    s[s[0].older].newer = n;
    s[0].older = n;
}

static void list_remove(uint32_t n)
{
    struct slot *s = events.slots;
    s[s[n].older].newer = s[n].newer;
    s[s[n].newer].older = s[n].older;
}

static uint32_t take_slot(void)
{
    uint32_t n = events.freed;
    if (n != NONE)
        events.freed = events.slots[n].newer;
    else if (events.used < EVENTS)
        n = ++events.used;
    return n;
}

void event_post(int type, uint64_t source, int64_t value)
{
    pthread_mutex_lock(&events.lock);
    bool silent = events.slots[0].newer == NONE && !events.lost;
    uint32_t *bucket = bucket_of(type, source), n = *bucket;
    while (n != NONE && (events.slots[n].type != (uint32_t)type || events.slots[n].source != source))
        n = events.slots[n].chain;
    if (n != NONE) {
        if (type != EVENT_IO_ERROR && type != EVENT_READ_ERROR)
            events.slots[n].value = value;
        list_remove(n);
        list_append(n);
    } else if ((n = take_slot()) != NONE) {
        struct slot *s = &events.slots[n];
        s->type = type;
        s->source = source;
        s->value = value;
        s->chain = *bucket;
        *bucket = n;
        list_append(n);
    } else {
        events.lost = true;
    }
    if (silent)
        signal_fd();
    pthread_mutex_unlock(&events.lock);
}

int rbdn_event_fd(void)
{
    pthread_mutex_lock(&events.lock);
    if (events.fd < 0) {
        events.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (events.fd >= 0 && (events.slots[0].newer != NONE || events.lost))
            signal_fd();
    }
    int rc = events.fd >= 0 ? events.fd : -errno;
    pthread_mutex_unlock(&events.lock);
    return rc;
}

int rbdn_event_next(rbdn_event *out)
{
    int found = 0;
    pthread_mutex_lock(&events.lock);
    uint32_t n = events.slots[0].newer;
    if (n != NONE) {
        struct slot *s = &events.slots[n];
        uint32_t *link = bucket_of(s->type, s->source);
        while (*link != n)
            link = &events.slots[*link].chain;
        *link = s->chain;
        list_remove(n);
        out->type = s->type;
        out->source = s->source;
        out->value = s->value;
        s->newer = events.freed;
        events.freed = n;
        found = 1;
    } else if (events.lost) {
        events.lost = false;
        out->type = EVENT_LOST;
        out->source = 0;
        out->value = 0;
        found = 1;
    } else if (events.fd >= 0) {
        /* Nothing left: only now is the descriptor silenced, so a reader that stops half-way is called again. */
        uint64_t count;
        while (read(events.fd, &count, sizeof count) < 0 && errno == EINTR)
            ;
    }
    pthread_mutex_unlock(&events.lock);
    return found;
}
