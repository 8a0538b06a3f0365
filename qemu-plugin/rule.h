/* SPDX-License-Identifier: MIT */
/*
 * The rule of the clock, apart from where it runs: what the module does with QEMU's KVM_GET_CLOCK and KVM_SET_CLOCK.
 *
 * Everything it needs of the world comes through struct host, so that the tests run it against a kernel's clock of
 * their own.
 */
#ifndef FTCLOCK_RULE_H
#define FTCLOCK_RULE_H

#include <linux/kvm.h>
#include <stdbool.h>

#include "../clockpage/clockpage.h"

/* Clocks of one moment, ns. */
struct moment {
    uint64_t raw;   /* CLOCK_MONOTONIC_RAW */
    uint64_t real;  /* CLOCK_REALTIME */
    uint64_t boot;  /* CLOCK_BOOTTIME */
    uint64_t slept; /* CLOCK_BOOTTIME - CLOCK_MONOTONIC: how long the host slept since it booted */
};

struct host {
    /* The kernel's ioctl on the VM behind fd: its result, with errno set when that is negative. */
    int (*clock_ioctl)(int fd, unsigned long request, struct kvm_clock_data *data);
    uint64_t (*raw)(void);
    uint64_t (*real)(void);
    uint64_t (*boot)(void);
    uint64_t (*mono)(void); /* CLOCK_MONOTONIC */
    uint64_t (*tai)(void);  /* CLOCK_TAI */
    uint64_t (*tsc)(void);  /* the host's TSC, as KVM_CLOCK_HOST_TSC means it */
    /* The guest's TSC, see vcpus.h. */
    int (*tsc_offset)(int64_t *offset);
    int (*move_tsc)(int64_t by);
    uint32_t (*vm_khz)(int fd);
    uint32_t (*vcpu_khz)(void);
    double (*own_rate)(uint32_t khz);
};

/* What the module remembers. All in one place, zero at first, touched by one thread at a time. */
struct rule {
    const struct host *host;
    struct ftclock_page *page;

    bool stopped;        /* KVM_GET_CLOCK came, KVM_SET_CLOCK didn't yet */
    bool stop_stable;    /* and its flags said KVM_CLOCK_TSC_STABLE */
    uint32_t stop_flags; /* all of them */
    uint64_t saved;      /* the clock it gave */
    struct moment stop;
    int64_t stop_residual;

    uint64_t ran_since_raw; /* the last cont; 0: unknown */
    uint64_t order_seen;    /* sequence of the last order that was judged */
    uint32_t import_used;   /* sequence of the last import that a state was judged by */

    /* The guest's TSC is the host's and this. Neither is known while khz is 0. */
    int64_t tsc_offset;
    uint32_t khz;
    bool tsc_asked;
    uint64_t stop_tsc; /* what it read at the stop; 0: not known */
    double own_rate;   /* what kvmclock runs faster than CLOCK_MONOTONIC_RAW by, in ns a ns */
    bool own_rate_known;

    int64_t left; /* what the guest's clock was ahead of where it should be by, and wasn't corrected */
    bool wrote;   /* the last cont wrote a value */

    uint64_t drifted_raw; /* until then what kvmclock did by itself is in the anchor */

    struct ftclock_anchor anchor; /* the page's copy is for readers: this one can't be written from outside */
    uint64_t anchor_read;         /* the reading that it was taken of, when the TSC read what the anchor says */
    struct ftclock_counts counts;

    uint64_t first_raw, first_tsc; /* a pair from long ago, for the TSC's rate against CLOCK_MONOTONIC_RAW */
    uint64_t slept;                /* how long the host slept since it booted, as far as it was noticed */
    bool slept_known;

    struct ftclock_follow follow; /* the page's copy is for readers, too */
    int64_t stepped;              /* sum of the steps that became debt since the last cont */
    bool tai_known;
    int64_t tai;                  /* s that CLOCK_TAI is ahead of CLOCK_REALTIME by */
    uint64_t real_boot, tai_boot; /* what they were ahead of CLOCK_BOOTTIME by */
};

/* Starts the rule on a zeroed page, and announces the page by its magic. */
void rule_start(struct rule *rule, const struct host *host, struct ftclock_page *page, uint32_t pid);

/* Makes QEMU's KVM_GET_CLOCK and KVM_SET_CLOCK. Result and errno are as the kernel's. */
int rule_get_clock(struct rule *rule, int fd, struct kvm_clock_data *data);
int rule_set_clock(struct rule *rule, int fd, struct kvm_clock_data *data);

#endif
