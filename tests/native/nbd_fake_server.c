/* The NBD server over an image in memory, driven by lines on stdin, each answered by a line on stdout. For tests that
 * need requests to stay in flight, to fail, or the server to stop at a chosen moment.
 *   usage: nbd_fake_server SOCKET SIZE REACTORS MAX_CONNECTIONS */
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "fake_image.h"
#include "ffi/api_engine.h"
#include "ffi/api_export.h"
#include "transport/nbd.h"

#define EXPORTS 16
#define CAPACITY (256u << 20)

static rbdn_export *exports[EXPORTS];

static int listen_on(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    strncpy(a.sun_path, path, sizeof a.sun_path - 1);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 64)) {
        perror(path);
        exit(2);
    }
    return fd;
}

/* Waits for the event of that type and source; other events are dropped. */
static int await_event(int type, uint64_t source)
{
    struct pollfd p = {.fd = rbdn_event_fd(), .events = POLLIN};
    for (;;) {
        rbdn_event e;
        while (rbdn_event_next(&e) == 1)
            if (e.type == type && e.source == source)
                return 0;
        if (poll(&p, 1, 10000) <= 0)
            return -ETIMEDOUT;
    }
}

static int add_export(rbdn_nbd_server *server, struct image *image, unsigned id, const char *name, int read_only,
                      const char *description)
{
    int err = 0;
    rbdn_nbd_config c = {.read_only = read_only, .description = *description ? description : NULL};
    rbdn_export *e = rbdn_nbd_export(server, id, image, name, &c, &err);
    if (e)
        exports[id] = e;
    return e ? 0 : err;
}

/* "export ID READ_ONLY 'NAME' 'DESCRIPTION'": either may be empty. */
static int parse_export(rbdn_nbd_server *server, struct image *image, char *line)
{
    unsigned id = 0, read_only = 0;
    char *part[4], *p = strchr(line, '\'');
    for (int n = 0; n < 4; n++, p = strchr(p, '\'')) {
        if (!p)
            return -ENOSYS;
        *p++ = 0;
        part[n] = p;
    }
    if (sscanf(line, "export %u %u", &id, &read_only) != 2 || id >= EXPORTS)
        return -ENOSYS;
    return add_export(server, image, id, part[0], read_only, part[2]);
}

static int command(rbdn_nbd_server *server, struct image *image, char *line, char *answer, size_t room)
{
    unsigned id = 0, a = 0, b = 0;
    unsigned long long size = 0;
    if (!strncmp(line, "export ", 7))
        return parse_export(server, image, line);
    if (sscanf(line, "stop %u %u", &id, &a) == 2 && id < EXPORTS && exports[id])
        return rbdn_export_stop(exports[id], a);
    if (sscanf(line, "free %u", &id) == 1 && id < EXPORTS && exports[id]) {
        int rc = rbdn_export_free(exports[id]);
        exports[id] = rc ? exports[id] : NULL;
        return rc;
    }
    if (sscanf(line, "event %u %u", &a, &id) == 2)
        return await_event(a, id);
    if (sscanf(line, "image %llu %u", &size, &a) == 2) {
        fake_image_change(image, size, a);
        return 0;
    }
    if (sscanf(line, "hold %u", &a) == 1)
        return a ? fake_image_set(image, &image->held, true) : (int)fake_image_release(image, false);
    if (!strcmp(line, "release"))
        return (int)fake_image_release(image, true);
    if (!strcmp(line, "waiting"))
        return (int)fake_image_waiting(image);
    if (sscanf(line, "pooled %u", &a) == 1)
        return fake_image_set(image, &image->pooled, a);
    if (sscanf(line, "fail %u %u", &a, &b) == 2)
        return fake_image_fail(image, a, b);
    if (!strcmp(line, "counts")) {
        pthread_mutex_lock(&image->lock);
        snprintf(answer, room, " %llu %llu %llu %llu %llu %llu %llu", (unsigned long long)image->count[REQ_READ],
                 (unsigned long long)image->count[REQ_WRITE], (unsigned long long)image->count[REQ_DISCARD],
                 (unsigned long long)image->count[REQ_WRITE_ZEROES], (unsigned long long)image->count[REQ_FLUSH],
                 (unsigned long long)image->unmapped, (unsigned long long)image->fua);
        pthread_mutex_unlock(&image->lock);
        return 0;
    }
    if (sscanf(line, "stats %u", &id) == 1 && id < EXPORTS && exports[id]) {
        rbdn_export_stats s;
        int rc = rbdn_export_stats_get(exports[id], &s);
        snprintf(answer, room, " %u %llu %llu", s.clients, (unsigned long long)s.accepted,
                 (unsigned long long)s.broken);
        return rc;
    }
    if (sscanf(line, "memory %llu", &size) == 1) {
        atomic_store(&nbd_memory_max, size);
        return 0;
    }
    if (!strcmp(line, "end"))
        return rbdn_nbd_server_stop(server);
    return -ENOSYS;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int err = rbdn_runtime_start(strtoul(argv[3], NULL, 0));
    rbdn_nbd_server *server = err ? NULL : rbdn_nbd_server_new(strtoul(argv[4], NULL, 0), &err);
    if (!server)
        return 3;
    rbdn_event_fd();
    struct image *image = fake_image_new(strtoull(argv[2], NULL, 0), CAPACITY);
    int fd = listen_on(argv[1]);
    if (rbdn_nbd_listen(server, fd))
        return 4;
    close(fd);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("0\n");
    static char line[16384];
    while (fgets(line, sizeof line, stdin)) {
        char answer[256] = "";
        line[strcspn(line, "\n")] = 0;
        int rc = command(server, image, line, answer, sizeof answer);
        printf("%d%s\n", rc, answer);
        if (!strcmp(line, "end") && rc == 0)
            break;
    }
    fake_image_free(image);
    return 0;
}
