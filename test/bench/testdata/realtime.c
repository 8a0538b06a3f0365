/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * What ftclock is compared with: a QEMU that has the kernel make a pause good, by KVM_CLOCK_REALTIME (Linux 5.16 and
 * later). Preloaded into a stock QEMU, this adds the flag to its KVM_SET_CLOCK, with the CLOCK_REALTIME that the kernel
 * gave with the last KVM_GET_CLOCK: the kernel adds to the clock what CLOCK_REALTIME went on by since. QEMU makes both
 * calls under its lock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdint.h>

int ioctl(int fd, unsigned long request, ...);

static struct kvm_clock_data last;

int ioctl(int fd, unsigned long request, ...) {
    static int (*next)(int, unsigned long, void *);
    va_list list;

    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!next)
        next = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    /* QEMU's requests come sign-extended. */
    if ((uint32_t)request == (uint32_t)KVM_SET_CLOCK) {
        struct kvm_clock_data data = *(struct kvm_clock_data *)argument;
        if (data.clock && data.clock == last.clock && (last.flags & KVM_CLOCK_REALTIME)) {
            data.flags |= KVM_CLOCK_REALTIME;
            data.realtime = last.realtime;
        }
        return next(fd, request, &data);
    }
    int rc = next(fd, request, argument);
    if (rc == 0 && (uint32_t)request == (uint32_t)KVM_GET_CLOCK)
        last = *(struct kvm_clock_data *)argument;
    return rc;
}
