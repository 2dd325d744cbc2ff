/* The embedded store's folder for one image ("layout"): structures shared by its parts. Private to native/store.
 *
 *   index           page 0: struct index_header; then one struct entry per object, mmapped by every process
 *   head.<seg>      HEAD data; object o at (o << order), cut into segments of 4 TiB; sparse
 *   clone.<id>      what objects held before they were first overwritten under snap context <id>; one sparse file,
 *                   segments continue as clone.<id>.<seg>
 *   clone.<id>.idx  16 bytes per object, struct clone_entry
 *
 * Locks, in the order they are taken:
 *   stripe[objno % STRIPES]  shared: in-place writes; exclusive: everything that changes what exists
 *   kernel byte lock on the object's index entry: exclusive operations of different processes
 *   clones_lock              shared: use of a clone's descriptors; exclusive: change of the list
 *   kernel byte lock 0       shared: copying into clones; exclusive: trimming them
 *   lock                     growth, opening of segments, counters
 * A flock on the index says "in use" (shared) or "alone" (recovery, closing); one on head.0 says "owner".
 *
 * Reads of HEAD take no lock: an entry is one atomic word, and nothing a reader may see is ever exposed before it is
 * legal. Memory is little endian, as the files are.
 */
#ifndef RBDN_LAYOUT_H
#define RBDN_LAYOUT_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "store/store.h"

#define LAYOUT_VERSION 1u
#define LAYOUT_PAGE 4096u
#define LAYOUT_SLICE 65536u          /* largest buffered write: keeps ext4's folios small, overwrites cheap */
#define LAYOUT_STRIPES 64u
#define LAYOUT_SEG_SHIFT 42          /* 4 TiB */
#define LAYOUT_SEG_SIZE (1ULL << LAYOUT_SEG_SHIFT)
#define LAYOUT_CHUNK (256u << 10)    /* bytes of index that are allocated on disk at once */
#define LAYOUT_INDEX_MAX (8ULL << 30)/* bytes of address space reserved for an index */
#define LAYOUT_MAX_OBJECTS ((LAYOUT_INDEX_MAX - LAYOUT_PAGE) / 16)
#define LAYOUT_CLONE_FDS 128         /* clones with open files, at most (soft) */

/* All in the first sector: never torn. */
struct index_header {
    char magic[8];               /* constant part */
    uint32_t version, order, entry_size;
    uint32_t crc;                /* crc32c of the bytes before it */
    _Atomic uint32_t dirty;      /* 1: somebody changes things, or died doing so; 2: and a sync failed */
    _Atomic uint32_t users;      /* opened and not closed: more than there are when one was killed */
    _Atomic uint64_t clone_gen;  /* counts changes of the set of clone files */
    _Atomic uint64_t grown;      /* counts growth: who sees another value looks at the file's size again */
    _Atomic uint64_t map_plus1;  /* objects in the HEAD object map + 1; 0: none is kept */
};

/* One object. `word`: bits 0..31 size in bytes, 32..39 state, 40..47 object map, the rest 0. */
struct entry {
    _Atomic uint64_t seq; /* snap context seq under which HEAD was last begun; kept when the object is removed */
    _Atomic uint64_t word;
};

enum entry_state {
    ENTRY_ABSENT, /* and its range is a hole */
    ENTRY_EXISTS, /* bytes of its range behind `size` are zero */
    ENTRY_STRAY,  /* does not exist, but its range may hold data: being copied up or removed, or that was cut short */
    ENTRY_REMOVED,/* absent, but the disk may still hold the entry it had: see object_settle() */
};

enum { MAP_NONEXISTENT = 0, MAP_EXISTS = 1, MAP_CLEAN = 3 }; /* Ceph's numbers of an object map's states */

