/* Memory whose pages may be gone when they are touched: mapped files that somebody cuts short, that lie on a failing
 * device, or that find no room for a first write. The kernel says so with SIGBUS; here it becomes an answer. The process
 * has this one handler, and two ways to be safe from the signal:
 *
 *   regions         memory shared with a stranger, touched all over the place: the whole region is replaced by zeroes that
 *                   nobody else sees, and marked lost. Whoever touched it goes on and finds out later.
 *   guarded copies  of memory of our own: the copy stops and says so.
 *
 * A fault in a region is always the region's. */
#ifndef RBDN_GUARD_H
#define RBDN_GUARD_H

#include <stdbool.h>
#include <stddef.h>

/* Installs the process' SIGBUS handler, once. A SIGBUS that is neither's goes to whoever had it before. -errno */
int guard_install(void);
/* false: one side faulted; what was copied so far stays. Needs guard_install(). */
bool guarded_copy(void *to, const void *from, size_t len);

struct guard_region;
/* [start, start + len) is a mapping of its own, page (or huge page) aligned. Installs the handler. NULL: no memory. */
struct guard_region *guard_region_new(void *start, size_t len);
void guard_region_free(struct guard_region *); /* before it is unmapped; nobody touches it any more. NULL is fine */
bool guard_region_lost(const struct guard_region *);
unsigned guard_losses(void); /* of regions, in the life of this process: cheap to watch */

#endif
