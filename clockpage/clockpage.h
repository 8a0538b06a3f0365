/* SPDX-License-Identifier: MIT */
/*
 * The clock page: what ftclock's module inside QEMU and ftclock's shim outside it tell each other.
 *
 * The module creates the page as a memfd named FTCLOCK_PAGE_NAME, sealed against any change of size, and maps it. The
 * shim finds it among /proc/PID/fd, checks the seals and maps it as well. Nothing else is shared between the two.
 *
 * Rules
 *   - One writer a section, named in the section's comment. A section that has more than one word that belong together
 * begins with a sequence word: odd while its writer is at work, even when the section is whole. A reader copies the
 * section between two reads of the word and takes the copy if both are the same even number. Readers bound their
 * retries.
 *   - Sections are whole cache lines, so that the two sides never write to the same one.
 *   - All words are little-endian and naturally aligned. Times and clocks are nanoseconds; differences of them are
 * signed.
 *   - The shim trusts nothing in here: a guest that took QEMU over can write any value at any moment.
 *
 * Versions
 *   major: a reader refuses a page whose major it doesn't know. Raised when a word changes its meaning, place or width.
 *   minor: raised when a word that was reserved (zero) gets a meaning, or an enumeration a new value. Old readers
 *          ignore it.
 *
 *   1.0  first version
 *   1.1  the section import, behind the ring; the reasons FROM_IMPORT and FROM_ANCHOR
 *   1.2  imports of any value, by either clock, for either event; enum ftclock_leg
 *        the sections host, follow and clocks, behind import; anchor.slept; record.error and record.slept
 *   1.3  the guest's TSC, of now, anchor, import and record; anchors are of the last stop; an order no longer says
 *        what is to be done (its words what and event, which were 0: as the policy says); counts.passed_ns
 */
#ifndef FTCLOCK_CLOCKPAGE_H
#define FTCLOCK_CLOCKPAGE_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

#define FTCLOCK_PAGE_NAME  "ftclock-page"
#define FTCLOCK_PAGE_MAGIC UINT64_C(0x314b434f4c435446) /* "FTCLOCK1" in memory */
#define FTCLOCK_PAGE_MAJOR 1
#define FTCLOCK_PAGE_MINOR 3
#define FTCLOCK_PAGE_SIZE  36864 /* bytes: 9 pages of 4 KiB; the sections, the ring, and room */
#define FTCLOCK_RING_LEN   256   /* records; pause N is in record (N - 1) % FTCLOCK_RING_LEN */

/* What to do with a pause. */
enum ftclock_do {
    FTCLOCK_DO_CATCH_UP = 1, /* the guest's clock goes on as if there had been no pause */
    FTCLOCK_DO_HOLD = 2,     /* the guest's clock stood still: QEMU's own behaviour */
};

/* What a pause was taken for. */
enum ftclock_event {
    FTCLOCK_EVENT_NONE = 0,
    FTCLOCK_EVENT_CHECKPOINT = 1, /* not longer than the checkpoint's limit */
    FTCLOCK_EVENT_SUSPEND = 2,    /* longer */
    FTCLOCK_EVENT_RESTORE = 3,    /* the clock written isn't the one read at the stop: another state was loaded */
    FTCLOCK_EVENT_MIGRATE = 4,    /* the same, by an import that says so: a migration, or an engine's failover */
    FTCLOCK_EVENT_START = 5,      /* the first write after QEMU's start: no pause */
};

/* How QEMU's KVM_SET_CLOCK was handled. */
enum ftclock_decision {
    FTCLOCK_NOTHING = 0,
    FTCLOCK_DROPPED = 1,  /* not made: the kernel's clock was right */
    FTCLOCK_ANCHORED = 2, /* made with the anchor's value */
    FTCLOCK_HELD = 3,     /* made as QEMU wanted it; the anchor moved by the pause */
    FTCLOCK_PASSED = 4,   /* made as QEMU wanted it, because of a doubt; the anchor is given up */
};

