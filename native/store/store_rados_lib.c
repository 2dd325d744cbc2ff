/* See store_rados_lib.h. */
#include "store/store_rados_lib.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>

struct rados_lib rados_lib;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int loaded = -ENOSYS;
static void *library; /* never closed: its threads outlive every store */

static void load(void)
{
    if (rados_lib.conf_get) { /* a test's */
        loaded = 0;
        return;
    }
    library = dlopen("librados.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return;
    struct rados_lib found;
    bool all = true;
#define RADOS_LOOK(result, name, parameters) \
    all = (*(void **)(&found.name) = dlsym(library, "rados_" #name)) != NULL && all;
    RADOS_FUNCTIONS(RADOS_LOOK)
    RADOS_CONTROL_FUNCTIONS(RADOS_LOOK)
#undef RADOS_LOOK
    if (!all)
        return;
    rados_lib = found;
    loaded = 0;
}

int rados_lib_load(void)
{
    pthread_once(&once, load);
    return loaded;
}

void *rados_lib_symbol(const char *name)
{
    return library ? dlsym(library, name) : NULL;
}
