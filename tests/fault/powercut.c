/* Power cuts: powercut FSTYPE IMAGE MOUNTPOINT CUTS SEED
 *
 * IMAGE holds a file system of that type. In a mount namespace of its own, through a loop device that goes when the
 * process goes, a child runs a random program on an embedded store; at a random moment the file system is shut down
 * without flushing its log (what was not synced is lost), the child is killed, the file system mounted again, the
 * store opened (which repairs it) and every 512-byte sector of HEAD and of every snapshot compared with what it may
 * hold: its last flushed value or one issued later, whole. Then the program goes on from there.
 *
 * Half of the objects have a "parent": while they do not exist they show its bytes, so they come to be by copy-up and
 * must never show zeros instead. The model lives in memory shared with the child: a value is added before its
 * operation is issued, older ones are dropped after a flush that began when the newest was complete.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/store.h"

#define ORDER 16
#define SIZE (1u << ORDER)
#define SECTOR 512u
#define SECTORS (SIZE / SECTOR)
#define OBJECTS 16  /* odd ones have a parent */
#define THREADS 2   /* object o belongs to thread o / 8 */
#define SNAPS 4
#define CUTS_OF_A_LAYOUT 5
#define VALUES 12   /* issued and not flushed, at most, of one sector */
#define GOING_DOWN _IOR('X', 125, uint32_t) /* EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN */
#define NO_LOG_FLUSH 2u

/* What a sector may hold. Values: ZERO, PARENT, or the number of a write. */
enum { ZERO, PARENT, FIRST_WRITE };
struct legal {
    uint32_t n; /* >= 1; the last is the newest */
    uint64_t v[VALUES];
};

struct content {
    struct legal sector[OBJECTS][SECTORS];
};

struct model {
    struct content head;
    struct content snap[SNAPS];
    _Atomic uint64_t snap_id[SNAPS]; /* 0: free */
    _Atomic uint64_t seq;            /* highest snapshot id */
    _Atomic uint64_t writes;         /* numbers given out */
    _Atomic uint64_t flushes, copyups, copies, ops;
    _Atomic int started; /* threads */
    _Atomic int down;    /* the shutdown has begun */
};

/* 512 bytes that say whose they are; every word depends on all of it, so a torn sector shows. */
static void stamp(uint64_t *sector, uint64_t o, uint64_t index, uint64_t value)
{
    for (uint64_t i = 0; i < SECTOR / 8; i++)
        sector[i] = value == ZERO ? 0 : (value << 20 | o << 12 | index) ^ i * 0x9e3779b97f4a7c15ULL;
}

static struct model *m;
static const char *image, *mount_point, *device, *fstype, *layout_dir;
static int loop_fd = -1;
static pthread_rwlock_t snapshots = PTHREAD_RWLOCK_INITIALIZER; /* shared: operations; exclusive: a new snapshot */

#define DIE(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))

struct thread {
    rbdn_store *store;
    uint32_t first; /* object */
    uint64_t random;
    uint8_t buf[SIZE];
};

static uint64_t rnd(uint64_t *state, uint64_t below)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (*state >> 11) % below;
}

/* --- the program */

static void issue(uint32_t o, uint32_t from, uint32_t to, uint64_t value)
{
    for (uint32_t i = from; i < to; i++) {
        struct legal *l = &m->head.sector[o][i];
        l->v[l->n] = value;
        atomic_thread_fence(memory_order_seq_cst);
        l->n++;
    }
}

static void keep_newest(struct content *c, const struct thread *t)
{
    for (uint32_t o = t->first; o < t->first + OBJECTS / THREADS; o++)
        for (uint32_t i = 0; i < SECTORS; i++) {
            struct legal *l = &c->sector[o][i];
            l->v[0] = l->v[l->n - 1];
            l->n = 1;
        }
}

