/* Guest-side writer and verifier of stamped blocks. Linked statically, runs in the initramfs.
 *
 *   blkstamp write  DEV START BLOCKS EPOCH        stamp BLOCKS blocks from byte START, O_DIRECT, fsync at the end
 *   blkstamp verify DEV START BLOCKS EPOCH        read them back, O_DIRECT, and check every byte
 *   blkstamp load   DEV START BLOCKS THREADS SECS random stamped writes, fsyncs and verified reads, one area a thread
 *   blkstamp tick   DEV START BLOCKS SECS         one write after the other and a dot for each: when the host sees no
 *                                                 new dot, no write completed
 *
 * A block is 4096 bytes: {magic, lba, epoch, sequence, crc32 of the rest} and a pattern derived from them, so that
 * a block of another place, an older version or a torn one is told apart. Exit status 0 only if all was right.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, WORDS = BLOCK / 8 };
static const uint64_t MAGIC = 0x504d415453444252ULL; /* "RBDSTAMP" */

struct area {
    int fd;
    uint64_t first, blocks, epoch; /* in blocks of the device */
    unsigned seconds, id;
    uint64_t done, failed, longest_ms;
};

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ x >> 33;
}

static void fill(uint64_t *b, uint64_t lba, uint64_t epoch, uint64_t seq)
{
    b[0] = MAGIC, b[1] = lba, b[2] = epoch, b[3] = seq;
    for (int i = 4; i < WORDS; i++)
        b[i] = mix(lba * 0x9e3779b97f4a7c15ULL + epoch * 31 + seq * 1000003 + (uint64_t)i);
}

static int check(const uint64_t *b, uint64_t lba, uint64_t epoch, uint64_t seq)
{
    uint64_t want[WORDS];
    fill(want, lba, epoch, seq);
    return memcmp(b, want, BLOCK) ? -1 : 0;
}

