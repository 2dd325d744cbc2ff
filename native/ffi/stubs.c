/* Temporary: weak stand-ins so that the extension links while parts of the data plane are being written. */
#include <errno.h>
#include <stdlib.h>
#include "ffi/api_engine.h"
#include "ffi/api_export.h"
#include "ffi/api_store.h"
__attribute__((weak)) rbdn_view * rbdn_view_new(const rbdn_view_config *c, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) void rbdn_view_put(rbdn_view *v) { }
__attribute__((weak)) int rbdn_runtime_start(unsigned reactors) { return -ENOSYS; }
__attribute__((weak)) rbdn_image * rbdn_image_new(uint64_t id, rbdn_view *v, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) int rbdn_image_publish(rbdn_image *i, rbdn_view *v) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_block(rbdn_image *i, int which, int timeout_ms) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_unblock(rbdn_image *i, int which) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_fence(rbdn_image *i, int err) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_close(rbdn_image *i) { return -ENOSYS; }
__attribute__((weak)) int64_t rbdn_io(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags, uint64_t *mismatch) { return -ENOSYS; }
__attribute__((weak)) int rbdn_aio(rbdn_image *i, int type, uint64_t off, uint64_t len, void *buf, size_t buf_len, unsigned flags, uint64_t token) { return -ENOSYS; }
__attribute__((weak)) int rbdn_aio_fd(void) { return -ENOSYS; }
__attribute__((weak)) int rbdn_aio_reap(rbdn_completion *out, int max) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_runs(rbdn_image *i, uint64_t off, uint64_t len, rbdn_run *out, uint32_t max) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_copyup(rbdn_image *i, uint64_t objno) { return -ENOSYS; }
__attribute__((weak)) int rbdn_event_fd(void) { return -ENOSYS; }
__attribute__((weak)) int rbdn_event_next(rbdn_event *out) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_stats(rbdn_image *i, rbdn_stats *out) { return -ENOSYS; }
__attribute__((weak)) int rbdn_image_throttle(rbdn_image *i, uint64_t iops, uint64_t bytes_per_s) { return -ENOSYS; }
__attribute__((weak)) rbdn_export * rbdn_vhost_start(uint64_t id, rbdn_image *i, int listen_fd, const rbdn_vhost_config *c, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) rbdn_nbd_server * rbdn_nbd_server_new(unsigned max_connections, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) int rbdn_nbd_listen(rbdn_nbd_server *s, int listen_fd) { return -ENOSYS; }
__attribute__((weak)) int rbdn_nbd_serve(rbdn_nbd_server *s, int fd) { return -ENOSYS; }
__attribute__((weak)) rbdn_export * rbdn_nbd_export(rbdn_nbd_server *s, uint64_t id, rbdn_image *i, const char *name, const rbdn_nbd_config *c, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) int rbdn_nbd_server_stop(rbdn_nbd_server *s) { return -ENOSYS; }
__attribute__((weak)) rbdn_store * rbdn_layout_open(const char *dir, unsigned order, int create, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) rbdn_store * rbdn_null_open(unsigned order, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) rbdn_store * rbdn_fault_open(rbdn_store *inner, const char *spec, int *err) { *err = -ENOSYS; return NULL; }
__attribute__((weak)) void rbdn_store_close(rbdn_store *s) { }
__attribute__((weak)) int64_t rbdn_obj_read(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, void *buf, uint64_t len) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_write(rbdn_store *s, uint64_t objno, uint64_t off, const void *buf, uint64_t len, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_zero(rbdn_store *s, uint64_t objno, uint64_t off, uint64_t len, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_truncate(rbdn_store *s, uint64_t objno, uint64_t size, int create, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_remove(rbdn_store *s, uint64_t objno, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_copyup(rbdn_store *s, uint64_t objno, const void *buf, uint64_t len) { return -ENOSYS; }
__attribute__((weak)) int64_t rbdn_obj_stat(rbdn_store *s, uint64_t objno, uint64_t snap_id) { return -ENOSYS; }
__attribute__((weak)) int rbdn_obj_extents(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, uint64_t len, uint64_t *pairs, uint32_t max) { return -ENOSYS; }
__attribute__((weak)) int rbdn_store_flush(rbdn_store *s) { return -ENOSYS; }
__attribute__((weak)) int64_t rbdn_layout_next(rbdn_store *s, uint64_t from, int clones) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_rollback(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_clones(rbdn_store *s, uint64_t objno, uint64_t *rows, uint32_t max) { return -ENOSYS; }
__attribute__((weak)) uint64_t rbdn_layout_snap_seq(rbdn_store *s, uint64_t objno) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_trim(rbdn_store *s, const uint64_t *live, uint32_t nlive) { return -ENOSYS; }
__attribute__((weak)) int64_t rbdn_layout_map_get(rbdn_store *s, uint8_t *states, uint64_t max) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_map_set(rbdn_store *s, const uint8_t *states, int64_t count) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_own(rbdn_store *s, int timeout_ms) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_disown(rbdn_store *s) { return -ENOSYS; }
__attribute__((weak)) int rbdn_layout_check(rbdn_store *s, char *text, size_t size) { return -ENOSYS; }
#include "engine/event.h"
#include "engine/request.h"
__attribute__((weak)) void event_post(int type, uint64_t source, int64_t value) { }
__attribute__((weak)) void image_get(struct image *i, struct image_user *u) { }
__attribute__((weak)) void image_put(struct image *i, struct image_user *u) { }
__attribute__((weak)) void image_submit(struct image *i, struct req *r) { r->result = -ENOSYS; r->done(r); }
__attribute__((weak)) uint64_t image_size(struct image *i) { return 0; }
__attribute__((weak)) bool image_read_only(struct image *i) { return true; }
__attribute__((weak)) uint32_t image_object_size(struct image *i) { return 0; }
__attribute__((weak)) int image_runs(struct image *i, uint64_t off, uint64_t len, struct run *r, uint32_t max) { return -ENOSYS; }