static inline uint32_t word_size(uint64_t w) { return (uint32_t)w; }
static inline uint8_t word_state(uint64_t w) { return (uint8_t)(w >> 32); }
static inline uint8_t word_map(uint64_t w) { return (uint8_t)(w >> 40); }
static inline uint64_t word_make(uint32_t size, uint8_t state, uint8_t map)
{
    return size | (uint64_t)state << 32 | (uint64_t)map << 40;
}

/* Serves the snapshots s with lo < s <= clone id. present 0: no entry (holes of the file). */
struct clone_entry {
    uint64_t lo;
    uint32_t size; /* bytes */
    uint8_t present;
    uint8_t unused[3];
};

struct clone {
    uint64_t id;
    int data, idx; /* -1: not open. Data of segments behind the first is opened when needed */
};

/* Callers that want the same work done: one does it, those who came too late for it share the next round. */
struct rounds {
    pthread_mutex_t lock;
    pthread_cond_t done_cond;
    uint64_t started, done;
    bool running;
};

struct head {
    _Atomic int fd_plus1;  /* 0: not open */
    _Atomic int direct_plus1; /* with O_DIRECT; 0: not open */
    _Atomic bool dirty;    /* written since the last fdatasync began; set after the write */
};

struct stripe {
    _Alignas(64) pthread_rwlock_t lock;
};

struct layout {
    struct store store;      /* first */
    uint8_t order;
    int dir, index;
    uint32_t owned;          /* rbdn_layout_own calls not undone; under lock */
    char *base;              /* LAYOUT_INDEX_MAX bytes of addresses; the index is mapped at its start */
    _Atomic uint64_t entries;/* mapped entries */
    _Atomic uint64_t grown;  /* header's value when last looked */
    _Atomic bool ready;      /* the dirty mark is durable and no sync has failed: changes may go ahead */
    _Atomic bool failed;     /* an fdatasync failed: no write or flush succeeds any more */
    _Atomic bool index_dirty;/* like head.dirty */
    _Atomic bool past_cache; /* writes go past the page cache where they can */
    _Atomic bool untidy;     /* a stray object could not be cleared: not to be closed as clean */
    pthread_mutex_t lock;
    struct rounds data_sync, flush;

    pthread_rwlock_t clones_lock; /* guards the next four */
    struct clone *clones;         /* ascending id */
    uint32_t clone_count;
    uint32_t clone_open;          /* clones with open files */
    uint64_t clone_gen;           /* header's value when the list was read; ~0 never */
    pthread_mutex_t copying_lock; /* guards copying */
    uint32_t copying;             /* threads between clones_copy_begin and _end */

    _Atomic uint64_t allocated[LAYOUT_INDEX_MAX / LAYOUT_CHUNK / 64]; /* bit per chunk of index known to be allocated */
    _Atomic(struct windows *) windows; /* NULL until something is read or written */
    struct stripe stripe[LAYOUT_STRIPES];
    uint32_t head_count;
    struct head heads[];     /* by segment */
};

static inline struct index_header *layout_header(struct layout *l) { return (struct index_header *)l->base; }
static inline uint64_t layout_object_size(const struct layout *l) { return 1ULL << l->order; }
static inline struct stripe *layout_stripe(struct layout *l, uint64_t objno)
{
    return &l->stripe[objno % LAYOUT_STRIPES];
}

/* Where an object begins. */
static inline uint32_t layout_seg(const struct layout *l, uint64_t objno)
{
    return (uint32_t)(objno << l->order >> LAYOUT_SEG_SHIFT);
}
static inline uint64_t layout_pos(const struct layout *l, uint64_t objno)
{
    return objno << l->order & (LAYOUT_SEG_SIZE - 1);
}

extern const struct store_ops layout_store_ops;
struct layout *layout_of(struct store *); /* NULL: not an embedded store. Looks through fault stores */
struct store *fault_inner(struct store *); /* store_fault.c. NULL: not a fault store */

/* --- layout_file.c: files and byte ranges. 0 or -errno unless said otherwise */

