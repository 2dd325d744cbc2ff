/* One image's data objects on RADOS, and its HEAD object map, which the store changes with every object. Plain C for
 * cffi: no macros. Return values: >= 0, or -errno. */
#ifndef RBDN_API_RADOS_DATA_H
#define RBDN_API_RADOS_DATA_H
#include <stdint.h>
#include <stddef.h>
#include "ffi/api_store.h"

/* The objects `<prefix>.<%016x>` of 2^order bytes. `cluster`: a connected rados_t; it must outlive the store.
 * -ENOSYS: librados was not loaded; -ENOENT: no such pool. rbdn_store_close() as for every store. */
rbdn_store *rbdn_rados_open(void *cluster, int64_t pool_id, const char *name_space, const char *prefix, unsigned order,
                            int *err);
/* Everything in flight, and all that comes, fails with err (-ESHUTDOWN). Final. Other stores: does nothing. */
int rbdn_store_fence(rbdn_store *s, int err);
/* What all stores on the cluster handle have at librados now, and how many operations have ended so far: to see that none
 * does. -ENOENT: no store is open. */
int rbdn_rados_progress(void *cluster, uint64_t *running, uint64_t *ended);
/* Operations of the engine that travelled with a neighbour: reads, writes. */
int rbdn_rados_merged(rbdn_store *s, uint64_t *reads, uint64_t *writes);

typedef struct {
    int64_t pool_id;        /* of the header */
    const char *image_id;
    const uint8_t *states;  /* one byte (0..3) per object; copied */
    uint64_t count;
    int fast_diff;          /* the image has the feature */
    const void *assert_locked; /* input of lock.assert_locked for the map's lock; copied */
    size_t assert_len;
} rbdn_object_map;

/* From now on the store keeps the HEAD map: the caller owns the exclusive lock and the map's, the map is valid, and no
 * write is in flight. Replaces an earlier one. -EBUSY: changes are in flight. -EOPNOTSUPP: not a store on RADOS. */
int rbdn_map_start(rbdn_store *s, const rbdn_object_map *m);
/* Forgets the map, 0 when there is none; -EBUSY. */
int rbdn_map_stop(rbdn_store *s);
/* 1: the map could not be changed and was marked invalid in the header; 0; -ENOENT: there is none. */
int rbdn_map_broken(rbdn_store *s);
/* For who changes data objects past the store; waits. state: 1 before it may come to exist or change, 2 before it is
 * removed, 0 after it was removed. */
int rbdn_map_change(rbdn_store *s, uint64_t objno, int state);
#endif
