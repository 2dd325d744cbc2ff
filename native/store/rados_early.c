/* A connection that is begun while the interpreter still starts: loading librados and connecting take as long as all
 * of a small command's imports. */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "ffi/api_rados.h"
#include "store/rados_python.h"

static struct {
    char *conf; /* NULL: none was begun, or it was taken */
    pthread_t thread;
    rados_t cluster;
    int result; /* of connecting */
} early;

/* What goes wrong before connecting is said by whoever does it again. */
static void *early_main(void *unused)
{
    rados_t cluster = NULL;
    if (rados_lib_load() < 0 || RADOS(create2)(&cluster, "ceph", "client.admin", 0) < 0)
        return NULL;
    int r = RADOS(conf_read_file)(cluster, early.conf);
    if (r >= 0)
        early.result = r = RADOS(connect)(cluster);
    if (r < 0)
        RADOS(shutdown)(cluster);
    else
        early.cluster = cluster;
    return NULL;
}

int rbdn_rados_early(const char *conf)
{
    sigset_t all, before;
    if (early.conf)
        return -EBUSY;
    if (!(early.conf = strdup(conf)))
        return -ENOMEM;
    sigfillset(&all); /* signals are for the interpreter's thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int r = -pthread_create(&early.thread, NULL, early_main, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r < 0) {
        free(early.conf);
        early.conf = NULL;
    }
    return r;
}

void *rbdn_rados_early_take(const char *conf, int *err)
{
    *err = 0;
    if (!early.conf || strcmp(conf, early.conf) != 0)
        return NULL;
    pthread_join(early.thread, NULL);
    free(early.conf);
    early.conf = NULL;
    *err = early.result < 0 ? early.result : 0;
    return early.cluster;
}
