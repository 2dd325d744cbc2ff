/* Guest-side writer whose every acknowledged write can be accounted for afterwards, from outside and without the guest.
 *
 *   ledger DEV IMAGE OWNER EPOCH BLOCKS THREADS SECONDS
 *
 * Each thread has an area of BLOCKS / THREADS blocks of 4096 bytes, behind the first 4096 bytes of DEV. It writes, one after the
 * other, versions 1, 2, 3 ...: which block version n of an epoch goes to is a function of (thread, epoch, n), so that
 * who knows the last acknowledged n knows what every block must hold at least. One request in four reads a block back
 * and compares every byte. After BATCH writes it flushes, and says
 *
 *   STAMP-ACK thread epoch n .        versions up to n were written and flushed
 *
 * A block is {magic, image, lba, owner, epoch, thread and version, crc32 of the rest} and a pattern derived from them:
 * IMAGE, OWNER (which VM) and EPOCH (which boot of it) are numbers given by who starts the guest. tests/libvirt/ledger.py reads it.
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

enum { BLOCK = 4096, WORDS = BLOCK / 8, BATCH = 32, THREADS = 16 };
static const uint64_t MAGIC = 0x4c44474552444252ULL; /* "RBDREGDL" */

static int disk;
static uint64_t image, owner, epoch, share; /* share: blocks of a thread */
static unsigned seconds;

struct thread {
    pthread_t id;
    unsigned number;
    uint64_t writes, reads, failed;
};

static uint32_t crcs[256];

static void make_crcs(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? 0xedb88320U ^ c >> 1 : c >> 1;
        crcs[i] = c;
    }
}

static uint32_t crc32(const void *data, size_t n)
{
    uint32_t c = ~0U;
    for (const uint8_t *p = data, *end = p + n; p < end; p++)
        c = crcs[(c ^ *p) & 255] ^ c >> 8;
    return ~c;
}

static uint64_t mix(uint64_t x)
{
    x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL;
    return x ^ x >> 33;
}

/* The block, within its thread's area, of a version. */
static uint64_t place(unsigned thread, uint64_t version)
{
    return mix(version * 0x9e3779b97f4a7c15ULL + epoch * 1000003 + thread) % share;
}

static void fill(uint64_t *b, uint64_t lba, unsigned thread, uint64_t version)
{
    uint64_t head[] = { MAGIC, image, lba, owner, epoch, thread, version, 0 };
    uint64_t x = mix(lba + mix(version + mix(epoch)));
    memcpy(b, head, sizeof head);
    for (int i = 8; i < WORDS; i++)
        b[i] = x = x * 6364136223846793005ULL + 1442695040888963407ULL;
    b[7] = crc32(b, BLOCK); /* with zero in its own place */
}

static int64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void error(struct thread *t, const char *what, uint64_t lba, const char *why)
{
    if (t->failed++ < 4)
        printf("STAMP-ERROR ledger thread %u: %s of block %llu: %s\n", t->number, what, (unsigned long long)lba, why);
}

/* A block's words, and whether it is one that somebody wrote as a whole. */
static void describe(const char *what, uint64_t *b)
{
    uint64_t crc = b[7];
    b[7] = 0;
    int whole = b[0] == MAGIC && crc32(b, BLOCK) == crc;
    b[7] = crc;
    printf("STAMP-FOUND %s: image %llu block %llu owner %llu epoch %llu thread %llu version %llu magic %llx, %s\n", what,
           (unsigned long long)b[1], (unsigned long long)b[2], (unsigned long long)b[3], (unsigned long long)b[4],
           (unsigned long long)b[5], (unsigned long long)b[6], (unsigned long long)b[0], whole ? "whole" : "torn");
}

/* Tells a disk that holds something else from a guest whose memory does: what stood in the buffer before the read, what
 * the same read finds now, what the block should be, made again. */
