#include "transport/nbd_buffer.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/mman.h>

#include "engine/reactor.h"
#include "transport/nbd.h"
#include "transport/nbd_socket.h"

#define CLASS_MIN 12              /* 4 KiB */
#define CLASS_MAX 22              /* 4 MiB; larger ones are not kept */
#define CLASSES (CLASS_MAX - CLASS_MIN + 1)
#define UNCACHED 255
#define CACHE_MAX (32u << 20)     /* bytes kept free per reactor */
#define TRIM_MS 1000
#define OVERHEAD (sizeof(struct nbd_buffer) + NBD_HEADROOM)

struct nbd_cache {
    struct nbd_cache *next;
    struct reactor *reactor;
    struct nbd_buffer *free[CLASSES];
    struct nbd_slot *slots;
    size_t bytes;  /* in `free` */
    bool used;     /* since the last look of the timer */
    bool armed;
    int timer;
    struct fd_watch watch;
};

/* One per reactor, and reactors live as long as the process. */
static pthread_mutex_t caches_lock = PTHREAD_MUTEX_INITIALIZER;
static struct nbd_cache *caches;

static size_t mapped_size(size_t size)
{
    return (size + OVERHEAD + 4095) & ~(size_t)4095;
}

static void buffer_free(struct nbd_buffer *b)
{
    munmap(b, mapped_size(b->size));
}

static void trim(struct nbd_cache *c)
{
    for (unsigned i = 0; i < CLASSES; i++)
        while (c->free[i]) {
            struct nbd_buffer *b = c->free[i];
            c->free[i] = b->next;
            buffer_free(b);
        }
    c->bytes = 0;
    while (c->slots) {
        struct nbd_slot *s = c->slots;
        c->slots = s->next;
        free(s);
    }
}

static void timer_ready(struct fd_watch *w, uint32_t events)
{
    struct nbd_cache *c = w->owner;
    nbd_timer_clear(c->timer);
    c->armed = c->used;
    if (c->used)
        nbd_timer_arm(c->timer, TRIM_MS);
    else
        trim(c);
    c->used = false;
}

struct nbd_cache *nbd_cache_of(struct reactor *r)
{
    pthread_mutex_lock(&caches_lock);
    struct nbd_cache *c = caches;
    while (c && c->reactor != r)
        c = c->next;
    if (!c && (c = calloc(1, sizeof *c))) {
        c->reactor = r;
        c->watch = (struct fd_watch){.ready = timer_ready, .owner = c};
        c->timer = nbd_timer_new(0);
        if (c->timer >= 0) {
            c->watch.fd = c->timer;
            if (reactor_watch(r, &c->watch, EPOLLIN)) {
                nbd_socket_close(c->timer);
                c->timer = -1;
            }
        }
        if (c->timer < 0) {
            free(c);
            c = NULL;
        } else {
            c->next = caches;
            caches = c;
        }
    }
    pthread_mutex_unlock(&caches_lock);
    return c;
}

static unsigned class_of(size_t size)
{
    return size <= 1u << CLASS_MIN ? CLASS_MIN : 64 - __builtin_clzl(size - 1);
}

size_t nbd_buffer_capacity(size_t size)
{
    unsigned c = class_of(size);
    return c > CLASS_MAX ? (size + 4095) & ~(size_t)4095 : (size_t)1 << c;
}

struct nbd_buffer *nbd_buffer_get(struct nbd_cache *c, size_t size)
{
    unsigned n = class_of(size);
    struct nbd_buffer *b = n > CLASS_MAX ? NULL : c->free[n - CLASS_MIN];
    c->used = true;
    if (b) {
        c->free[n - CLASS_MIN] = b->next;
        c->bytes -= b->size;
    } else {
        /* mmap, not malloc: trimmed memory must leave the process, and untouched pages cost nothing. */
        size_t capacity = nbd_buffer_capacity(size);
        b = mmap(NULL, mapped_size(capacity), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (b == MAP_FAILED)
            return NULL;
        b->size = capacity;
        b->size_class = n > CLASS_MAX ? UNCACHED : n - CLASS_MIN;
    }
    b->next = NULL;
    b->refs = 1;
    return b;
}

static void arm(struct nbd_cache *c)
{
    if (!c->armed) {
        c->armed = true;
        nbd_timer_arm(c->timer, TRIM_MS);
    }
}

void nbd_buffer_put(struct nbd_cache *c, struct nbd_buffer *b)
{
    if (--b->refs)
        return;
    if (b->size_class == UNCACHED || c->bytes + b->size > CACHE_MAX) {
        buffer_free(b);
        return;
    }
    b->next = c->free[b->size_class];
    c->free[b->size_class] = b;
    c->bytes += b->size;
    arm(c);
}

struct nbd_slot *nbd_slot_get(struct nbd_cache *c)
{
    struct nbd_slot *s = c->slots;
    c->used = true;
    if (s)
        c->slots = s->next;
    else
        s = malloc(sizeof *s);
    return s;
}

void nbd_slot_put(struct nbd_cache *c, struct nbd_slot *s)
{
    s->next = c->slots;
    c->slots = s;
    arm(c);
}