static int flush(struct thread *t)
{
    int r = rbdn_store_flush(t->store);
    /* A flush that returns while the file system goes down proves nothing: XFS drops what its log had not written and
     * then finds nothing left to wait for. Nobody would have heard of it in a real cut. */
    if (r < 0 || m->down)
        return r < 0 ? r : -EIO;
    m->flushes++;
    keep_newest(&m->head, t);
    for (int s = 0; s < SNAPS; s++)
        if (m->snap_id[s])
            keep_newest(&m->snap[s], t);
    return 0;
}

static bool room(const struct thread *t, uint32_t o)
{
    for (uint32_t i = 0; i < SECTORS; i++)
        if (m->head.sector[o][i].n + 2 > VALUES)
            return false;
    return true;
}

struct context {
    struct snapc c;
    uint64_t ids[SNAPS];
};

static const struct snapc *context(struct context *c)
{
    c->c.seq = m->seq;
    c->c.count = 0;
    for (int s = 0; s < SNAPS; s++)
        if (m->snap_id[s])
            c->c.ids[c->c.count++] = m->snap_id[s];
    for (uint32_t i = 1; i < c->c.count; i++) /* newest first */
        for (uint32_t k = i; k > 0 && c->c.ids[k] > c->c.ids[k - 1]; k--) {
            uint64_t x = c->c.ids[k];
            c->c.ids[k] = c->c.ids[k - 1];
            c->c.ids[k - 1] = x;
        }
    return &c->c;
}

static int64_t submit(struct thread *t, struct store_op *op)
{
    struct context c;
    struct iovec v = {t->buf, op->len};
    op->iov = &v;
    op->iovcnt = 1;
    op->snapc = context(&c);
    return store_submit(t->store, op);
}

static int copy_up(struct thread *t, uint32_t o)
{
    for (uint32_t i = 0; i < SECTORS; i++)
        stamp((uint64_t *)(t->buf + i * SECTOR), o, i, PARENT);
    m->copyups++;
    return rbdn_obj_copyup(t->store, o, t->buf, SIZE);
}

static int write_some(struct thread *t, uint32_t o)
{
    uint32_t from = (uint32_t)rnd(&t->random, SECTORS);
    uint32_t n = 1 + (uint32_t)rnd(&t->random, rnd(&t->random, 4) ? 8 : SECTORS);
    uint32_t to = from + n < SECTORS ? from + n : SECTORS;
    uint64_t value = FIRST_WRITE + m->writes++;
    for (int tries = 0; tries < 2; tries++) {
        for (uint32_t i = from; i < to; i++)
            stamp((uint64_t *)(t->buf + (i - from) * SECTOR), o, i, value);
        if (tries == 0)
            issue(o, from, to, value);
        struct store_op op = {.type = STORE_WRITE, .flags = o % 2 ? STORE_GUARD : 0, .objno = o, .off = from * SECTOR,
                              .len = (to - from) * SECTOR};
        int64_t r = submit(t, &op);
        if (r != -ENOENT)
            return (int)r;
        if ((r = copy_up(t, o)) < 0)
            return (int)r;
    }
    return -EIO;
}

static int clear_some(struct thread *t, uint32_t o)
{
    struct store_op op = {.objno = o};
    uint32_t from = (uint32_t)rnd(&t->random, SECTORS), to = SECTORS;
    switch (rnd(&t->random, 3)) {
    case 0:
        op.type = STORE_ZERO;
        to = from + 1 + (uint32_t)rnd(&t->random, SECTORS - from);
        op.off = from * SECTOR;
        op.len = (to - from) * SECTOR;
        break;
    case 1:
        op.type = STORE_TRUNCATE;
        op.off = from * SECTOR;
        break;
    default:
        op.type = STORE_REMOVE;
        from = 0;
        if (o % 2) { /* a discard of all that hides the parent */
            op.type = STORE_TRUNCATE;
            op.flags = STORE_CREATE;
        }
    }
    if (!(op.flags & STORE_CREATE) && rbdn_obj_stat(t->store, o, STORE_NOSNAP) < 0)
        return 0;
    issue(o, from, to, ZERO);
    return (int)submit(t, &op);
}