/* Why. Clearly worded for people by the Go side. */
enum ftclock_reason {
    FTCLOCK_REASON_NONE = 0,
    FTCLOCK_REASON_IN_TOLERANCE = 1,     /* dropped */
    FTCLOCK_REASON_OUT_OF_TOLERANCE = 2, /* anchored */
    FTCLOCK_REASON_NEVER_BACK = 3,       /* anchored, raised to QEMU's value so that time doesn't go back */
    FTCLOCK_REASON_POLICY = 4,           /* held: the policy says hold */
    FTCLOCK_REASON_OVER_LIMIT = 5,       /* held: longer than its event's limit */
    FTCLOCK_REASON_DISABLED = 6,         /* held: the policy only watches */
    FTCLOCK_REASON_NO_POLICY = 7,        /* held: no policy was written yet */
    FTCLOCK_REASON_FIRST = 8,        /* passed: no stop seen before this write (QEMU's start, or loaded while paused) */
    FTCLOCK_REASON_UNSTABLE = 9,     /* passed: the kernel's flags lack KVM_CLOCK_TSC_STABLE */
    FTCLOCK_REASON_OTHER_VALUE = 10, /* passed: not the value read at the stop (a loaded state) */
    FTCLOCK_REASON_TORN = 11,        /* passed: the policy or the order couldn't be read whole */
    FTCLOCK_REASON_BOUNDS = 12,      /* passed: a value out of bounds */
    FTCLOCK_REASON_READ_FAILED = 13, /* passed: KVM_GET_CLOCK failed */
    FTCLOCK_REASON_WRITE_FAILED = 14, /* passed: the kernel refused the anchor's value */
    FTCLOCK_REASON_FROM_IMPORT = 15,  /* anchored: a loaded state, by the import */
    FTCLOCK_REASON_FROM_ANCHOR = 16,  /* anchored: a loaded state of this process's own guest */
};

/* What was done with the guest's TSC where its clock was moved. */
enum ftclock_tsc {
    FTCLOCK_TSC_LEFT = 0,    /* nothing: the clock wasn't moved, or the guest's TSC went on with it */
    FTCLOCK_TSC_MOVED = 1,   /* moved by as much, on every vCPU */
    FTCLOCK_TSC_UNMOVED = 2, /* the kernel can't move it, or what it should read isn't known: it is where QEMU put it */
};

/* The host clock by which an import is carried on. */
enum ftclock_leg {
    FTCLOCK_LEG_REAL = 0, /* CLOCK_REALTIME: from another host, or from before a reboot */
    FTCLOCK_LEG_RAW = 1,  /* CLOCK_MONOTONIC_RAW: of this host, since it booted */
};

/* The clocks that follow kvmclock; in ftclock_clocks.on or'ed. */
enum ftclock_clock {
    FTCLOCK_CLOCK_KVMCLOCK = 1,       /* kvmclock itself */
    FTCLOCK_CLOCK_HYPERV_PAGE = 2,    /* Hyper-V's reference TSC page */
    FTCLOCK_CLOCK_HYPERV_COUNTER = 4, /* its reference counter, which a guest that has introduced itself may read */
    FTCLOCK_CLOCK_NOT_KNOWN = 8,      /* alone: the last look gave no answer */
};

/* Times are worth a limit of at most this: older guests' clock arithmetic wraps on long jumps. */
#define FTCLOCK_LIMIT_MAX INT64_C(900000000000)
/* |residual| up to which the kernel's clock counts as right. */
#define FTCLOCK_TOLERANCE INT64_C(1000)
/* What a guest is behind or ahead of its reference by is followed up to here. More than that isn't followed at all. */
#define FTCLOCK_FOLLOW_MAX INT64_C(10000000000)
/* The largest slew bound, in ppm. */
#define FTCLOCK_SLEW_MAX 100000

/* Section 0. Writer: the module, once, magic last. */
struct ftclock_head {
    uint64_t magic; /* 0 until the page is ready */
    uint32_t major;
    uint32_t minor;
    uint32_t size;        /* bytes, FTCLOCK_PAGE_SIZE */
    uint32_t ring_len;    /* FTCLOCK_RING_LEN */
    uint32_t record_size; /* bytes, sizeof(struct ftclock_record) */
    uint32_t pid;         /* of QEMU, as QEMU sees it */
    uint64_t loaded_raw;  /* CLOCK_MONOTONIC_RAW when the module was loaded */
    uint64_t reserved[3];
};

