/* The index: header, growth, the durable dirty mark, exclusion between processes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/layout.h"

static const char MAGIC[8] = "RBDNIDX1";

_Static_assert(sizeof(struct entry) == 16 && sizeof(struct clone_entry) == 16, "on-disk size");
_Static_assert(offsetof(struct index_header, crc) == 20 && sizeof(struct index_header) <= 512, "on-disk layout");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "files are mapped as they are");

static uint32_t crc32c(const void *data, size_t len)
{
    const uint8_t *p = data;
    uint32_t crc = ~0u;
    while (len--) {
        crc ^= *p++;
        for (int i = 0; i < 8; i++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0);
    }
    return ~crc;
}

/* Under a lock on the directory, by way of another name: a half-made index is never seen. */
int index_create(int dir, unsigned order)
{
    char page[LAYOUT_PAGE] = {0};
    struct index_header *h = (struct index_header *)page;
    memcpy(h->magic, MAGIC, sizeof MAGIC);
    h->version = LAYOUT_VERSION;
    h->order = order;
    h->entry_size = sizeof(struct entry);
    h->crc = crc32c(page, offsetof(struct index_header, crc));
    struct iovec v = {page, sizeof page};
    if (unlinkat(dir, "index.new", 0) < 0 && errno != ENOENT)
        return -errno;
    int fd = file_open(dir, "index.new", true);
    if (fd < 0)
        return fd;
    int r = file_write(fd, &v, 1, sizeof page, 0);
    if (r == 0 && (fallocate(fd, 0, 0, LAYOUT_CHUNK) < 0 || fsync(fd) < 0))
        r = -errno;
    if (r == 0 && (renameat(dir, "index.new", dir, "index") < 0 || fsync(dir) < 0))
        r = -errno;
    close(fd);
    return r;
}

/* Maps what the file holds beyond what is mapped; under l->lock, or while opening. */
static int index_extend(struct layout *l)
{
    uint64_t entries = atomic_load(&l->entries);
    uint64_t mapped = entries ? LAYOUT_PAGE + entries * sizeof(struct entry) : 0;
    struct stat st;
    if (fstat(l->index, &st) < 0)
        return -errno;
    uint64_t size = (uint64_t)st.st_size / LAYOUT_PAGE * LAYOUT_PAGE;
    if (size > LAYOUT_INDEX_MAX)
        size = LAYOUT_INDEX_MAX;
    if (size <= mapped)
        return 0;
    void *at = mmap(l->base + mapped, size - mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, l->index,
                    (off_t)mapped);
    if (at == MAP_FAILED)
        return -errno;
    atomic_store_explicit(&l->entries, (size - LAYOUT_PAGE) / sizeof(struct entry), memory_order_release);
    return 0;
}

/* Everything in the file is checked before it is mapped. */
int index_order(int fd, unsigned *order)
{
    struct index_header h;
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    ssize_t n = pread(fd, &h, sizeof h, 0);
    if (n < 0)
        return -errno;
    if (n != sizeof h || st.st_size < 2 * LAYOUT_PAGE || st.st_size % LAYOUT_PAGE != 0 ||
        memcmp(h.magic, MAGIC, sizeof MAGIC) != 0 || h.crc != crc32c(&h, offsetof(struct index_header, crc)))
        return -EIO;
    if (h.version != LAYOUT_VERSION)
        return -EPROTONOSUPPORT;
    if (h.entry_size != sizeof(struct entry) || h.order < 12 || h.order > 25 ||
        h.map_plus1 > LAYOUT_MAX_OBJECTS + 1)
        return -EIO;
    *order = h.order;
    return 0;
}

