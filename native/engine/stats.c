/* Statistics of an image: sharded by thread so that two reactors do not fight for a cache line, relaxed so that a reader
 * stops nothing. A shard is allocated at its first request: an idle image has none. */
#include <stdlib.h>
#include <string.h>

#include "engine/image.h"

#define TYPES 8
#define BUCKETS 40

struct stats_shard {
    _Atomic uint64_t histogram[TYPES][BUCKETS]; /* their sum is the count of requests */
    _Atomic uint64_t bytes[TYPES], failed[TYPES], total_ns[TYPES];
    _Atomic uint64_t last; /* when a request completed, ns; its type in the lowest three bits */
};

static _Atomic unsigned threads;
static __thread unsigned mine __attribute__((tls_model("initial-exec"))); /* shard + 1 */

static struct stats_shard *shard_of(struct image *i)
{
    if (!mine)
        mine = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) % STATS_SHARDS + 1;
    _Atomic(struct stats_shard *) *slot = &i->stats[mine - 1];
    struct stats_shard *s = atomic_load_explicit(slot, memory_order_acquire);
    if (s)
        return s;
    struct stats_shard *made = aligned_alloc(64, (sizeof *made + 63) & ~63UL);
    if (!made)
        return NULL;
    memset(made, 0, sizeof *made);
    if (atomic_compare_exchange_strong(slot, &s, made))
        return made;
    free(made);
    return s;
}

static inline void add(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

void stats_count(struct image *i, unsigned type, uint64_t bytes, int64_t result, uint64_t ns, uint64_t now)
{
    struct stats_shard *s = shard_of(i);
    if (!s)
        return;
    unsigned bucket = ns ? 63 - __builtin_clzll(ns) : 0;
    add(&s->histogram[type][bucket < BUCKETS ? bucket : BUCKETS - 1], 1);
    add(&s->total_ns[type], ns);
    if (bytes)
        add(&s->bytes[type], bytes);
    if (result < 0)
        add(&s->failed[type], 1);
    atomic_store_explicit(&s->last, (now & ~7ULL) | type, memory_order_relaxed);
}

static uint64_t get(_Atomic uint64_t *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

int rbdn_image_stats(rbdn_image *i, rbdn_stats *out)
{
    uint64_t last = 0;
    memset(out, 0, sizeof *out);
    for (int n = 0; n < STATS_SHARDS; n++) {
        struct stats_shard *s = atomic_load_explicit(&i->stats[n], memory_order_acquire);
        if (!s)
            continue;
        for (int t = 0; t < TYPES; t++) {
            for (int b = 0; b < BUCKETS; b++) {
                uint64_t count = get(&s->histogram[t][b]);
                out->histogram[t][b] += count;
                out->ops[t] += count;
            }
            out->bytes[t] += get(&s->bytes[t]);
            out->failed[t] += get(&s->failed[t]);
            out->total_ns[t] += get(&s->total_ns[t]);
        }
        if (get(&s->last) > last)
            last = get(&s->last);
    }
    uint64_t now = now_ns();
    out->last_type = last ? (int32_t)(last & 7) : -1;
    last = last ? last & ~7ULL : i->made_ns;
    out->idle_ns = now > last ? now - last : 0;
    gate_in_flight(i, &out->in_flight, &out->parked);
    return 0;
}

void stats_free(struct image *i)
{
    for (int n = 0; n < STATS_SHARDS; n++)
        free(atomic_load_explicit(&i->stats[n], memory_order_relaxed));
}