static void *buffer(void)
{
    void *p = NULL;
    if (posix_memalign(&p, BLOCK, BLOCK))
        abort();
    return p;
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static int pass(int fd, int writing, uint64_t first, uint64_t blocks, uint64_t epoch)
{
    uint64_t *b = buffer(), bad = 0;
    for (uint64_t i = 0; i < blocks; i++) {
        off_t at = (off_t)((first + i) * BLOCK);
        if (writing)
            fill(b, first + i, epoch, 0);
        ssize_t n = writing ? pwrite(fd, b, BLOCK, at) : pread(fd, b, BLOCK, at);
        if (n != BLOCK) {
            printf("STAMP-ERROR block %llu: %s\n", (unsigned long long)(first + i), n < 0 ? strerror(errno) : "short");
            return 1;
        }
        if (!writing && check(b, first + i, epoch, 0) && bad++ < 8)
            printf("STAMP-ERROR block %llu holds other data\n", (unsigned long long)(first + i));
    }
    if (writing && fsync(fd)) {
        printf("STAMP-ERROR fsync: %s\n", strerror(errno));
        return 1;
    }
    free(b);
    return bad != 0;
}

static void *loader(void *arg)
{
    struct area *a = arg;
    uint64_t *b = buffer(), *seq = calloc(a->blocks, sizeof *seq), end = now_ms() + a->seconds * 1000ULL;
    uint64_t random = mix(a->id + 1), said = now_ms();
    while (now_ms() < end) {
        random = mix(random + 0x9e3779b97f4a7c15ULL);
        uint64_t i = random % a->blocks, lba = a->first + i, begin = now_ms();
        off_t at = (off_t)(lba * BLOCK);
        int rc = 0;
        if (seq[i] && random >> 60 < 6) {
            rc = pread(a->fd, b, BLOCK, at) != BLOCK ? errno : check(b, lba, a->epoch, seq[i]) ? EILSEQ : 0;
        } else {
            fill(b, lba, a->epoch, ++seq[i]);
            rc = pwrite(a->fd, b, BLOCK, at) != BLOCK ? errno : random >> 60 == 15 && fsync(a->fd) ? errno : 0;
        }
        if (rc && a->failed++ < 4)
            printf("STAMP-ERROR thread %u block %llu: %s\n", a->id, (unsigned long long)lba, strerror(rc));
        uint64_t took = now_ms() - begin;
        if (took > a->longest_ms)
            a->longest_ms = took;
        a->done++;
        if (a->id == 0 && now_ms() - said >= 500) {
            said = now_ms();
            printf("STAMP-TICK %llu\n", (unsigned long long)a->done);
        }
    }
    for (uint64_t i = 0; i < a->blocks; i++)
        if (seq[i] && (pread(a->fd, b, BLOCK, (off_t)((a->first + i) * BLOCK)) != BLOCK ||
                       check(b, a->first + i, a->epoch, seq[i])) && a->failed++ < 8)
            printf("STAMP-ERROR thread %u: block %llu lost its last version\n", a->id, (unsigned long long)(a->first + i));
    free(seq);
    free(b);
    return NULL;
}

static int load(int fd, uint64_t first, uint64_t blocks, unsigned threads, unsigned seconds)
{
    struct area areas[64];
    pthread_t ids[64];
    uint64_t done = 0, failed = 0, longest = 0;
    if (threads < 1 || threads > 64 || blocks < threads)
        return 2;
    for (unsigned t = 0; t < threads; t++) {
        uint64_t share = blocks / threads;
        areas[t] = (struct area){ .fd = fd, .first = first + t * share, .blocks = share, .epoch = 1, .seconds = seconds, .id = t };
        if (pthread_create(&ids[t], NULL, loader, &areas[t]))
            return 2;
    }
    for (unsigned t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        done += areas[t].done, failed += areas[t].failed;
        longest = areas[t].longest_ms > longest ? areas[t].longest_ms : longest;
    }
    printf("STAMP-LOAD ops=%llu errors=%llu longest_ms=%llu\n", (unsigned long long)done, (unsigned long long)failed,
           (unsigned long long)longest);
    return failed != 0;
}

static int tick(int fd, uint64_t first, uint64_t blocks, unsigned seconds)
{
    uint64_t *b = buffer(), end = now_ms() + seconds * 1000ULL, seq = 0;
    for (; now_ms() < end; seq++) {
        uint64_t lba = first + seq % blocks;
        fill(b, lba, 1, seq);
        if (pwrite(fd, b, BLOCK, (off_t)(lba * BLOCK)) != BLOCK) {
            printf("STAMP-ERROR write %llu: %s\n", (unsigned long long)seq, strerror(errno));
            return 1;
        }
        if (write(1, ".", 1) != 1)
            return 1;
    }
    free(b);
    return 0;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 6) {
        fprintf(stderr, "usage: blkstamp write|verify DEV START BLOCKS EPOCH | load DEV START BLOCKS THREADS SECONDS"
                        " | tick DEV START BLOCKS SECONDS\n");
        return 2;
    }
    int fd = open(argv[2], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0) {
        printf("STAMP-ERROR %s: %s\n", argv[2], strerror(errno));
        return 1;
    }
    uint64_t first = strtoull(argv[3], NULL, 0) / BLOCK, blocks = strtoull(argv[4], NULL, 0);
    if (!strcmp(argv[1], "load"))
        return load(fd, first, blocks, (unsigned)atoi(argv[5]), argc > 6 ? (unsigned)atoi(argv[6]) : 10);
    if (!strcmp(argv[1], "tick"))
        return tick(fd, first, blocks, (unsigned)atoi(argv[5]));
    int rc = pass(fd, !strcmp(argv[1], "write"), first, blocks, strtoull(argv[5], NULL, 0));
    if (!rc)
        printf("STAMP-OK %s %llu blocks\n", argv[1], (unsigned long long)blocks);
    return rc;
}
