/* What we use of librados, looked up at run time: the package works without Ceph. The declarations follow Ceph's
 * <rados/librados.h> (LGPL-2.1), its types reduced to pointers.
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
typedef void *rados_read_op_t;
typedef void *rados_iter_t; /* omap rows, xattrs, object names */
typedef void (*rados_callback_t)(rados_completion_t, void *);
typedef void (*rados_watchcb2_t)(void *arg, uint64_t notify_id, uint64_t cookie, uint64_t notifier, void *data, size_t len);
typedef void (*rados_watcherrcb_t)(void *arg, uint64_t cookie, int err);

struct rados_cluster_stat_t {
    uint64_t kb, kb_used, kb_avail, num_objects;
};

struct rados_pool_stat_t {
    uint64_t numbers[16]; /* bytes, kb, objects, clones, copies, missing on primary, unfound, degraded, rd, rd_kb, ... */
};

#define LIBRADOS_CREATE_IDEMPOTENT 0

/* F(result, name, parameters) */
#define RADOS_FUNCTIONS(F) \
    F(int, conf_get, (rados_t, const char *option, char *buf, size_t len)) \
    F(int, ioctx_create2, (rados_t, int64_t pool_id, rados_ioctx_t *)) \
    F(void, ioctx_destroy, (rados_ioctx_t)) \
    F(void, ioctx_set_namespace, (rados_ioctx_t, const char *)) \
    F(void, ioctx_locator_set_key, (rados_ioctx_t, const char *)) \
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

/* Of Python's half: connections, operation lists, watches. */
#define RADOS_COMMAND_PARAMETERS \
    const char **cmd, size_t cmdlen, const char *in, size_t inlen, char **out, size_t *outlen, char **outs, size_t *outslen