/* Not atomic: sectors may be found cleared, or as they were. */
static int roll_back(struct thread *t, uint32_t o)
{
    struct context c;
    int s = (int)rnd(&t->random, SNAPS);
    uint64_t id = m->snap_id[s];
    if (!id || m->snap[s].sector[o][0].n != 1) /* newest value only */
        return 0;
    for (uint32_t i = 0; i < SECTORS; i++) {
        if (m->snap[s].sector[o][i].n != 1)
            return 0;
    }
    issue(o, 0, SECTORS, ZERO);
    for (uint32_t i = 0; i < SECTORS; i++)
        issue(o, i, i + 1, m->snap[s].sector[o][i].v[0]);
    context(&c);
    return rbdn_layout_rollback(t->store, o, id, c.c.seq, c.c.ids, c.c.count);
}

/* The kernel may write back anything at any time; so do we. */
static void sync_something(struct thread *t)
{
    static const char *const names[] = {"index", "head.0"};
    char path[300];
    uint64_t id = m->snap_id[rnd(&t->random, SNAPS)];
    if (rnd(&t->random, 3) || !id)
        snprintf(path, sizeof path, "%s/%s", layout_dir, names[rnd(&t->random, 2)]);
    else
        snprintf(path, sizeof path, "%s/clone.%llu%s", layout_dir, (unsigned long long)id,
                 rnd(&t->random, 2) ? "" : ".idx");
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0) {
        fdatasync(fd);
        close(fd);
    }
}

static int take_snapshot(struct thread *t)
{
    int r = 0;
    pthread_rwlock_wrlock(&snapshots);
    for (int s = 0; s < SNAPS; s++)
        if (!m->snap_id[s]) {
            memcpy(&m->snap[s], &m->head, sizeof m->head);
            atomic_store(&m->snap_id[s], ++m->seq);
            break;
        }
    pthread_rwlock_unlock(&snapshots);
    return r;
}

static int drop_snapshot(struct thread *t)
{
    struct context c;
    uint64_t live[SNAPS + 1];
    int s = (int)rnd(&t->random, SNAPS);
    pthread_rwlock_wrlock(&snapshots);
    m->snap_id[s] = 0;
    context(&c);
    for (uint32_t i = 0; i < c.c.count; i++)
        live[i] = c.c.ids[c.c.count - 1 - i];
    live[c.c.count] = m->seq + 1;
    int r = rbdn_layout_trim(t->store, live, c.c.count + 1);
    pthread_rwlock_unlock(&snapshots);
    return r;
}

static void *program(void *arg)
{
    struct thread *t = arg;
    int r = 0;
    m->started++;
    while (r >= 0) { /* until the file system is gone */
        uint64_t what = rnd(&t->random, 100);
        uint32_t o = t->first + (uint32_t)rnd(&t->random, OBJECTS / THREADS);
        m->ops++;
        if (what < 2)
            r = take_snapshot(t);
        else if (what < 3)
            r = drop_snapshot(t);
        else {
            pthread_rwlock_rdlock(&snapshots);
            if (what < 10 || !room(t, o))
                r = flush(t);
            else if (what < 15)
                sync_something(t);
            else if (what < 35)
                r = clear_some(t, o);
            else if (what < 40)
                r = roll_back(t, o);
            else
                r = write_some(t, o);
            pthread_rwlock_unlock(&snapshots);
        }
    }
    return NULL;
}

static void gone(int signal)
{
    _exit(1); /* a mapped page could not be had: the file system is shut down */
}

static void child(uint64_t seed)
{
    signal(SIGBUS, gone);
    static struct thread threads[THREADS];
    pthread_t ids[THREADS];
    int err;
    rbdn_store *s = rbdn_layout_open(layout_dir, ORDER, 0, &err);
    if (!s)
        DIE("open: %s", strerror(-err));
    for (uint32_t i = 0; i < THREADS; i++) {
        threads[i].store = s;
        threads[i].first = i * OBJECTS / THREADS;
        threads[i].random = seed * 77 + i * 1234567 + 88172645463325252ULL;
        if (pthread_create(&ids[i], NULL, program, &threads[i]) != 0)
            DIE("no thread");
    }
    for (uint32_t i = 0; i < THREADS; i++)
        pthread_join(ids[i], NULL);
    pause(); /* no clean end */
}

