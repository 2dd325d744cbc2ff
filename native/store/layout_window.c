/* HEAD in memory: parts of the head files that are mapped, so that what is resident is copied without a system call.
 *
 * A mapped page costs 0.3 us to copy where pread needs 0.8 and pwrite 1 to 4 us (in large folios, more); but one that is not
 * resident blocks the thread, and the first store into a page that is clean costs more than a pwrite. Hence two bits
 * for each page, which are hints and never decide what is right:
 *   seen     it was resident when somebody read it. All are forgotten when threads fault pages in from the disk.
 *   written  it was written by pwrite since the last sync: it has its block, and is being rewritten. Storing costs one fault,
 *            then next to nothing until the next sync cleans the page.
 * Everything else goes through the file. Both ways show the same page cache, and fdatasync writes back both.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include "store/guard.h"
#include "store/layout.h"

#define WINDOW_SHIFT 26 /* 64 MiB */
#define WINDOW_SIZE (1ULL << WINDOW_SHIFT)
#define WINDOW_WORDS (WINDOW_SIZE / LAYOUT_PAGE / 64)
#define WINDOWS_SEG (LAYOUT_SEG_SIZE >> WINDOW_SHIFT)
#define WINDOWS_MAX 8192   /* mappings of the process; the kernel allows 65530 of all kinds */
#define WINDOW_IO (64u << 10) /* longer requests gain nothing */
#define FAULTS_EVERY 4096  /* copies of a thread between two looks at how many of its faults went to the disk */

struct marks {
    _Atomic uint32_t gen; /* marks of an older generation do not count */
    _Atomic uint64_t bits[WINDOW_WORDS];
};

struct window {
    char *base;
    struct window *next; /* of windows->all */
    struct marks seen, written;
};

struct windows {
    _Atomic uint32_t seen_gen, written_gen;
    _Atomic(struct window *) all;
    struct {
        _Atomic(_Atomic(struct window *) *) table; /* WINDOWS_SEG pointers; calloc gives memory only where it is used */
        _Atomic uint64_t size;                     /* bytes the file has at least; files never shrink */
    } seg[];
};

static _Atomic uint32_t mapped; /* windows of the process */

static struct window *find(struct layout *l, uint32_t seg, uint64_t pos, uint64_t len)
{
    struct windows *ws = atomic_load_explicit(&l->windows, memory_order_acquire);
    if (!ws || len > WINDOW_IO || (pos ^ (pos + len - 1)) >> WINDOW_SHIFT)
        return NULL;
    _Atomic(struct window *) *table = atomic_load_explicit(&ws->seg[seg].table, memory_order_acquire);
    return table ? atomic_load_explicit(&table[pos >> WINDOW_SHIFT], memory_order_acquire) : NULL;
}

static bool has(const struct marks *m, uint32_t gen, uint64_t first, uint64_t last)
{
    if (atomic_load_explicit(&m->gen, memory_order_relaxed) != gen)
        return false;
    for (uint64_t page = first; page <= last; page++)
        if (!(atomic_load_explicit(&m->bits[page / 64], memory_order_relaxed) >> page % 64 & 1))
            return false;
    return true;
}

static void set(struct marks *m, uint32_t gen, uint64_t first, uint64_t last)
{
    if (atomic_load_explicit(&m->gen, memory_order_relaxed) != gen) {
        for (unsigned i = 0; i < WINDOW_WORDS; i++)
            atomic_store_explicit(&m->bits[i], 0, memory_order_relaxed);
        atomic_store_explicit(&m->gen, gen, memory_order_relaxed);
    }
    for (uint64_t page = first; page <= last; page++)
        if (!(atomic_load_explicit(&m->bits[page / 64], memory_order_relaxed) >> page % 64 & 1))
            atomic_fetch_or_explicit(&m->bits[page / 64], 1ULL << page % 64, memory_order_relaxed);
}

static uint64_t first_page(uint64_t pos) { return (pos & (WINDOW_SIZE - 1)) / LAYOUT_PAGE; }

/* Pages that had to come from the disk under this thread's copies: residency is not what it was. */
static void watch_faults(struct windows *ws)
{
    static __thread uint32_t copies __attribute__((tls_model("initial-exec")));
    static __thread long faults __attribute__((tls_model("initial-exec")));
    if (++copies % FAULTS_EVERY)
        return;
    struct rusage now;
    if (getrusage(RUSAGE_THREAD, &now) == 0 && now.ru_majflt != faults) {
        faults = now.ru_majflt;
        atomic_fetch_add(&ws->seen_gen, 1);
    }
}

static bool copy_all(const struct store_op *op, char *at, uint64_t len, bool out)
{
    for (uint32_t i = 0; i < op->iovcnt && len; i++) {
        size_t n = op->iov[i].iov_len < len ? op->iov[i].iov_len : len;
        char *buf = op->iov[i].iov_base;
        if (!(out ? guarded_copy(buf, at, n) : guarded_copy(at, buf, n)))
            return false;
        at += n;
        len -= n;
    }
    return len == 0;
}

bool window_read(struct layout *l, uint32_t seg, const struct store_op *op, uint64_t pos, uint64_t len)
{
    struct window *w = find(l, seg, pos, len);
    if (!w)
        return false;
    struct windows *ws = atomic_load_explicit(&l->windows, memory_order_relaxed);
    uint64_t first = first_page(pos), last = first_page(pos + len - 1);
    if (!has(&w->seen, atomic_load_explicit(&ws->seen_gen, memory_order_relaxed), first, last))
        return false;
    watch_faults(ws);
    return copy_all(op, w->base + (pos & (WINDOW_SIZE - 1)), len, true);
}

