/* vhost_server SOCKET SIZE QUEUES MODE...: a vhost-user-blk export of memory, for front ends to test.
 *
 * MODE: async ro nowce, and first of all perhaps the path of a file for the data. Commands are lines on stdin, each answered by one line; the end of stdin ends it.
 *   block | unblock        requests wait
 *   hold FROM TO           requests that begin in [FROM, TO) wait, fence or not; equal numbers let them go
 *   resize BYTES
 *   deadline MS MS         of GET_VRING_BASE: until the fence, then until the connection ends
 *   offer MS               how long a switch-over waits
 *   goon NUMBER            answers a switch-over: its errno
 *   serve PATH             connects to PATH and serves that: errno
 *   stop soft|hard         waits for EVENT_EXPORT_STOPPED and frees
 *   stats                  clients accepted broken resubmitted dirty_pages submitted fua
 *   events                 "type:value" of those not read yet
 */
#define _GNU_SOURCE /* memfd_create */
#include "vhost_image.h"

#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "engine/event.h"
#include "transport/vhost_session.h"

static int listen_at(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    unlink(path);
    if (bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, 8)) {
        perror(path);
        exit(1);
    }
    return fd;
}

static int connect_to(const char *path)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", path);
    if (connect(fd, (struct sockaddr *)&a, sizeof a)) {
        perror(path);
        exit(1);
    }
    return fd;
}

static void stop(rbdn_export *e, bool hard)
{
    rbdn_event ev;
    rbdn_export_stop(e, hard);
    for (;;) {
        while (rbdn_event_next(&ev) > 0)
            if (ev.type == EVENT_EXPORT_STOPPED) {
                puts(rbdn_export_free(e) ? "busy" : "ok");
                return;
            }
        usleep(1000);
    }
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    uint64_t size = strtoull(argv[2], NULL, 0);
    struct image *image = fake_image_new(argc > 4 && argv[4][0] == '/' ? argv[4] : NULL, size, size * 2);
    rbdn_vhost_config c = {
        .num_queues = (uint16_t)atoi(argv[3]), .queue_size_max = 256, .write_cache = 1, .serial = "fake", .logical_block_size = 512,
    };
    for (int n = 4; n < argc; n++) {
        image->async |= !strcmp(argv[n], "async");
        c.read_only |= !strcmp(argv[n], "ro");
        c.write_cache &= strcmp(argv[n], "nowce") != 0;
    }
    int err;
    rbdn_runtime_start(2);
    int listener = listen_at(argv[1]);
    rbdn_export *e = rbdn_vhost_start(7, image, listener, &c, &err);
    close(listener);
    if (!e) {
        fprintf(stderr, "rbdn_vhost_start: %s\n", strerror(-err));
        return 1;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[128], word[32], path[108];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long a, b;
        if (!strncmp(line, "block", 5) || !strncmp(line, "unblock", 7)) {
            fake_block(image, line[0] == 'b');
            puts("ok");
        } else if (sscanf(line, "hold %llu %llu", &a, &b) == 2) {
            fake_hold(image, a, b);
            puts("ok");
        } else if (sscanf(line, "resize %llu", &a) == 1) {
            fake_resize(image, a);
            puts("ok");
        } else if (sscanf(line, "deadline %llu %llu", &a, &b) == 2) {
            ((struct vhost_export *)e)->drain_ms = (unsigned)a;
            ((struct vhost_export *)e)->fenced_ms = (unsigned)b;
            puts("ok");
        } else if (sscanf(line, "offer %llu", &a) == 1) {
            ((struct vhost_export *)e)->offer_ms = (unsigned)a;
            puts("ok");
        } else if (sscanf(line, "goon %llu", &a) == 1) {
            printf("%d\n", -rbdn_export_go_on(e, (int64_t)a));
        } else if (sscanf(line, "serve %107s", path) == 1) {
            printf("%d\n", -rbdn_vhost_serve(e, connect_to(path)));
        } else if (sscanf(line, "stop %31s", word) == 1) {
            stop(e, !strcmp(word, "hard"));
        } else if (!strncmp(line, "stats", 5)) {
            rbdn_export_stats s;
            rbdn_export_stats_get(e, &s);
            printf("%u %llu %llu %llu %llu %llu %llu\n", s.clients, (unsigned long long)s.accepted,
                   (unsigned long long)s.broken, (unsigned long long)s.resubmitted, (unsigned long long)s.dirty_pages,
                   (unsigned long long)atomic_load(&image->submitted), (unsigned long long)atomic_load(&image->fua));
        } else if (!strncmp(line, "events", 6)) {
            rbdn_event ev;
            while (rbdn_event_next(&ev) > 0)
                printf("%d:%lld ", ev.type, (long long)ev.value);
            puts("");
        } else {
            puts("unknown");
        }
    }
    _exit(0); /* reactors cannot be ended; what they use is not a leak */
}