/* -> fd. Regular files only, symbolic links refused (-ELOOP). With create the name is durable on return. */
int file_open(int dir, const char *name, bool create);
int file_write(int fd, const struct iovec *iov, uint32_t iovcnt, uint64_t len, uint64_t pos);
/* Bytes beyond the file's end read as zeros. nowait: -EAGAIN instead of waiting for a disk. Fills the first len bytes. */
int file_read(int fd, const struct iovec *iov, uint32_t iovcnt, uint64_t len, uint64_t pos, bool nowait);
void iov_zero(const struct iovec *iov, uint32_t iovcnt, uint64_t from, uint64_t to); /* bytes from..to of the vector */
int file_punch(int fd, uint64_t pos, uint64_t len);
/* First data at or after pos, below end: true and [*from, *to). A hole to the end: false. */
bool file_data(int fd, uint64_t pos, uint64_t end, uint64_t *from, uint64_t *to);
/* Copies data; holes of the source are left alone in the target, which must be a hole itself. */
int file_copy(int from, uint64_t from_pos, int to, uint64_t to_pos, uint64_t len, bool *copied);
int head_open(struct layout *, uint32_t seg, bool create); /* -> fd; -ENOENT: nothing was ever written there */
void head_dirty(struct layout *, uint32_t seg);
int head_punch(struct layout *, uint64_t objno, uint64_t off, uint64_t len);

/* --- layout_window.c: HEAD mapped. All within segment seg, whose file is fd; len > 0 */

/* true: done. false: go through the file, which also says what is wrong. */
bool window_read(struct layout *, uint32_t seg, const struct store_op *, uint64_t pos, uint64_t len);
bool window_write(struct layout *, uint32_t seg, const struct store_op *, uint64_t pos);
/* The file was read, or written, there: the next time it may go faster. */
void window_saw(struct layout *, uint32_t seg, int fd, uint64_t pos, uint64_t len);
void window_wrote(struct layout *, uint32_t seg, int fd, uint64_t pos, uint64_t len);
void windows_synced(struct layout *);
void windows_free(struct layout *);

/* --- layout_bulk.c */

/* true: done. false: go through the page cache, which also says what is wrong. head_open() came before. */
bool direct_write(struct layout *, uint32_t seg, const struct store_op *, uint64_t pos);

/* --- layout_index.c */

int index_create(int dir, unsigned order);
int index_order(int fd, unsigned *order);       /* checks the header. -EIO damaged, -EPROTONOSUPPORT newer */
int index_map(struct layout *, unsigned order); /* reserves addresses and maps a checked file */
void index_unmap(struct layout *);
/* The object's entry, or NULL when no process ever made one. */
struct entry *index_slow_find(struct layout *, uint64_t objno);
static inline struct entry *index_find(struct layout *l, uint64_t objno)
{
    if (__builtin_expect(objno < atomic_load_explicit(&l->entries, memory_order_acquire), 1))
        return (struct entry *)(l->base + LAYOUT_PAGE) + objno;
    return index_slow_find(l, objno);
}
/* A new entry's page is allocated on disk before it is touched: a full disk is -ENOSPC, not SIGBUS. -EFBIG. */
int index_make(struct layout *, uint64_t objno, struct entry **);
uint64_t index_skip_hole(struct layout *, uint64_t from);
static inline bool index_allocated(struct layout *l, uint64_t objno)
{
    uint64_t chunk = (LAYOUT_PAGE + objno * sizeof(struct entry)) / LAYOUT_CHUNK;
    return atomic_load_explicit(&l->allocated[chunk / 64], memory_order_relaxed) >> chunk % 64 & 1;
}
void entry_set_seq(struct layout *, struct entry *, uint64_t seq); /* never lowers it */
void entry_set_word(struct layout *, struct entry *, uint64_t word);
static inline bool index_keeps_map(struct layout *l, uint64_t objno)
{
    return objno + 1 < atomic_load_explicit(&layout_header(l)->map_plus1, memory_order_relaxed);
}
/* The map byte an object that exists (or not) must have; `now` when no map is kept. */
static inline uint8_t index_map_byte(struct layout *l, uint64_t objno, bool exists, uint8_t now)
{
    return index_keeps_map(l, objno) ? exists : now;
}
int layout_make_ready(struct layout *); /* durable dirty mark; -EIO after a failed sync */
int layout_range_lock(struct layout *, short type, uint64_t start, uint64_t len); /* F_RDLCK, F_WRLCK, F_UNLCK */
void object_lock(struct layout *, uint64_t objno);   /* exclusive, in all processes */
void object_unlock(struct layout *, uint64_t objno);

