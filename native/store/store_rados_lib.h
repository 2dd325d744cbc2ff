/* What the data path uses of librados, looked up at run time: the package works without Ceph. The declarations follow
 * Ceph's <rados/librados.h> (LGPL-2.1), its types reduced to pointers.
 */
#ifndef RBDN_STORE_RADOS_LIB_H
#define RBDN_STORE_RADOS_LIB_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

typedef void *rados_t;
typedef void *rados_ioctx_t;
typedef void *rados_completion_t;
typedef void *rados_write_op_t;
typedef void (*rados_callback_t)(rados_completion_t, void *);

#define LIBRADOS_CREATE_IDEMPOTENT 0

/* F(result, name, parameters) */
#define RADOS_FUNCTIONS(F) \
    F(int, conf_get, (rados_t, const char *option, char *buf, size_t len)) \
    F(int, ioctx_create2, (rados_t, int64_t pool_id, rados_ioctx_t *)) \
    F(void, ioctx_destroy, (rados_ioctx_t)) \
    F(void, ioctx_set_namespace, (rados_ioctx_t, const char *)) \
    F(void, set_pool_full_try, (rados_ioctx_t)) \
    F(void, ioctx_snap_set_read, (rados_ioctx_t, uint64_t snap)) \
    F(int, ioctx_selfmanaged_snap_set_write_ctx, (rados_ioctx_t, uint64_t seq, uint64_t *snaps, int count)) \
    F(int, aio_create_completion2, (void *arg, rados_callback_t, rados_completion_t *)) \
    F(int, aio_get_return_value, (rados_completion_t)) \
    F(void, aio_release, (rados_completion_t)) \
    F(int, aio_cancel, (rados_ioctx_t, rados_completion_t)) \
    F(int, aio_read, (rados_ioctx_t, const char *oid, rados_completion_t, char *buf, size_t len, uint64_t off)) \
    F(int, aio_write, (rados_ioctx_t, const char *oid, rados_completion_t, const char *buf, size_t len, uint64_t off)) \
    F(int, aio_write_full, (rados_ioctx_t, const char *oid, rados_completion_t, const char *buf, size_t len)) \
    F(int, aio_remove, (rados_ioctx_t, const char *oid, rados_completion_t)) \
    F(int, aio_stat, (rados_ioctx_t, const char *oid, rados_completion_t, uint64_t *size, time_t *mtime)) \
    F(int, aio_write_op_operate, (rados_write_op_t, rados_ioctx_t, rados_completion_t, const char *oid, time_t *mtime, \
                                  int flags)) \
    F(rados_write_op_t, create_write_op, (void)) \
    F(void, release_write_op, (rados_write_op_t)) \
    F(void, write_op_assert_exists, (rados_write_op_t)) \
    F(void, write_op_create, (rados_write_op_t, int exclusive, const char *category)) \
    F(void, write_op_write, (rados_write_op_t, const char *buf, size_t len, uint64_t off)) \
    F(void, write_op_write_full, (rados_write_op_t, const char *buf, size_t len)) \
    F(void, write_op_truncate, (rados_write_op_t, uint64_t size)) \
    F(void, write_op_zero, (rados_write_op_t, uint64_t off, uint64_t len)) \
    F(void, write_op_set_alloc_hint, (rados_write_op_t, uint64_t object_size, uint64_t write_size)) \
    F(void, write_op_exec, (rados_write_op_t, const char *cls, const char *method, const char *in, size_t len, int *rc))

struct rados_lib {
#define RADOS_FIELD(result, name, parameters) result(*name) parameters;
    RADOS_FUNCTIONS(RADOS_FIELD)
#undef RADOS_FIELD
};

#define RADOS(name) (rados_lib.name)

extern struct rados_lib rados_lib; /* written once; a test may fill it before */
int rados_lib_load(void);          /* 0, or -ENOSYS: there is no librados.so.2, or one without these functions */

#endif
