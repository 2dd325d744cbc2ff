/* Shared by the store's tests: a folder that goes away, random numbers that come again, checks that say where. */
#ifndef STORE_TEST_H
#define STORE_TEST_H

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ffi/api_store.h"
#include "store/store.h"

static char test_dir[256];
static pid_t test_owner; /* the process that made test_dir */

static inline int test_remove_one(const char *path, const struct stat *st, int type, struct FTW *at)
{
    return remove(path);
}

static inline void test_cleanup(void)
{
    if (test_owner == getpid())
        nftw(test_dir, test_remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

/* CHECK(condition) or CHECK(condition, format, ...) */
#define CHECK(cond, ...) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s" __VA_OPT__(": "), __FILE__, __LINE__, #cond); \
            __VA_OPT__(fprintf(stderr, __VA_ARGS__);) \
            fputc('\n', stderr); \
            test_cleanup(); \
            _exit(1); \
        } \
    } while (0)

#define EQ(a, b) \
    do { \
        long long eq_a = (long long)(a), eq_b = (long long)(b); \
        CHECK(eq_a == eq_b, "%s = %lld, not %lld", #a, eq_a, eq_b); \
    } while (0)

static uint64_t test_seed = 0x9e3779b97f4a7c15ULL;

static inline uint64_t rnd(uint64_t below)
{
    test_seed ^= test_seed << 13;
    test_seed ^= test_seed >> 7;
    test_seed ^= test_seed << 17;
    return (test_seed >> 11) % below;
}

/* A new folder under $TMPDIR or `where`; removed when the process that made it exits. */
static inline void test_folder(const char *where)
{
    const char *tmp = where ? where : getenv("TMPDIR");
    snprintf(test_dir, sizeof test_dir, "%s/rbdpy-store-XXXXXX", tmp ? tmp : "/tmp");
    CHECK(mkdtemp(test_dir), "%s: %s", test_dir, strerror(errno));
    test_owner = getpid();
    atexit(test_cleanup);
}

static inline const char *test_path(const char *name)
{
    static char path[2][600];
    static int i;
    i = !i;
    snprintf(path[i], sizeof path[i], "%s/%s", test_dir, name);
    return path[i];
}

static inline rbdn_store *test_open(const char *name, unsigned order, int create)
{
    int err = 0;
    rbdn_store *s = rbdn_layout_open(test_path(name), order, create, &err);
    CHECK(s, "%s: %s", name, strerror(-err));
    return s;
}

static inline void test_sound(rbdn_store *s)
{
    char text[4096];
    int n = rbdn_layout_check(s, text, sizeof text);
    CHECK(n == 0, "%d findings:\n%s", n, text);
}

/* Runs fn in a child and returns the status of waitpid. */
static inline pid_t test_fork(void (*fn)(void *), void *arg)
{
    fflush(NULL);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        fn(arg);
        _exit(0);
    }
    return pid;
}

static inline int test_wait(pid_t pid)
{
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    return status;
}

#endif
