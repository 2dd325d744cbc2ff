/* Copies that may touch a page which is not there: of a mapped file that was cut short, lies on a failing device, or
 * finds no room for its first write. The kernel says so with SIGBUS; here it becomes an answer. */
#ifndef RBDN_GUARD_H
#define RBDN_GUARD_H

#include <stdbool.h>
#include <stddef.h>

/* Installs the process' SIGBUS handler, once. A SIGBUS outside guarded copies goes to whoever had it before. -errno */
int guard_install(void);
/* false: one side faulted; what was copied so far stays. Needs guard_install(). */
bool guarded_copy(void *to, const void *from, size_t len);

#endif
