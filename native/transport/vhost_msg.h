/* Messages of the vhost-user protocol: what they look like, and reading and writing them on a nonblocking socket.
 *
 * The one validator of this wire is the table in vhost_msg.c: a message that reaches the session has a size, a number
 * of file descriptors and a negotiated protocol feature that fit its type. What depends on state is the session's.
 */
#ifndef RBDN_VHOST_MSG_H
#define RBDN_VHOST_MSG_H

#include <stdbool.h>
#include <stdint.h>

#define VHOST_REGIONS_PER_TABLE 8
#define VHOST_CONFIG_MAX 256

/* X(number, name, smallest and largest payload, fewest and most descriptors, protocol feature needed or -1) */
#define VHOST_MESSAGES(X)                                          \
    X(1, GET_FEATURES, 0, 0, 0, 0, -1)                             \
    X(2, SET_FEATURES, 8, 8, 0, 0, -1)                             \
    X(3, SET_OWNER, 0, 0, 0, 0, -1)                                \
    X(4, RESET_OWNER, 0, 0, 0, 0, -1)                              \
    X(5, SET_MEM_TABLE, 8, 8 + 32 * VHOST_REGIONS_PER_TABLE, 0, VHOST_REGIONS_PER_TABLE, -1) \
    X(6, SET_LOG_BASE, 16, 16, 1, 1, VHOST_P_LOG_SHMFD)            \
    X(7, SET_LOG_FD, 0, 8, 1, 1, -1)                               \
    X(8, SET_VRING_NUM, 8, 8, 0, 0, -1)                            \
    X(9, SET_VRING_ADDR, 40, 40, 0, 0, -1)                         \
    X(10, SET_VRING_BASE, 8, 8, 0, 0, -1)                          \
    X(11, GET_VRING_BASE, 8, 8, 0, 0, -1)                          \
    X(12, SET_VRING_KICK, 8, 8, 0, 1, -1)                          \
    X(13, SET_VRING_CALL, 8, 8, 0, 1, -1)                          \
    X(14, SET_VRING_ERR, 8, 8, 0, 1, -1)                           \
    X(15, GET_PROTOCOL_FEATURES, 0, 0, 0, 0, -1)                   \
    X(16, SET_PROTOCOL_FEATURES, 8, 8, 0, 0, -1)                   \
    X(17, GET_QUEUE_NUM, 0, 0, 0, 0, VHOST_P_MQ)                   \
    X(18, SET_VRING_ENABLE, 8, 8, 0, 0, -1)                        \
    X(21, SET_BACKEND_REQ_FD, 0, 8, 1, 1, VHOST_P_BACKEND_REQ)     \
    X(24, GET_CONFIG, 12, 12 + VHOST_CONFIG_MAX, 0, 0, VHOST_P_CONFIG) \
    X(25, SET_CONFIG, 12, 12 + VHOST_CONFIG_MAX, 0, 0, VHOST_P_CONFIG) \
    X(31, GET_INFLIGHT_FD, 20, 24, 0, 0, VHOST_P_INFLIGHT_SHMFD)   \
    X(32, SET_INFLIGHT_FD, 20, 24, 1, 1, VHOST_P_INFLIGHT_SHMFD)   \
    X(34, RESET_DEVICE, 0, 0, 0, 0, VHOST_P_RESET_DEVICE)          \
    X(36, GET_MAX_MEM_SLOTS, 0, 0, 0, 0, VHOST_P_CONFIGURE_MEM_SLOTS) \
    X(37, ADD_MEM_REG, 40, 40, 1, 1, VHOST_P_CONFIGURE_MEM_SLOTS)  \
    X(38, REM_MEM_REG, 40, 40, 0, 1, VHOST_P_CONFIGURE_MEM_SLOTS)

enum vhost_protocol_feature {
    VHOST_P_MQ = 0,
    VHOST_P_LOG_SHMFD = 1,
    VHOST_P_REPLY_ACK = 3,
    VHOST_P_BACKEND_REQ = 5,
    VHOST_P_CONFIG = 9,
    VHOST_P_INFLIGHT_SHMFD = 12,
    VHOST_P_RESET_DEVICE = 13,
    VHOST_P_CONFIGURE_MEM_SLOTS = 15,
};
#define VHOST_PROTOCOL_FEATURES                                                                               \
    (1ULL << VHOST_P_MQ | 1ULL << VHOST_P_LOG_SHMFD | 1ULL << VHOST_P_REPLY_ACK | 1ULL << VHOST_P_BACKEND_REQ | \
     1ULL << VHOST_P_CONFIG | 1ULL << VHOST_P_INFLIGHT_SHMFD | 1ULL << VHOST_P_RESET_DEVICE |                 \
     1ULL << VHOST_P_CONFIGURE_MEM_SLOTS)

#define VHOST_NUMBER(number, name, ...) VHOST_##name = number,
enum vhost_message { VHOST_MESSAGES(VHOST_NUMBER) };
#undef VHOST_NUMBER
#define VHOST_BACKEND_CONFIG_CHANGE 2 /* on the back end's own channel */

struct vhost_mem_region {
    uint64_t guest, size, user, offset;
};

struct vhost_header {
    uint32_t request, flags, size;
};

struct vu_msg {
    struct vhost_header header;
    union {
        uint64_t u64;
        struct {
            uint32_t index, num;
        } state;
        struct {
            uint32_t index, flags;
            uint64_t desc, used, avail, log;
        } addr;
        struct {
            uint32_t count, padding;
            struct vhost_mem_region regions[VHOST_REGIONS_PER_TABLE];
        } table;
        struct {
            uint64_t padding;
            struct vhost_mem_region region;
        } one;
        struct {
            uint64_t size, offset;
        } log;
        struct {
            uint64_t size, offset;
            uint16_t num_queues, queue_size;
        } inflight;
        struct {
            uint32_t offset, size, flags;
            uint8_t data[VHOST_CONFIG_MAX];
        } config;
        uint8_t bytes[12 + VHOST_CONFIG_MAX];
    };
    int fds[VHOST_REGIONS_PER_TABLE]; /* owned by the message; who keeps one sets it to -1 */
    unsigned fd_count;
};

#define VHOST_VERSION 1
#define VHOST_REPLY 4
#define VHOST_NEED_REPLY 8

/* A message being read. Zeroed at the start; vhost_msg_drop() when the connection ends. */
struct vhost_reader {
    struct vu_msg msg;
    uint32_t got; /* bytes, header included */
};

/* Never blocks. 1: a message that fits the table. 0: no more for now. -EPROTO: it does not fit; -ECONNRESET: the peer
 * is gone; other -errno. `negotiated`: protocol features. */
int vhost_read(int fd, struct vhost_reader *, uint64_t negotiated);
/* Closes what descriptors the message still owns and makes room for the next one. */
void vhost_msg_drop(struct vhost_reader *);
/* Sends header and size bytes of payload, with a descriptor if >= 0. Never blocks: a peer that lets its socket fill
 * up with replies is in error (-EAGAIN). 0 or -errno. */
int vhost_write(int fd, uint32_t request, uint32_t flags, const void *payload, uint32_t size, int pass_fd);
const char *vhost_message_name(uint32_t request); /* NULL = unknown */

#endif
