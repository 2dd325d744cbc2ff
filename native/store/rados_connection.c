/* Connections, pools and contexts of librados for Python (ffi/api_rados.h). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ffi/api_rados.h"
#include "store/rados_python.h"

int rbdn_rados_load(void)
{
    return rados_lib_load();
}

int rbdn_rados_version(void)
{
    int major = 0, minor = 0, extra = 0;
    RADOS(version)(&major, &minor, &extra);
    return major * 10000 + minor * 100 + extra;
}

void *rbdn_rados_create(const char *cluster_name, const char *name, int *err)
{
    rados_t cluster = NULL;
    *err = RADOS(create2)(&cluster, cluster_name, name, 0);
    return *err < 0 ? NULL : cluster;
}

int rbdn_rados_conf_read(void *cluster, const char *path)
{
    return RADOS(conf_read_file)(cluster, path);
}

int rbdn_rados_conf_words(void *cluster, int count, const char **words)
{
    return RADOS(conf_parse_argv)(cluster, count, words);
}

int rbdn_rados_conf_set(void *cluster, const char *option, const char *value)
{
    return RADOS(conf_set)(cluster, option, value);
}

int rbdn_rados_conf_get(void *cluster, const char *option, char *buf, size_t len)
{
    return RADOS(conf_get)(cluster, option, buf, len);
}

int rbdn_rados_connect(void *cluster)
{
    return RADOS(connect)(cluster);
}

void rbdn_rados_shutdown(void *cluster)
{
    RADOS(shutdown)(cluster);
}

int rbdn_rados_fsid(void *cluster, char *buf, size_t len)
{
    return RADOS(cluster_fsid)(cluster, buf, len);
}

int rbdn_rados_addresses(void *cluster, char *buf, size_t len)
{
    char *found = NULL;
    int rc = RADOS(getaddrs)(cluster, &found);
    if (rc < 0)
        return rc;
    size_t size = strlen(found) + 1;
    if (size <= len)
        memcpy(buf, found, size);
    RADOS(buffer_free)(found);
    return size <= len ? 0 : -ENAMETOOLONG;
}

uint64_t rbdn_rados_instance(void *cluster)
{
    return RADOS(get_instance_id)(cluster);
}

int rbdn_rados_latest_map(void *cluster)
{
    return RADOS(wait_for_latest_osdmap)(cluster);
}

int rbdn_rados_oldest_client(void *cluster)
{
    int8_t is = 0, required = 0;
    int rc = RADOS(get_min_compatible_client)(cluster, &is, &required);
    return rc < 0 ? rc : required;
}

int rbdn_rados_stat(void *cluster, uint64_t *out)
{
    struct rados_cluster_stat_t found;
    int rc = RADOS(cluster_stat)(cluster, &found);
    if (rc >= 0)
        memcpy(out, &found, sizeof found);
    return rc;
}

int rbdn_rados_command(void *cluster, int target, const char *where, const char *command, const void *in, size_t len,
                       rbdn_rados_reply *reply)
{
    memset(reply, 0, sizeof *reply);
#define REPLY &reply->out, &reply->out_len, &reply->status, &reply->status_len
    switch (target) {
    case RBDN_TO_MON:
        if (*where)
            return RADOS(mon_command_target)(cluster, where, &command, 1, in, len, REPLY);
        return RADOS(mon_command)(cluster, &command, 1, in, len, REPLY);
    case RBDN_TO_MGR:
        return RADOS(mgr_command)(cluster, &command, 1, in, len, REPLY);
    case RBDN_TO_OSD:
        return RADOS(osd_command)(cluster, atoi(where), &command, 1, in, len, REPLY);
    case RBDN_TO_PG:
        return RADOS(pg_command)(cluster, where, &command, 1, in, len, REPLY);
    }
    return -EINVAL;
#undef REPLY
}

void rbdn_rados_reply_free(rbdn_rados_reply *reply)
{
    if (reply->out)
        RADOS(buffer_free)(reply->out);
    if (reply->status)
        RADOS(buffer_free)(reply->status);
    memset(reply, 0, sizeof *reply);
}

/* --- pools -------------------------------------------------------------------------------------------------------- */

int rbdn_rados_pools(void *cluster, char *buf, size_t len)
{
    return RADOS(pool_list)(cluster, buf, len);
}

int64_t rbdn_rados_pool_lookup(void *cluster, const char *name)
{
    return RADOS(pool_lookup)(cluster, name);
}

int rbdn_rados_pool_create(void *cluster, const char *name)
{
    return RADOS(pool_create)(cluster, name);
}

int rbdn_rados_pool_delete(void *cluster, const char *name)
{
    return RADOS(pool_delete)(cluster, name);
}

/* --- contexts ----------------------------------------------------------------------------------------------------- */

rados_ioctx_t rbdn_ioctx_own(rbdn_ioctx *c, int *err)
{
    rados_ioctx_t io = NULL;
    *err = RADOS(ioctx_create2)(c->cluster, c->pool_id, &io);
    if (*err < 0)
        return NULL;
    RADOS(ioctx_set_namespace)(io, c->name_space);
    if (c->locator)
        RADOS(ioctx_locator_set_key)(io, c->locator);
    /* A full pool answers ENOSPC, as a disk does, where librados would wait for room without end. */
    RADOS(set_pool_full_try)(io);
    return io;
}

rbdn_ioctx *rbdn_ioctx_open(void *cluster, int64_t pool_id, const char *name_space, int *err)
{
    rbdn_ioctx *c = calloc(1, sizeof *c);
    *err = -ENOMEM;
    if (!c)
        return NULL;
    c->cluster = cluster;
    c->pool_id = pool_id;
    c->name_space = strdup(name_space);
    if (c->name_space)
        c->io = rbdn_ioctx_own(c, err);
    if (!c->io) {
        free(c->name_space);
        free(c);
        return NULL;
    }
    pthread_mutex_init(&c->lock, NULL);
    return c;
}

