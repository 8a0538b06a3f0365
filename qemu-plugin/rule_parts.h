/* SPDX-License-Identifier: MIT */
/*
 * What the parts of the rule have in common: rule.c is the stop and the cont, rule_clocks.c reads the clocks,
 * rule_follow.c has the reference, rule_tsc.c the guest's TSC, and rule_restore.c the states that are loaded.
 */
#ifndef FTCLOCK_RULE_PARTS_H
#define FTCLOCK_RULE_PARTS_H

#include "rule_page.h"

#define SECOND INT64_C(1000000000)
/* Readings of clocks that take longer than this were preempted, and are made again. */
#define READ_SLOW  INT64_C(2000)
#define READ_TRIES 3
/* Shortest span over which the TSC's rate is measured: 1 ms. */
#define RATE_SPAN INT64_C(1000000)
/* What kvmclock may leave CLOCK_MONOTONIC_RAW by itself, ppb: both are the TSC, scaled by two factors that differ by up
 * to 230 (the resolution of the kernel's). */
#define OWN_RATE UINT64_C(300)
/* The kernel may tell how long the host slept by a clock of whole seconds. */
#define SLEEP_ERROR UINT64_C(2000000000)

static inline uint64_t magnitude(int64_t v) { return v < 0 ? -(uint64_t)v : (uint64_t)v; }

static inline int64_t clamp(int64_t v, int64_t most) { return v > most ? most : v < -most ? -most : v; }

/* --- rule_clocks.c --- */

/* A reading of the kernel's clock, with the host's clocks of the same instant and the bound of their error. */
struct reading {
    struct kvm_clock_data data;
    struct moment at;
    uint64_t error;
};

/* What the kernel's clock may have left the host's other clocks by itself from one moment to another, at most. */
static inline uint64_t own_drift(const struct moment *from, const struct moment *to) {
    uint64_t slept = to->slept - from->slept;
    uint64_t passed = to->raw - from->raw + slept;
    return passed / SECOND * OWN_RATE + passed % SECOND * OWN_RATE / SECOND + (slept ? SLEEP_ERROR : 0);
}

/* What it did leave them by, where it was seen to leave them by so much. */
int64_t own(const struct rule *r, const struct moment *from, const struct moment *to, int64_t seen);
bool slept_uncounted(const struct rule *r, int64_t ahead, const struct reading *now);
void notice_sleep(struct rule *r);
uint64_t read_moment(const struct rule *r, struct moment *now);
int read_clock(struct rule *r, int fd, struct kvm_clock_data *data, struct reading *out);
void read_better(struct rule *r, int fd, struct reading *best);
bool read_stable(struct rule *r, int fd, struct reading *now);

/* --- the anchor --- */

static inline uint64_t expected(const struct rule *r, uint64_t raw) {
    return r->anchor.clock + (raw - r->anchor.raw) + (r->slept - r->anchor.slept) + (uint64_t)r->anchor.steer;
}

/* What the guest's TSC read at the instant of a reading; 0: not known. */
static inline uint64_t guest_tsc(const struct rule *r, const struct reading *at) {
    return r->khz && at->data.flags & KVM_CLOCK_HOST_TSC ? at->data.host_tsc + (uint64_t)r->tsc_offset : 0;
}

void take_anchor(struct rule *r, const struct reading *from, uint64_t epoch);
void give_up_anchor(struct rule *r);

/* --- rule_follow.c --- */

void notice_steps(struct rule *r);
void take_base(struct rule *r, uint64_t clock, uint64_t real);
void begin_following(struct rule *r, int fd);
int64_t steer(struct rule *r, const struct ftclock_policy *p, const struct moment *now);

/* --- rule_tsc.c --- */

void learn_tsc(struct rule *r, int fd);
uint8_t move_tsc(struct rule *r, int fd, uint64_t from_clock, uint64_t from_tsc, uint32_t from_khz,
                 const struct kvm_clock_data *loaded, const struct ftclock_record *rec);

/* --- rule.c, for rule_restore.c --- */

int pass(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec, uint16_t reason);
bool write_expected(struct rule *r, int fd, uint64_t least, struct ftclock_record *rec);
bool judge_pause(struct rule *r, const struct reading *now, struct ftclock_record *rec);

/* --- rule_restore.c --- */

int restore(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec);

#endif
