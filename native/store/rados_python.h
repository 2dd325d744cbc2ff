/* The C side of librbd_py.store.rados, for its own files only (rados_*.c). See ffi/api_rados.h. */
#ifndef RBDN_RADOS_PYTHON_H
#define RBDN_RADOS_PYTHON_H

#include <pthread.h>

#include "ffi/api_rados.h"
#include "store/store_rados_lib.h"

struct rbdn_ioctx {
    rados_t cluster;
    int64_t pool_id;
    char *name_space;
    char *locator; /* places all objects of the context together, where their names would; NULL: none */
    pthread_mutex_t lock; /* held from setting io's snapshots until the operation is submitted */
    rados_ioctx_t io;
};

/* Another ioctx of the same pool and namespace: for calls that wait with state in it. Destroy it. */
rados_ioctx_t rbdn_ioctx_own(rbdn_ioctx *c, int *err);

#endif
