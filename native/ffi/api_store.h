/* Python's way to an image's data objects in the embedded store ("layout"): generic object operations on
 * rbd_data.<id>.<objno> go through the same C code as guest I/O. Also null and fault stores for tests and bench.
 * Plain C for cffi: no macros. Return values: >= 0, or -errno. */
#ifndef RBDN_API_STORE_H
#define RBDN_API_STORE_H
#include <stdint.h>
#include <stddef.h>

typedef struct store rbdn_store;

/* Opens (create: makes) the folder `dir` that holds one image's data objects of 2^order bytes.
 * Runs crash recovery when the last user did not close and nobody else has it open. NULL and *err on failure. */
/* order 0 (not with create): whatever it is. -EIO a damaged index, -EPROTONOSUPPORT a newer one, -EINVAL other order. */
rbdn_store *rbdn_layout_open(const char *dir, unsigned order, int create, int *err);
/* Reads leave buffers untouched: only for measuring. */
rbdn_store *rbdn_null_open(unsigned order, int *err);
/* A store that wraps another (and owns it): fails or delays chosen operations. See store_fault.c for `spec`.
 * Every rbdn_layout_* call reaches through it. On failure `inner` stays the caller's. */
rbdn_store *rbdn_fault_open(rbdn_store *inner, const char *spec, int *err);
void rbdn_store_close(rbdn_store *s); /* after its images were closed */

/* Synchronous object operations, any thread, GIL released. snap ids: newest first. */
int64_t rbdn_obj_read(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, void *buf, uint64_t len);
int rbdn_obj_write(rbdn_store *s, uint64_t objno, uint64_t off, const void *buf, uint64_t len, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps);
int rbdn_obj_zero(rbdn_store *s, uint64_t objno, uint64_t off, uint64_t len, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps);
int rbdn_obj_truncate(rbdn_store *s, uint64_t objno, uint64_t size, int create, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps);
int rbdn_obj_remove(rbdn_store *s, uint64_t objno, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps);
int rbdn_obj_copyup(rbdn_store *s, uint64_t objno, const void *buf, uint64_t len);
int64_t rbdn_obj_stat(rbdn_store *s, uint64_t objno, uint64_t snap_id);
/* pairs of (off, len), at most max pairs; returns the number of pairs */
int rbdn_obj_extents(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t off, uint64_t len, uint64_t *pairs, uint32_t max);
int rbdn_store_flush(rbdn_store *s);

/* Layout only. */
/* Next existing object number >= from whose HEAD exists (or, with clones set, that has any clone); -ENOENT at the end. */
int64_t rbdn_layout_next(rbdn_store *s, uint64_t from, int clones);
int rbdn_layout_rollback(rbdn_store *s, uint64_t objno, uint64_t snap_id, uint64_t seq, const uint64_t *snaps, uint32_t nsnaps);
/* Clones of one object, oldest first: rows of (clone id, lowest snap id covered exclusive, size); returns rows. */
int rbdn_layout_clones(rbdn_store *s, uint64_t objno, uint64_t *rows, uint32_t max);
uint64_t rbdn_layout_snap_seq(rbdn_store *s, uint64_t objno); /* snapset seq of the object, 0 when it never existed */
/* Forget what only removed snapshots needed. `live`: every snapshot id that still exists in the pool, ascending, and
 * last the lowest id that was not given out yet: clones from there on may belong to a snapshot made since the list was
 * read, so they are left alone (without that last number the clones of the newest removed snapshots stay). */
int rbdn_layout_trim(rbdn_store *s, const uint64_t *live, uint32_t nlive);
/* HEAD object map kept in the layout's index: one byte (0..3) per object. count -1 in set = there is none. */
int64_t rbdn_layout_map_get(rbdn_store *s, uint8_t *states, uint64_t max); /* number of objects in the map; -ENOENT none */
/* Durable on return. */
int rbdn_layout_map_set(rbdn_store *s, const uint8_t *states, int64_t count);
/* Completes the object map of a snapshot: objects that `states` calls nonexistent (0) and the snapshot has, because they
 * were copied up after it, become 1, or 3 when the same version serves the snapshot `before` (0: there is none) too.
 * Returns how many. */
int64_t rbdn_layout_snap_map(rbdn_store *s, uint64_t snap_id, uint64_t before, uint8_t *states, uint64_t count);
/* The kernel lock of the exclusive-lock owner, on the open file description that writes HEAD data: it is free only when
 * no byte of an earlier owner can be written any more. -ETIMEDOUT while another process has it. Counted per handle. */
int rbdn_layout_own(rbdn_store *s, int timeout_ms);
int rbdn_layout_disown(rbdn_store *s);
/* Begins to write HEAD's data to the disk, so that the next flush has less to wait for. Waits for nothing but room in the
 * device's queue, promises nothing. */
void rbdn_layout_write_back(rbdn_store *s);
/* Many bytes at once (layout_bulk.c). on: large writes of this handle go past the page cache where that is possible; other
 * handles of the process that share the layout do the same meanwhile. */
int rbdn_layout_past_cache(rbdn_store *s, int on);
/* Room on the disk for objects objno.. that will be written soon and whole, and back what nobody wrote. -ENOSPC,
 * -EOPNOTSUPP: nothing is wrong, writes will say. */
int rbdn_layout_reserve(rbdn_store *s, uint64_t objno, uint64_t count);
int rbdn_layout_give_back(rbdn_store *s, uint64_t objno, uint64_t count);
/* The same for bytes of any file, which nobody else writes meanwhile; it becomes as long as the room. */
int rbdn_file_reserve(int fd, uint64_t pos, uint64_t len);
int rbdn_file_give_back(int fd, uint64_t pos, uint64_t len);
/* Verify offline: one line per finding in `text` (each ends in a newline, all in one NUL; what does not fit is left
 * out); returns the number of findings. */
int rbdn_layout_check(rbdn_store *s, char *text, size_t size);
#endif
