/* Durability: shared rounds of fdatasync, and what a failed one means. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/layout.h"

int rounds_init(struct rounds *r)
{
    int err = pthread_mutex_init(&r->lock, NULL);
    if (err == 0 && (err = pthread_cond_init(&r->done_cond, NULL)) != 0)
        pthread_mutex_destroy(&r->lock);
    return -err;
}

void rounds_destroy(struct rounds *r)
{
    pthread_cond_destroy(&r->done_cond);
    pthread_mutex_destroy(&r->lock);
}

/* A round that began before the call does not count: what the caller waits for may have been written since. So the
 * caller needs the next round to begin, and whoever finds none running does it for all who wait: N callers, at most
 * two rounds. Failures are sticky in the layout, so a round needs no result of its own. */
static int rounds_join(struct layout *l, struct rounds *r, void (*work)(struct layout *))
{
    pthread_mutex_lock(&r->lock);
    uint64_t target = r->started + 1;
    while (r->done < target) {
        if (r->running) {
            pthread_cond_wait(&r->done_cond, &r->lock);
            continue;
        }
        uint64_t mine = ++r->started;
        r->running = true;
        pthread_mutex_unlock(&r->lock);
        work(l);
        pthread_mutex_lock(&r->lock);
        r->running = false;
        r->done = mine;
        pthread_cond_broadcast(&r->done_cond);
    }
    pthread_mutex_unlock(&r->lock);
    return atomic_load(&l->failed) ? -EIO : 0;
}

/* After a failure the kernel drops what it could not write and calls it clean: a second fdatasync would succeed
 * without having written anything. Hence no retry, and no later write may be acknowledged as if nothing happened. */
int layout_fdatasync(struct layout *l, int fd)
{
    while (fdatasync(fd) < 0) {
        if (errno == EINTR)
            continue;
        atomic_store(&l->failed, true);
        atomic_store(&l->ready, false);
        atomic_store(&layout_header(l)->dirty, 2);
        return -EIO;
    }
    return 0;
}

static void sync_heads(struct layout *l)
{
    for (uint32_t seg = 0; seg < l->head_count; seg++) {
        if (!atomic_load_explicit(&l->heads[seg].dirty, memory_order_seq_cst))
            continue;
        int fd = head_open(l, seg, false);
        if (fd >= 0) {
            atomic_store_explicit(&l->heads[seg].dirty, false, memory_order_seq_cst);
            layout_fdatasync(l, fd);
            windows_synced(l);
        }
    }
}

int layout_sync_data(struct layout *l)
{
    return rounds_join(l, &l->data_sync, sync_heads);
}

/* Data first: an entry that says "exists" or "larger" must never outlive what it speaks of. */
static void sync_heads_then_index(struct layout *l)
{
    if (layout_sync_data(l) == 0 && atomic_exchange(&l->index_dirty, false))
        layout_fdatasync(l, l->index);
}

int layout_flush(struct layout *l)
{
    if (atomic_load(&l->failed))
        return -EIO;
    return rounds_join(l, &l->flush, sync_heads_then_index);
}

int layout_sync_all(struct layout *l)
{
    uint64_t entries = atomic_load(&l->entries);
    uint32_t last = entries ? layout_seg(l, entries - 1) : 0;
    for (uint32_t seg = 0; seg < l->head_count && seg <= last; seg++) {
        int fd = head_open(l, seg, false);
        if (fd < 0 && fd != -ENOENT)
            return fd;
        if (fd >= 0)
            atomic_store(&l->heads[seg].dirty, true);
    }
    atomic_store(&l->index_dirty, true);
    return layout_flush(l);
}

/* Errors of this writing are the next fdatasync's: it is not asked for them here. */
void rbdn_layout_write_back(rbdn_store *s)
{
    struct layout *l = layout_of(s);
    for (uint32_t seg = 0; l && seg < l->head_count; seg++) {
        int fd = atomic_load_explicit(&l->heads[seg].fd_plus1, memory_order_acquire) - 1;
        if (fd >= 0 && atomic_load_explicit(&l->heads[seg].dirty, memory_order_seq_cst))
            sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
    }
}