/* Section 1. Writer: the shim. The standing policy: what is done with a pause. */
struct ftclock_policy {
    uint32_t seq;           /* 0 until the first policy */
    uint32_t enabled;       /* 0: watch only */
    uint32_t reference;     /* 0 CLOCK_MONOTONIC_RAW, 1 the disciplined clock: struct ftclock_follow */
    uint32_t slew_ppm;      /* reference 1: at most so much of the time run since the last pause */
    uint32_t checkpoint_do; /* enum ftclock_do */
    uint32_t suspend_do;
    uint32_t restore_do;
    uint32_t migrate_do;
    uint64_t checkpoint_limit; /* a longer pause is a suspend */
    uint64_t suspend_limit;    /* 0: FTCLOCK_LIMIT_MAX */
    uint64_t restore_limit;
    uint64_t migrate_limit;
};

/* Section 2. Writer: the shim, before it lets a cont go on. When one pause was, as the shim saw it. */
struct ftclock_order {
    uint32_t seq;
    uint32_t reserved0;
    uint64_t pause;    /* the pause it is for: ftclock_now.pause when it was written */
    uint64_t stop_raw; /* the shim's own: when the stop went through, or its event came */
    uint64_t cont_raw; /* when the cont came */
    uint64_t lost;     /* cont_raw - stop_raw */
    uint64_t reserved[3];
};

/* Sections 3 and 4. Writer: the module. Each word stands for itself. */
struct ftclock_counts {
    uint64_t pauses; /* decisions made; the number of the last record */
    uint64_t dropped;
    uint64_t anchored;
    uint64_t held;
    uint64_t passed;
    uint64_t over_limit; /* of the held */
    uint64_t reanchored; /* anchors given up because the running clock moved by more than FTCLOCK_REANCHOR */
    uint64_t stale_orders;
    uint64_t orders;         /* orders followed */
    uint64_t busy;           /* calls that met another one inside and were passed through unseen */
    uint64_t caught_up_ns;   /* sum of lost over dropped and anchored */
    uint64_t held_ns;        /* sum of lost over held */
    uint64_t worst_residual; /* largest |residual_stop| seen */
    uint64_t worst_cost;
    uint64_t passed_ns; /* sum of lost over passed */
    uint64_t reserved;
};

/* Section 5. Writer: the module. */
struct ftclock_now {
    uint32_t seq;
    uint32_t paused; /* 1 between KVM_GET_CLOCK and KVM_SET_CLOCK */
    uint64_t pause;  /* the number that the current or next pause's record will have */
    uint64_t saved;  /* what KVM_GET_CLOCK said, ns */
    uint64_t stop_raw;
    uint64_t stop_real;
    uint64_t tsc; /* what vCPU 0's TSC read at the same time; 0: not known */
    uint32_t khz; /* its frequency; 0: not known, or it isn't the host's */
    uint32_t reserved0;
    uint64_t reserved;
};

/* Sections 6 and 7. Writer: the module. Clocks of one instant: of the last stop, or of a write after it. */
struct ftclock_anchor {
    uint32_t seq;
    uint32_t valid;
    uint64_t epoch; /* how many anchors were taken */
    uint64_t clock; /* kvmclock */
    uint64_t raw;   /* CLOCK_MONOTONIC_RAW */
    uint64_t real;  /* CLOCK_REALTIME */
    uint64_t boot;  /* CLOCK_BOOTTIME */
    int64_t steer;  /* reference 1: what was added to follow the disciplined clock */
    uint64_t error; /* bound of the pairing's error */
    uint64_t slept; /* how long the host had slept since it booted: CLOCK_BOOTTIME - CLOCK_MONOTONIC */
    uint64_t tsc;   /* vCPU 0's TSC; 0: not known */
    uint32_t khz;   /* its frequency; 0: not known, or it isn't the host's */
    uint32_t reserved0;
    uint64_t reserved[5];
};

/* The ring. Writer: the module. */
struct ftclock_record {
    uint32_t seq;
    uint32_t flags;   /* of KVM_GET_CLOCK at the stop: KVM_CLOCK_* of linux/kvm.h */
    uint64_t number;  /* counts from 1 */
    uint64_t saved;   /* kvmclock at the stop, as QEMU wants it back */
    uint64_t went_on; /* kvmclock that the guest went on with */
    uint64_t stop_raw;
    uint64_t cont_raw;
    uint64_t stop_real;
    uint64_t cont_real;
    int64_t lost;          /* cont_raw - stop_raw; with slept, what stock QEMU would have taken from the guest */
    int64_t residual_stop; /* kernel's clock - the last anchor at the stop, beyond its own drift */
    int64_t residual_cont; /* kernel's clock - this pause's anchor at the cont, before a write; 0: not read */
    uint64_t order_lost;   /* the shim's figure; 0 without an order */
    uint64_t cost;         /* time in the module at the cont, the kernel's part included */
    uint16_t decision;
    uint16_t reason;
    uint16_t event;
    uint8_t ordered; /* 1: by order */
    uint8_t tsc;     /* enum ftclock_tsc */
    uint64_t error;  /* bound of what CLOCK_REALTIME was off UTC by, or of the import; 0: not known */
    uint64_t slept;  /* how long the host slept in this pause: CLOCK_MONOTONIC_RAW stood still meanwhile */
};

