/* SPDX-License-Identifier: MIT */
/*
 * Scenarios of the rule of the clock, on a host that is all simulated: time passes only when the rule asks for a clock
 * or calls the kernel, and all chance comes from the seed, so that a scenario and a seed are always the same run.
 *
 * The simulated kernel is kvm_vm_ioctl_get_clock and kvm_vm_ioctl_set_clock (arch/x86/kvm/x86.c): the clock runs on
 * whatever QEMU does, at a rate of its own; SET_CLOCK replaces it, and with KVM_CLOCK_REALTIME adds what CLOCK_REALTIME
 * went on since.
 *
 *     rule_test -list            names the scenarios
 *     rule_test NAME [SEED [N]]  runs one, with N seeds from SEED on
 *     rule_test                  runs all with seed 1
 *
 * A scenario ends at its first failure, with one line that has the command to replay it.
 */
#ifndef FTCLOCK_ENGINE_H
#define FTCLOCK_ENGINE_H

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

#include "../rule.h"

#define US        INT64_C(1000)
#define MS        INT64_C(1000000)
#define SEC       INT64_C(1000000000)
#define HOUR      (3600 * SEC)
#define DAY       (86400 * SEC)
#define LENGTH(a) ((int)(sizeof(a) / sizeof((a)[0])))

#define STABLE   ((uint32_t)KVM_CLOCK_TSC_STABLE)
#define FLAGS    (STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC)
#define HOST_KHZ 2900000

/* An address that the kernel can't write to. */
#define NOWHERE ((struct kvm_clock_data *)8)

enum { CATCH_UP = FTCLOCK_DO_CATCH_UP, HOLD = FTCLOCK_DO_HOLD };

struct scenario {
    const char *name;
    void (*run)(void);
    struct scenario *next;
};

void add_scenario(struct scenario *s);

/* Defines a scenario: SCENARIO(what_it_shows) { given, when, then }. */
#define SCENARIO(name)                                                                                                 \
    static void name(void);                                                                                            \
    __attribute__((constructor)) static void add_##name(void) {                                                        \
        static struct scenario s = {#name, name, NULL};                                                                \
        add_scenario(&s);                                                                                              \
    }                                                                                                                  \
    static void name(void)

