/* See guard.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#include "store/guard.h"

/* The copy this thread is in. Read by the handler, in the same thread. */
static __thread sigjmp_buf *volatile copying __attribute__((tls_model("initial-exec")));
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int installed;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    sigjmp_buf *here = copying;
    if (here && info->si_code > 0) { /* not one that somebody sent */
        copying = NULL;
        siglongjmp(*here, 1);
    }
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
        sigaction(number, &before, NULL); /* the access is made again and ends the process, as it would have */
        if (info->si_code <= 0)
            raise(number);
    } else {
        before.sa_handler(number);
    }
}

static void install(void)
{
    /* SA_NODEFER: the handler is left by a jump, which does not give the signal mask back. */
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    installed = sigaction(SIGBUS, &action, &before) < 0 ? -errno : 0;
}

int guard_install(void)
{
    pthread_once(&once, install);
    return installed;
}

#if defined(__SANITIZE_THREAD__)
/* Requests that overlap may run at the same time: which bytes they leave is theirs to order, as on any disk. */
#define SAVE_MASK 1 /* its own handler blocks every signal, whatever was asked for */
__attribute__((no_sanitize("thread"))) static void copy(void *to, const void *from, size_t len)
{
    for (size_t i = 0; i < len; i++)
        ((volatile uint8_t *)to)[i] = ((const volatile uint8_t *)from)[i];
}
#else
#define SAVE_MASK 0
#define copy memcpy
#endif

__attribute__((noinline)) bool guarded_copy(void *to, const void *from, size_t len)
{
    sigjmp_buf here;
    if (sigsetjmp(here, SAVE_MASK) != 0)
        return false;
    copying = &here;
    copy(to, from, len);
    copying = NULL;
    return true;
}
