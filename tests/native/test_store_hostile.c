/* Files somebody else made: refused or survived, never a crash. And many layouts at once. */
#include "store_test.h"

#include <sys/resource.h>

#define ORDER 16
#define SIZE (1u << ORDER)

static uint8_t buf[SIZE];

static char *in(const char *layout, const char *file)
{
    static char path[2][700];
    static int i;
    i = !i;
    snprintf(path[i], sizeof path[i], "%s/%s", test_path(layout), file);
    return path[i];
}

static void make(const char *name)
{
    rbdn_store *s = test_open(name, ORDER, 1);
    memset(buf, 1, SIZE);
    for (uint64_t snap = 0; snap < 3; snap++)
        for (uint64_t o = 0; o < 4; o++)
            EQ(rbdn_obj_write(s, o, 0, buf, SIZE / (snap + 1), snap, &snap, snap != 0), 0);
    rbdn_store_close(s);
}

static void put(const char *path, uint64_t pos, const void *data, size_t len)
{
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0 && pwrite(fd, data, len, (off_t)pos) == (ssize_t)len, "%s", path);
    close(fd);
}

static int open_error(const char *name, unsigned order, int create)
{
    int err = 1;
    rbdn_store *s = rbdn_layout_open(test_path(name), order, create, &err);
    CHECK(!s, "%s was opened", name);
    return err;
}

static void wrong_files_are_refused(void)
{
    EQ(open_error("none", ORDER, 0), -ENOENT);
    EQ(open_error("none/deeper", ORDER, 1), -ENOENT);
    EQ(open_error("small", 11, 1), -EINVAL);
    EQ(open_error("small", 0, 1), -EINVAL);
    make("order");
    EQ(open_error("order", ORDER + 1, 0), -EINVAL);
    EQ(open_error("order", ORDER + 1, 1), -EINVAL);
    for (uint32_t byte = 0; byte < 24; byte++) { /* all that the checksum covers, and itself */
        char name[32];
        snprintf(name, sizeof name, "header-%u", byte);
        make(name);
        put(in(name, "index"), byte, "\x5a", 1);
        EQ(open_error(name, ORDER, 0), -EIO);
    }
    static const long sizes[] = {0, 1, 63, 4096, 8191, 8193};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        make("size");
        CHECK(truncate(in("size", "index"), sizes[i]) == 0);
        EQ(open_error("size", ORDER, 0), -EIO);
        unlink(in("size", "index"));
        EQ(open_error("size", ORDER, 0), -ENOENT);
    }
    static const char *const files[] = {"index", "head.0"};
    for (int i = 0; i < 2; i++) {
        char name[32];
        for (int kind = 0; kind < 4; kind++) {
            snprintf(name, sizeof name, "kind-%d-%d", i, kind);
            make(name);
            CHECK(rename(in(name, files[i]), in(name, "elsewhere")) == 0);
            if (kind == 0)
                CHECK(symlink("elsewhere", in(name, files[i])) == 0);
            if (kind == 1)
                CHECK(mkfifo(in(name, files[i]), 0600) == 0);
            if (kind == 2)
                CHECK(mkdir(in(name, files[i]), 0700) == 0);
            CHECK(open_error(name, ORDER, 0) < 0, "%s kind %d", files[i], kind);
        }
    }
    make("link");
    CHECK(symlink("link", test_path("to")) == 0);
    EQ(open_error("to", ORDER, 0), -ENOTDIR);
    CHECK(symlink("/etc/passwd", in("link", "clone.9")) == 0);
    rbdn_store *s = test_open("link", ORDER, 0);
    uint64_t id = 9;
    EQ(rbdn_obj_write(s, 0, 0, "x", 1, 9, &id, 1), -ELOOP); /* would copy there */
    rbdn_store_close(s);
}

static void limits_are_errors(void)
{
    uint64_t id = 9;
    make("limits");
    rbdn_store *s = test_open("limits", ORDER, 0);
    EQ(rbdn_obj_write(s, UINT64_MAX, 0, buf, 1, 0, NULL, 0), -EFBIG);
    EQ(rbdn_obj_write(s, 1ULL << 29, 0, buf, 1, 0, NULL, 0), -EFBIG);
    EQ(rbdn_obj_copyup(s, 1ULL << 60, buf, 1), -EFBIG);
    EQ(rbdn_obj_read(s, UINT64_MAX, STORE_NOSNAP, 0, buf, 1), -ENOENT);
    EQ(rbdn_obj_read(s, UINT64_MAX, 1, 0, buf, 1), -ENOENT);
    EQ(rbdn_obj_write(s, 0, SIZE, buf, 1, 0, NULL, 0), -EINVAL);
    EQ(rbdn_obj_write(s, 0, UINT64_MAX, buf, 2, 0, NULL, 0), -EINVAL);
    EQ(rbdn_obj_read(s, 0, STORE_NOSNAP, 1, buf, UINT64_MAX), -EINVAL);
    EQ(rbdn_obj_write(s, 0, 0, buf, 1, 8, &id, 1), -EINVAL); /* a snapshot newer than the context */
    EQ(rbdn_obj_truncate(s, 0, SIZE + 1, 0, 0, NULL, 0), -EINVAL);
    EQ(rbdn_layout_map_set(s, buf, -2), -EINVAL);
    EQ(rbdn_layout_map_set(s, (uint8_t[]){4}, 1), -EINVAL);
    EQ(rbdn_layout_map_set(s, buf, INT64_MAX), -EFBIG);
    EQ(rbdn_layout_trim(s, (uint64_t[]){3, 3}, 2), -EINVAL);
    EQ(rbdn_layout_rollback(s, UINT64_MAX, 1, 0, NULL, 0), -EFBIG);
    EQ(rbdn_layout_next(s, UINT64_MAX, 1), -ENOENT);
    test_sound(s);
    rbdn_store_close(s);
}

