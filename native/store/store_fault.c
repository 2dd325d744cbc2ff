/* A store that wraps another and misbehaves as told, for tests.
 *
 *   spec    = rule *(";" rule)
 *   rule    = op 1*(":" setting)
 *   op      = read | write | zero | truncate | remove | copyup | stat | extents | flush | any
 *   setting = nth=N      only the N-th such operation (from 1)
 *           | every=N    each N-th
 *           | after=N    all behind the first N
 *           | errno=E    fails with -E without reaching the wrapped store
 *           | done       ... after it was done there: the caller cannot know
 *           | delay_ms=D answers D milliseconds later
 *           | pending=1  answers from another thread
 *
 * At most one of nth, every, after (none: always), and at least one of errno, delay_ms, pending. The first rule that
 * matches decides. "read:every=7:errno=5;flush:nth=3:errno=28". An operation submitted with STORE_NOWAIT that any rule
 * concerns is refused with -EAGAIN uncounted, for it comes again: so each operation counts once. The exception is a rule
 * that always answers from another thread: it has nothing to count and does not block.
 */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "ffi/api_store.h"
#include "store/layout.h"

#define MAX_RULES 32
#define ANY 9

static const char *const OPS[] = {"read", "write", "zero", "truncate", "remove", "copyup", "stat", "extents", "flush",
                                  "any"};

enum when { ALWAYS, NTH, EVERY, AFTER };

struct rule {
    int op; /* enum store_op_type or ANY */
    enum when when;
    uint64_t n;
    int err; /* positive; 0 none */
    bool after_done, pending;
    uint32_t delay_ms;
    uint64_t seen; /* operations that it concerned; under lock */
};

/* An operation that is answered from the thread. */
struct late {
    struct late *next;
    struct store_op *op;
    const struct rule *rule;
    struct timespec due;
};

struct fault_store {
    struct store store; /* first */
    struct store_ops ops; /* caps are the wrapped store's */
    struct store *inner;
    uint32_t count;
    struct rule rules[MAX_RULES];
    pthread_mutex_t lock;
    pthread_cond_t cond; /* CLOCK_MONOTONIC */
    pthread_t thread;
    bool threaded, stop; /* stop under lock */
    struct late *queue;  /* by due time; under lock */
};

static int64_t fault_submit(struct store *s, struct store_op *op);

struct store *fault_inner(struct store *s)
{
    return s->ops->submit == fault_submit ? ((struct fault_store *)s)->inner : NULL;
}

static bool matches(const struct rule *r)
{
    switch (r->when) {
    case NTH:
        return r->seen == r->n;
    case EVERY:
        return r->seen % r->n == 0;
    case AFTER:
        return r->seen > r->n;
    default:
        return true;
    }
}

static int64_t perform(struct fault_store *f, struct store_op *op, const struct rule *r)
{
    if (r->err && !r->after_done)
        return -r->err;
    int64_t result = store_submit(f->inner, op);
    return r->err && result != STORE_PENDING ? -r->err : result;
}

static int enqueue(struct fault_store *f, struct store_op *op, const struct rule *r)
{
    struct late *l = malloc(sizeof *l), **at = &f->queue;
    if (!l)
        return -ENOMEM;
    l->op = op;
    l->rule = r;
    clock_gettime(CLOCK_MONOTONIC, &l->due);
    l->due.tv_nsec += (long)(r->delay_ms % 1000) * 1000000;
    l->due.tv_sec += r->delay_ms / 1000 + l->due.tv_nsec / 1000000000;
    l->due.tv_nsec %= 1000000000;
    while (*at && ((*at)->due.tv_sec < l->due.tv_sec ||
                   ((*at)->due.tv_sec == l->due.tv_sec && (*at)->due.tv_nsec <= l->due.tv_nsec)))
        at = &(*at)->next;
    l->next = *at;
    *at = l;
    pthread_cond_signal(&f->cond);
    return 0;
}

