/* Views: an immutable description of an image that requests follow. See api_engine.h. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/image.h"

#define SIZE_MAX_BYTES (1ULL << 62) /* leaves room for off + len and for object sets at the end */
#define SNAPS_MAX (1u << 20)

static int check(const rbdn_view_config *c)
{
    if (!c->store || c->size > SIZE_MAX_BYTES || c->snap_count > SNAPS_MAX || (c->snap_count && !c->snaps))
        return -EINVAL;
    for (uint32_t n = 0; n < c->snap_count; n++) /* newest first, none beyond the highest id given */
        if (c->snaps[n] >= (n ? c->snaps[n - 1] : c->snap_seq + 1))
            return -EINVAL;
    if (c->discard_granularity & (c->discard_granularity - 1))
        return -EINVAL;
    if (!c->parent)
        return c->overlap > (c->fetch ? c->size : 0) ? -EINVAL : 0;
    if (!c->parent->read_only || c->overlap > c->parent->size || c->overlap > c->size)
        return -EINVAL;
    return c->parent->depth + 1 > VIEW_DEPTH_MAX ? -ELOOP : 0;
}

rbdn_view *rbdn_view_new(const rbdn_view_config *c, int *err)
{
    struct striping striping;
    *err = check(c);
    if (!*err)
        *err = striping_init(&striping, c->order, c->stripe_unit, c->stripe_count ? c->stripe_count : 1);
    if (*err)
        return NULL;
    struct view *v = calloc(1, sizeof *v);
    struct snapc *snapc = NULL;
    if (v && (c->snap_count || c->snap_seq)) {
        snapc = malloc(sizeof *snapc + c->snap_count * sizeof snapc->ids[0]);
        if (!snapc) {
            free(v);
            v = NULL;
        }
    }
    if (!v) {
        *err = -ENOMEM;
        return NULL;
    }
    if (snapc) {
        snapc->seq = c->snap_seq;
        snapc->count = c->snap_count;
        if (c->snap_count)
            memcpy(snapc->ids, c->snaps, c->snap_count * sizeof snapc->ids[0]);
    }
    v->refs = 1;
    v->striping = striping;
    v->size = c->size;
    v->store = c->store;
    v->snap_id = c->snap_id;
    v->snapc = snapc;
    v->read_only = c->read_only || c->snap_id != STORE_NOSNAP;
    v->need_lock = c->need_lock && !v->read_only;
    v->discard_granularity = c->discard_granularity;
    if (c->parent && c->overlap) {
        v->parent = view_get(c->parent);
        v->overlap = c->overlap;
        v->depth = c->parent->depth + 1;
    } else if (!c->parent) {
        v->overlap = c->overlap;
    }
    v->fetch = c->fetch && v->overlap;
    return v;
}

struct view *view_get(struct view *v)
{
    atomic_fetch_add_explicit(&v->refs, 1, memory_order_relaxed);
    return v;
}

void rbdn_view_put(rbdn_view *v)
{
    while (v && atomic_fetch_sub_explicit(&v->refs, 1, memory_order_acq_rel) == 1) {
        struct view *parent = v->parent;
        free(v->snapc);
        free(v);
        v = parent;
    }
}

uint32_t rbdn_view_refs(rbdn_view *v)
{
    return atomic_load_explicit(&v->refs, memory_order_acquire);
}