/* --- the rig */

/* A new loop device, which goes with its last user: then nothing of the old mount stays in its cache. (ext4 would read
 * its own uncommitted metadata from there.) */
static void attach(void)
{
    struct loop_config config = {.info.lo_flags = LO_FLAGS_AUTOCLEAR};
    static char path[64];
    int control = open("/dev/loop-control", O_RDWR | O_CLOEXEC), file = open(image, O_RDWR | O_CLOEXEC);
    if (control < 0 || file < 0)
        DIE("%s: %s", control < 0 ? "/dev/loop-control" : image, strerror(errno));
    for (int tries = 0; tries < 50; tries++) { /* somebody else may take the free one first */
        int n = ioctl(control, LOOP_CTL_GET_FREE);
        snprintf(path, sizeof path, "/dev/loop%d", n);
        loop_fd = n < 0 ? -1 : open(path, O_RDWR | O_CLOEXEC);
        config.fd = (uint32_t)file;
        if (loop_fd >= 0 && ioctl(loop_fd, LOOP_CONFIGURE, &config) == 0)
            break;
        int err = errno;
        if (loop_fd >= 0)
            close(loop_fd);
        loop_fd = -1;
        errno = err;
    }
    if (loop_fd < 0)
        DIE("no loop device: %s", strerror(errno));
    device = path;
    close(control);
    close(file);
}

static void mount_it(void)
{
    attach();
    if (mount(device, mount_point, fstype, 0, NULL) < 0)
        DIE("mount %s: %s", fstype, strerror(errno));
    close(loop_fd);
}

static void shut_down(void)
{
    uint32_t how = NO_LOG_FLUSH;
    int fd = open(mount_point, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, GOING_DOWN, &how) < 0)
        DIE("shutdown: %s", strerror(errno));
    close(fd);
}

static void remount(void)
{
    for (int tries = 0; umount(mount_point) < 0; tries++) {
        if (errno != EBUSY || tries == 1000)
            DIE("umount: %s", strerror(errno));
        nanosleep(&(struct timespec){0, 1000000}, NULL);
    }
    mount_it();
}

static const char *name_of(uint64_t value)
{
    static char text[4][32];
    static int i;
    i = (i + 1) % 4;
    if (value <= PARENT)
        return value == ZERO ? "zeros" : "parent";
    snprintf(text[i], sizeof text[i], "write %llu", (unsigned long long)value);
    return text[i];
}

static void verify_content(rbdn_store *s, struct content *c, uint64_t snap, int cut)
{
    static uint8_t buf[SIZE];
    for (uint32_t o = 0; o < OBJECTS; o++) {
        int64_t n = rbdn_obj_read(s, o, snap, 0, buf, SIZE);
        if (n < 0 && n != -ENOENT)
            DIE("cut %d: object %u: %s", cut, o, strerror((int)-n));
        if (n >= 0)
            memset(buf + n, 0, SIZE - (size_t)n);
        for (uint32_t i = 0; i < SECTORS; i++) {
            struct legal *l = &c->sector[o][i];
            uint64_t want[SECTOR / 8], value = 0;
            const uint64_t *have = (const uint64_t *)(buf + i * SECTOR);
            if (n == -ENOENT)
                value = o % 2 ? PARENT : ZERO;
            else if (have[0])
                value = have[0] >> 20;
            stamp(want, o, i, value);
            if (n >= 0 && memcmp(want, have, SECTOR) != 0)
                DIE("cut %d: object %u sector %u snapshot %lld: torn or foreign", cut, o, i, (long long)snap);
            uint32_t k = l->n;
            while (k > 0 && l->v[k - 1] != value)
                k--;
            if (k == 0) {
                fprintf(stderr, "cut %d: object %u sector %u snapshot %lld (seq %llu, size %lld): %s, but legal are",
                        cut, o, i, (long long)snap, (unsigned long long)rbdn_layout_snap_seq(s, o), (long long)n,
                        name_of(value));
                for (k = 0; k < l->n; k++)
                    fprintf(stderr, " %s%s", name_of(l->v[k]), k + 1 < l->n ? "," : "\n");
                exit(1);
            }
            l->v[0] = value; /* on disk, or repaired to the same again */
            l->n = 1;
        }
    }
}