/*
 * Behind the ring. Writer: the shim. What the guest's clock read at one instant in an earlier process, from which a
 * state that is loaded into this one is caught up, once.
 *
 * Either it is the reading of the stop at which the state was saved: then it is good for that very value. Or it is a
 * reading of the running clock, some time before the stop or even after it: then it is good for any value, and the time
 * that the guest ran in between is what the two values differ by.
 */
struct ftclock_import {
    uint32_t seq;   /* 0 without one */
    uint32_t leg;   /* enum ftclock_leg */
    uint64_t clock; /* kvmclock */
    uint64_t at;    /* the leg's clock at that instant */
    int64_t rate;   /* ppb by which the leg's clock ran faster than the guest's until the stop; leg RAW: 0 */
    uint64_t error; /* bound of the pairing's error, the hosts' own included */
    uint16_t event; /* FTCLOCK_EVENT_MIGRATE, or else it is a restore */
    uint16_t reserved0;
    uint32_t any; /* 0: for a write of this very value; 1: for any */
    uint64_t tsc; /* what the guest's TSC read at that instant */
    uint32_t khz; /* its frequency; 0: nothing is known of the TSC */
    uint32_t reserved1;
};

/* Behind import. Writer: the shim. How good the host's clock is, as adjtimex(2) says. */
struct ftclock_host {
    uint32_t seq;          /* 0 until the shim asked */
    uint32_t synchronised; /* 0: STA_UNSYNC or TIME_ERROR */
    uint64_t at_raw;       /* when it asked */
    uint64_t error;        /* bound of CLOCK_REALTIME's error then; it grows by 500 ppm, as the kernel's own */
    uint64_t reserved[5];
};

/*
 * Behind host. Writer: the module. The reference that a guest with reference 1 follows: CLOCK_TAI, which is
 * CLOCK_REALTIME without its leap seconds, or CLOCK_REALTIME itself as long as nobody told the kernel the difference.
 */
struct ftclock_follow {
    uint32_t seq;
    uint32_t known;     /* 1: there is a base */
    uint64_t base;      /* reference - kvmclock as it should be */
    int64_t debt;       /* how far the guest was behind its reference at the last cont */
    int64_t steered;    /* sum of what was steered */
    uint64_t bases;     /* bases taken, the first included */
    uint64_t steps;     /* steps of CLOCK_REALTIME that were noticed */
    int64_t last_step;  /* the newest of them; leap seconds and a new TAI offset are none */
    uint64_t given_up;  /* debts that went above FTCLOCK_FOLLOW_MAX: the guest was left where it was */
    int64_t last_given; /* the newest of them */
    uint64_t leaps;     /* leap seconds noticed */
    uint64_t sleeps;    /* how often the host slept */
    uint64_t reserved[5];
};

/*
 * Behind follow. Writer: the module. Which of the clocks that it keeps the guest has switched on, as the first vCPU's
 * state said at a cont. Which of several a guest reads, or whether it reads yet another one, can't be seen.
 */
struct ftclock_clocks {
    uint32_t seq;     /* 0: nobody looked yet */
    uint32_t on;      /* enum ftclock_clock; 0: none of them */
    uint64_t at_raw;  /* the last look */
    uint64_t without; /* on 0: how long the guest has run, pauses not counted, since it was first seen so */
    uint64_t looks;
    uint64_t failed; /* of the looks */
    uint64_t reserved[3];
};

struct ftclock_page {
    struct ftclock_head head;
    struct ftclock_policy policy;
    struct ftclock_order order;
    struct ftclock_counts counts;
    struct ftclock_now now;
    struct ftclock_anchor anchor;
    struct ftclock_record ring[FTCLOCK_RING_LEN];
    struct ftclock_import import;
    struct ftclock_host host;
    struct ftclock_follow follow;
    struct ftclock_clocks clocks;
};

