/* Guest-side partner of VM-consistent snapshots. Linked statically, runs in the initramfs.
 *
 *   agent serve PORT MOUNT...   speaks the guest agent's protocol on a virtio-serial port: ping, sync, info, and freezing and
 *                               thawing the file systems on the MOUNTs (qemu-ga's commands of those names)
 *   agent twins FILE FILE       writes 1, 2, 3, ... to one file, syncs it, then to the other: at any moment the first is equal to
 *                               the second or one ahead, and what a snapshot shows must be, too
 *
 * Messages are lines; what is no message is answered with an error. A message is limited to 4096 bytes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { MESSAGE = 4096 };
static char **mounts;
static int frozen;

/* Freezes or thaws all; the number of file systems, or -1 with everything thawed. */
static int freeze(int on)
{
    int count = 0;
    for (char **mount = mounts; *mount; mount++) {
        int fd = open(*mount, O_RDONLY | O_CLOEXEC);
        int rc = fd < 0 ? -1 : ioctl(fd, on ? FIFREEZE : FITHAW, 0);
        if (fd >= 0)
            close(fd);
        if (!rc)
            count++;
        else if (on && count) {
            freeze(0);
            return -1;
        }
    }
    frozen = on && count;
    return count;
}

static void answer(char *line, FILE *port)
{
    char *name = strstr(line, "\"execute\""), *id = strstr(line, "\"id\"");
    long number = 0;
    int count;
    if (id && (id = strchr(id, ':')))
        number = strtol(id + 1, NULL, 10);
    if (!name)
        fprintf(port, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no command\"}}\n");
    else if (strstr(name, "guest-sync-delimited"))
        fprintf(port, "\xff{\"return\": %ld}\n", number);
    else if (strstr(name, "guest-sync"))
        fprintf(port, "{\"return\": %ld}\n", number);
    else if (strstr(name, "guest-ping"))
        fprintf(port, "{\"return\": {}}\n");
    else if (strstr(name, "guest-fsfreeze-status"))
        fprintf(port, "{\"return\": \"%s\"}\n", frozen ? "frozen" : "thawed");
    else if (strstr(name, "guest-fsfreeze-freeze") || strstr(name, "guest-fsfreeze-thaw")) {
        count = freeze(!strstr(name, "thaw"));
        if (count < 0)
            fprintf(port, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"freezing failed: %s\"}}\n", strerror(errno));
        else
            fprintf(port, "{\"return\": %d}\n", count);
    } else
        fprintf(port, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"unknown command\"}}\n");
    fflush(port);
}

static int serve(const char *path)
{
    char line[MESSAGE];
    size_t have = 0;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    FILE *port = fd < 0 ? NULL : fdopen(dup(fd), "w");
    if (!port) {
        perror(path);
        return 1;
    }
    printf("GUEST-AGENT ready\n");
    fflush(stdout);
    for (;;) {
        ssize_t got = read(fd, line + have, sizeof line - 1 - have);
        if (got <= 0) { /* nobody is connected on the host's side */
            usleep(20000);
            continue;
        }
        have += (size_t)got;
        for (char *end; (end = memchr(line, '\n', have));) {
            *end = 0;
            answer(line, port);
            have -= (size_t)(end + 1 - line);
            memmove(line, end + 1, have);
        }
        if (have == sizeof line - 1)
            have = 0;
    }
}

static int put(const char *path, long number)
{
    char text[32];
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    int length = snprintf(text, sizeof text, "%020ld\n", number);
    int rc = fd >= 0 && pwrite(fd, text, (size_t)length, 0) == length && !fsync(fd) ? 0 : -1;
    if (fd >= 0)
        close(fd);
    return rc;
}

static int twins(const char *first, const char *second)
{
    for (long number = 1;; number++)
        if (put(first, number) || put(second, number)) {
            printf("GUEST-FAILED twins: %s\n", strerror(errno));
            return 1;
        } else if (number % 100 == 0) {
            printf("GUEST-TWINS %ld\n", number);
            fflush(stdout);
        }
}

int main(int argc, char **argv)
{
    if (argc >= 4 && !strcmp(argv[1], "serve")) {
        mounts = argv + 3;
        return serve(argv[2]);
    }
    if (argc == 4 && !strcmp(argv[1], "twins"))
        return twins(argv[2], argv[3]);
    fprintf(stderr, "usage: agent serve PORT MOUNT... | agent twins FILE FILE\n");
    return 2;
}