#define RADOS_CONTROL_FUNCTIONS(F) \
    F(void, version, (int *major, int *minor, int *extra)) \
    F(int, create2, (rados_t *, const char *cluster, const char *name, uint64_t flags)) \
    F(int, conf_read_file, (rados_t, const char *path)) \
    F(int, conf_parse_argv, (rados_t, int argc, const char **argv)) \
    F(int, conf_set, (rados_t, const char *option, const char *value)) \
    F(int, connect, (rados_t)) \
    F(void, shutdown, (rados_t)) \
    F(int, cluster_fsid, (rados_t, char *buf, size_t len)) \
    F(int, cluster_stat, (rados_t, struct rados_cluster_stat_t *)) \
    F(int, getaddrs, (rados_t, char **addrs)) \
    F(uint64_t, get_instance_id, (rados_t)) \
    F(int, wait_for_latest_osdmap, (rados_t)) \
    F(int, get_min_compatible_client, (rados_t, int8_t *is, int8_t *required)) \
    F(int, mon_command, (rados_t, RADOS_COMMAND_PARAMETERS)) \
    F(int, mon_command_target, (rados_t, const char *mon, RADOS_COMMAND_PARAMETERS)) \
    F(int, mgr_command, (rados_t, RADOS_COMMAND_PARAMETERS)) \
    F(int, osd_command, (rados_t, int osd, RADOS_COMMAND_PARAMETERS)) \
    F(int, pg_command, (rados_t, const char *pg, RADOS_COMMAND_PARAMETERS)) \
    F(void, buffer_free, (char *)) \
    F(int, pool_list, (rados_t, char *buf, size_t len)) \
    F(int64_t, pool_lookup, (rados_t, const char *name)) \
    F(int, pool_create, (rados_t, const char *name)) \
    F(int, pool_delete, (rados_t, const char *name)) \
    F(rados_t, ioctx_get_cluster, (rados_ioctx_t)) \
    F(int64_t, ioctx_get_id, (rados_ioctx_t)) \
    F(int, ioctx_pool_stat, (rados_ioctx_t, struct rados_pool_stat_t *)) \
    F(int, application_enable, (rados_ioctx_t, const char *name, int force)) \
    F(int, ioctx_selfmanaged_snap_create, (rados_ioctx_t, uint64_t *snap)) \
    F(int, ioctx_selfmanaged_snap_remove, (rados_ioctx_t, uint64_t snap)) \
    F(int, ioctx_selfmanaged_snap_rollback, (rados_ioctx_t, const char *oid, uint64_t snap)) \
    F(int, nobjects_list_open, (rados_ioctx_t, rados_iter_t *)) \
    F(int, nobjects_list_next2, (rados_iter_t, const char **entry, const char **key, const char **space, \
                                 size_t *entry_len, size_t *key_len, size_t *space_len)) \
    F(void, nobjects_list_close, (rados_iter_t)) \
    F(uint64_t, aio_get_version, (rados_completion_t)) \
    F(int, aio_read_op_operate, (rados_read_op_t, rados_ioctx_t, rados_completion_t, const char *oid, int flags)) \
    F(void, write_op_assert_version, (rados_write_op_t, uint64_t)) \
    F(void, write_op_cmpext, (rados_write_op_t, const char *buf, size_t len, uint64_t off, int *rc)) \
    F(void, write_op_cmpxattr, (rados_write_op_t, const char *name, uint8_t how, const char *value, size_t len)) \
    F(void, write_op_omap_cmp2, (rados_write_op_t, const char *key, uint8_t how, const char *value, size_t key_len, \
                                 size_t len, int *rc)) \
    F(void, write_op_append, (rados_write_op_t, const char *buf, size_t len)) \
    F(void, write_op_writesame, (rados_write_op_t, const char *buf, size_t len, size_t write_len, uint64_t off)) \
    F(void, write_op_remove, (rados_write_op_t)) \
    F(void, write_op_setxattr, (rados_write_op_t, const char *name, const char *value, size_t len)) \
    F(void, write_op_rmxattr, (rados_write_op_t, const char *name)) \
    F(void, write_op_omap_set2, (rados_write_op_t, const char *const *keys, const char *const *values, \
                                 const size_t *key_lens, const size_t *lens, size_t count)) \
    F(void, write_op_omap_rm_keys2, (rados_write_op_t, const char *const *keys, const size_t *key_lens, size_t count)) \
    F(void, write_op_omap_rm_range2, (rados_write_op_t, const char *begin, size_t begin_len, const char *end, \
                                      size_t end_len)) \
    F(void, write_op_omap_clear, (rados_write_op_t)) \
    F(rados_read_op_t, create_read_op, (void)) \
    F(void, release_read_op, (rados_read_op_t)) \
    F(void, read_op_assert_exists, (rados_read_op_t)) \
    F(void, read_op_assert_version, (rados_read_op_t, uint64_t)) \
    F(void, read_op_cmpext, (rados_read_op_t, const char *buf, size_t len, uint64_t off, int *rc)) \
    F(void, read_op_cmpxattr, (rados_read_op_t, const char *name, uint8_t how, const char *value, size_t len)) \
    F(void, read_op_omap_cmp2, (rados_read_op_t, const char *key, uint8_t how, const char *value, size_t key_len, \
                                size_t len, int *rc)) \
    F(void, read_op_stat, (rados_read_op_t, uint64_t *size, time_t *mtime, int *rc)) \
    F(void, read_op_read, (rados_read_op_t, uint64_t off, size_t len, char *buf, size_t *got, int *rc)) \
    F(void, read_op_exec, (rados_read_op_t, const char *cls, const char *method, const char *in, size_t len, char **out, \
                           size_t *out_len, int *rc)) \
    F(void, read_op_getxattrs, (rados_read_op_t, rados_iter_t *, int *rc)) \
    F(void, read_op_omap_get_vals2, (rados_read_op_t, const char *after, const char *prefix, uint64_t max, rados_iter_t *, \
                                     unsigned char *more, int *rc)) \
    F(void, read_op_omap_get_keys2, (rados_read_op_t, const char *after, uint64_t max, rados_iter_t *, \
                                     unsigned char *more, int *rc)) \
    F(void, read_op_omap_get_vals_by_keys2, (rados_read_op_t, const char *const *keys, size_t count, \
                                             const size_t *key_lens, rados_iter_t *, int *rc)) \
    F(int, getxattrs_next, (rados_iter_t, const char **name, const char **value, size_t *len)) \
    F(void, getxattrs_end, (rados_iter_t)) \
    F(int, omap_get_next2, (rados_iter_t, char **key, char **value, size_t *key_len, size_t *len)) \
    F(void, omap_get_end, (rados_iter_t)) \
    F(int, watch3, (rados_ioctx_t, const char *oid, uint64_t *cookie, rados_watchcb2_t, rados_watcherrcb_t, \
                    uint32_t timeout, void *arg)) \
    F(int, watch_check, (rados_ioctx_t, uint64_t cookie)) \
    F(int, unwatch2, (rados_ioctx_t, uint64_t cookie)) \
    F(int, watch_flush, (rados_t)) \
    F(int, aio_notify, (rados_ioctx_t, const char *oid, rados_completion_t, const char *buf, int len, \
                        uint64_t timeout_ms, char **reply, size_t *reply_len)) \
    F(int, notify_ack, (rados_ioctx_t, const char *oid, uint64_t notify_id, uint64_t cookie, const char *buf, int len))

struct rados_lib {
#define RADOS_FIELD(result, name, parameters) result(*name) parameters;
    RADOS_FUNCTIONS(RADOS_FIELD)
    RADOS_CONTROL_FUNCTIONS(RADOS_FIELD)
#undef RADOS_FIELD
};

#define RADOS(name) (rados_lib.name)

extern struct rados_lib rados_lib; /* written once; a test may fill it before */
int rados_lib_load(void);          /* 0, or -ENOSYS: there is no librados.so.2, or one without these functions */
/* A symbol of librados, or of a library it needs, that is not in its C interface; NULL. After rados_lib_load(). */
void *rados_lib_symbol(const char *name);

#endif
