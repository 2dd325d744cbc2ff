/* LD_PRELOAD: allocations of our extension fail on demand. The file $ALLOC_FAIL, mapped by the test too, holds
 *
 *   int64 countdown   n > 0: the n-th allocation from now fails, then no other; n < 0: all from the -n-th on; 0: none
 *   int64 failed      how many have
 *
 * Only calls from a shared object named *_native* count: Python, SQLite and libc get their memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static struct {
    _Atomic int64_t countdown, failed;
} *state;

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t),
    *__libc_memalign(size_t, size_t);

__attribute__((constructor)) static void attach(void)
{
    const char *path = getenv("ALLOC_FAIL");
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *p = mmap(NULL, 16, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (p != MAP_FAILED)
        state = p;
}

static bool fails(void *caller)
{
    Dl_info info;
    if (!state || !state->countdown || !dladdr(caller, &info) || !info.dli_fname || !strstr(info.dli_fname, "_native"))
        return false;
    int64_t now = state->countdown;
    while (now != 0 && now != -1 && !atomic_compare_exchange_weak(&state->countdown, &now, now > 0 ? now - 1 : now + 1))
        ;
    if (now != 1 && now != -1)
        return false;
    state->failed++;
    errno = ENOMEM;
    return true;
}

#define CALLER __builtin_return_address(0)

void *malloc(size_t size) { return fails(CALLER) ? NULL : __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return fails(CALLER) ? NULL : __libc_calloc(n, size); }
void *realloc(void *p, size_t size) { return fails(CALLER) ? NULL : __libc_realloc(p, size); }
void *aligned_alloc(size_t align, size_t size) { return fails(CALLER) ? NULL : __libc_memalign(align, size); }

int posix_memalign(void **out, size_t align, size_t size)
{
    if (fails(CALLER))
        return ENOMEM;
    void *p = __libc_memalign(align, size);
    *out = p;
    return p ? 0 : ENOMEM;
}