int index_map(struct layout *l, unsigned order)
{
    l->order = (uint8_t)order;
    l->base = mmap(NULL, LAYOUT_INDEX_MAX, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (l->base == MAP_FAILED) {
        l->base = NULL;
        return -errno;
    }
    int r = index_extend(l);
    if (r == 0)
        atomic_store(&l->grown, atomic_load(&layout_header(l)->grown));
    return r;
}

void index_unmap(struct layout *l)
{
    if (l->base)
        munmap(l->base, LAYOUT_INDEX_MAX);
    l->base = NULL;
}

struct entry *index_slow_find(struct layout *l, uint64_t objno)
{
    uint64_t grown = atomic_load(&layout_header(l)->grown);
    if (grown == atomic_load(&l->grown))
        return NULL;
    pthread_mutex_lock(&l->lock);
    if (index_extend(l) == 0)
        atomic_store(&l->grown, grown);
    pthread_mutex_unlock(&l->lock);
    return objno < atomic_load(&l->entries) ? (struct entry *)(l->base + LAYOUT_PAGE) + objno : NULL;
}

int index_make(struct layout *l, uint64_t objno, struct entry **e)
{
    int r = 0;
    if (objno >= LAYOUT_MAX_OBJECTS)
        return -EFBIG;
    if (!index_allocated(l, objno)) {
        uint64_t chunk = (LAYOUT_PAGE + objno * sizeof(struct entry)) / LAYOUT_CHUNK;
        pthread_mutex_lock(&l->lock);
        /* Extends the file when it must, never shortens it: processes may do this at the same time. */
        while (r == 0 && fallocate(l->index, 0, (off_t)(chunk * LAYOUT_CHUNK), LAYOUT_CHUNK) < 0)
            if (errno != EINTR)
                r = -errno;
        if (r == 0 && objno >= atomic_load(&l->entries)) {
            r = index_extend(l);
            atomic_fetch_add(&layout_header(l)->grown, 1);
        }
        if (r == 0)
            atomic_fetch_or(&l->allocated[chunk / 64], 1ULL << chunk % 64);
        pthread_mutex_unlock(&l->lock);
        if (r < 0)
            return r;
    }
    *e = index_find(l, objno);
    return *e ? 0 : -EIO; /* somebody cut the file */
}

/* First object at or after `from` whose index page is not a hole of the file; so a scan costs what was ever used. */
uint64_t index_skip_hole(struct layout *l, uint64_t from)
{
    uint64_t data, hole, pos = LAYOUT_PAGE + from * sizeof(struct entry);
    if (!file_data(l->index, pos, LAYOUT_INDEX_MAX, &data, &hole))
        return LAYOUT_MAX_OBJECTS;
    return data <= pos ? from : (data - LAYOUT_PAGE) / sizeof(struct entry);
}

static void index_touched(struct layout *l)
{
    if (!atomic_load_explicit(&l->index_dirty, memory_order_seq_cst))
        atomic_store_explicit(&l->index_dirty, true, memory_order_seq_cst);
}

void entry_set_seq(struct layout *l, struct entry *e, uint64_t seq)
{
    uint64_t now = atomic_load_explicit(&e->seq, memory_order_relaxed);
    while (now < seq && !atomic_compare_exchange_weak(&e->seq, &now, seq))
        ;
    index_touched(l);
}

void entry_set_word(struct layout *l, struct entry *e, uint64_t word)
{
    atomic_store(&e->word, word);
    index_touched(l);
}

int layout_make_ready(struct layout *l)
{
    int r = 0;
    pthread_mutex_lock(&l->lock);
    if (atomic_load(&l->failed)) {
        r = -EIO;
    } else if (!atomic_load(&l->ready)) {
        /* Synced even if set already: whoever set it may still be waiting for the disk. Nobody clears it while we
         * have the layout open. */
        uint32_t clean = 0;
        atomic_compare_exchange_strong(&layout_header(l)->dirty, &clean, 1);
        r = layout_fdatasync(l, l->index);
        atomic_store(&l->ready, r == 0);
        if (atomic_load(&l->failed)) /* another thread's sync, in between */
            atomic_store(&l->ready, false);
    }
    pthread_mutex_unlock(&l->lock);
    return r;
}

int layout_range_lock(struct layout *l, short type, uint64_t start, uint64_t len)
{
    struct flock f = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)start, .l_len = (off_t)len};
    while (fcntl(l->index, F_OFD_SETLKW, &f) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

/* The kernel lock can only fail for want of memory; threads of this process are kept apart by the stripe anyway. */
void object_lock(struct layout *l, uint64_t objno)
{
    pthread_rwlock_wrlock(&layout_stripe(l, objno)->lock);
    layout_range_lock(l, F_WRLCK, LAYOUT_PAGE + objno * sizeof(struct entry), sizeof(struct entry));
}

void object_unlock(struct layout *l, uint64_t objno)
{
    layout_range_lock(l, F_UNLCK, LAYOUT_PAGE + objno * sizeof(struct entry), sizeof(struct entry));
    pthread_rwlock_unlock(&layout_stripe(l, objno)->lock);
}