/* A running clock that left its anchor by more than this was set by somebody else: 100 ms. */
#define FTCLOCK_REANCHOR INT64_C(100000000)

#define FTCLOCK_AT(type, member, offset)                                                                               \
    static_assert(offsetof(struct type, member) == (offset), #type "." #member " moved")
FTCLOCK_AT(ftclock_head, magic, 0);
FTCLOCK_AT(ftclock_head, major, 8);
FTCLOCK_AT(ftclock_head, minor, 12);
FTCLOCK_AT(ftclock_head, size, 16);
FTCLOCK_AT(ftclock_head, ring_len, 20);
FTCLOCK_AT(ftclock_head, record_size, 24);
FTCLOCK_AT(ftclock_head, pid, 28);
FTCLOCK_AT(ftclock_head, loaded_raw, 32);
FTCLOCK_AT(ftclock_policy, seq, 0);
FTCLOCK_AT(ftclock_policy, enabled, 4);
FTCLOCK_AT(ftclock_policy, reference, 8);
FTCLOCK_AT(ftclock_policy, slew_ppm, 12);
FTCLOCK_AT(ftclock_policy, checkpoint_do, 16);
FTCLOCK_AT(ftclock_policy, suspend_do, 20);
FTCLOCK_AT(ftclock_policy, restore_do, 24);
FTCLOCK_AT(ftclock_policy, migrate_do, 28);
FTCLOCK_AT(ftclock_policy, checkpoint_limit, 32);
FTCLOCK_AT(ftclock_policy, suspend_limit, 40);
FTCLOCK_AT(ftclock_policy, restore_limit, 48);
FTCLOCK_AT(ftclock_policy, migrate_limit, 56);
FTCLOCK_AT(ftclock_order, seq, 0);
FTCLOCK_AT(ftclock_order, pause, 8);
FTCLOCK_AT(ftclock_order, stop_raw, 16);
FTCLOCK_AT(ftclock_order, cont_raw, 24);
FTCLOCK_AT(ftclock_order, lost, 32);
FTCLOCK_AT(ftclock_counts, pauses, 0);
FTCLOCK_AT(ftclock_counts, dropped, 8);
FTCLOCK_AT(ftclock_counts, anchored, 16);
FTCLOCK_AT(ftclock_counts, held, 24);
FTCLOCK_AT(ftclock_counts, passed, 32);
FTCLOCK_AT(ftclock_counts, over_limit, 40);
FTCLOCK_AT(ftclock_counts, reanchored, 48);
FTCLOCK_AT(ftclock_counts, stale_orders, 56);
FTCLOCK_AT(ftclock_counts, orders, 64);
FTCLOCK_AT(ftclock_counts, busy, 72);
FTCLOCK_AT(ftclock_counts, caught_up_ns, 80);
FTCLOCK_AT(ftclock_counts, held_ns, 88);
FTCLOCK_AT(ftclock_counts, worst_residual, 96);
FTCLOCK_AT(ftclock_counts, worst_cost, 104);
FTCLOCK_AT(ftclock_counts, passed_ns, 112);
FTCLOCK_AT(ftclock_now, seq, 0);
FTCLOCK_AT(ftclock_now, paused, 4);
FTCLOCK_AT(ftclock_now, pause, 8);
FTCLOCK_AT(ftclock_now, saved, 16);
FTCLOCK_AT(ftclock_now, stop_raw, 24);
FTCLOCK_AT(ftclock_now, stop_real, 32);
FTCLOCK_AT(ftclock_now, tsc, 40);
FTCLOCK_AT(ftclock_now, khz, 48);
FTCLOCK_AT(ftclock_anchor, seq, 0);
FTCLOCK_AT(ftclock_anchor, valid, 4);
FTCLOCK_AT(ftclock_anchor, epoch, 8);
FTCLOCK_AT(ftclock_anchor, clock, 16);
FTCLOCK_AT(ftclock_anchor, raw, 24);
FTCLOCK_AT(ftclock_anchor, real, 32);
FTCLOCK_AT(ftclock_anchor, boot, 40);
FTCLOCK_AT(ftclock_anchor, steer, 48);
FTCLOCK_AT(ftclock_anchor, error, 56);
FTCLOCK_AT(ftclock_anchor, slept, 64);
FTCLOCK_AT(ftclock_anchor, tsc, 72);
FTCLOCK_AT(ftclock_anchor, khz, 80);
FTCLOCK_AT(ftclock_record, seq, 0);
FTCLOCK_AT(ftclock_record, flags, 4);
FTCLOCK_AT(ftclock_record, number, 8);
FTCLOCK_AT(ftclock_record, saved, 16);
FTCLOCK_AT(ftclock_record, went_on, 24);
FTCLOCK_AT(ftclock_record, stop_raw, 32);
FTCLOCK_AT(ftclock_record, cont_raw, 40);
FTCLOCK_AT(ftclock_record, stop_real, 48);
FTCLOCK_AT(ftclock_record, cont_real, 56);
FTCLOCK_AT(ftclock_record, lost, 64);
FTCLOCK_AT(ftclock_record, residual_stop, 72);
FTCLOCK_AT(ftclock_record, residual_cont, 80);
FTCLOCK_AT(ftclock_record, order_lost, 88);
FTCLOCK_AT(ftclock_record, cost, 96);
FTCLOCK_AT(ftclock_record, decision, 104);
FTCLOCK_AT(ftclock_record, reason, 106);
FTCLOCK_AT(ftclock_record, event, 108);
FTCLOCK_AT(ftclock_record, ordered, 110);
FTCLOCK_AT(ftclock_record, tsc, 111);
FTCLOCK_AT(ftclock_record, error, 112);
FTCLOCK_AT(ftclock_record, slept, 120);
FTCLOCK_AT(ftclock_page, head, 0);
FTCLOCK_AT(ftclock_page, policy, 64);
FTCLOCK_AT(ftclock_page, order, 128);
FTCLOCK_AT(ftclock_page, counts, 192);
FTCLOCK_AT(ftclock_page, now, 320);
FTCLOCK_AT(ftclock_page, anchor, 384);
FTCLOCK_AT(ftclock_page, ring, 512);
FTCLOCK_AT(ftclock_page, import, 33280);
FTCLOCK_AT(ftclock_page, host, 33344);
FTCLOCK_AT(ftclock_page, follow, 33408);
FTCLOCK_AT(ftclock_page, clocks, 33536);
FTCLOCK_AT(ftclock_import, seq, 0);
FTCLOCK_AT(ftclock_import, leg, 4);
FTCLOCK_AT(ftclock_import, clock, 8);
FTCLOCK_AT(ftclock_import, at, 16);
FTCLOCK_AT(ftclock_import, rate, 24);
FTCLOCK_AT(ftclock_import, error, 32);
FTCLOCK_AT(ftclock_import, event, 40);
FTCLOCK_AT(ftclock_import, any, 44);
FTCLOCK_AT(ftclock_import, tsc, 48);
FTCLOCK_AT(ftclock_import, khz, 56);
FTCLOCK_AT(ftclock_host, seq, 0);
FTCLOCK_AT(ftclock_host, synchronised, 4);
FTCLOCK_AT(ftclock_host, at_raw, 8);
FTCLOCK_AT(ftclock_host, error, 16);
FTCLOCK_AT(ftclock_follow, seq, 0);
FTCLOCK_AT(ftclock_follow, known, 4);
FTCLOCK_AT(ftclock_follow, base, 8);
FTCLOCK_AT(ftclock_follow, debt, 16);
FTCLOCK_AT(ftclock_follow, steered, 24);
FTCLOCK_AT(ftclock_follow, bases, 32);
FTCLOCK_AT(ftclock_follow, steps, 40);
FTCLOCK_AT(ftclock_follow, last_step, 48);
FTCLOCK_AT(ftclock_follow, given_up, 56);
FTCLOCK_AT(ftclock_follow, last_given, 64);
FTCLOCK_AT(ftclock_follow, leaps, 72);
FTCLOCK_AT(ftclock_follow, sleeps, 80);
FTCLOCK_AT(ftclock_clocks, seq, 0);
FTCLOCK_AT(ftclock_clocks, on, 4);
FTCLOCK_AT(ftclock_clocks, at_raw, 8);
FTCLOCK_AT(ftclock_clocks, without, 16);
FTCLOCK_AT(ftclock_clocks, looks, 24);
FTCLOCK_AT(ftclock_clocks, failed, 32);
static_assert(sizeof(struct ftclock_record) == 128, "a record is two cache lines");
static_assert(sizeof(struct ftclock_page) <= FTCLOCK_PAGE_SIZE, "the page holds all sections");

#endif