int rbdn_ioctx_locator(rbdn_ioctx *c, const char *key)
{
    c->locator = strdup(key);
    if (!c->locator)
        return -ENOMEM;
    RADOS(ioctx_locator_set_key)(c->io, c->locator);
    return 0;
}

void rbdn_ioctx_close(rbdn_ioctx *c)
{
    RADOS(ioctx_destroy)(c->io);
    pthread_mutex_destroy(&c->lock);
    free(c->name_space);
    free(c->locator);
    free(c);
}

int rbdn_ioctx_stat(rbdn_ioctx *c, uint64_t *out)
{
    struct rados_pool_stat_t found;
    int rc = RADOS(ioctx_pool_stat)(c->io, &found);
    if (rc >= 0)
        memcpy(out, found.numbers, 12 * sizeof *out);
    return rc;
}

int rbdn_ioctx_application(rbdn_ioctx *c, const char *name, int force)
{
    return RADOS(application_enable)(c->io, name, force);
}

int rbdn_ioctx_snap_create(rbdn_ioctx *c, uint64_t *snap)
{
    return RADOS(ioctx_selfmanaged_snap_create)(c->io, snap);
}

int rbdn_ioctx_snap_remove(rbdn_ioctx *c, uint64_t snap)
{
    return RADOS(ioctx_selfmanaged_snap_remove)(c->io, snap);
}

int rbdn_ioctx_rollback(rbdn_ioctx *c, const char *oid, uint64_t snap, uint64_t seq, uint64_t *snaps, int count)
{
    /* Waits for the OSD with the snap context in the ioctx: with one of its own nobody else has to wait. */
    int rc;
    rados_ioctx_t io = rbdn_ioctx_own(c, &rc);
    if (!io)
        return rc;
    rc = RADOS(ioctx_selfmanaged_snap_set_write_ctx)(io, seq, snaps, count);
    if (rc >= 0)
        rc = RADOS(ioctx_selfmanaged_snap_rollback)(io, oid, snap);
    RADOS(ioctx_destroy)(io);
    return rc;
}

void *rbdn_foreign_cluster(void *io, int64_t *pool_id)
{
    *pool_id = RADOS(ioctx_get_id)(io);
    return RADOS(ioctx_get_cluster)(io);
}

/* --- names -------------------------------------------------------------------------------------------------------- */

struct rbdn_listing {
    rados_ioctx_t io;
    rados_iter_t rows;
    int whole;  /* rows of three names */
    char *kept; /* a name that found no room; malloc */
    size_t kept_len;
};

/* The next row, with its locator and namespace, in `kept`; 1: one that holds a NUL. */
static int whole_row(rbdn_listing *l)
{
    const char *part[3];
    size_t size[3];
    int rc = RADOS(nobjects_list_next2)(l->rows, &part[0], &part[1], &part[2], &size[0], &size[1], &size[2]);
    if (rc < 0)
        return rc;
    l->kept_len = size[0] + 1 + size[1] + 1 + size[2];
    l->kept = malloc(l->kept_len + 1);
    if (!l->kept)
        return -ENOMEM;
    char *to = l->kept;
    for (int i = 0; i < 3; i++) {
        if (size[i])
            memcpy(to, part[i], size[i]);
        to += size[i];
        *to++ = 0;
    }
    if (memchr(part[0], 0, size[0]) || memchr(l->kept + size[0] + 1, 0, size[1])) {
        free(l->kept);
        l->kept = NULL;
        return 1;
    }
    return 0;
}

rbdn_listing *rbdn_listing_open(rbdn_ioctx *c, int *err)
{
    rbdn_listing *l = calloc(1, sizeof *l);
    *err = -ENOMEM;
    if (!l)
        return NULL;
    l->io = rbdn_ioctx_own(c, err);
    if (l->io) {
        *err = RADOS(nobjects_list_open)(l->io, &l->rows);
        if (*err >= 0)
            return l;
        RADOS(ioctx_destroy)(l->io);
    }
    free(l);
    return NULL;
}

void rbdn_listing_whole(rbdn_listing *l)
{
    l->whole = 1;
}

int rbdn_listing_next(rbdn_listing *l, char *buf, size_t len)
{
    size_t used = 0;
    for (;;) {
        const char *name = l->kept;
        size_t size = l->kept_len;
        if (!name) {
            int rc = l->whole ? whole_row(l)
                            : RADOS(nobjects_list_next2)(l->rows, &name, NULL, NULL, &size, NULL, NULL);
            if (rc == -ENOENT)
                return (int)used;
            if (rc < 0)
                return used ? (int)used : rc;
            if (rc > 0 || (!l->whole && memchr(name, 0, size)))
                continue;
            if (l->whole) {
                name = l->kept;
                size = l->kept_len;
            }
        }
        if (used + size + 1 > len) {
            if (!l->kept && (l->kept = malloc(size + 1))) {
                memcpy(l->kept, name, size);
                l->kept_len = size;
            }
            return !l->kept ? -ENOMEM : used ? (int)used : -ERANGE;
        }
        memcpy(buf + used, name, size);
        buf[used + size] = 0;
        used += size + 1;
        free(l->kept);
        l->kept = NULL;
        if (used > len / 2)
            return (int)used;
    }
}

void rbdn_listing_close(rbdn_listing *l)
{
    RADOS(nobjects_list_close)(l->rows);
    RADOS(ioctx_destroy)(l->io);
    free(l->kept);
    free(l);
}
