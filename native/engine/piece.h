/* A piece is one object's share of a request (or of a copy-up's read): the store operation with its state machine. A split
 * cuts a request over several objects into pieces and runs a bounded number of them at a time. */
#ifndef RBDN_PIECE_H
#define RBDN_PIECE_H

#include "engine/image.h"

#define PIECE_IOVS 8     /* inline; more are allocated */
#define SPLIT_WINDOW 16  /* pieces of one request at the store at once */
#define PATTERN_BYTES 65536u

/* Bytes of a request: a list of iovecs, or a pattern repeated for ever. */
struct data {
    const struct iovec *iov; /* NULL: the pattern */
    uint32_t count;
    const uint8_t *pattern;
    uint64_t pattern_len; /* bytes */
    uint32_t hint;        /* where the last search ended: index and bytes before it */
    uint64_t hint_off;
};

enum piece_step {
    PIECE_READ,        /* READ of an object of `view`; -ENOENT goes on with the parent */
    PIECE_CHANGE,      /* the write-like operation */
    PIECE_OWN_COPYUP,  /* COPYUP with the piece's own data, then PIECE_CHANGE */
};

struct split;
struct piece {
    struct store_op op; /* first: op.done finds its piece */
    struct job job;
    struct piece *next; /* thread cache; copyup's waiters */
    struct image *image;
    struct view *view;  /* whose object op.objno is; a read goes up the chain */
    struct req *req;
    void (*finish)(struct piece *, int err); /* frees the piece */
    void *owner;        /* of finish: split, copyup */
    uint8_t step;       /* enum piece_step */
    bool blocking;      /* this thread may block */
    uint64_t fetches;   /* image->fetches before a read */
    struct iovec *iovs; /* op.iov points here, or to the request's own */
    uint32_t iov_room;
    struct iovec inline_iovs[PIECE_IOVS];
};

enum step_outcome {
    STEP_AGAIN, /* submit op (again) */
    STEP_WAITS, /* somebody else goes on with the piece: do not touch it */
    STEP_DONE,
};

struct piece *piece_new(struct image *, struct view *, struct req *); /* NULL: no memory */
void piece_free(struct piece *);
void piece_go(struct piece *, enum step_outcome, int err); /* what a step says is to be done next */
int piece_add_iov(struct piece *, void *base, size_t len);
int piece_gather(struct piece *, struct data *, uint64_t off, uint64_t len); /* adds bytes off.. of data */
void piece_finish_req(struct piece *, int err); /* `finish` of a request's only piece */
int piece_error(struct piece *, int64_t result); /* what to tell the guest of a store's error; reports it */

/* io_read.c */
void read_image(struct image *, struct req *);
void read_prepare(struct piece *, uint64_t objno, uint64_t off, uint64_t len); /* op.iov holds len bytes */
enum step_outcome read_result(struct piece *, int *err);
enum step_outcome read_absent(struct piece *, int *err); /* the object of `view` does not exist: look further up */
/* After copyup_join. `buf`: the object's beginning; NULL: it is here now, or `zero`. */
void read_fetched(struct piece *, int err, bool zero, const uint8_t *buf, uint64_t len);

/* io_write.c */
void write_image(struct image *, struct req *); /* all write-like types but compare-and-write */
enum step_outcome write_prepare(struct piece *, uint64_t objno, uint64_t off, uint64_t len, int *err);
enum step_outcome write_result(struct piece *, int *err);
void write_copied(struct piece *, int err, bool parent_is_zero); /* after copyup_join */

/* split.c. split_parent: reads the parent's bytes under the first `len` of the piece's extent, then above->finish(). */
void split_run(struct image *, struct req *, const struct data *, void *to_free);
void split_parent(struct piece *above, uint64_t len);

/* copyup.c: reads the parent's data of the object and writes it with STORE_COPYUP unless it is all zero. */
void copyup_join(struct piece *); /* write_copied() or read_fetched() follows */
/* After a read of an object that exists: 0 good; 1 it was brought meanwhile, version by version: read again; 2 it still is:
 * the piece waits, read_fetched() follows. */
int copyup_crossed(struct piece *);
bool copyup_asked(const struct piece *); /* its object has come, or was not there: no version of it is still missing */
bool copyup_in_vain(const struct piece *); /* its object was fetched, and there was nothing */
int copyup_object(struct image *, struct view *, uint64_t objno); /* blocks; 0 copied, 1 parent is zero, or -errno */

void data_list(struct data *, const struct iovec *, uint32_t count);
void data_pattern(struct data *, const void *pattern, uint64_t len);

#endif
