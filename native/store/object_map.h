/* The HEAD object map of an image, for stores that do not record existence by themselves: two bits per object in memory,
 * the same in the store's object rbd_object_map.<id>, changed there before (EXISTS, PENDING) or after (NONEXISTENT) the
 * object changes. Only the owner of the exclusive lock has one.
 *
 * Who changes an object begins, changes it, and ends. Writers of an object run side by side; who removes it runs alone,
 * so that no write that was counted before the removal comes after it. Changes of neighbours that wait together are sent
 * as one. When the map cannot be changed it is declared invalid, in the header too, and everything goes on without it.
 *
 * Sends nothing itself: see struct object_map_target. Any thread; locks are its own.
 */
#ifndef RBDN_OBJECT_MAP_H
#define RBDN_OBJECT_MAP_H

#include <stdbool.h>
#include <stdint.h>

enum object_state { /* Ceph's numbers */
    OBJECT_NONEXISTENT = 0,
    OBJECT_EXISTS = 1,
    OBJECT_PENDING = 2, /* being removed */
    OBJECT_CLEAN = 3,   /* exists, unchanged since the newest snapshot */
};
#define OBJECT_ANY 0xff

enum map_want {
    MAP_WRITE,   /* the object may come into being or change */
    MAP_COPY,    /* it gets the parent's data, under every snapshot */
    MAP_REMOVE,  /* it goes; alone */
    MAP_FORGET,  /* says that a removed object is gone */
};

struct object_map;

/* One user of one object, from begin to end. */
struct map_ticket {
    struct map_ticket *next;
    uint64_t objno;
    uint8_t want;  /* enum map_want */
    uint8_t copy_state; /* MAP_COPY: what an absent object becomes */
    bool held;     /* counted in its object's users */
    int result;    /* before go(): 0; -ENOENT MAP_REMOVE of nothing; or -ESHUTDOWN */
    void (*go)(struct map_ticket *); /* any thread; only after MAP_WAITS */
    void *owner;
};

/* A change of [start, end) to `to` where it is `from` (OBJECT_ANY: whatever it is). */
struct map_change {
    struct map_change *next;
    uint64_t start, end;
    uint8_t to, from;
    struct object_map *map;
    struct map_object *objects;
};

struct object_map_target {
    /* Sends one change; object_map_sent() follows, on any thread, perhaps before this returns. */
    void (*send)(void *owner, struct map_change *);
    /* The map is wrong from now on: says so in the header; object_map_invalidated() follows. */
    void (*invalidate)(void *owner, struct object_map *, int err);
    void *owner;
};

/* `states`: one byte per object. NULL: no memory. */
struct object_map *object_map_new(const struct object_map_target *, const uint8_t *states, uint64_t count);
/* Nobody uses it. */
void object_map_free(struct object_map *);
bool object_map_idle(struct object_map *);
/* Nothing is sent from now on; who waits goes on with err. */
void object_map_fence(struct object_map *, int err);

enum { MAP_WAITS = 1 };
/* 0 go on; MAP_WAITS; -ENOENT (MAP_REMOVE) there is nothing to remove; -ENOMEM; a fence's err. After 0, and after go()
 * with result 0, object_map_end() must follow. */
int object_map_begin(struct object_map *, struct map_ticket *);
void object_map_end(struct object_map *, struct map_ticket *);
/* True: the map says that the object does not exist, and nobody is about to make it. */
bool object_map_absent(struct object_map *, uint64_t objno);
uint8_t object_map_state(struct object_map *, uint64_t objno); /* OBJECT_ANY: not known */
bool object_map_broken(struct object_map *);

void object_map_sent(struct map_change *, int result); /* frees the change */
void object_map_invalidated(struct object_map *);

#endif