static void wrong(struct thread *t, uint64_t lba, uint64_t *b, uint64_t *want, uint64_t version, uint64_t *before)
{
    int first = 0, last = WORDS - 1, differ = 0;
    error(t, "read", lba, "it holds something else");
    while (first < WORDS && b[first] == want[first])
        first++;
    while (last > first && b[last] == want[last])
        last--;
    for (int i = 0; i < WORDS; i++)
        differ += b[i] != want[i];
    printf("STAMP-FOUND %d words differ, %d to %d; wanted version %llu\n", differ, first, last, (unsigned long long)version);
    describe("wanted", want);
    describe("found", b);
    describe("in the buffer before", before);
    fill(want, lba, t->number, version);
    printf("STAMP-FOUND made again: %s\n", memcmp(b, want, BLOCK) ? "differs" : "is what was found");
    for (int i = 0; i < WORDS; i++)
        b[i] = ~want[i];
    if (pread(disk, b, BLOCK, (off_t)(lba * BLOCK)) == BLOCK)
        describe(memcmp(b, want, BLOCK) ? "read again, not right" : "read again, right", b);
}

static void *run(void *arg)
{
    struct thread *t = arg;
    uint64_t *held = calloc(share, sizeof *held), *b = NULL, *want = NULL, *before = NULL;
    uint64_t random = mix(t->number + epoch * 977), version = 0;
    int64_t end = now_ms() + seconds * 1000LL, said = 0;
    if (!held || posix_memalign((void **)&b, BLOCK, BLOCK) || posix_memalign((void **)&want, BLOCK, BLOCK) ||
        posix_memalign((void **)&before, BLOCK, BLOCK))
        abort();
    while (now_ms() < end && !t->failed) {
        random = mix(random + 0x9e3779b97f4a7c15ULL);
        uint64_t at = random % share, lba = 1 + t->number * share + at;
        if (random >> 62 == 0 && held[at]) {
            fill(want, lba, t->number, held[at]);
            memcpy(before, b, BLOCK);
            if (pread(disk, b, BLOCK, (off_t)(lba * BLOCK)) != BLOCK)
                error(t, "read", lba, strerror(errno));
            else if (memcmp(b, want, BLOCK))
                wrong(t, lba, b, want, held[at], before);
            t->reads++;
            continue;
        }
        at = place(t->number, ++version), lba = 1 + t->number * share + at;
        fill(b, lba, t->number, version);
        if (pwrite(disk, b, BLOCK, (off_t)(lba * BLOCK)) != BLOCK) {
            error(t, "write", lba, strerror(errno));
            break;
        }
        held[at] = version;
        t->writes++;
        if (version % BATCH == 0) {
            if (fsync(disk)) {
                error(t, "flush", lba, strerror(errno));
                break;
            }
            printf("STAMP-ACK %u %llu %llu .\n", t->number, (unsigned long long)epoch, (unsigned long long)version);
        }
        if (t->number == 0 && now_ms() - said >= 200) {
            said = now_ms();
            printf("STAMP-TICK %llu\n", (unsigned long long)version);
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static struct thread threads[THREADS];
    uint64_t writes = 0, reads = 0, failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    make_crcs();
    unsigned count = argc == 8 ? (unsigned)atoi(argv[6]) : 0;
    if (count < 1 || count > THREADS) {
        fprintf(stderr, "usage: ledger DEV IMAGE OWNER EPOCH BLOCKS THREADS SECONDS\n");
        return 2;
    }
    disk = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (disk < 0) {
        printf("STAMP-ERROR %s: %s\n", argv[1], strerror(errno));
        return 1;
    }
    image = strtoull(argv[2], NULL, 0), owner = strtoull(argv[3], NULL, 0), epoch = strtoull(argv[4], NULL, 0);
    share = strtoull(argv[5], NULL, 0) / count, seconds = (unsigned)atoi(argv[7]);
    if (!share)
        return 2;
    for (unsigned i = 0; i < count; i++) {
        threads[i].number = i;
        if (pthread_create(&threads[i].id, NULL, run, &threads[i]))
            return 2;
    }
    for (unsigned i = 0; i < count; i++) {
        pthread_join(threads[i].id, NULL);
        writes += threads[i].writes, reads += threads[i].reads, failed += threads[i].failed;
    }
    printf("STAMP-LOAD writes=%llu reads=%llu errors=%llu\n", (unsigned long long)writes, (unsigned long long)reads,
           (unsigned long long)failed);
    return failed != 0;
}