/* Names the row of a table that is run next: a failure shows it. */
void in_case(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Takes data into the digest of the run, by which two runs are compared. */
void digest(const void *data, size_t bytes);

void check(bool ok, const char *file, int line, const char *what);
void check_near(int64_t value, int64_t most, const char *file, int line, const char *what);
void check_decision(unsigned decision, unsigned reason, const char *file, int line);

#define CHECK(ok)          check((ok), __FILE__, __LINE__, #ok)
#define NEAR(value, most)  check_near((value), (most), __FILE__, __LINE__, "|" #value "| < " #most)
#define DECIDED(what, why) check_decision(FTCLOCK_##what, FTCLOCK_REASON_##why, __FILE__, __LINE__)
#define DECIDED_AS(d, r)   check_decision((d), (r), __FILE__, __LINE__)
/* The same of a table's row: its decision and its reason. */
#define ENDS(what, why) FTCLOCK_##what, FTCLOCK_REASON_##why
#define DROPPED()       DECIDED(DROPPED, IN_TOLERANCE)
#define CAUGHT_UP()     CHECK(record()->decision == FTCLOCK_DROPPED || record()->decision == FTCLOCK_ANCHORED)
/* No guest may see its clock go back. */
#define NOT_BACK() CHECK(guest() >= guest_saw)
/* The first anchor is still the one that all goes by. */
#define FIRST_ANCHOR_KEPT() CHECK(page->anchor.epoch == 1 && page->counts.reanchored == 0)

/* --- chance --- */

extern uint64_t seed;

uint64_t draw(void);
int64_t between(int64_t least, int64_t most);
static inline bool one_in(uint64_t n) { return draw() % n == 0; }
static inline int64_t size(int64_t v) { return v < 0 ? -v : v; }

/* --- the simulated host --- */

extern struct sim {
    int64_t now;             /* ns, the truth; CLOCK_MONOTONIC_RAW shows it */
    int64_t mono, mono_from; /* CLOCK_MONOTONIC was so much at that time */
    int64_t mono_rate;       /* ns/s that it is faster by since: the discipline */
    int64_t suspended;       /* CLOCK_BOOTTIME - CLOCK_MONOTONIC */
    int64_t wall;            /* CLOCK_REALTIME - CLOCK_BOOTTIME */
    int64_t tai;             /* s, CLOCK_TAI - CLOCK_REALTIME */
    int64_t tsc_extra;       /* ns that the TSC went on by while the host slept, or less where it began anew */
    bool tsc_reset;          /* it began anew, and KVM found out */
    bool garbage;            /* it will find out: until then KVM_GET_CLOCK counts from a TSC that is gone */
    int64_t guest_tsc;       /* what the guest's TSC is ahead of the host's by */
    int64_t moved_tsc;       /* what it was moved by in all */
    int64_t look;            /* ns that the next look for the vCPUs takes */
    bool no_vm_khz;          /* Linux before 5.18 */
    int tsc_error;           /* a kernel that doesn't say, 1, or that doesn't move it, 2 */
    uint32_t khz;            /* the guest's frequency, 0: the host's */
    int64_t clock, clock_at; /* kvmclock was so much at that time */
    int64_t rate;            /* ns/s that it is faster by */
    int64_t moved; /* what it was moved by in all, by writes and in pauses: a twin that isn't paused lacks it */
    uint32_t flags;
    int get_error, set_error; /* errno; set_error for other writes than QEMU's own */
    int own_error;            /* for QEMU's own */
    int64_t slow;             /* ns more in each ioctl */
    int64_t cold;             /* what a reading of CLOCK_MONOTONIC_RAW takes to return, where its code isn't cached */
    /* Preemption: at the at-th place from now (a call of a clock, or in a call of the kernel) for so long. */
    int place, preempt_at;
    int64_t preempt_for;
    bool preempt_asleep; /* the host sleeps instead */
    /* What the kernel was asked. */
    const struct kvm_clock_data *own;
    int gets, sets, own_sets;
    struct kvm_clock_data last;
    bool own_last;
} sim;

/* The host's clocks and the guest's at a time, and the guest's clock and TSC now. */
int64_t boot_at(int64_t t);
uint64_t real_at(int64_t t), tsc_at(int64_t t), clock_at(int64_t t);
int64_t guest(void), guest_tsc(void);

/* Sets CLOCK_REALTIME by a step, and CLOCK_MONOTONIC's rate, ns/s. */
void set_real(int64_t step, int64_t rate);
/* A host whose kvmclock has that rate, ns/s. One that tells its frequency has told it. */
void set_rate(int64_t rate);
/* CLOCK_MONOTONIC_RAW stands, kvmclock goes on. A TSC that goes on, too, carries kvmclock's master clock over it. */
void host_sleeps(int64_t for_ns, bool tsc_goes_on);
void host_sleeps_uncounted(int64_t for_ns);
/* Something in the kernel moves the clock of a guest that stands. */
void kernel_moves(int64_t by);
/* At the at-th place from now the module is preempted; 0: nowhere. */
void preempt(int at, int64_t for_ns);

/* --- the simulated QEMU, guest and shim --- */

extern struct rule rule;
extern struct ftclock_page *page;
extern struct kvm_clock_data kept; /* QEMU's: the clock that it writes back, and what goes with it */
extern int64_t guest_saw;          /* the largest value that the guest can have read */

/* A host that is up for 1000 s, a QEMU that has the module, a guest that never ran, no policy. */
void boot(void);
/* The module alone starts, preempted at a place. */
void start_module(int preempted_at, int64_t for_ns);
/* Loaded into a running QEMU whose guest ran for 10 s, with the usual policy: page->policy is there to be changed. */
void attach(void);
/* The same after a first checkpoint, which leaves an anchor. */
void anchored_guest(void);
extern const struct ftclock_policy usual;
void write_policy(struct ftclock_policy policy);
/* The usual policy with reference 1, of 500 ppm. */
void follow_utc(void);
void write_order(uint64_t pause, uint64_t lost);
/* Of the pause that is on, checkpoint or suspend. */
void policy_says(uint32_t what);
void write_import(struct ftclock_import import);

/* The guest runs, or stands. */
void run(int64_t for_ns), stand(int64_t for_ns);
/* QEMU's stop and cont, which the kernel lets succeed; try_ returns what the kernel said. */
void stop(void), stop_after(int64_t ran), cont(void);
int try_stop(void), try_cont(void);
void stop_preempted(int at, int64_t for_ns), cont_preempted(int at, int64_t for_ns);
/* QEMU loads a state in the pause: of a guest that saw less or more than this one. */
void load_state(int64_t clock);

/* A run and a pause, after which the guest's clock isn't behind what it showed. */
void checkpoint(int64_t ran, int64_t pause);
void checkpoints(int n, int64_t ran, int64_t pause);
/* One that is dropped. */
void dropped(int64_t ran, int64_t pause);
/* One in whose pause the kernel moves the clock. */
void disturbed(int64_t ran, int64_t pause, int64_t by);
/* One that is held. */
void held(int64_t ran, int64_t pause);
/* One with a reading of the clock that QEMU has the kernel continue (KVM_CLOCK_REALTIME): run and stop. */
void stop_with_realtime(int64_t ran);

/* Of the last pause. */
const struct ftclock_record *record(void);

/* A guest that is never paused from this moment on, by CLOCK_MONOTONIC_RAW: what the guest is ahead of it by. */
extern struct mark {
    int64_t clock, at, tsc;
    uint64_t real;
} mark;
void mark_twin(void);
int64_t off_twin(void), off_reference(void); /* the latter by CLOCK_REALTIME */
/* How far apart the guest's TSC and its clock went since they were those of the mark, ns. */
int64_t apart(void);

#endif