/* --- layout_sync.c */

int rounds_init(struct rounds *);
void rounds_destroy(struct rounds *);
int layout_fdatasync(struct layout *, int fd); /* a failure is final for the layout */
int layout_sync_data(struct layout *);         /* shared: HEAD data written before the call is durable */
int layout_flush(struct layout *);             /* shared: and the index */
int layout_sync_all(struct layout *);          /* also what other processes wrote */

/* --- layout_clones.c */

/* Content of an object for snapshot `snap`, which HEAD does not hold. -> 0 with clones_lock held shared until
 * clones_done(); or -ENOENT, -EAGAIN (nowait), -errno, not held. */
struct clone_source {
    struct clone_entry entry;
    int fd; /* < 0: all zeros */
    bool close_it;
};
int clones_find(struct layout *, uint64_t objno, uint64_t snap, bool nowait, struct clone_source *);
void clones_done(struct layout *, struct clone_source *);
int clones_load(struct layout *); /* reads the list again if it changed; takes clones_lock exclusive for that */
/* With clones_lock held shared and files open; position i in l->clones. */
int clones_lock_open(struct layout *, uint64_t id, bool create, uint32_t *i);
int clone_entry_read(int idx, uint64_t objno, bool nowait, struct clone_entry *); /* 1 present, 0 none, -errno */
int64_t clone_entry_next(int idx, uint64_t from, struct clone_entry *);           /* objno or -ENOENT */
int clone_entry_write(int idx, uint64_t objno, const struct clone_entry *);
bool clone_entry_valid(const struct layout *, uint64_t id, const struct clone_entry *);
int clone_data_fd(struct layout *, const struct clone *, uint32_t seg, bool create, bool *close_it);
void clones_free(struct layout *);
/* At most max ids, ascending, from > after. */
uint32_t clones_ids(struct layout *, uint64_t after, uint64_t *ids, uint32_t max);

/* --- layout_cow.c */

/* Before HEAD of an existing object is changed under snapc: saves it when a snapshot needs it, then raises the
 * entry's seq. Object locked. */
int clones_preserve(struct layout *, uint64_t objno, struct entry *, const struct snapc *);

/* --- layout_recover.c */

int layout_recover(struct layout *); /* alone; dirty */

/* --- layout_open.c */

void layout_close(struct store *);

/* --- store_embedded.c */

/* Locked, the object does not exist, and is about to be made under `seq`: makes its range a hole. A power cut could
 * bring back the entry of a removed object without its removal, and with it what is written next as if it were that
 * object's own content, old enough for a newer snapshot. So where that matters (a higher seq, or `always`), the removal
 * is made durable first. */
int object_settle(struct layout *, uint64_t objno, struct entry *, uint64_t seq, bool always);
/* From absent only: another process may create the object in place meanwhile, without the lock. Then false. */
bool object_mark_stray(struct layout *, struct entry *);
int object_create(struct layout *, uint64_t objno, struct entry *, uint64_t size, uint64_t seq); /* locked, absent */
int object_remove(struct layout *, uint64_t objno, struct entry *);                             /* locked, exists */

#endif
