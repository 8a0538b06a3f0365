/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * A stand-in for a QEMU whose main thread is busy for a while behind its greeting, as it is while it pins hundreds of
 * GiB of memory for a device. This library, preloaded into a stock QEMU, has the main thread never sleep in ppoll for
 * the first FTCLOCK_BUSY_SECONDS of its life: its commands are answered, but the loader finds it busy.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef int function(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask);

static time_t now(void) {
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec;
}

static int busy(void) {
    static time_t until;
    const char *seconds = getenv("FTCLOCK_BUSY_SECONDS");

    if (until == 0)
        until = now() + (seconds ? atoi(seconds) : 0);
    return getpid() == (pid_t)syscall(SYS_gettid) && now() < until;
}

int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask) {
    static function *next;

    if (!busy()) {
        if (!next)
            next = (function *)dlsym(RTLD_NEXT, "ppoll");
        return next(fds, n, timeout, mask);
    }
    return (int)syscall(SYS_poll, fds, n, 0);
}

/* What a fortified program calls. */
int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *timeout, const sigset_t *mask, size_t size) {
    (void)size;
    return ppoll(fds, n, timeout, mask);
}