/* Random bytes in entries, clone entries and behind the header, opened dirty (repaired) and clean. */
static void garbage_is_survived(void)
{
    for (int round = 0; round < 300; round++) {
        uint64_t o, id = 4;
        char text[2000];
        int err;
        make("garbage");
        for (int n = 1 + (int)rnd(12); n > 0; n--) {
            uint64_t value = rnd(2) ? rnd(1ULL << 50) << rnd(15) : rnd(4) << 32;
            uint64_t pos = rnd(6) ? 4096 + rnd(6 * 2) * 8 : 24 + rnd(5) * 8;
            if (rnd(3))
                put(in("garbage", "index"), pos, &value, 8);
            else
                put(in("garbage", rnd(2) ? "clone.1.idx" : "clone.2.idx"), rnd(8) * 8, &value, 8);
        }
        if (rnd(5) == 0)
            CHECK(truncate(in("garbage", rnd(2) ? "clone.1.idx" : "clone.1"), (long)rnd(40)) == 0);
        rbdn_store *s = rbdn_layout_open(test_path("garbage"), ORDER, 0, &err);
        if (s) {
            rbdn_layout_check(s, text, sizeof text);
            uint8_t map[16];
            rbdn_layout_map_get(s, map, 16);
            for (o = 0; o < 6; o++) {
                for (uint64_t snap = 1; snap < 4; snap++) {
                    uint64_t pairs[4];
                    CHECK(rbdn_obj_read(s, o, snap == 3 ? STORE_NOSNAP : snap, 0, buf, SIZE) <= SIZE);
                    rbdn_obj_extents(s, o, snap, 0, SIZE, pairs, 2);
                    rbdn_layout_rollback(s, o, snap, id, &id, 1);
                }
                rbdn_obj_write(s, o, 5, buf, 100, id, &id, 1);
                rbdn_obj_truncate(s, o, rnd(SIZE), 1, id, &id, 1);
                rbdn_obj_remove(s, o, id, &id, 1);
            }
            rbdn_layout_trim(s, (uint64_t[]){4, 5}, 2);
            rbdn_layout_next(s, 0, 1);
            rbdn_store_close(s);
        }
        nftw(test_path("garbage"), test_remove_one, 8, FTW_DEPTH | FTW_PHYS);
    }
}

static long resident_kib(void)
{
    long pages = 0, dummy;
    FILE *f = fopen("/proc/self/statm", "r");
    CHECK(f && fscanf(f, "%ld %ld", &dummy, &pages) == 2);
    fclose(f);
    return pages * 4;
}

static void a_thousand_layouts_are_cheap(void)
{
#ifdef __SANITIZE_THREAD__
    enum { N = 300, KIB = 1000 }; /* less address space, and memory shadowed */
#else
    enum { N = 1000, KIB = 100 };
#endif
    static rbdn_store *stores[N];
    struct rlimit files = {4096, 4096};
    CHECK(setrlimit(RLIMIT_NOFILE, &files) == 0);
    char name[32];
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "many-%d", i);
        rbdn_store_close(test_open(name, 22, 1));
    }
    long before = resident_kib();
    for (int i = 0; i < N; i++) {
        snprintf(name, sizeof name, "many-%d", i);
        stores[i] = test_open(name, 22, 0);
        EQ(rbdn_obj_stat(stores[i], 5, STORE_NOSNAP), -ENOENT);
    }
    long each = (resident_kib() - before) / N;
    CHECK(each < KIB, "%ld KiB each", each);
    for (int i = 0; i < N; i++)
        rbdn_store_close(stores[i]);
}

int main(void)
{
    test_folder(NULL);
    wrong_files_are_refused();
    limits_are_errors();
    garbage_is_survived();
    a_thousand_layouts_are_cheap();
    puts("store hostile: ok");
    return 0;
}