static void *answer(void *arg)
{
    struct fault_store *f = arg;
    pthread_mutex_lock(&f->lock);
    while (!f->stop || f->queue) {
        struct timespec now;
        struct late *l = f->queue;
        if (!l) {
            pthread_cond_wait(&f->cond, &f->lock);
            continue;
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec < l->due.tv_sec || (now.tv_sec == l->due.tv_sec && now.tv_nsec < l->due.tv_nsec)) {
            pthread_cond_timedwait(&f->cond, &f->lock, &l->due);
            continue;
        }
        f->queue = l->next;
        pthread_mutex_unlock(&f->lock);
        l->op->flags &= (uint8_t)~STORE_NOWAIT;
        int64_t r = perform(f, l->op, l->rule);
        if (r != STORE_PENDING) {
            l->op->result = r;
            l->op->done(l->op);
        }
        free(l);
        pthread_mutex_lock(&f->lock);
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

static int64_t fault_submit(struct store *s, struct store_op *op)
{
    struct fault_store *f = (struct fault_store *)s;
    struct rule *hit = NULL;
    int64_t r = 0;
    pthread_mutex_lock(&f->lock);
    for (uint32_t i = 0; i < f->count && !hit; i++) {
        struct rule *rule = &f->rules[i];
        if (rule->op != ANY && rule->op != op->type)
            continue;
        if ((op->flags & STORE_NOWAIT) && !(rule->pending && rule->when == ALWAYS)) {
            r = -EAGAIN;
            break;
        }
        rule->seen++;
        if (matches(rule))
            hit = rule;
    }
    if (hit && hit->pending)
        r = enqueue(f, op, hit) < 0 ? -ENOMEM : STORE_PENDING;
    pthread_mutex_unlock(&f->lock);
    if (r)
        return r;
    if (!hit)
        return store_submit(f->inner, op);
    if (hit->delay_ms)
        nanosleep(&(struct timespec){hit->delay_ms / 1000, (long)(hit->delay_ms % 1000) * 1000000}, NULL);
    return perform(f, op, hit);
}

static void fault_close(struct store *s)
{
    struct fault_store *f = (struct fault_store *)s;
    if (f->threaded) {
        pthread_mutex_lock(&f->lock);
        f->stop = true;
        pthread_cond_signal(&f->cond);
        pthread_mutex_unlock(&f->lock);
        pthread_join(f->thread, NULL);
    }
    f->inner->ops->close(f->inner);
    pthread_cond_destroy(&f->cond);
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static void fault_fence(struct store *s, int err)
{
    store_fence(((struct fault_store *)s)->inner, err);
}

/* Decimal digits only, 1..max. */
static bool number(const char *text, uint64_t max, uint64_t *value)
{
    *value = 0;
    if (!*text)
        return false;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || *value > max / 10)
            return false;
        *value = *value * 10 + (uint64_t)(*text - '0');
    }
    return *value >= 1 && *value <= max;
}

static int parse_setting(struct rule *r, char *setting)
{
    char *value = strchr(setting, '=');
    uint64_t n;
    if (!strcmp(setting, "done")) {
        if (r->after_done)
            return -EINVAL;
        r->after_done = true;
        return 0;
    }
    if (!value)
        return -EINVAL;
    *value++ = 0;
    enum when when = !strcmp(setting, "nth") ? NTH : !strcmp(setting, "every") ? EVERY :
                     !strcmp(setting, "after") ? AFTER : ALWAYS;
    if (when != ALWAYS) {
        if (r->when != ALWAYS || !number(value, UINT32_MAX, &n))
            return -EINVAL;
        r->when = when;
        r->n = n;
    } else if (!strcmp(setting, "errno")) {
        if (r->err || !number(value, 4095, &n))
            return -EINVAL;
        r->err = (int)n;
    } else if (!strcmp(setting, "delay_ms")) {
        if (r->delay_ms || !number(value, 60000, &n))
            return -EINVAL;
        r->delay_ms = (uint32_t)n;
    } else if (!strcmp(setting, "pending")) {
        if (r->pending || !number(value, 1, &n))
            return -EINVAL;
        r->pending = true;
    } else {
        return -EINVAL;
    }
    return 0;
}

static int parse_rule(struct rule *r, char *text)
{
    char *save = NULL, *word;
    if (!*text || strstr(text, "::") || text[strlen(text) - 1] == ':' || text[0] == ':')
        return -EINVAL;
    word = strtok_r(text, ":", &save);
    for (r->op = 0; r->op <= ANY && strcmp(word, OPS[r->op]); r->op++)
        ;
    if (r->op > ANY)
        return -EINVAL;
    while ((word = strtok_r(NULL, ":", &save))) {
        int err = parse_setting(r, word);
        if (err < 0)
            return err;
    }
    if (!r->err && (r->after_done || (!r->delay_ms && !r->pending)))
        return -EINVAL;
    return 0;
}

static int parse(struct fault_store *f, const char *spec)
{
    char *copy = strdup(spec), *rule = copy;
    int r = copy ? 0 : -ENOMEM;
    while (r == 0 && rule) {
        char *next = strchr(rule, ';');
        if (next)
            *next++ = 0;
        r = f->count == MAX_RULES ? -E2BIG : parse_rule(&f->rules[f->count], rule);
        f->count++;
        rule = next;
    }
    free(copy);
    return r;
}

/* On failure `inner` stays the caller's. */
rbdn_store *rbdn_fault_open(rbdn_store *inner, const char *spec, int *err)
{
    struct fault_store *f = calloc(1, sizeof *f);
    int r = f ? parse(f, spec) : -ENOMEM;
    bool threaded = false;
    for (uint32_t i = 0; r == 0 && i < f->count; i++)
        threaded |= f->rules[i].pending;
    if (r == 0) {
        pthread_condattr_t attr;
        pthread_condattr_init(&attr);
        pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
        pthread_mutex_init(&f->lock, NULL);
        pthread_cond_init(&f->cond, &attr);
        pthread_condattr_destroy(&attr);
        f->inner = inner;
        f->ops = (struct store_ops){"fault", inner->ops->caps, fault_submit, fault_close, fault_fence};
        f->store.ops = &f->ops;
        if (threaded && (r = -pthread_create(&f->thread, NULL, answer, f)) == 0)
            f->threaded = true;
    }
    if (err)
        *err = r;
    if (r < 0) {
        free(f);
        return NULL;
    }
    return &f->store;
}
