/* SPDX-License-Identifier: MIT */
/*
 * Which of the clocks that follow kvmclock the guest has switched on: all others lose its pauses, whatever the module
 * does. A guest tells the processor by MSRs, and the kernel tells those who have the vCPU's descriptor.
 */
#ifndef FTCLOCK_CLOCKS_H
#define FTCLOCK_CLOCKS_H

#include <stdbool.h>

#include "../clockpage/clockpage.h"

/* What the module remembers. Zero at first but for the first three, touched by one thread at a time. */
struct clocks {
    /* The kernel's ioctl on the vCPU behind fd: its result, with errno set when that is negative. */
    int (*vcpu_ioctl)(int fd, unsigned long request, void *argument);
    uint64_t (*raw)(void); /* CLOCK_MONOTONIC_RAW */
    struct ftclock_page *page;

    struct ftclock_clocks seen; /* the page's copy is for readers: this one can't be written from outside */
    uint64_t pause;             /* the last one that was looked at */
    uint64_t cont_raw;          /* when that was */
    uint64_t ran;               /* ns that the guest ran since the last look */
    int vcpu;                   /* whose CPUID is known, if any is */
    bool asked, hyperv, foreign;
};

/*
 * Takes what the kernel said to QEMU's KVM_KVMCLOCK_CTRL on a vCPU, by whose own thread it is called: error is 0 or
 * errno. pause counts QEMU's conts, and stop_raw is when the guest stood.
 */
void clocks_look(struct clocks *c, int fd, int error, uint64_t pause, uint64_t stop_raw);

#endif
