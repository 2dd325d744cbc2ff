/* What the engine itself costs per request: submit to done on the null store, which does nothing, in one thread, and in
 * two threads on one image. Build, from the root:
 *   cc -std=gnu11 -O2 -fPIC -Inative -pthread tests/bench/engine_cost.c native/{striping,store,engine}/*.[c] -ldl
 * What makes the figures worthless: another process on the same core, a build without -fPIC (the extension has it). */
#include <assert.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "engine/request.h"
#include "engine/threads.h"
#include "ffi/api_engine.h"

#define REQUESTS 3000000

static rbdn_image *image;
static uint64_t image_bytes = 1ULL << 30;

static void done(struct req *r)
{
    ++*(uint64_t *)r->owner;
}

static double loop(int type, uint64_t len, int count)
{
    static uint8_t buffer[65536];
    struct iovec iov = {buffer, len};
    uint64_t completed = 0, pos = 0, begin = now_ns();
    for (int n = 0; n < count; n++) {
        struct req r = {.type = type, .off = pos, .len = len, .iov = &iov, .iovcnt = 1, .done = done};
        r.owner = &completed;
        image_submit(image, &r);
        pos = (pos + 40960) % (image_bytes - len);
        pos &= ~(len - 1);
    }
    assert(completed == (uint64_t)count);
    return (double)(now_ns() - begin) / count;
}

static void *thread(void *arg)
{
    *(double *)arg = loop(REQ_READ, 4096, REQUESTS);
    return NULL;
}

static rbdn_image *open_image(rbdn_store *store, rbdn_view *parent)
{
    int err;
    rbdn_view_config c = {.size = image_bytes, .order = 22, .store = store, .snap_id = 0xfffffffffffffffeULL,
                          .parent = parent, .overlap = parent ? image_bytes : 0};
    rbdn_view *v = rbdn_view_new(&c, &err);
    assert(v);
    rbdn_image *i = rbdn_image_new(1, v, &err);
    assert(i);
    rbdn_view_put(v);
    return i;
}

int main(void)
{
    int err;
    rbdn_store *store = rbdn_null_open(22, &err);
    image = open_image(store, NULL);
    loop(REQ_READ, 4096, REQUESTS / 10);
    printf("read 4 KiB            %6.1f ns\n", loop(REQ_READ, 4096, REQUESTS));
    printf("write 4 KiB           %6.1f ns\n", loop(REQ_WRITE, 4096, REQUESTS));
    printf("flush                 %6.1f ns\n", loop(REQ_FLUSH, 0 + 4096, REQUESTS / 4));
    pthread_t t[2];
    double ns[2];
    for (int n = 0; n < 2; n++)
        pthread_create(&t[n], NULL, thread, &ns[n]);
    for (int n = 0; n < 2; n++)
        pthread_join(t[n], NULL);
    printf("read 4 KiB, 2 threads %6.1f ns each\n", (ns[0] + ns[1]) / 2);
    assert(rbdn_image_close(image) == 0);

    rbdn_view_config c = {.size = image_bytes, .order = 22, .store = store, .snap_id = 1};
    rbdn_view *parent = rbdn_view_new(&c, &err);
    image = open_image(store, parent);
    printf("write 4 KiB, clone    %6.1f ns\n", loop(REQ_WRITE, 4096, REQUESTS));
    assert(rbdn_image_throttle(image, 1ULL << 40, 0) == 0);
    printf("read 4 KiB, throttled %6.1f ns\n", loop(REQ_READ, 4096, REQUESTS / 4));
    assert(rbdn_image_close(image) == 0);
    rbdn_view_put(parent);
    rbdn_store_close(store);
    return 0;
}