static rbdn_store *verify(int cut)
{
    int err;
    char text[2000];
    rbdn_store *s = rbdn_layout_open(layout_dir, ORDER, 0, &err);
    if (!s)
        DIE("cut %d: open: %s", cut, strerror(-err));
    if (rbdn_layout_check(s, text, sizeof text) != 0)
        DIE("cut %d: check:\n%s", cut, text);
    verify_content(s, &m->head, STORE_NOSNAP, cut);
    for (int i = 0; i < SNAPS; i++)
        if (m->snap_id[i])
            verify_content(s, &m->snap[i], m->snap_id[i], cut);
    return s;
}

static void cut_power(int cut, uint64_t *random)
{
    m->started = m->down = 0;
    uint64_t seed = rnd(random, 1ULL << 40);
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0)
        DIE("fork: %s", strerror(errno));
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        child(seed);
        _exit(1);
    }
    while (m->started < THREADS && waitpid(pid, NULL, WNOHANG) == 0)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    nanosleep(&(struct timespec){0, (long)rnd(random, rnd(random, 3) ? 8000000 : 40000000)}, NULL);
    m->down = 1;
    shut_down();
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    remount();
    rbdn_store *s = verify(cut);
    if (rnd(random, 4) == 0) { /* again, before the repair is durable */
        shut_down();
        rbdn_store_close(s);
        remount();
        s = verify(cut);
    }
    rbdn_store_close(s);
}

static void new_layout(void)
{
    int err;
    uint8_t map[OBJECTS] = {0};
    for (int i = 0; i < SNAPS; i++)
        m->snap_id[i] = 0;
    for (uint32_t o = 0; o < OBJECTS; o++)
        for (uint32_t i = 0; i < SECTORS; i++)
            m->head.sector[o][i] = (struct legal){1, {o % 2 ? PARENT : ZERO}};
    rbdn_store *s = rbdn_layout_open(layout_dir, ORDER, 1, &err);
    if (!s || (err = rbdn_layout_map_set(s, map, OBJECTS)) < 0)
        DIE("create: %s", strerror(-err));
    rbdn_store_close(s);
}

int main(int argc, char **argv)
{
    if (argc != 6)
        DIE("usage: powercut FSTYPE IMAGE MOUNTPOINT CUTS SEED");
    fstype = argv[1];
    image = argv[2];
    mount_point = argv[3];
    int cuts = atoi(argv[4]);
    uint64_t random = 88172645463325252ULL ^ strtoull(argv[5], NULL, 0) * 0x9e3779b97f4a7c15ULL;
    char path[300];
    layout_dir = path;
    m = mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED || unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        DIE("set-up: %s", strerror(errno));
    mount_it();
    for (int cut = 1; cut <= cuts; cut++) {
        if (cut % CUTS_OF_A_LAYOUT == 1) {
            snprintf(path, sizeof path, "%s/layout%d", mount_point, cut);
            new_layout();
        }
        cut_power(cut, &random);
    }
    if (umount(mount_point) < 0)
        DIE("umount: %s", strerror(errno));
    printf("%s: %d cuts, %llu operations, %llu writes, %llu flushes, %llu copy-ups, %llu snapshots: every sector legal\n",
           fstype, cuts, (unsigned long long)m->ops, (unsigned long long)m->writes, (unsigned long long)m->flushes,
           (unsigned long long)m->copyups, (unsigned long long)m->seq);
    return 0;
}