bool window_write(struct layout *l, uint32_t seg, const struct store_op *op, uint64_t pos)
{
    struct window *w = find(l, seg, pos, op->len);
    if (!w)
        return false;
    struct windows *ws = atomic_load_explicit(&l->windows, memory_order_relaxed);
    if (!has(&w->written, atomic_load_explicit(&ws->written_gen, memory_order_relaxed), first_page(pos),
             first_page(pos + op->len - 1)))
        return false;
    return copy_all(op, w->base + (pos & (WINDOW_SIZE - 1)), op->len, false);
}

static struct windows *make_windows(struct layout *l)
{
    struct windows *ws = calloc(1, sizeof *ws + l->head_count * sizeof ws->seg[0]), *none = NULL;
    if (!ws)
        return NULL;
    atomic_store(&ws->seen_gen, 1);
    atomic_store(&ws->written_gen, 1);
    if (atomic_compare_exchange_strong(&l->windows, &none, ws))
        return ws;
    free(ws);
    return none;
}

static struct window *map_window(int fd, uint64_t pos)
{
    if (atomic_fetch_add(&mapped, 1) >= WINDOWS_MAX || guard_install() < 0) {
        atomic_fetch_sub(&mapped, 1);
        return NULL;
    }
    struct window *w = calloc(1, sizeof *w);
    char *base = w ? mmap(NULL, WINDOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd,
                          (off_t)(pos & ~(WINDOW_SIZE - 1)))
                   : MAP_FAILED;
    if (base == MAP_FAILED) {
        free(w);
        atomic_fetch_sub(&mapped, 1);
        return NULL;
    }
    madvise(base, WINDOW_SIZE, MADV_DONTDUMP); /* the guest's bytes have no place in a core dump */
    madvise(base, WINDOW_SIZE, MADV_RANDOM);
    w->base = base;
    return w;
}

static void unmap_window(struct window *w)
{
    munmap(w->base, WINDOW_SIZE);
    free(w);
    atomic_fetch_sub(&mapped, 1);
}

/* Maps the window when it is not there yet. NULL: too many, or no memory. */
static struct window *make(struct layout *l, uint32_t seg, int fd, uint64_t pos, uint64_t len)
{
    struct window *w = find(l, seg, pos, len);
    if (w || len > WINDOW_IO || (pos ^ (pos + len - 1)) >> WINDOW_SHIFT ||
        atomic_load_explicit(&mapped, memory_order_relaxed) >= WINDOWS_MAX)
        return w;
    struct windows *ws = atomic_load(&l->windows);
    if (!ws && !(ws = make_windows(l)))
        return NULL;
    _Atomic(struct window *) *table = atomic_load(&ws->seg[seg].table), *none = NULL;
    if (!table) {
        if (!(table = calloc(WINDOWS_SEG, sizeof *table)))
            return NULL;
        if (!atomic_compare_exchange_strong(&ws->seg[seg].table, &none, table)) {
            free(table);
            table = none;
        }
    }
    struct window *other = NULL;
    if (!(w = map_window(fd, pos)))
        return NULL;
    if (!atomic_compare_exchange_strong(&table[pos >> WINDOW_SHIFT], &other, w)) {
        unmap_window(w);
        return other;
    }
    w->next = atomic_load(&ws->all);
    while (!atomic_compare_exchange_weak(&ws->all, &w->next, w))
        ;
    return w;
}

/* Whether the pages of bytes pos.. are whole pages of the file. Those behind its end are not there, however they read,
 * and a store into the rest of its last page would not make it longer. */
static bool in_file(struct windows *ws, uint32_t seg, int fd, uint64_t pos, uint64_t len)
{
    struct stat st;
    uint64_t end = (pos + len + LAYOUT_PAGE - 1) & ~(uint64_t)(LAYOUT_PAGE - 1);
    if (end <= atomic_load_explicit(&ws->seg[seg].size, memory_order_relaxed))
        return true;
    if (fstat(fd, &st) < 0)
        return false;
    atomic_store_explicit(&ws->seg[seg].size, (uint64_t)st.st_size, memory_order_relaxed);
    return end <= (uint64_t)st.st_size;
}

void window_saw(struct layout *l, uint32_t seg, int fd, uint64_t pos, uint64_t len)
{
    struct window *w = len ? make(l, seg, fd, pos, len) : NULL;
    if (!w)
        return;
    struct windows *ws = atomic_load_explicit(&l->windows, memory_order_relaxed);
    if (in_file(ws, seg, fd, pos, len))
        set(&w->seen, atomic_load_explicit(&ws->seen_gen, memory_order_relaxed), first_page(pos),
            first_page(pos + len - 1));
}

void window_wrote(struct layout *l, uint32_t seg, int fd, uint64_t pos, uint64_t len)
{
    struct window *w = make(l, seg, fd, pos, len);
    if (!w)
        return;
    struct windows *ws = atomic_load_explicit(&l->windows, memory_order_relaxed);
    if (in_file(ws, seg, fd, pos, len))
        set(&w->written, atomic_load_explicit(&ws->written_gen, memory_order_relaxed), first_page(pos),
            first_page(pos + len - 1));
}

void windows_synced(struct layout *l)
{
    struct windows *ws = atomic_load(&l->windows);
    if (ws)
        atomic_fetch_add(&ws->written_gen, 1);
}

void windows_free(struct layout *l)
{
    struct windows *ws = atomic_load(&l->windows);
    if (!ws)
        return;
    for (struct window *w = atomic_load(&ws->all), *next; w; w = next) {
        next = w->next;
        unmap_window(w);
    }
    for (uint32_t seg = 0; seg < l->head_count; seg++)
        free(atomic_load(&ws->seg[seg].table));
    free(ws);
}
