/* HEAD mapped into memory: the same bytes as through the file, and a file that is cut short under the mapping. */
#include "store_test.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "store/guard.h"

#define ORDER 20
#define SIZE (1u << ORDER)
#define PAGE 4096u

static uint8_t model[SIZE], buf[SIZE];

static int head_file(const char *name)
{
    char path[700];
    snprintf(path, sizeof path, "%s/head.0", test_path(name));
    int fd = open(path, O_RDWR);
    CHECK(fd >= 0);
    return fd;
}

/* Reads and writes of all sizes, again and again in the same place, with flushes and discards between: the first goes
 * through the file, later ones through memory, and the file agrees. */
static void memory_and_file_agree(void)
{
    rbdn_store *s = test_open("agree", ORDER, 1);
    int fd = head_file("agree");
    for (int n = 0; n < 20000; n++) {
        uint64_t off = rnd(8) ? rnd(16) * PAGE + rnd(2) * 512 : rnd(SIZE), max = SIZE - off, what = rnd(40);
        uint64_t len = 1 + rnd(what < 30 ? 3 * PAGE : 100000);
        len = len < max ? len : max;
        if (what < 18) {
            memset(buf, (int)rnd(256), len);
            memcpy(model + off, buf, len);
            EQ(rbdn_obj_write(s, 0, off, buf, len, 0, NULL, 0), 0);
        } else if (what < 36) {
            memset(buf, 0xee, len);
            int64_t got = rbdn_obj_read(s, 0, STORE_NOSNAP, off, buf, len);
            CHECK(got == -ENOENT || got >= 0);
            if (got >= 0)
                memset(buf + got, 0, len - (uint64_t)got);
            CHECK(got < 0 || !memcmp(buf, model + off, len), "step %d: %llu bytes at %llu", n,
                  (unsigned long long)len, (unsigned long long)off);
        } else if (what == 36) {
            EQ(rbdn_store_flush(s), 0);
        } else if (what == 37) {
            int64_t r = rbdn_obj_zero(s, 0, off, len, 0, NULL, 0);
            CHECK(r == 0 || r == -ENOENT);
            if (r == 0)
                memset(model + off, 0, len);
        } else if (what == 38) {
            CHECK(pread(fd, buf, SIZE, 0) >= 0);
        }
    }
    memset(buf, 0, SIZE);
    CHECK(pread(fd, buf, SIZE, 0) >= 0);
    CHECK(!memcmp(buf, model, SIZE));
    close(fd);
    rbdn_store_close(s);
}

/* Somebody cuts the file short under a mapping that was used a moment ago. */
static void a_file_cut_short_is_no_crash(void)
{
    rbdn_store *s = test_open("cut", ORDER, 1);
    int fd = head_file("cut");
    memset(buf, 7, SIZE);
    EQ(rbdn_obj_write(s, 0, 0, buf, SIZE, 0, NULL, 0), 0);
    for (int i = 0; i < 3; i++) {
        EQ(rbdn_obj_write(s, 0, 8 * PAGE, buf, PAGE, 0, NULL, 0), 0);
        EQ(rbdn_obj_read(s, 0, STORE_NOSNAP, 8 * PAGE, buf, PAGE), PAGE);
    }
    CHECK(ftruncate(fd, 0) == 0);
    EQ(rbdn_obj_read(s, 0, STORE_NOSNAP, 8 * PAGE, buf, PAGE), PAGE);
    for (unsigned i = 0; i < PAGE; i++)
        EQ(buf[i], 0);
    memset(buf, 9, PAGE);
    EQ(rbdn_obj_write(s, 0, 8 * PAGE, buf, PAGE, 0, NULL, 0), 0);
    memset(buf, 0, PAGE);
    EQ(rbdn_obj_read(s, 0, STORE_NOSNAP, 8 * PAGE, buf, PAGE), PAGE);
    EQ(buf[PAGE - 1], 9);
    close(fd);
    rbdn_store_close(s);
}

/* A page of a file that ends before it. */
static char *missing_page(void)
{
    int fd = open(test_path("short"), O_RDWR | O_CREAT, 0600);
    CHECK(fd >= 0 && ftruncate(fd, 0) == 0);
    char *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(page != MAP_FAILED);
    close(fd);
    return page;
}

static void guarded_copies_answer(void)
{
    char *page = missing_page(), word[8] = "intact";
    EQ(guard_install(), 0);
    for (int i = 0; i < 3; i++) {
        CHECK(!guarded_copy(word, page, sizeof word));
        CHECK(!guarded_copy(page, word, sizeof word));
        CHECK(guarded_copy(buf, word, sizeof word) && !strcmp((char *)buf, "intact"));
    }
    munmap(page, PAGE);
}

static void regions_become_zeroes(void)
{
    char *page = missing_page(), *other = missing_page(), word[8] = "intact", got[8] = "garbage";
    struct guard_region *g = guard_region_new(page, PAGE), *h = guard_region_new(other, PAGE);
    unsigned before = guard_losses();
    CHECK(g && h && g != h && !guard_region_lost(g));
    *(volatile char *)page = 1;
    EQ(page[0], 1);
    EQ(page[1], 0);
    CHECK(guard_region_lost(g) && !guard_region_lost(h));
    CHECK(guarded_copy(got, other, sizeof got) && !memcmp(got, (char[8]){0}, sizeof got)); /* the region's, not the copy's */
    CHECK(guard_region_lost(h));
    EQ(guard_losses() - before, 2);
    guard_region_free(h);
    munmap(other, PAGE);
    other = missing_page(); /* nobody's */
    CHECK(!guarded_copy(other, word, sizeof word));
    CHECK(guard_region_new(other, PAGE) == h && !guard_region_lost(h));
    CHECK(guarded_copy(other, word, sizeof word) && guard_region_lost(h));
    EQ(guard_losses() - before, 3);
    guard_region_free(g);
    guard_region_free(h);
    guard_region_free(NULL);
    munmap(page, PAGE);
    munmap(other, PAGE);
}

static void chained(int number, siginfo_t *info, void *context) { _exit(info->si_addr ? 42 : 43); }

static int status_of(bool handler, bool sent)
{
    pid_t child = fork();
    if (child == 0) {
        struct sigaction action = {.sa_sigaction = chained, .sa_flags = SA_SIGINFO};
        if (handler)
            sigaction(SIGBUS, &action, NULL);
        guard_install();
        if (sent)
            raise(SIGBUS);
        else
            *(volatile char *)missing_page() = 1;
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

/* Before any other test: the handler is installed once in a process, and children have that of their parent. */
static void faults_of_others_go_where_they_went(void)
{
    int status = status_of(false, false);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = status_of(false, true);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    status = status_of(true, false);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 42);
}

int main(void)
{
    test_folder(NULL);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) /* they report the children's faults themselves */
    faults_of_others_go_where_they_went();
#else
    (void)faults_of_others_go_where_they_went;
#endif
    guarded_copies_answer();
    regions_become_zeroes();
    memory_and_file_agree();
    a_file_cut_short_is_no_crash();
    return 0;
}
