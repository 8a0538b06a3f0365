/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * Tests of the rule of the clock, against a host that is all simulated: time passes only when the rule asks for a clock
 * or calls the kernel, so that a run depends on its seed alone. Run with a seed to repeat one: rule_test 1234.
 *
 * The simulated kernel is kvm_vm_ioctl_get_clock and kvm_vm_ioctl_set_clock (arch/x86/kvm/x86.c): the clock runs on
 * whatever QEMU does, at a rate of its own; SET_CLOCK replaces it, and with KVM_CLOCK_REALTIME adds what CLOCK_REALTIME
 * went on since.
 */
#include "rule.h"
#include "vcpus.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define US    INT64_C(1000)
#define MS    INT64_C(1000000)
#define SEC   INT64_C(1000000000)
#define FLAGS (KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC)

/* --- checks --- */

static const char *test;
static int failures;
static uint64_t seed;

#define CHECK(ok, ...)                                                                                                 \
    do {                                                                                                               \
        if (!(ok)) {                                                                                                   \
            static int said; /* a few of each place */                                                                 \
            failures++;                                                                                                \
            if (said++ < 3) {                                                                                          \
                printf("FAIL %s, line %d (seed %" PRIu64 "): ", test, __LINE__, seed);                                 \
                printf(__VA_ARGS__);                                                                                   \
                printf(" [" #ok "]\n");                                                                                \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

static uint64_t random_state;

static uint64_t draw(void) { /* splitmix64 */
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static int64_t between(int64_t least, int64_t most) { return least + (int64_t)(draw() % (uint64_t)(most - least + 1)); }

/* --- the simulated host --- */

static struct {
    int64_t now;             /* ns, the truth; CLOCK_MONOTONIC_RAW shows it */
    int64_t mono, mono_from; /* CLOCK_MONOTONIC was so much at that time */
    int64_t mono_rate;       /* ns/s that it is faster by since: the discipline */
    int64_t suspended;       /* CLOCK_BOOTTIME - CLOCK_MONOTONIC */
    int64_t wall;            /* CLOCK_REALTIME - CLOCK_BOOTTIME */
    int64_t tai;             /* s, CLOCK_TAI - CLOCK_REALTIME */
    int64_t tsc_extra;       /* ns that the TSC went on by while the host slept, or less where it began anew */
    bool tsc_reset;          /* it began anew, and KVM found out */
    int64_t guest_tsc;       /* what the guest's TSC is ahead of the host's by */
    int64_t moved_tsc;       /* what it was moved by in all */
    int64_t look;            /* ns that the next look for the vCPUs takes */
    bool no_vm_khz;          /* Linux before 5.18 */
    int tsc_error;           /* a kernel that doesn't say, 1, or that doesn't move it, 2 */
    uint32_t khz;            /* the guest's frequency, 0: the host's */
    bool garbage;            /* it will find out: until then KVM_GET_CLOCK counts from a TSC that is gone */
    int64_t clock, clock_at; /* kvmclock was so much at that time */
    int64_t rate;            /* ns/s that it is faster by */
    int64_t moved; /* what it was moved by in all, by writes and in pauses: a twin that isn't paused lacks it */
    uint32_t flags;
    int get_error, set_error; /* errno; set_error for other writes than QEMU's own */
    int own_error;            /* for QEMU's own */
    int64_t slow;             /* ns more in each ioctl */
    /* Preemption: at the at-th place from now (a call of a clock, or in a call of the kernel) for so long. */
    int64_t cold; /* what a reading of CLOCK_MONOTONIC_RAW takes to return, where its code isn't cached */
    int place, preempt_at;
    int64_t preempt_for;
    bool preempt_asleep; /* the host sleeps instead */
    /* What the kernel was asked. */
    const struct kvm_clock_data *own;
    int gets, sets, own_sets;
    struct kvm_clock_data last;
    bool own_last;
} sim;

static int64_t mono_at(int64_t t) {
    return sim.mono + (t - sim.mono_from) + (int64_t)((__int128)(t - sim.mono_from) * sim.mono_rate / SEC);
}

static int64_t boot_at(int64_t t) { return mono_at(t) + sim.suspended; }

static uint64_t real_at(int64_t t) { return (uint64_t)(boot_at(t) + sim.wall); }

#define HOST_KHZ 2900000

static uint64_t tsc_at(int64_t t) { return (uint64_t)((__int128)(t + 7 * SEC + sim.tsc_extra) * 29 / 10); }

static uint64_t clock_at(int64_t t) {
    return (uint64_t)(sim.clock + (t - sim.clock_at) + (int64_t)((__int128)(t - sim.clock_at) * sim.rate / SEC));
}

/* The guest's clock now. */
static int64_t guest(void) { return (int64_t)clock_at(sim.now); }

/*
 * The host sleeps: CLOCK_MONOTONIC and CLOCK_MONOTONIC_RAW stand, the others go on, and so does kvmclock, which counts
 * from CLOCK_MONOTONIC_RAW and the time slept (get_kvmclock_base_ns). A TSC that goes on carries it over the sleep; one
 * that begins anew has KVM give the master clock up for good, and KVM_CLOCK_TSC_STABLE with it, once a vCPU ran or the
 * clock was set (kvm_arch_hardware_enable, pvclock_update_vm_gtod_copy).
 */
static void host_sleeps(int64_t for_ns, bool tsc_goes_on) {
    sim.suspended += for_ns;
    sim.clock += for_ns;
    if (tsc_goes_on)
        sim.tsc_extra += for_ns;
    else {
        sim.tsc_extra = -sim.now - 7 * SEC + SEC;
        sim.tsc_reset = sim.garbage = true;
    }
}

/* Time passes between two instructions that matter. */
static void place(int64_t cost) {
    if (sim.preempt_at > 0 && ++sim.place == sim.preempt_at) {
        if (sim.preempt_asleep)
            host_sleeps(sim.preempt_for, true);
        else
            sim.now += sim.preempt_for;
    }
    sim.now += cost;
}

static uint64_t sim_raw(void) {
    place(between(15, 25));
    int64_t read = sim.now;
    sim.now += sim.cold;
    return (uint64_t)read;
}

static uint64_t sim_real(void) {
    place(between(15, 25));
    return real_at(sim.now);
}

static uint64_t sim_boot(void) {
    place(between(15, 25));
    return (uint64_t)boot_at(sim.now);
}

static uint64_t sim_mono(void) {
    place(between(15, 25));
    return (uint64_t)mono_at(sim.now);
}

static uint64_t sim_tai(void) {
    place(between(15, 25));
    return real_at(sim.now) + (uint64_t)(sim.tai * SEC);
}

static uint64_t sim_tsc(void) {
    place(between(5, 15));
    return tsc_at(sim.now);
}

static int sim_ioctl(int fd, unsigned long request, struct kvm_clock_data *data) {
    CHECK(fd == 7, "fd %d", fd);
    place(between(60, 120) + sim.slow);
    if (request == KVM_GET_CLOCK) {
        sim.gets++;
        if (sim.get_error) {
            errno = sim.get_error;
            return -1;
        }
        *data = (struct kvm_clock_data){.clock = clock_at(sim.now), .flags = sim.flags};
        if (sim.garbage)
            data->clock -= UINT64_C(7777) * (uint64_t)SEC;
        if (sim.flags & KVM_CLOCK_REALTIME)
            data->realtime = real_at(sim.now);
        if (sim.flags & KVM_CLOCK_HOST_TSC)
            data->host_tsc = tsc_at(sim.now);
    } else {
        CHECK(request == KVM_SET_CLOCK, "request %#lx", request);
        sim.sets++;
        sim.own_last = data == sim.own;
        sim.own_sets += sim.own_last;
        sim.last = *data;
        if (!sim.own_last)
            CHECK(data->flags == 0 && data->realtime == 0 && data->host_tsc == 0, "our write: flags %#x", data->flags);
        int error = sim.own_last ? sim.own_error : sim.set_error;
        if (error) {
            errno = error;
            return -1;
        }
        int64_t before = guest();
        sim.clock = (int64_t)data->clock;
        if (data->flags & KVM_CLOCK_REALTIME && real_at(sim.now) > data->realtime)
            sim.clock += (int64_t)(real_at(sim.now) - data->realtime);
        sim.clock_at = sim.now;
        sim.moved += guest() - before;
        if (sim.garbage) {
            sim.garbage = false;
            sim.flags = 0;
        }
    }
    place(between(60, 120));
    return 0;
}

static int sim_tsc_offset(int64_t *offset) {
    place(between(60, 120) + sim.look);
    sim.look = 0;
    *offset = sim.guest_tsc;
    return sim.tsc_error == 1 ? -1 : 0;
}

static int sim_move_tsc(int64_t by) {
    place(between(60, 120));
    if (sim.tsc_error)
        return -1;
    sim.guest_tsc += by;
    sim.moved_tsc += by;
    return 0;
}

static uint32_t sim_vm_khz(int fd) {
    (void)fd;
    return sim.no_vm_khz ? 0 : HOST_KHZ;
}

static uint32_t sim_vcpu_khz(void) { return sim.khz ? sim.khz : HOST_KHZ; }

static double sim_own_rate(uint32_t khz) { return khz == HOST_KHZ ? (double)sim.rate / SEC : 0; }

static const struct host host = {
    .clock_ioctl = sim_ioctl,
    .raw = sim_raw,
    .real = sim_real,
    .boot = sim_boot,
    .mono = sim_mono,
    .tai = sim_tai,
    .tsc = sim_tsc,
    .tsc_offset = sim_tsc_offset,
    .move_tsc = sim_move_tsc,
    .vm_khz = sim_vm_khz,
    .vcpu_khz = sim_vcpu_khz,
    .own_rate = sim_own_rate,
};

/* --- the simulated QEMU and shim --- */

static struct rule rule;
static struct ftclock_page *page;
static struct kvm_clock_data kept; /* QEMU's: s->clock and what goes with it */
static int64_t guest_saw;          /* the largest value that the guest can have read */

static void run(int64_t for_ns) {
    sim.now += for_ns;
    if (sim.garbage) {
        sim.garbage = false;
        sim.flags = 0;
    }
    if (guest() > guest_saw)
        guest_saw = guest();
}

static void stand(int64_t for_ns) { sim.now += for_ns; }

/* Something in the kernel moves the clock of a guest that stands: one that runs elsewhere at the time isn't touched. */
static void kernel_moves(int64_t by) {
    sim.clock += by;
    sim.moved += by;
}

static void preempt(int at, int64_t for_ns) {
    sim.place = 0;
    sim.preempt_at = at;
    sim.preempt_for = for_ns;
    sim.preempt_asleep = false;
}

static int stop(void) {
    if (guest() > guest_saw)
        guest_saw = guest();
    struct kvm_clock_data data = {0};
    sim.own = &data;
    int rc = rule_get_clock(&rule, 7, &data);
    if (rc == 0)
        kept = (struct kvm_clock_data){.clock = data.clock}; /* QEMU keeps the clock alone */
    return rc;
}

static const struct ftclock_record *record(void) { return &page->ring[(page->counts.pauses - 1) % FTCLOCK_RING_LEN]; }

/* A cont; what the kernel was asked is counted from here. */
static int cont(void) {
    struct kvm_clock_data data = kept, before = data;
    sim.own = &data;
    sim.gets = sim.sets = sim.own_sets = 0;
    uint64_t pauses = page->counts.pauses;
    int rc = rule_set_clock(&rule, 7, &data);
    CHECK(memcmp(&data, &before, sizeof(data)) == 0, "QEMU's own data were changed");
    CHECK(page->counts.pauses == pauses + 1, "%" PRIu64 " pauses after %" PRIu64, page->counts.pauses, pauses);
    CHECK(!page->now.paused && page->now.pause == pauses + 2, "now: paused %u, pause %" PRIu64, page->now.paused,
          page->now.pause);
    const struct ftclock_counts *c = &page->counts;
    CHECK(c->dropped + c->anchored + c->held + c->passed == c->pauses, "decisions don't add up to the pauses");
    const struct ftclock_record *rec = record();
    CHECK(rec->number == pauses + 1 && !(rec->seq & 1), "record %" PRIu64 ", sequence %u", rec->number, rec->seq);
    CHECK((rec->decision == FTCLOCK_DROPPED) == (sim.sets == 0), "decision %u with %d writes", rec->decision, sim.sets);
    return rc;
}

#define DECIDED(want, why)                                                                                             \
    CHECK(record()->decision == (want) && record()->reason == (why), "decision %u for reason %u", record()->decision,  \
          record()->reason)

static void write_policy(struct ftclock_policy policy) {
    policy.seq = (page->policy.seq | 1) + 1;
    page->policy = policy;
}

static const struct ftclock_policy usual = {
    .enabled = 1,
    .checkpoint_do = FTCLOCK_DO_CATCH_UP,
    .suspend_do = FTCLOCK_DO_HOLD,
    .restore_do = FTCLOCK_DO_HOLD,
    .migrate_do = FTCLOCK_DO_CATCH_UP,
    .checkpoint_limit = (uint64_t)(10 * SEC),
    .migrate_limit = (uint64_t)(60 * SEC),
};

static void write_order(uint32_t what, uint64_t pause, uint64_t lost) {
    page->order = (struct ftclock_order){
        .seq = (page->order.seq | 1) + 1, .what = what, .pause = pause, .cont_raw = (uint64_t)sim.now, .lost = lost};
}

/* A host that is up for 1000 s, a QEMU that has the module, a guest that never ran. */
static void boot(const char *name) {
    test = name;
    random_state = seed;
    memset(&sim, 0, sizeof(sim));
    sim.now = 1000 * SEC;
    sim.mono = sim.mono_from = sim.now;
    sim.wall = INT64_C(1700000000) * SEC;
    sim.clock_at = sim.now;
    sim.clock = 5 * MS;
    sim.flags = FLAGS;
    guest_saw = 0;
    memset(page, 0, FTCLOCK_PAGE_SIZE);
    rule_start(&rule, &host, page, 4711);
    stand(100 * MS);
}

/* A host whose kvmclock has that rate, ns a second. One that tells its frequency has told it. */
static void set_rate(int64_t rate) {
    sim.rate = rate;
    if (rule.own_rate_known)
        rule.own_rate = sim_own_rate(HOST_KHZ);
}

/* The same, loaded into a running QEMU whose guest runs, with the usual policy. */
static void attach(const char *name) {
    boot(name);
    write_policy(usual);
    run(10 * SEC);
}

/* One checkpoint. */
static void checkpoint(int64_t ran, int64_t pause) {
    run(ran);
    CHECK(stop() == 0, "the stop");
    stand(pause);
    CHECK(cont() == 0, "the cont");
}

/* One in whose pause the kernel moves the clock. */
static void disturbed(int64_t ran, int64_t pause, int64_t by) {
    run(ran);
    CHECK(stop() == 0, "the stop");
    stand(pause / 2);
    kernel_moves(by);
    stand(pause / 2);
    CHECK(cont() == 0, "the cont");
}

#define NOT_BACK() CHECK(guest() >= guest_saw, "the guest's clock went back by %" PRId64 " ns", guest_saw - guest())

/* What the guest's clock is off by, from a VM that was never paused since the clock was so at that time. */
static int64_t off(int64_t clock, int64_t at) { return guest() - (clock + (sim.now - at)); }

static int64_t size(int64_t v) { return v < 0 ? -v : v; }

/* --- the start --- */

static void test_start(void) {
    boot("the page's head");
    CHECK(page->head.magic == FTCLOCK_PAGE_MAGIC && page->head.major == 1 && page->head.size == FTCLOCK_PAGE_SIZE &&
              page->head.ring_len == FTCLOCK_RING_LEN && page->head.record_size == 128 && page->head.pid == 4711 &&
              page->head.loaded_raw > 0,
          "head");
    CHECK(page->now.pause == 1 && !page->now.paused && page->anchor.valid == 0, "now");

    boot("the first write after the start");
    kept.clock = 12345;
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_FIRST);
    CHECK(record()->event == FTCLOCK_EVENT_START && sim.own_sets == 1 && sim.clock == 12345 && page->anchor.valid &&
              page->anchor.epoch == 1,
          "start");
    CHECK(page->counts.passed == 1, "counted");
    /* From then on it's a life like any other. */
    write_policy(usual);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);

    boot("the start with LD_PRELOAD");
    write_policy(usual);
    sim.flags = 0;
    CHECK(stop() == 0, "QEMU reads the clock while it builds the machine");
    CHECK(!page->anchor.valid, "anchored to a clock that isn't stable");
    stand(2 * SEC);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_UNSTABLE);
    CHECK(record()->event == FTCLOCK_EVENT_START && sim.own_sets == 1, "event %u", record()->event);
    sim.flags = FLAGS;
    run(3 * SEC);
    CHECK(stop() == 0 && page->anchor.valid && page->anchor.epoch == 1, "no anchor at the first stable stop");
    int64_t at = (int64_t)page->anchor.raw;
    CHECK(size((int64_t)(page->anchor.clock - clock_at(at))) <= 20, "the anchor's pair is off by %" PRId64,
          (int64_t)(page->anchor.clock - clock_at(at)));
    CHECK(size((int64_t)(page->anchor.real - real_at(at))) <= 20, "the anchor's REALTIME leg");
    CHECK(size((int64_t)page->anchor.boot - boot_at(at)) <= 200, "the anchor's BOOTTIME leg");
    CHECK(page->now.paused && page->now.saved == kept.clock && page->now.pause == 2, "now");
    stand(5 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(size(off((int64_t)page->anchor.clock, at)) <= 20, "off by %" PRId64, off((int64_t)page->anchor.clock, at));

    attach("loaded while the guest is paused");
    kept.clock = clock_at(sim.now);
    stand(5 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_FIRST);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
}

/* --- checkpoints --- */

static void test_tolerance(void) {
    attach("dropped within the tolerance");
    checkpoint(SEC, 5 * MS);
    disturbed(SEC, 5 * MS, 900);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(size(record()->residual_stop) < 40 && size(record()->residual_cont - 900) < 40, "residuals");
    CHECK(record()->lost > 5 * MS && record()->lost < 5 * MS + 2 * US, "lost %" PRId64, record()->lost);
    CHECK(page->counts.dropped == 2 && page->counts.caught_up_ns > (uint64_t)(10 * MS), "counts");
    CHECK(record()->went_on >= kept.clock && record()->saved == kept.clock, "record");

    attach("anchored beyond the tolerance");
    checkpoint(SEC, 5 * MS);
    for (int i = 0; i < 2; i++) {
        disturbed(SEC, 5 * MS, i ? -50 * US : 50 * US);
        DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_OUT_OF_TOLERANCE);
        CHECK(size(sim.moved) < US, "off by %" PRId64, sim.moved);
        CHECK(!sim.own_last && sim.last.clock == record()->went_on, "what was written");
        CHECK(size(size(record()->residual_cont) - 50 * US) < 200, "residual %" PRId64, record()->residual_cont);
    }
    CHECK(page->anchor.epoch == 1 && page->counts.worst_residual <= (uint64_t)US, "worst residual %" PRIu64,
          page->counts.worst_residual);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);

    attach("never back");
    checkpoint(SEC, 5 * MS);
    disturbed(SEC, 5 * MS, -20 * MS); /* the kernel's clock is below what was read at the stop */
    DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_OUT_OF_TOLERANCE);
    NOT_BACK();
    CHECK(size(sim.moved) < US, "off by %" PRId64, sim.moved);

    attach("never back, with the kernel's clock within the tolerance");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    kernel_moves(-900); /* a pause so short that the clock is below what was read at the stop */
    CHECK(cont() == 0, "cont");
    NOT_BACK();

    attach("a hold ends when the kernel takes the value, not before");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
    stand(30 * MS);
    sim.slow = 15 * US;
    CHECK(cont() == 0, "cont");
    sim.slow = 0;
    int64_t moved = sim.moved;
    for (int i = 0; i < 3; i++) {
        checkpoint(50 * MS, 5 * MS);
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    }
    CHECK(sim.moved == moved, "moved by %" PRId64 " afterwards", sim.moved - moved);
}

/* The clock's own rate is the guest's to know: no pause takes or gives what a run made of it, however long it was. */
/* As package kvmclock has it, which has measured it. */
static void test_formula(void) {
    static const struct {
        uint32_t khz;
        double ppb;
    } cases[] = {{0, 0}, {1000000, 0}, {2000000, 0}, {2095995, 5.13}, {2900000, -17.88}};
    test = "kvmclock's own rate";
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        double off = vcpus_own_rate(cases[i].khz) * 1e9 - cases[i].ppb;
        CHECK(off > -0.01 && off < 0.01, "%" PRIu32 " kHz: off by %g ppb", cases[i].khz, off);
    }
}

static void test_own_rate(void) {
    static const int64_t runs[] = {5 * MS, SEC, 200 * SEC, 86400 * SEC, 90 * 86400 * SEC};
    for (size_t i = 0; i < sizeof(runs) / sizeof(runs[0]); i++) {
        for (int64_t rate = -230; rate <= 230; rate += 230) {
            attach("a pause after a run without one");
            set_rate(rate);
            checkpoint(SEC, 5 * MS);
            for (int j = 0; j < 3; j++) {
                checkpoint(runs[i], 5 * MS);
                DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
                CHECK(sim.moved == 0, "moved by %" PRId64 " after %" PRId64 " at %" PRId64, sim.moved, runs[i], rate);
            }
            /* Nor what it made of a long pause. */
            struct ftclock_policy p = usual;
            p.suspend_do = FTCLOCK_DO_CATCH_UP;
            write_policy(p);
            checkpoint(runs[i], 800 * SEC);
            DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
            CHECK(sim.moved == 0 && page->counts.reanchored == 0 && page->anchor.epoch == 1, "moved by %" PRId64,
                  sim.moved);
            CHECK(page->counts.worst_residual < (uint64_t)US, "worst residual %" PRIu64, page->counts.worst_residual);
            /* A write in a pause takes the clock where the pause would have left it. */
            disturbed(runs[i], 5 * MS, 70 * MS);
            DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_OUT_OF_TOLERANCE);
            CHECK(size(sim.moved) < US, "off by %" PRId64 " after a run of %" PRId64, sim.moved, runs[i]);
        }
    }
}

static void test_reanchor(void) {
    for (int i = 0; i < 2; i++) {
        attach("a running clock that somebody set");
        checkpoint(SEC, 5 * MS);
        int64_t jump = i ? -150 * MS : 150 * MS;
        sim.clock += jump;
        int64_t clock = guest(), at = sim.now;
        guest_saw = 0;
        checkpoint(SEC, 5 * MS);
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
        CHECK(size(off(clock, at)) < 40, "off by %" PRId64, off(clock, at));
        CHECK(page->counts.reanchored == 1 && page->anchor.epoch == 2 && record()->residual_stop == 0,
              "not reanchored");
    }
}

struct statistics {
    int64_t worst;
    double first, last; /* means of the first and the last tenth */
    int dropped, anchored, others;
};

/*
 * Pauses of random lengths, with a kvmclock that leaves CLOCK_MONOTONIC_RAW by up to 230 ns/s either way. Disturbed:
 * every fiftieth operation is preempted at a random place, and in every hundredth pause the kernel moves the clock.
 */
static struct statistics many(const char *name, int pauses, bool disturb) {
    struct statistics s = {0};
    attach(name);
    CHECK(stop() == 0, "stop");
    CHECK(cont() == 0, "cont");
    CHECK(page->anchor.valid, "no anchor");
    sim.moved = 0;
    for (int i = 0; i < pauses; i++) {
        if (i % 1000 == 0) {
            sim.clock = guest();
            sim.clock_at = sim.now;
            set_rate(between(-230, 230));
        }
        int64_t ran = between(MS, 200 * MS), pause = between(100 * US, 50 * MS);
        bool in_stop = draw() % 2;
        int where = (int)between(1, 24);
        int64_t delay = between(10 * US, 10 * MS);
        bool hit = disturb && draw() % 50 == 0;
        run(ran);
        preempt(hit && in_stop ? where : 0, delay);
        CHECK(stop() == 0, "stop");
        preempt(0, 0);
        stand(pause);
        if (disturb && draw() % 100 == 0)
            kernel_moves((draw() % 2 ? 1 : -1) *
                         between(2 * US, 50 * US)); /* less is taken for the clock's own doing */
        preempt(hit && !in_stop ? where : 0, delay);
        CHECK(cont() == 0, "cont");
        preempt(0, 0);
        NOT_BACK();
        s.dropped += record()->decision == FTCLOCK_DROPPED;
        s.anchored += record()->decision == FTCLOCK_ANCHORED;
        s.others += record()->decision != FTCLOCK_DROPPED && record()->decision != FTCLOCK_ANCHORED;
        if (size(sim.moved) > s.worst)
            s.worst = size(sim.moved);
        if (i < pauses / 10)
            s.first += (double)sim.moved / (pauses / 10);
        if (i >= pauses - pauses / 10)
            s.last += (double)sim.moved / (pauses / 10);
    }
    CHECK(page->anchor.epoch == 1 && page->counts.reanchored == 0, "epoch %" PRIu64, page->anchor.epoch);
    CHECK(s.others == 0, "%d pauses neither dropped nor anchored", s.others);
    CHECK(page->counts.pauses == (uint64_t)pauses + 1, "pauses");
    printf("%s: %d pauses, %d dropped, %d anchored; guest - twin: worst %" PRId64
           " ns, mean %.0f ns in the first tenth, %.0f ns in the last\n",
           name, pauses, s.dropped, s.anchored, s.worst, s.first, s.last);
    return s;
}

static void test_many(void) {
    struct statistics s = many("undisturbed", 500000, false);
    CHECK(s.worst == 0 && s.dropped == 500000, "worst %" PRId64, s.worst);
    s = many("disturbed", 500000, true);
    CHECK(s.anchored > 4000, "anchored %d", s.anchored);
    CHECK(s.worst <= 5 * US, "worst %" PRId64, s.worst);
}

/* A kernel before 5.16 gives neither the TSC nor CLOCK_REALTIME: instants are known to half of an ioctl's time. */
static void test_old_kernel(void) {
    attach("a kernel without KVM_CLOCK_HOST_TSC");
    sim.flags = KVM_CLOCK_TSC_STABLE;
    set_rate(200);
    for (int i = 0; i < 20000; i++) {
        checkpoint(50 * MS, 5 * MS);
        NOT_BACK();
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    }
    CHECK(sim.moved == 0, "off by %" PRId64, sim.moved);
    CHECK(page->anchor.epoch == 1, "epoch");
    CHECK(size((int64_t)(page->anchor.real - real_at((int64_t)page->anchor.raw))) < 300, "the anchor's REALTIME leg");
}

static void test_preempted(void) {
    for (int flags = 0; flags < 2; flags++) {
        for (int in_stop = 0; in_stop < 2; in_stop++) {
            for (int drift = 0; drift < 2; drift++) {
                for (int at = 1; at <= 40; at++) {
                    char name[100];
                    snprintf(name, sizeof(name), "preempted at place %d of the %s, %s, %s", at,
                             in_stop ? "stop" : "cont", drift ? "to be anchored" : "to be dropped",
                             flags ? "old kernel" : "new kernel");
                    attach(name);
                    sim.flags = flags ? KVM_CLOCK_TSC_STABLE : FLAGS;
                    checkpoint(SEC, 5 * MS);
                    int64_t clock = guest(), when = sim.now;
                    run(SEC);
                    preempt(in_stop ? at : 0, 7 * MS);
                    CHECK(stop() == 0, "stop");
                    preempt(0, 0);
                    stand(5 * MS);
                    kernel_moves(drift ? -30 * US : 0);
                    preempt(in_stop ? 0 : at, 7 * MS);
                    CHECK(cont() == 0, "cont");
                    preempt(0, 0);
                    NOT_BACK();
                    CHECK(record()->decision == FTCLOCK_DROPPED || record()->decision == FTCLOCK_ANCHORED,
                          "decision %u, reason %u", record()->decision, record()->reason);
                    CHECK(size(off(clock, when)) < 2 * US, "off by %" PRId64, off(clock, when));
                    checkpoint(SEC, 5 * MS);
                    CHECK(size(off(clock, when)) < 2 * US, "off by %" PRId64 " after the next", off(clock, when));
                    CHECK(page->anchor.epoch == 1, "reanchored");
                }
            }
        }
    }
    /* The pair from which the TSC's rate is known must be as good as the rest. */
    for (int at = 1; at <= 12; at++) {
        boot("preempted at the module's start, and at its first anchor");
        preempt(at, 20 * MS);
        memset(page, 0, FTCLOCK_PAGE_SIZE);
        rule_start(&rule, &host, page, 4711);
        preempt(0, 0);
        write_policy(usual);
        run(100 * MS);
        preempt(7, 7 * MS); /* after the kernel read its clock */
        CHECK(stop() == 0, "stop");
        preempt(0, 0);
        int64_t clock = guest(), when = sim.now;
        stand(5 * MS);
        CHECK(cont() == 0, "cont");
        checkpoint(SEC, 5 * MS);
        NOT_BACK();
        CHECK(size(off(clock, when)) < 2 * US, "off by %" PRId64 ", start preempted at place %d", off(clock, when), at);
        CHECK((int64_t)page->anchor.error + 20 >=
                  size((int64_t)(page->anchor.clock - clock_at((int64_t)page->anchor.raw))),
              "the anchor's error is %" PRId64 ", its bound says %" PRIu64,
              (int64_t)(page->anchor.clock - clock_at((int64_t)page->anchor.raw)), page->anchor.error);
    }
    /* A kernel's call that always takes longer than the tolerance: the time is found out and allowed for. */
    attach("slow kernel");
    sim.slow = 5 * US;
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest(), when = sim.now;
    disturbed(SEC, 5 * MS, 20 * US);
    for (int i = 0; i < 1000; i++) {
        checkpoint(50 * MS, 5 * MS);
        NOT_BACK();
    }
    CHECK(size(off(clock, when)) < US, "off by %" PRId64, off(clock, when));
    CHECK(page->counts.dropped >= 1000, "only %" PRIu64 " dropped", page->counts.dropped);
    printf("slow kernel: calls of 5 us: %" PRIu64 " of 1001 dropped, %" PRIu64 " anchored, off by %" PRId64 " ns\n",
           page->counts.dropped, page->counts.anchored, off(clock, when));
}

/* --- policy and orders --- */

static void test_hold(void) {
    attach("a hold isn't caught up later");
    checkpoint(SEC, 5 * MS);
    set_rate(100);
    for (int i = 0; i < 1000; i++) {
        run(50 * MS);
        CHECK(stop() == 0, "stop");
        write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        stand(30 * MS);
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
        CHECK(sim.own_last && sim.sets == 1 && guest() - (int64_t)kept.clock < US, "the guest saw the pause");
        int64_t clock = guest(), at = sim.now;
        checkpoint(50 * MS, 5 * MS);
        NOT_BACK();
        CHECK(size(off(clock, at)) < 2 * US, "the next checkpoint made %" PRId64 " of it", off(clock, at));
        CHECK(record()->decision == FTCLOCK_DROPPED || record()->decision == FTCLOCK_ANCHORED, "decision %u",
              record()->decision);
    }
    CHECK(page->anchor.epoch == 1 && page->counts.held == 1000 && page->counts.held_ns >= (uint64_t)(30 * SEC),
          "counts");

    for (int at = 1; at <= 12; at++) {
        for (int in_stop = 0; in_stop < 2; in_stop++) {
            attach("a hold, preempted");
            checkpoint(SEC, 5 * MS);
            run(50 * MS);
            preempt(in_stop ? at : 0, 7 * MS);
            CHECK(stop() == 0, "stop");
            preempt(0, 0);
            write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
            stand(30 * MS);
            preempt(in_stop ? 0 : at, 7 * MS);
            CHECK(cont() == 0, "cont");
            preempt(0, 0);
            int64_t clock = guest(), when = sim.now;
            checkpoint(50 * MS, 5 * MS);
            NOT_BACK();
            CHECK(size(off(clock, when)) < 2 * US,
                  "preempted at place %d of the %s: the next checkpoint made %" PRId64 " of it", at,
                  in_stop ? "stop" : "cont", off(clock, when));
        }
    }

    attach("a hold whose write fails");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
    stand(30 * MS);
    sim.own_error = EPERM;
    errno = 0;
    CHECK(cont() == -1 && errno == EPERM, "errno %d", errno);
    CHECK(!page->anchor.valid, "the anchor was kept");
    sim.own_error = 0;
}

/* One pause with a policy; the caller looks at the record. */
static void pause_with(const char *name, struct ftclock_policy policy, int64_t pause) {
    attach(name);
    checkpoint(SEC, 5 * MS);
    write_policy(policy);
    checkpoint(SEC, pause);
    NOT_BACK();
}

static void test_policy(void) {
    struct ftclock_policy p = usual;
    pause_with("longer than the checkpoint's limit, suspend held", p, 11 * SEC);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
    CHECK(record()->event == FTCLOCK_EVENT_SUSPEND && page->counts.over_limit == 0, "event %u", record()->event);

    p.suspend_do = FTCLOCK_DO_CATCH_UP;
    pause_with("suspend caught up", p, 11 * SEC);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(record()->event == FTCLOCK_EVENT_SUSPEND, "event");
    p.suspend_limit = (uint64_t)(20 * SEC);
    pause_with("suspend within its limit", p, 19 * SEC);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    pause_with("suspend over its limit", p, 21 * SEC);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT);
    CHECK(page->counts.over_limit == 1 && page->counts.held == 1, "counts");
    int64_t clock = guest(), at = sim.now;
    checkpoint(SEC, 5 * MS);
    CHECK(size(off(clock, at)) < 2 * US, "caught up after all: %" PRId64, off(clock, at));

    p.suspend_limit = 0;
    pause_with("15 minutes, less a second", p, 899 * SEC);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    pause_with("15 minutes and a second", p, 901 * SEC);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT);
    p.suspend_limit = UINT64_MAX;
    pause_with("15 minutes, whatever the policy says", p, 901 * SEC);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT);
    p.checkpoint_limit = UINT64_MAX;
    pause_with("15 minutes, as a checkpoint", p, 901 * SEC);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT);

    p = usual;
    p.checkpoint_do = FTCLOCK_DO_HOLD;
    pause_with("checkpoints held", p, 5 * MS);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
    CHECK(record()->event == FTCLOCK_EVENT_CHECKPOINT, "event");
    p.checkpoint_do = 77;
    pause_with("a value of a later version", p, 5 * MS);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
    p = usual;
    p.enabled = 0;
    pause_with("watch only", p, 5 * MS);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_DISABLED);
    write_policy(usual);
    clock = guest();
    at = sim.now;
    checkpoint(SEC, 5 * MS);
    CHECK(size(off(clock, at)) < 2 * US, "what was only watched was caught up: %" PRId64, off(clock, at));

    boot("no policy");
    run(SEC);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_NO_POLICY);
    write_order(FTCLOCK_DO_CATCH_UP, page->now.pause, 0);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_NO_POLICY);
}

static void test_orders(void) {
    attach("an order is followed, once");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_HOLD, page->now.pause, 5 * US);
    stand(5 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
    CHECK(record()->ordered == 1 && record()->order_lost == (uint64_t)(5 * US) && page->counts.orders == 1, "order");
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(record()->ordered == 0 && record()->order_lost == 0, "the order was followed twice");
    CHECK(page->counts.orders == 1 && page->counts.stale_orders == 0, "counts");

    attach("a stale order, counted once");
    checkpoint(SEC, 5 * MS);
    write_order(FTCLOCK_DO_HOLD, page->now.pause - 1, 0);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(page->counts.stale_orders == 1 && page->counts.orders == 0 && !record()->ordered, "stale order");
    checkpoint(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 1, "counted twice");
    /* One for a pause to come isn't kept for it: the shim writes orders while the pause is on. */
    write_order(FTCLOCK_DO_HOLD, page->now.pause + 1, 0);
    checkpoint(SEC, 5 * MS);
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(page->counts.stale_orders == 2, "counts");

    for (int i = 0; i < 4; i++) {
        static const char *const kinds[] = {"before its stop", "after its cont", "for the last pause",
                                            "for the next pause"};
        char name[100];
        snprintf(name, sizeof(name), "an order %s", kinds[i]);
        attach(name);
        checkpoint(SEC, 5 * MS);
        if (i == 0)
            write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        run(SEC);
        CHECK(stop() == 0, "stop");
        stand(5 * MS);
        if (i > 0)
            write_order(FTCLOCK_DO_HOLD, page->now.pause + (uint64_t)(i == 2 ? -1 : i == 3), 0);
        if (i == 1)
            page->order.cont_raw += SEC;
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
        CHECK(page->counts.stale_orders == 1 && page->counts.orders == 0 && !record()->ordered, "stale order");
    }

    attach("an order whose pause was passed isn't stale");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_CATCH_UP, page->now.pause, 0);
    kept.clock += 1000 * SEC; /* a state was loaded */
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_OTHER_VALUE);
    checkpoint(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 0, "%" PRIu64 " stale orders", page->counts.stale_orders);

    attach("an order to catch up a suspend");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    stand(12 * SEC);
    write_order(FTCLOCK_DO_CATCH_UP, page->now.pause, 0);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);

    attach("an order to do as the policy says");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_POLICY, page->now.pause, (uint64_t)(5 * MS));
    stand(5 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(record()->ordered == 1 && record()->order_lost == (uint64_t)(5 * MS), "order");

    attach("an order of no known kind");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    write_order(99, page->now.pause, 0);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
}

static void test_torn(void) {
    for (int i = 0; i < 2; i++) {
        attach(i ? "torn order" : "torn policy");
        checkpoint(SEC, 5 * MS);
        uint32_t *seq = i ? &page->order.seq : &page->policy.seq;
        *seq |= 1;
        checkpoint(SEC, 5 * MS);
        DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_TORN);
        CHECK(sim.own_last && sim.sets == 1 && page->counts.passed == 1 && page->anchor.epoch == 2, "not passed");
        NOT_BACK();
        *seq += 1;
        checkpoint(SEC, 5 * MS);
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
        CHECK(page->anchor.epoch == 2, "epoch");
    }
}

/* --- doubts --- */

static void test_errors(void) {
    attach("KVM_GET_CLOCK fails at the stop");
    checkpoint(SEC, 5 * MS);
    sim.get_error = ENXIO;
    errno = 0;
    CHECK(stop() == -1 && errno == ENXIO, "errno %d", errno);
    sim.get_error = 0;

    attach("KVM_GET_CLOCK fails at the cont");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    stand(5 * MS);
    sim.get_error = ENXIO;
    CHECK(cont() == 0 && sim.own_sets == 1 && sim.sets == 1, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_READ_FAILED);
    CHECK(!page->anchor.valid && sim.clock == (int64_t)kept.clock, "anchor kept");
    sim.get_error = 0;
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(page->anchor.epoch == 2, "no new anchor");

    attach("both KVM_GET_CLOCK and QEMU's KVM_SET_CLOCK fail");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    sim.get_error = ENXIO;
    sim.own_error = EINVAL;
    errno = 0;
    CHECK(cont() == -1 && errno == EINVAL, "errno %d", errno);
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_READ_FAILED);

    attach("KVM_SET_CLOCK fails for the anchor's value");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    stand(5 * MS);
    kernel_moves(50 * US);
    sim.set_error = EINVAL;
    CHECK(cont() == 0 && sim.own_sets == 1 && sim.sets == 2, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_WRITE_FAILED);
    CHECK(sim.own_last && page->anchor.epoch == 2 && record()->went_on == kept.clock, "record");

    attach("KVM_SET_CLOCK fails for both values");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    kernel_moves(50 * US);
    sim.set_error = EINVAL;
    sim.own_error = EPERM;
    errno = 0;
    CHECK(cont() == -1 && errno == EPERM, "errno %d", errno);
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_WRITE_FAILED);

    attach("the kernel's clock is unstable at the cont");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    sim.flags &= ~(uint32_t)KVM_CLOCK_TSC_STABLE;
    CHECK(cont() == 0 && sim.own_last, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_UNSTABLE);

    attach("the kernel's clock is unstable at the stop");
    checkpoint(SEC, 5 * MS);
    sim.flags &= ~(uint32_t)KVM_CLOCK_TSC_STABLE;
    CHECK(stop() == 0 && !page->anchor.valid, "anchor kept");
    sim.flags = FLAGS;
    CHECK(cont() == 0 && sim.own_last, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_UNSTABLE);
    CHECK(record()->event == FTCLOCK_EVENT_NONE, "event");
    checkpoint(SEC, 5 * MS);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);

    attach("CLOCK_MONOTONIC_RAW goes back");
    checkpoint(SEC, 5 * MS);
    CHECK(stop() == 0, "stop");
    sim.now -= 50 * MS;
    CHECK(cont() == 0 && sim.own_last, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_BOUNDS);
}

static void test_states(void) {
    for (int i = 0; i < 3; i++) {
        attach("another state was loaded");
        checkpoint(SEC, 5 * MS);
        run(SEC);
        CHECK(stop() == 0, "stop");
        stand(50 * MS);
        kept.clock = i == 0 ? kept.clock - (uint64_t)(5 * SEC) : i == 1 ? kept.clock + 1 : UINT64_MAX / 4;
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_OTHER_VALUE);
        CHECK(record()->event == FTCLOCK_EVENT_RESTORE && sim.own_last && sim.sets == 1 && page->anchor.epoch == 2,
              "record");
        guest_saw = 0;
        int64_t clock = guest(), at = sim.now;
        checkpoint(SEC, 5 * MS);
        DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
        CHECK(size(off(clock, at)) < 40 && page->anchor.epoch == 2 && page->counts.reanchored == 0, "the new anchor");
    }

    attach("a write without a reading");
    checkpoint(SEC, 5 * MS);
    kept.clock = 99;
    CHECK(cont() == 0 && sim.own_last, "not passed");
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_FIRST);
    CHECK(page->anchor.epoch == 2, "anchor kept");

    attach("several readings in one pause");
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest(), at = sim.now;
    run(SEC);
    for (int i = 0; i < 3; i++) {
        CHECK(stop() == 0, "stop");
        stand(40 * MS);
    }
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(size(off(clock, at)) < 40 && page->counts.pauses == 2, "off by %" PRId64, off(clock, at));
    run(SEC);
    for (int i = 0; i < 3; i++) {
        CHECK(stop() == 0, "stop");
        stand(40 * MS);
    }
    write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_HELD, FTCLOCK_REASON_POLICY);
    clock = guest();
    at = sim.now;
    checkpoint(SEC, 5 * MS);
    CHECK(size(off(clock, at)) < 2 * US, "a held pause with several readings: %" PRId64, off(clock, at));
}

static void write_import(struct ftclock_import import) {
    import.seq = page->import.seq + 2;
    page->import.seq++;
    page->import = import;
}

/* A loaded state that is to be caught up. */
static void test_restore(void) {
    struct ftclock_policy catch_up = {
        .enabled = 1,
        .checkpoint_do = FTCLOCK_DO_CATCH_UP,
        .suspend_do = FTCLOCK_DO_HOLD,
        .restore_do = FTCLOCK_DO_CATCH_UP,
        .checkpoint_limit = (uint64_t)(10 * SEC),
    };

    attach("an older state of the same process");
    write_policy(catch_up);
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest(), at = sim.now;
    run(SEC);
    CHECK(stop() == 0, "stop");
    stand(50 * MS);
    kept.clock -= (uint64_t)(SEC / 2);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_ANCHOR);
    CHECK(record()->event == FTCLOCK_EVENT_RESTORE && size(record()->lost - SEC / 2 - 50 * MS) < MS, "record");
    CHECK(size(off(clock, at)) < 2 * US, "off by %" PRId64, off(clock, at));
    checkpoint(SEC, 5 * MS);
    CHECK(size(off(clock, at)) < 2 * US && page->counts.passed == 0, "after it off by %" PRId64, off(clock, at));

    for (int known = 0; known < 2; known++) {
        attach(known ? "a state of an earlier process" : "a state of an earlier process that isn't known");
        write_policy(catch_up);
        kept.clock = (uint64_t)(77 * SEC);
        write_import(
            (struct ftclock_import){.clock = kept.clock + !known, .at = real_at(sim.now) - (uint64_t)(3 * SEC)});
        CHECK(cont() == 0, "cont");
        guest_saw = 0;
        if (!known) {
            DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_FIRST);
            CHECK(guest() - 77 * SEC < MS, "it was caught up: %" PRId64, guest());
            continue;
        }
        DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_IMPORT);
        CHECK(size(guest() - 80 * SEC) < MS, "the clock is %" PRId64, guest());
        clock = guest();
        at = sim.now;
        checkpoint(SEC, 5 * MS);
        CHECK(size(off(clock, at)) < 2 * US, "after it off by %" PRId64, off(clock, at));
        /* The import is for that one value only. */
        checkpoint(SEC, 5 * MS);
        CHECK(size(off(clock, at)) < 2 * US, "later off by %" PRId64, off(clock, at));
    }

    struct {
        const char *name;
        int64_t away;
        uint64_t limit;
        uint32_t restore_do;
        uint16_t decision, reason;
    } cases[] = {
        {"within the limit", 3 * SEC, 5 * SEC, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_IMPORT},
        {"over the limit", 6 * SEC, 5 * SEC, FTCLOCK_DO_CATCH_UP, FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT},
        {"over every limit", 901 * SEC, 0, FTCLOCK_DO_CATCH_UP, FTCLOCK_HELD, FTCLOCK_REASON_OVER_LIMIT},
        {"from the future", -SEC, 0, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED, FTCLOCK_REASON_NEVER_BACK},
        {"from a far future", -901 * SEC, 0, FTCLOCK_DO_CATCH_UP, FTCLOCK_PASSED, FTCLOCK_REASON_BOUNDS},
        {"held by the policy", 3 * SEC, 0, FTCLOCK_DO_HOLD, FTCLOCK_HELD, FTCLOCK_REASON_POLICY},
        {"from the future, held", -SEC, 0, FTCLOCK_DO_HOLD, FTCLOCK_HELD, FTCLOCK_REASON_POLICY},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        attach(cases[i].name);
        catch_up.restore_do = cases[i].restore_do;
        catch_up.restore_limit = cases[i].limit;
        write_policy(catch_up);
        kept.clock = (uint64_t)(77 * SEC);
        write_import((struct ftclock_import){.clock = kept.clock, .at = real_at(sim.now) - (uint64_t)cases[i].away});
        CHECK(cont() == 0, "cont");
        DECIDED(cases[i].decision, cases[i].reason);
        bool moved = cases[i].decision == FTCLOCK_ANCHORED && cases[i].away > 0;
        CHECK(size(guest() - 77 * SEC - (moved ? cases[i].away : 0)) < MS, "the clock is %" PRId64, guest());
        CHECK(record()->event == FTCLOCK_EVENT_RESTORE && page->counts.held_ns < (uint64_t)(1000 * SEC),
              "event %u, %" PRIu64 " ns held", record()->event, page->counts.held_ns);
    }
}

/* A state that came from elsewhere with a reading of the running clock, not of the stop: a migration, a failover. */
static void test_migrate(void) {
    static const struct ftclock_policy standard = {
        .enabled = 1,
        .checkpoint_do = FTCLOCK_DO_CATCH_UP,
        .suspend_do = FTCLOCK_DO_HOLD,
        .restore_do = FTCLOCK_DO_HOLD,
        .migrate_do = FTCLOCK_DO_CATCH_UP,
        .checkpoint_limit = (uint64_t)(10 * SEC),
        .migrate_limit = (uint64_t)(60 * SEC),
    };
    /* The reading was of 70 s, the state is of 77 s (so the guest ran for 7 s, or will have), and the reading's instant
     * is `ago` before the cont. */
    const int64_t read = 70 * SEC, saved = 77 * SEC, ran = saved - read, OLDER = INT64_MAX;
    struct {
        const char *name;
        int64_t ago, rate;
        enum ftclock_leg leg;
        uint32_t migrate_do;
        uint16_t decision, reason;
        int64_t lost;
    } cases[] = {
        {"by RAW", ran + 300 * MS, 0, FTCLOCK_LEG_RAW, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED,
         FTCLOCK_REASON_FROM_IMPORT, 300 * MS},
        {"by REALTIME", ran + 300 * MS, 0, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED,
         FTCLOCK_REASON_FROM_IMPORT, 300 * MS},
        {"by a REALTIME 100 ppm fast", ran + 700 * US + 300 * MS, 100000, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP,
         FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_IMPORT, 300 * MS},
        {"of a state older than the reading", OLDER, 0, FTCLOCK_LEG_RAW, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED,
         FTCLOCK_REASON_FROM_IMPORT, 0},
        {"the other host's clock is behind", ran - 5 * MS, 0, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP, FTCLOCK_ANCHORED,
         FTCLOCK_REASON_NEVER_BACK, 0},
        {"longer than its limit", ran + 61 * SEC, 0, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP, FTCLOCK_HELD,
         FTCLOCK_REASON_OVER_LIMIT, 0},
        {"the other host is in another age", ran - 61 * SEC, 0, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP, FTCLOCK_PASSED,
         FTCLOCK_REASON_BOUNDS, 0},
        {"held by the policy", ran + 300 * MS, 0, FTCLOCK_LEG_RAW, FTCLOCK_DO_HOLD, FTCLOCK_HELD, FTCLOCK_REASON_POLICY,
         0},
        {"an impossible rate", ran + 300 * MS, INT64_MAX, FTCLOCK_LEG_REAL, FTCLOCK_DO_CATCH_UP, FTCLOCK_PASSED,
         FTCLOCK_REASON_BOUNDS, 0},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        attach(cases[i].name);
        bool older = cases[i].ago == OLDER;
        struct ftclock_policy policy = standard;
        policy.migrate_do = cases[i].migrate_do;
        write_policy(policy);
        kept.clock = (uint64_t)(older ? read - 5 * SEC : saved);
        int64_t ago = older ? 2 * SEC : cases[i].ago;
        int64_t lost = older ? 7 * SEC : cases[i].lost;
        uint64_t leg = cases[i].leg == FTCLOCK_LEG_RAW ? (uint64_t)sim.now : real_at(sim.now);
        write_import((struct ftclock_import){.leg = cases[i].leg,
                                             .clock = (uint64_t)read,
                                             .at = leg - (uint64_t)ago,
                                             .rate = cases[i].rate,
                                             .error = 1234,
                                             .event = FTCLOCK_EVENT_MIGRATE,
                                             .any = 1});
        uint64_t from = kept.clock;
        CHECK(cont() == 0, "cont");
        DECIDED(cases[i].decision, cases[i].reason);
        CHECK(size(guest() - (int64_t)from - lost) < 20 * US, "the clock went on by %" PRId64, guest() - (int64_t)from);
        CHECK(record()->event == FTCLOCK_EVENT_MIGRATE, "event %u", record()->event);
        guest_saw = 0;
        if (cases[i].decision != FTCLOCK_ANCHORED)
            continue;
        /* What came with the state, and what the write took. */
        CHECK(page->anchor.error > 1234 && page->anchor.error < 1234 + 20 * US, "error %" PRIu64, page->anchor.error);
        CHECK(record()->error == page->anchor.error, "the record's error %" PRIu64, record()->error);
        int64_t clock = guest(), at = sim.now;
        checkpoint(SEC, 5 * MS);
        NOT_BACK();
        CHECK(size(off(clock, at)) < 25 * US, "after it off by %" PRId64, off(clock, at));
        /* It is used once: the next state is this process's own, and by the rule for that. */
        run(SEC);
        CHECK(stop() == 0, "stop");
        kept.clock -= (uint64_t)MS;
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_OTHER_VALUE);
        CHECK(record()->event == FTCLOCK_EVENT_RESTORE, "event %u", record()->event);
        guest_saw = 0;
    }

    /* Preempted anywhere on the way to the write, by a time that would show. */
    for (int leg = 0; leg < 2; leg++) {
        for (int at = 1; at < 40; at++) {
            attach(leg ? "a loaded state, by REALTIME, preempted" : "a loaded state, preempted");
            write_policy(standard);
            kept.clock = (uint64_t)saved;
            write_import((struct ftclock_import){.leg = leg ? FTCLOCK_LEG_REAL : FTCLOCK_LEG_RAW,
                                                 .clock = (uint64_t)saved,
                                                 .at = leg ? real_at(sim.now - SEC) : (uint64_t)(sim.now - SEC),
                                                 .event = FTCLOCK_EVENT_MIGRATE,
                                                 .any = 1});
            preempt(at, 5 * MS);
            int64_t from = sim.now - SEC;
            CHECK(cont() == 0, "cont");
            preempt(0, 0);
            CHECK(size(off(saved, from)) < 20 * US, "preempted at %d: off by %" PRId64, at, off(saved, from));
            CHECK((uint64_t)size(off(saved, from)) <= page->anchor.error,
                  "preempted at %d: off by %" PRId64 ", known to %" PRIu64, at, off(saved, from), page->anchor.error);
            guest_saw = 0;
        }
    }

    /* The primary of an engine is fed by a fresher reading from time to time: each is good for one state. */
    attach("a fresh import after a used one");
    write_policy(standard);
    for (int i = 0; i < 3; i++) {
        run(SEC);
        CHECK(stop() == 0, "stop");
        kept.clock = (uint64_t)((50 + i) * SEC);
        write_import((struct ftclock_import){.leg = FTCLOCK_LEG_RAW,
                                             .clock = kept.clock,
                                             .at = (uint64_t)sim.now - (uint64_t)(2 * SEC),
                                             .event = FTCLOCK_EVENT_MIGRATE,
                                             .any = 1});
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_IMPORT);
        CHECK(size(guest() - (52 + i) * SEC) < 20 * US, "the clock is %" PRId64, guest());
        guest_saw = 0;
    }
}

/* How far apart the guest's TSC and its clock went, ns, since they were so. */
static int64_t apart(int64_t tsc, int64_t clock) {
    int64_t ns = (int64_t)((__int128)((int64_t)tsc_at(sim.now) + sim.guest_tsc - tsc) * 1000000 / HOST_KHZ);
    return ns - (guest() - clock);
}

/* QEMU sets the TSC of a state that it loads to what it read some time after the stop. */
static void load_tsc(int64_t tsc, int64_t late) {
    sim.guest_tsc = tsc + (int64_t)((__int128)late * HOST_KHZ / 1000000) - (int64_t)tsc_at(sim.now);
}

/* The guest's TSC goes where its clock goes: guests read their time from either, and compare the two. */
static void test_tsc(void) {
    struct ftclock_policy policy = usual;
    policy.restore_do = FTCLOCK_DO_CATCH_UP;

    struct {
        const char *name;
        int64_t away, late, loaded; /* read so long after the stop, loaded so long before the cont */
        int64_t tsc;                /* what the reading's TSC is wrong by, in ns: the guest was reset since */
        uint32_t khz, reading_khz;
        int error;
        uint8_t want;
    } cases[] = {
        {"a state that was away for 20 s", 20 * SEC, 80 * MS, 300 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a state that was away for 14 minutes", 840 * SEC, 0, 50 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a migration", 50 * MS, MS, 20 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"from a host of almost the same frequency", 50 * MS, MS, 20 * MS, 0, 0, HOST_KHZ + 3, 0, FTCLOCK_TSC_MOVED},
        {"a TSC that KVM took for synchronised", 6 * SEC, -640 * MS, 300 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a guest that was reset since", 50 * MS, MS, 20 * MS, 600 * SEC, 0, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a guest that was reset early", 50 * MS, MS, 20 * MS, -600 * SEC, 0, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a TSC that the kernel scales", SEC, MS, 20 * MS, 0, HOST_KHZ / 2, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a reading without a TSC", SEC, MS, 20 * MS, 0, 0, 0, 0, FTCLOCK_TSC_UNMOVED},
        {"a kernel before 5.16", SEC, MS, 20 * MS, 0, 0, HOST_KHZ, 1, FTCLOCK_TSC_UNMOVED},
        {"a kernel that refuses", SEC, MS, 20 * MS, 0, 0, HOST_KHZ, 2, FTCLOCK_TSC_UNMOVED},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        attach(cases[i].name);
        write_policy(policy);
        sim.tsc_error = cases[i].error;
        sim.khz = cases[i].khz;
        /* The reading is of 70 s and of a TSC of 11e9, the state of 77 s. */
        int64_t clock = 70 * SEC, tsc = INT64_C(11000000000), saved = 77 * SEC;
        int64_t tsc_saved = tsc + 7 * (cases[i].reading_khz ? cases[i].reading_khz : HOST_KHZ) * INT64_C(1000);
        int64_t stopped = sim.now;
        stand(cases[i].away - cases[i].loaded);
        load_tsc(tsc_saved, cases[i].late);
        stand(cases[i].loaded);
        kept.clock = (uint64_t)saved;
        write_import((struct ftclock_import){
            .leg = FTCLOCK_LEG_RAW,
            .clock = (uint64_t)clock,
            .at = (uint64_t)(stopped - 7 * SEC),
            .any = 1,
            .tsc = (uint64_t)(tsc + (int64_t)((__int128)cases[i].tsc * HOST_KHZ / 1000000)),
            .khz = cases[i].reading_khz,
        });
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_IMPORT);
        CHECK(record()->tsc == cases[i].want, "tsc %u", record()->tsc);
        CHECK(size(guest() - saved - cases[i].away) < 20 * US, "the clock went on by %" PRId64, guest() - saved);
        if (cases[i].want == FTCLOCK_TSC_MOVED) {
            CHECK(size(apart(tsc_saved, saved)) <= US, "TSC and clock are %" PRId64 " apart", apart(tsc_saved, saved));
            CHECK(sim.guest_tsc == rule.tsc_offset, "another offset");
        } else {
            CHECK(sim.moved_tsc == 0, "it was moved by %" PRId64, sim.moved_tsc);
        }
        guest_saw = 0;
        /* A stop and a cont on one host move neither. */
        int64_t moved = sim.moved_tsc;
        for (int j = 0; j < 3; j++) {
            checkpoint(SEC, 5 * MS);
            DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
            CHECK(record()->tsc == FTCLOCK_TSC_LEFT && sim.moved_tsc == moved, "moved by a pause");
        }
        bool known = !cases[i].khz && cases[i].error != 1;
        CHECK((page->anchor.khz == HOST_KHZ) == known && (page->now.khz == HOST_KHZ) == known, "known: %u",
              page->anchor.khz);
        if (known) {
            int64_t tsc_then = (int64_t)tsc_at((int64_t)page->anchor.raw) + sim.guest_tsc;
            CHECK(size((int64_t)page->anchor.tsc - tsc_then) <= 58, "the anchor's TSC");
            CHECK(page->now.tsc == page->anchor.tsc, "the stop's TSC");
        }
    }

    for (int old = 0; old < 2; old++) {
        attach("a long look for the vCPUs, and a module that was preempted in its start");
        memset(page, 0, FTCLOCK_PAGE_SIZE);
        preempt(2, MS);
        rule_start(&rule, &host, page, 4711);
        preempt(0, 0);
        write_policy(usual);
        sim.no_vm_khz = old;
        sim.look = old ? 20 * MS : 5 * SEC;
        checkpoint(SEC, 5 * MS);
        CHECK(page->now.khz == HOST_KHZ, "%u kHz", page->now.khz);
    }

    attach("an older state of the same process");
    write_policy(policy);
    sim.guest_tsc = -INT64_C(123456789012);
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest(), tsc = (int64_t)tsc_at(sim.now) + sim.guest_tsc;
    run(SEC);
    uint64_t older = clock_at(sim.now);
    int64_t older_tsc = (int64_t)tsc_at(sim.now) + sim.guest_tsc;
    run(5 * SEC);
    CHECK(stop() == 0, "stop");
    stand(20 * MS);
    kept.clock = older;
    load_tsc(older_tsc, 3 * MS);
    stand(50 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_ANCHOR);
    CHECK(record()->tsc == FTCLOCK_TSC_MOVED && size(apart(tsc, clock)) <= US, "tsc %u, %" PRId64 " apart",
          record()->tsc, apart(tsc, clock));

    attach("a held pause has its anchor at its end");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
    stand(30 * MS);
    CHECK(cont() == 0 && sim.moved_tsc == 0, "cont");
    CHECK(size((int64_t)(page->anchor.tsc - tsc_at((int64_t)page->anchor.raw))) <= 58, "the anchor's TSC");
    CHECK(size((int64_t)page->anchor.clock - (int64_t)clock_at((int64_t)page->anchor.raw)) <= 20, "its clock");
}

/*
 * An engine loads each checkpoint over a guest that ran on: its clock is written each time, so that our own errors
 * would add up. It stays with a guest that nothing was ever loaded over.
 */
static void test_secondary(void) {
    for (int i = 0; i < 6; i++) {
        int64_t rate = (i % 3 - 1) * 230;
        attach(i < 3 ? "an engine's secondary" : "an engine's secondary, from cold caches");
        struct ftclock_policy policy = usual;
        policy.restore_do = FTCLOCK_DO_CATCH_UP;
        write_policy(policy);
        set_rate(rate);
        checkpoint(SEC, 5 * MS);
        sim.moved = 0;
        int64_t worst = 0;
        for (int j = 0; j < 200000; j++) {
            run(between(20 * MS, 200 * MS));
            sim.cold = i < 3 ? 0 : 400;
            CHECK(stop() == 0, "stop");
            sim.cold = 0;
            stand(between(MS, 20 * MS));
            kept.clock -= (uint64_t)between(MS, 100 * MS); /* the primary's, of a moment ago */
            CHECK(cont() == 0, "cont");
            DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_ANCHOR);
            NOT_BACK();
            worst = size(sim.moved) > worst ? size(sim.moved) : worst;
        }
        /* The simulated clock loses half a nanosecond at each write, as it has whole ones. */
        CHECK(worst < US + (rate ? 100 * US : 0), "off by %" PRId64 " at %" PRId64 " ns/s", worst, rate);
        printf("%s, %" PRId64 " ns/s off CLOCK_MONOTONIC_RAW: 200000 states loaded, worst %" PRId64 " ns\n", test, rate,
               worst);
    }
}

/* A QEMU that has the kernel add the downtime (KVM_CLOCK_REALTIME) is left to do so, and isn't counted twice. */
static void test_realtime_flag(void) {
    attach("KVM_CLOCK_REALTIME of QEMU's own, passed");
    stop();
    uint64_t real = real_at(sim.now);
    stand(50 * MS);
    kept = (struct kvm_clock_data){.clock = kept.clock + 1, .flags = KVM_CLOCK_REALTIME, .realtime = real};
    CHECK(cont() == 0 && sim.last.flags == KVM_CLOCK_REALTIME && sim.last.realtime == real, "flags %#x",
          sim.last.flags);
    DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_OTHER_VALUE);

    for (int i = 0; i < 2; i++) {
        attach("KVM_CLOCK_REALTIME of QEMU's own, held");
        checkpoint(SEC, 5 * MS);
        run(SEC);
        int64_t clock = guest(), at = sim.now;
        CHECK(stop() == 0, "stop");
        kept.flags = KVM_CLOCK_REALTIME;
        kept.realtime = real_at(sim.now);
        int64_t pause = i ? 500 * MS : 50 * MS;
        stand(pause);
        write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        CHECK(cont() == 0 && sim.own_last && sim.last.flags == KVM_CLOCK_REALTIME, "not as QEMU wanted it");
        CHECK(size(off(clock, at)) < US, "the kernel's own accounting: %" PRId64, off(clock, at));
        for (int j = 0; j < 20; j++) {
            checkpoint(SEC, 5 * MS);
            NOT_BACK();
            CHECK(size(off(clock, at)) < 2 * US, "taken back: %" PRId64, off(clock, at));
        }

        attach("KVM_CLOCK_REALTIME of QEMU's own, caught up");
        checkpoint(SEC, 5 * MS);
        clock = guest();
        at = sim.now;
        run(SEC);
        CHECK(stop() == 0, "stop");
        kept.flags = KVM_CLOCK_REALTIME;
        kept.realtime = real_at(sim.now);
        stand(pause);
        sim.clock += i ? 50 * US : 0;
        CHECK(cont() == 0, "cont");
        CHECK(size(off(clock, at)) < US, "off by %" PRId64, off(clock, at));
    }
}

/* The host sleeps: kvmclock and CLOCK_BOOTTIME go on, CLOCK_MONOTONIC_RAW doesn't; the TSC may. */
static void test_host_suspend(void) {
    attach("the host slept while the guest ran");
    checkpoint(SEC, 5 * MS);
    run(SEC);
    host_sleeps(3600 * SEC, true);
    sim.clock += 600 * MS; /* the TSC counted the sleep to the nanosecond, CLOCK_BOOTTIME to the second */
    int64_t clock = guest(), at = sim.now;
    guest_saw = guest();
    checkpoint(SEC, 5 * MS);
    NOT_BACK();
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
    CHECK(size(off(clock, at)) < US && page->anchor.epoch == 1 && page->counts.reanchored == 0, "off by %" PRId64,
          off(clock, at));
    CHECK(page->follow.sleeps == 1 && record()->slept == 0 && record()->residual_stop == 0, "the residual is %" PRId64,
          record()->residual_stop);
    /* The TSC's rate is known again, so that a preempted reading is as good as before. */
    run(SEC);
    CHECK(stop() == 0, "stop");
    stand(5 * MS);
    preempt(13, 7 * MS);
    CHECK(cont() == 0, "cont");
    preempt(0, 0);
    DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);

    static const struct {
        const char *name;
        int64_t slept;
        uint32_t suspend_do;
        uint16_t reason;
        bool ordered;
    } cases[] = {
        {"for an hour in a pause", 3600 * SEC, FTCLOCK_DO_HOLD, FTCLOCK_REASON_POLICY, false},
        {"for an hour in a pause that the shim took for a checkpoint", 3600 * SEC, FTCLOCK_DO_HOLD,
         FTCLOCK_REASON_POLICY, true},
        {"for ten minutes in a pause, to be caught up", 600 * SEC, FTCLOCK_DO_CATCH_UP, FTCLOCK_REASON_NONE, false},
        {"for an hour in a pause, to be caught up", 3600 * SEC, FTCLOCK_DO_CATCH_UP, FTCLOCK_REASON_OVER_LIMIT, true},
        {"for a second in a pause", SEC, FTCLOCK_DO_HOLD, FTCLOCK_REASON_NONE, false},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        for (int tsc = 0; tsc < 2; tsc++) {
            attach(cases[i].name);
            struct ftclock_policy p = usual;
            p.suspend_do = cases[i].suspend_do;
            write_policy(p);
            checkpoint(SEC, 5 * MS);
            run(SEC);
            CHECK(stop() == 0, "stop");
            stand(2 * MS);
            host_sleeps(cases[i].slept, tsc);
            stand(2 * MS);
            if (cases[i].ordered) {
                write_order(FTCLOCK_DO_CATCH_UP, page->now.pause, (uint64_t)(4 * MS));
                page->order.event = FTCLOCK_EVENT_CHECKPOINT;
            }
            CHECK(cont() == 0, "cont");
            NOT_BACK();
            CHECK(record()->event == (cases[i].slept > 10 * SEC ? FTCLOCK_EVENT_SUSPEND : FTCLOCK_EVENT_CHECKPOINT),
                  "event %u", record()->event);
            CHECK(size((int64_t)record()->slept - cases[i].slept) < US && size(record()->lost - 4 * MS) < MS,
                  "slept %" PRIu64 ", lost %" PRId64, record()->slept, record()->lost);
            int64_t went_on = guest() - (int64_t)kept.clock;
            if (cases[i].reason == FTCLOCK_REASON_NONE) {
                CHECK(size(went_on - cases[i].slept - 4 * MS) < 10 * US, "went on by %" PRId64, went_on);
                CHECK(record()->decision == (tsc ? FTCLOCK_DROPPED : FTCLOCK_ANCHORED), "decision %u",
                      record()->decision);
            } else {
                CHECK(went_on < US, "went on by %" PRId64, went_on);
                DECIDED(FTCLOCK_HELD, cases[i].reason);
            }
            clock = guest();
            at = sim.now;
            checkpoint(SEC, 5 * MS);
            NOT_BACK();
            if (tsc) {
                DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
                CHECK(size(off(clock, at)) < 2 * US, "the next checkpoint made %" PRId64 " of it", off(clock, at));
            } else { /* KVM says no longer that the clock is stable */
                DECIDED(FTCLOCK_PASSED, FTCLOCK_REASON_UNSTABLE);
            }
        }
    }

    /* At any moment of the module's own work. */
    for (int held = 0; held < 2; held++) {
        for (int in_stop = 0; in_stop < 2; in_stop++) {
            for (int place = 1; place <= 60; place++) {
                char name[100];
                snprintf(name, sizeof(name), "the host slept at place %d of the %s, %s", place,
                         in_stop ? "stop" : "cont", held ? "held" : "caught up");
                attach(name);
                struct ftclock_policy p = usual;
                p.suspend_do = FTCLOCK_DO_CATCH_UP;
                write_policy(p);
                checkpoint(SEC, 5 * MS);
                clock = guest();
                at = sim.now;
                run(SEC);
                preempt(in_stop ? place : 0, 100 * SEC);
                sim.preempt_asleep = true;
                CHECK(stop() == 0, "stop");
                if (held)
                    write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
                stand(5 * MS);
                preempt(in_stop ? 0 : place, 100 * SEC);
                sim.preempt_asleep = true;
                CHECK(cont() == 0, "cont");
                preempt(0, 0);
                NOT_BACK();
                if (held) {
                    clock = guest();
                    at = sim.now;
                } else {
                    CHECK(size(off(clock, at) - sim.suspended) < 2 * US, "off by %" PRId64,
                          off(clock, at) - sim.suspended);
                    clock += sim.suspended;
                }
                /* What it slept behind the last look at it is the next pause's to see. */
                for (int i = 0; i < 3; i++) {
                    checkpoint(SEC, 5 * MS);
                    NOT_BACK();
                    CHECK(size(off(clock, at)) < 2 * US, "later off by %" PRId64, off(clock, at));
                }
                DECIDED(FTCLOCK_DROPPED, FTCLOCK_REASON_IN_TOLERANCE);
                CHECK(page->anchor.epoch == 1, "reanchored");
            }
        }
    }
}

/* --- reference 1: the disciplined clock --- */

static const struct ftclock_policy utc = {
    .enabled = 1,
    .reference = 1,
    .slew_ppm = 500,
    .checkpoint_do = FTCLOCK_DO_CATCH_UP,
    .suspend_do = FTCLOCK_DO_HOLD,
    .checkpoint_limit = (uint64_t)(10 * SEC),
};

/* The guest's clock against CLOCK_REALTIME, from where they were at the start. */
static int64_t off_real(int64_t clock, uint64_t real) { return guest() - clock - (int64_t)(real_at(sim.now) - real); }

static void set_real(int64_t step, int64_t rate) {
    sim.mono = mono_at(sim.now);
    sim.mono_from = sim.now;
    sim.mono_rate = rate;
    sim.wall += step;
}

static void test_steering(void) {
    for (int i = 0; i < 2; i++) {
        attach("follows CLOCK_REALTIME's rate");
        write_policy(utc);
        set_real(0, i ? -40000 : 40000); /* 40 ppm: a bad crystal, disciplined */
        checkpoint(SEC, 5 * MS);
        int64_t clock = guest();
        uint64_t real = real_at(sim.now);
        int64_t worst = 0;
        for (int j = 0; j < 20000; j++) {
            checkpoint(50 * MS, 5 * MS);
            NOT_BACK();
            worst = size(off_real(clock, real)) > worst ? size(off_real(clock, real)) : worst;
            CHECK(record()->decision == FTCLOCK_DROPPED || record()->decision == FTCLOCK_ANCHORED,
                  "decision %u, reason %u", record()->decision, record()->reason);
        }
        CHECK(worst < 5 * US, "left UTC by %" PRId64 " ns", worst);
        CHECK(page->anchor.epoch == 1, "epoch");
    }

    for (int i = 0; i < 2; i++) {
        attach("a step of CLOCK_REALTIME by an hour isn't followed, the rate still is");
        write_policy(utc);
        set_real(0, 40000);
        checkpoint(SEC, 5 * MS);
        int64_t clock = guest();
        uint64_t real = real_at(sim.now);
        int64_t step = i ? -3600 * SEC : 3600 * SEC;
        for (int j = 0; j < 4; j++) {
            set_real(step, 40000);
            real += (uint64_t)step;
            for (int k = 0; k < 100; k++) {
                checkpoint(50 * MS, 5 * MS);
                NOT_BACK();
                CHECK(size(off_real(clock, real)) < 3 * US, "off by %" PRId64, off_real(clock, real));
            }
            CHECK(page->follow.given_up == (uint64_t)j + 1 && page->follow.steps == (uint64_t)j + 1 &&
                      size(page->follow.last_step - step) < 3 * US && size(page->follow.last_given - step) < 3 * US,
                  "given up %" PRIu64 ", steps %" PRIu64, page->follow.given_up, page->follow.steps);
            step = -step;
        }
        CHECK(page->anchor.epoch == 1 && page->counts.reanchored == 0 && page->follow.bases == 1, "epoch");
    }

    for (int i = 0; i < 2; i++) {
        attach("a step of CLOCK_REALTIME by five seconds is slewed");
        write_policy(utc);
        checkpoint(SEC, 5 * MS);
        int64_t clock = guest(), at = sim.now;
        set_real(i ? -5 * SEC : 5 * SEC, 0);
        for (int j = 0; j < 10000; j++) {
            int64_t before = off(clock, at);
            int64_t ran = sim.now;
            checkpoint(50 * MS, 5 * MS);
            NOT_BACK();
            int64_t slew = size(off(clock, at) - before), most = (sim.now - ran) * 500 / 1000000;
            CHECK(slew <= most + US, "pause %d: slewed by %" PRId64 ", at most %" PRId64 " allowed", j, slew, most);
            CHECK(j < 10 || slew >= most * 8 / 10, "pause %d: slewed by %" PRId64 " of %" PRId64, j, slew, most);
            CHECK(record()->decision == FTCLOCK_ANCHORED && record()->residual_stop < 2 * US,
                  "decision %u, reason %u, residual %" PRId64, record()->decision, record()->reason,
                  record()->residual_stop);
        }
        CHECK(page->anchor.epoch == 1 && page->counts.reanchored == 0, "epoch %" PRIu64, page->anchor.epoch);
        CHECK(page->follow.steps == 1 && page->follow.given_up == 0, "steps");
    }

    for (int i = 0; i < 2; i++) {
        attach("a step of 2 ms converges");
        write_policy(utc);
        checkpoint(SEC, 5 * MS);
        int64_t clock = guest();
        uint64_t real = real_at(sim.now);
        set_real(i ? -2 * MS : 2 * MS, 0);
        for (int j = 0; j < 200; j++) {
            checkpoint(50 * MS, 5 * MS);
            NOT_BACK();
        }
        CHECK(size(off_real(clock, real)) < 3 * US, "off by %" PRId64, off_real(clock, real));
    }

    /* The slew bound grows with the run: a step must not become one jump after a long one, and drift must not stay. */
    for (int i = 0; i < 2; i++) {
        attach("a step of nine seconds, in a run of five hours");
        write_policy(utc);
        checkpoint(SEC, 5 * MS);
        set_real(0, i ? -20000 : 20000);
        run(18000 * SEC);
        int64_t clock = guest(), at = sim.now;
        set_real(i ? -9 * SEC : 9 * SEC, 0);
        checkpoint(SEC, 2 * SEC);
        NOT_BACK();
        CHECK(record()->decision == FTCLOCK_ANCHORED, "decision %u, reason %u", record()->decision, record()->reason);
        /* 20 ppm of five hours are 360 ms. */
        CHECK(size(size(off(clock, at)) - FTCLOCK_REANCHOR - 360 * MS) < 10 * US, "moved by %" PRId64, off(clock, at));
        CHECK(page->anchor.valid && page->anchor.epoch == 1, "the anchor was given up");
    }

    /* Back by more than the pauses are long: no pause gives more than itself. */
    attach("back, with pauses shorter than the slew");
    write_policy(utc);
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest();
    uint64_t real = real_at(sim.now);
    set_real(-300 * MS, 0);
    for (int j = 0; j < 4000; j++) {
        checkpoint(SEC, 100 * US); /* the bound is 500 us, the pause 100 */
        NOT_BACK();
    }
    CHECK(page->anchor.epoch == 1 && page->counts.reanchored == 0, "reanchored: what was left to follow is forgotten");
    CHECK(size(off_real(clock, real)) < 3 * US, "off by %" PRId64, off_real(clock, real));

    attach("held pauses don't turn into steering");
    write_policy(utc);
    checkpoint(SEC, 5 * MS);
    for (int j = 0; j < 100; j++) {
        run(50 * MS);
        CHECK(stop() == 0, "stop");
        write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        stand(30 * MS);
        CHECK(cont() == 0, "cont");
        int64_t held = guest(), when = sim.now;
        checkpoint(50 * MS, 5 * MS);
        CHECK(size(off(held, when)) < 2 * US, "steered by %" PRId64, off(held, when));
    }

    attach("a slew of any size in the page");
    struct ftclock_policy wild = utc;
    wild.slew_ppm = UINT32_MAX;
    write_policy(wild);
    checkpoint(SEC, 5 * MS);
    set_real(9 * SEC, 0);
    for (int j = 0; j < 100; j++) {
        checkpoint(SEC, 5 * MS);
        NOT_BACK();
        CHECK(record()->went_on <= kept.clock + (uint64_t)(record()->lost + 100 * MS + 10 * US), "jumped");
    }
}

/* The guest's clock against CLOCK_REALTIME, after so many more checkpoints. */
static int64_t settled(int64_t clock, uint64_t real, int pauses) {
    for (int i = 0; i < pauses; i++) {
        checkpoint(SEC, 50 * MS);
        NOT_BACK();
    }
    return off_real(clock, real);
}

static void test_following(void) {
    /* Seconds that CLOCK_TAI is ahead: before, after; what CLOCK_REALTIME moves by. */
    static const int leaps[][3] = {{37, 38, -1}, {37, 36, 1}, {0, 1, -1}, {0, 37, 0}, {37, 0, 0}, {36, 37, 0}};
    for (size_t i = 0; i < sizeof(leaps) / sizeof(leaps[0]); i++) {
        for (int held = 0; held < 3; held++) {
            attach("leap seconds, and a TAI offset that is set");
            sim.tai = leaps[i][0];
            write_policy(utc);
            set_real(0, 40000);
            checkpoint(SEC, 5 * MS);
            int64_t clock = guest();
            uint64_t real = real_at(sim.now);
            run(SEC);
            if (held)
                CHECK(stop() == 0, "stop");
            sim.tai = leaps[i][1];
            set_real(leaps[i][2] * SEC, 40000);
            real += (uint64_t)(leaps[i][2] * SEC);
            if (held) {
                uint64_t from = real_at(sim.now);
                write_order(held == 2 ? FTCLOCK_DO_HOLD : FTCLOCK_DO_CATCH_UP, page->now.pause, 0);
                stand(20 * MS);
                CHECK(cont() == 0, "cont");
                if (held == 2)
                    real += real_at(sim.now) - from;
            }
            for (int j = 0; j < 20; j++) {
                checkpoint(SEC, 5 * MS);
                NOT_BACK();
                CHECK(size(off_real(clock, real)) < 3 * US, "row %zu: off by %" PRId64, i, off_real(clock, real));
            }
            CHECK(page->follow.leaps == (leaps[i][2] != 0) && page->follow.steps == 0 && page->follow.given_up == 0,
                  "row %zu: %" PRIu64 " leaps, %" PRIu64 " steps", i, page->follow.leaps, page->follow.steps);
        }
    }

    /* What a doubt took from the guest, and what was owed before it, comes back. */
    for (int i = 0; i < 6; i++) {
        static const char *const names[] = {
            "torn policy",          "KVM_GET_CLOCK fails",          "KVM_SET_CLOCK fails",
            "unstable at the stop", "a write of QEMU's that fails", "QEMU has the kernel add the pause"};
        attach(names[i]);
        write_policy(utc);
        set_real(0, -40000);
        checkpoint(SEC, 5 * MS);
        int64_t clock = guest();
        uint64_t real = real_at(sim.now);
        set_real(300 * MS, -40000);
        checkpoint(SEC, 5 * MS);
        int64_t owed = page->follow.debt;
        CHECK(size(owed - 300 * MS) < MS, "the debt is %" PRId64, owed);
        run(SEC);
        if (i == 0)
            page->policy.seq |= 1;
        if (i == 3)
            sim.flags &= ~(uint32_t)KVM_CLOCK_TSC_STABLE;
        CHECK(stop() == 0, "stop");
        sim.get_error = i == 1 ? EIO : 0;
        sim.set_error = i == 2 ? EIO : 0;
        sim.own_error = i == 4 ? EIO : 0;
        if (i >= 4)
            write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        if (i == 5) {
            kept.flags = KVM_CLOCK_REALTIME;
            kept.realtime = real_at(sim.now);
        }
        stand(40 * MS);
        CHECK(cont() == (i == 4 ? -1 : 0), "cont");
        CHECK(!page->anchor.valid || page->anchor.epoch == 2, "the anchor was kept");
        sim.get_error = sim.set_error = sim.own_error = 0;
        sim.flags = FLAGS;
        if (i == 0)
            page->policy.seq++;
        checkpoint(SEC, 5 * MS);
        CHECK(page->anchor.epoch == 2 && page->follow.bases == 1 && page->follow.debt > owed - 2 * MS,
              "the debt is %" PRId64 ", it was %" PRId64, page->follow.debt, owed);
        CHECK(size(settled(clock, real, 1000)) < 3 * US, "off by %" PRId64, off_real(clock, real));
    }

    /* Who sets a running clock, or loads another state, means it. */
    for (int i = 0; i < 2; i++) {
        attach(i ? "another state" : "a running clock that somebody set");
        write_policy(utc);
        set_real(0, 40000);
        checkpoint(SEC, 5 * MS);
        run(SEC);
        sim.clock += i ? 0 : 150 * MS;
        CHECK(stop() == 0, "stop");
        stand(5 * MS);
        kept.clock -= i ? (uint64_t)(500 * MS) : 0;
        CHECK(cont() == 0, "cont");
        guest_saw = guest();
        int64_t clock = guest();
        uint64_t real = real_at(sim.now);
        CHECK(size(settled(clock, real, 100)) < 3 * US && page->follow.bases == 2, "off by %" PRId64,
              off_real(clock, real));
    }

    attach("an older state, caught up, owes what it owed");
    struct ftclock_policy revert = utc;
    revert.restore_do = FTCLOCK_DO_CATCH_UP;
    write_policy(revert);
    checkpoint(SEC, 5 * MS);
    int64_t clock = guest();
    uint64_t real = real_at(sim.now);
    set_real(200 * MS, 0);
    checkpoint(SEC, 5 * MS);
    run(SEC);
    CHECK(stop() == 0, "stop");
    kept.clock -= (uint64_t)(500 * MS);
    CHECK(cont() == 0, "cont");
    DECIDED(FTCLOCK_ANCHORED, FTCLOCK_REASON_FROM_ANCHOR);
    CHECK(size(settled(clock, real, 1000)) < 3 * US && page->follow.bases == 1, "off by %" PRId64,
          off_real(clock, real));

    /* The base is that of the guest's start, however late its first pause comes. */
    boot("an hour before the first pause");
    write_policy(utc);
    set_real(0, 40000);
    kept.clock = 12345;
    CHECK(cont() == 0, "cont");
    clock = guest();
    real = real_at(sim.now);
    run(3600 * SEC);
    CHECK(size(settled(clock, real, 1000)) < 3 * US && page->follow.bases == 1, "off by %" PRId64,
          off_real(clock, real));

    /* From raw to utc in a running guest: what was missed meanwhile comes in pieces. */
    attach("utc, after a day of raw");
    set_real(0, 40000);
    checkpoint(SEC, 5 * MS);
    clock = guest();
    real = real_at(sim.now);
    for (int i = 0; i < 24; i++)
        checkpoint(3600 * SEC, 5 * MS);
    CHECK(off_real(clock, real) < -3 * SEC && page->follow.steered == 0, "off by %" PRId64, off_real(clock, real));
    write_policy(utc);
    int64_t before = off_real(clock, real);
    checkpoint(3600 * SEC, 5 * MS);
    CHECK(size(off_real(clock, real) - before - FTCLOCK_REANCHOR) < MS, "one jump of %" PRId64,
          off_real(clock, real) - before);
    CHECK(size(settled(clock, real, 10000)) < 3 * US, "off by %" PRId64, off_real(clock, real));

    /* A guest from a host whose clock is ahead of ours, or behind it. */
    for (int i = 0; i < 2; i++) {
        attach(i ? "from a host that is ahead" : "from a host that is behind");
        revert = utc;
        revert.restore_do = FTCLOCK_DO_CATCH_UP;
        write_policy(revert);
        kept.clock = (uint64_t)(77 * SEC);
        int64_t away = i ? -2 * SEC : 3 * SEC;
        real = real_at(sim.now) - (uint64_t)away;
        write_import((struct ftclock_import){.clock = kept.clock, .at = real});
        CHECK(cont() == 0, "cont");
        DECIDED(FTCLOCK_ANCHORED, i ? FTCLOCK_REASON_NEVER_BACK : FTCLOCK_REASON_FROM_IMPORT);
        CHECK(guest() >= 77 * SEC, "the clock went back");
        guest_saw = guest();
        CHECK(size(settled(77 * SEC, real, 10000)) < 3 * US, "off by %" PRId64, off_real(77 * SEC, real));
    }

    attach("a step within a held pause isn't lost");
    write_policy(utc);
    checkpoint(SEC, 5 * MS);
    clock = guest();
    real = real_at(sim.now);
    for (int i = 0; i < 50; i++) {
        run(SEC);
        CHECK(stop() == 0, "stop");
        write_order(FTCLOCK_DO_HOLD, page->now.pause, 0);
        uint64_t from = real_at(sim.now);
        stand(30 * MS);
        real += real_at(sim.now) - from;
        set_real(i ? 0 : 200 * MS, 0);
        from = real_at(sim.now);
        CHECK(cont() == 0, "cont");
        real += real_at(sim.now) - from;
    }
    /* Each time the call ends some 200 ns after the kernel took the value. */
    CHECK(size(settled(clock, real, 1000)) < 20 * US, "off by %" PRId64, off_real(clock, real));

    /* Right after a sleep an instant is known only to half the time that its reading took. */
    for (int place = 1; place <= 40; place++) {
        attach("a blurred reading isn't steered by");
        write_policy(utc);
        checkpoint(SEC, 5 * MS);
        run(20 * SEC);
        CHECK(stop() == 0, "stop");
        stand(20 * MS);
        host_sleeps(SEC, true);
        preempt(place, 900 * US);
        CHECK(cont() == 0, "cont");
        preempt(0, 0);
        NOT_BACK();
        CHECK(size(page->anchor.steer) < 10 * US, "preempted at place %d: steered by %" PRId64, place,
              page->anchor.steer);
    }

    attach("how good the host's clock is");
    checkpoint(SEC, 5 * MS);
    CHECK(record()->error == 0, "an error of %" PRIu64 " without the shim", record()->error);
    page->host = (struct ftclock_host){.seq = 2, .at_raw = (uint64_t)sim.now, .error = (uint64_t)(3 * MS)};
    checkpoint(1000 * SEC, 5 * MS);
    CHECK(size((int64_t)record()->error - 503 * MS) < MS, "an error of %" PRIu64, record()->error);
    page->host.error = UINT64_MAX - 5;
    checkpoint(SEC, 5 * MS);
    CHECK(record()->error == UINT64_MAX, "an error of %" PRIu64, record()->error);
    page->host.seq |= 1;
    checkpoint(SEC, 5 * MS);
    CHECK(record()->error == 0, "an error of %" PRIu64 " from a torn page", record()->error);
}

/* --- a year of pauses --- */

/*
 * The host's oscillator, which is CLOCK_MONOTONIC_RAW, is off by up to 50 ppm and wanders. A client of NTP disciplines
 * CLOCK_MONOTONIC: every 64 to 1024 s it measures with 30 us of noise, and slews by a loop of the second order, or
 * steps what is more than 128 ms. Now and then it is away for up to two days. Somebody sets the clock wrong, a second
 * leaps, the TAI offset is set, the host sleeps and has its time back from a coarse clock.
 */
static struct {
    int64_t truth, truth_from, truth_rate; /* UTC without leap seconds, from the year's start */
    int64_t next, away_until;              /* of the discipline */
    double frequency;                      /* what it believes the oscillator to be off by, ns/s */
    int64_t error0;
    int64_t pending, followed, big_steps; /* steps since the module looked, those to be followed, the others' number */
    int64_t given;                        /* the sum of the others */
    int64_t leaps;
    int64_t calm_since;
} year;

static int64_t true_at(int64_t t) {
    return year.truth + (t - year.truth_from) + (int64_t)((__int128)(t - year.truth_from) * year.truth_rate / SEC);
}

/* What the host's idea of UTC is off by. */
static int64_t host_off(void) {
    return (int64_t)real_at(sim.now) - INT64_C(1700000000) * SEC + year.leaps * SEC - true_at(sim.now) - year.error0;
}

static void step_clock(int64_t by) {
    sim.wall += by;
    year.pending += by;
    year.calm_since = sim.now;
}

static double uniform(void) { return (double)(draw() >> 11) / 9007199254740992.0; }

static void discipline(void) {
    int64_t wander = between(-20, 20);
    year.truth = true_at(sim.now);
    year.truth_from = sim.now;
    year.truth_rate += wander;
    int64_t interval = between(64, 1024);
    year.next = sim.now + interval * SEC;
    if (sim.now < year.away_until) {
        year.calm_since = sim.now;
        return;
    }
    if (draw() % 5000 == 0)
        year.away_until = sim.now + between(3600, 48 * 3600) * SEC;
    double noise = 30e3 * (uniform() + uniform() + uniform() - 1.5) * 2;
    double measured = (double)host_off() + noise;
    if (size((int64_t)measured) > 128 * MS) {
        step_clock(-(int64_t)measured);
        measured = 0;
    }
    year.frequency -= 0.02 * measured / (double)interval;
    double rate = year.frequency - 0.25 * measured / (double)interval;
    double most = 500e3;
    year.frequency = year.frequency > most ? most : year.frequency < -most ? -most : year.frequency;
    set_real(0, (int64_t)(rate > most ? most : rate < -most ? -most : rate));
}

/* Time passes, and the host's clock with it. */
static void pass_time(int64_t for_ns, void (*how)(int64_t)) {
    int64_t until = sim.now + for_ns;
    while (year.next < until) {
        if (year.next > sim.now)
            how(year.next - sim.now);
        discipline();
    }
    if (until > sim.now)
        how(until - sim.now);
}

static void year_sleeps(void) {
    int64_t slept = between(1, 8 * 3600) * SEC;
    int64_t error = draw() % 2 ? between(-500 * MS, 500 * MS) : 0;
    year.truth = true_at(sim.now) + slept + error;
    year.truth_from = sim.now;
    host_sleeps(slept, true);
    year.next = sim.now + 10 * SEC;
    year.calm_since = sim.now;
}

/* The module looks at the host's clock: as many steps as there were since it looked are one. */
static void looked(void) {
    if (size(year.pending) > FTCLOCK_FOLLOW_MAX) {
        year.big_steps++;
        year.given += year.pending;
    } else
        year.followed += year.pending;
    year.pending = 0;
}

/* What the guest should read less what it reads, by the host's clock. */
static struct {
    int64_t guest, host, held;
    int64_t loose; /* what we don't know of it: reading errors of held pauses and big steps */
} base;

static int64_t host_time(void) { return boot_at(sim.now) + year.followed; }

static int64_t owed(void) { return base.guest + host_time() - base.host - base.held - guest(); }

static void rebase(void) {
    base.guest = guest();
    base.host = host_time();
    base.held = 0;
    base.loose = 100;
}

static int64_t spread(int64_t least, int64_t most) { /* log-uniform */
    double ratio = (double)most / (double)least, v = (double)least, u = uniform();
    for (double part = 0.5, root = ratio; part > 1e-6; part /= 2) { /* ratio to the power of u, without libm */
        double guess = root;
        for (int i = 0; i < 60; i++)
            guess = (guess + root / guess) / 2;
        root = guess;
        if (u >= part) {
            u -= part;
            v *= root;
        }
    }
    return (int64_t)v;
}

static void test_year(bool holds) {
    static char name[64];
    snprintf(name, sizeof(name), "a year of pauses, %s", holds ? "with held ones" : "all caught up");
    attach(name);
    memset(&year, 0, sizeof(year));
    struct ftclock_policy policy = utc;
    policy.suspend_do = holds ? FTCLOCK_DO_HOLD : FTCLOCK_DO_CATCH_UP;
    write_policy(policy);
    year.truth_from = sim.now;
    year.truth_rate = between(-50000, 50000);
    year.frequency = (double)year.truth_rate + (double)between(-2000, 2000);
    set_real(0, (int64_t)year.frequency);
    year.error0 = (int64_t)real_at(sim.now) - INT64_C(1700000000) * SEC;
    year.next = sim.now + 64 * SEC;
    set_rate(between(-20, 20));
    int64_t start = sim.now, leap_at = start + between(100, 300) * 86400 * SEC,
            tai_at = start + between(1, 99) * 86400 * SEC;
    CHECK(stop() == 0, "stop");
    int64_t k0 = guest(), v0 = true_at(sim.now);
    rebase();
    CHECK(cont() == 0, "cont");
    int64_t worst_calm = 0, worst_host = 0, worst_slew = 0, last_owed = owed(), longest = 0, since_paid = sim.now,
            right_at = sim.now + sim.suspended;
    int pauses = 0, calm = 0, sleeps = 0, lost_anchors = 0, steps = 0;
    int before_failures = failures;
    while (sim.now - start < 365 * 86400 * SEC && failures < before_failures + 20) {
        int64_t ran = spread(5 * MS, 4 * 3600 * SEC), from = sim.now;
        if (draw() % 500 == 0) { /* checkpoints as an engine makes them */
            for (int i = 0; i < 200; i++) {
                checkpoint(between(5 * MS, 50 * MS), between(MS, 10 * MS));
                NOT_BACK();
                looked();
            }
            last_owed = owed();
            from = sim.now;
            right_at = sim.now + sim.suspended;
        }
        pass_time(ran / 2, run);

        if (draw() % 500 == 0) {
            year_sleeps();
            sleeps++;
        }
        if (draw() % 1000 == 0) {
            step_clock((draw() % 2 ? 1 : -1) *
                       (draw() % 2 ? between(200 * MS, 9 * SEC) : between(20 * SEC, 7200 * SEC)));
            steps++;
        }
        if (tai_at && sim.now > tai_at) {
            sim.tai += 37;
            tai_at = 0;
        }
        if (leap_at && sim.now > leap_at) {
            sim.wall -= SEC;
            sim.tai++;
            year.leaps++;
            leap_at = 0;
        }
        pass_time(ran - ran / 2, run);
        int kind = (int)(draw() % 1000);
        int place = (int)between(1, 60), hit = (int)(draw() % 40);
        if (kind == 0)
            sim.flags &= ~(uint32_t)KVM_CLOCK_TSC_STABLE;
        /* Nobody could tell, with no anchor or a sleep since. */
        if (kind == 1 && (!rule.anchor.valid || size(sim.suspended - (int64_t)rule.anchor.slept) > MS))
            kind = 5;
        if (kind == 1 && holds)
            sim.clock += 150 * MS;
        guest_saw = guest();
        preempt(hit == 0 ? place : 0, spread(US, 20 * MS));
        CHECK(stop() == 0, "stop");
        preempt(0, 0);
        looked();
        if (kind == 1 && holds) { /* somebody set the clock: that is where it goes on from */
            rebase();
            last_owed = 0;
        }
        int64_t ran_for = (int64_t)rule.stop.raw - from;
        int64_t host_stop = boot_at(sim.now), owed_at_stop = owed(), followed = year.followed,
                wait = spread(MS, 200 * MS);
        if (kind > 4 && draw() % 50 == 0)
            wait = spread(SEC, holds ? 1200 * SEC : 800 * SEC);
        pass_time(wait, stand);
        if (holds && draw() % 1000 == 0) {
            year_sleeps();
            sleeps++;
        }
        if (kind == 2)
            page->policy.seq |= 1;
        sim.get_error = kind == 3 ? EIO : 0;
        if (kind == 4 && holds) { /* another state */
            kept.clock -= (uint64_t)(5 * SEC);
        }
        lost_anchors += kind < (holds ? 5 : 4) && (kind != 1 || holds);
        int64_t untouched = guest(), at = sim.now;
        int64_t late = hit == 1 ? spread(US, 20 * MS) : 0;
        preempt(hit == 1 ? place : 0, late);
        CHECK(cont() == 0, "cont");
        preempt(0, 0);
        looked();
        page->policy.seq += page->policy.seq & 1;
        sim.get_error = 0;
        sim.flags = FLAGS;
        pauses++;
        if (kind == 4 && holds) {
            guest_saw = guest();
            rebase();
            last_owed = 0;
            continue;
        }
        NOT_BACK();
        const struct ftclock_record *rec = record();
        if (rec->decision == FTCLOCK_HELD) {
            /* The guest stood still by the host's clock, from the module's reading to its write: to some 100 ns, but
             * what we know of it is our own readings around that. So its word is taken, and checked against them. */
            base.held += boot_at(sim.now) - host_stop;
            owed_at_stop += year.followed - followed;
            CHECK(size(owed() - owed_at_stop) < 45 * MS, "a held pause left a debt of %" PRId64 ", it was %" PRId64,
                  owed(), owed_at_stop);
            base.held += owed() - owed_at_stop;
            base.loose += US;
        } else if (rec->decision == FTCLOCK_DROPPED || rec->decision == FTCLOCK_ANCHORED) {
            int64_t moved = guest() - untouched - (sim.now - at) - (int64_t)((__int128)(sim.now - at) * sim.rate / SEC);
            int64_t natural = (int64_t)((__int128)(sim.now + sim.suspended - right_at) * size(sim.rate) / SEC);
            int64_t most = ran_for * 500 / 1000000;
            /* Slew bound, tolerance on both sides, and kvmclock's own drift since it was last right. */
            CHECK(size(moved) <= most + natural + 3 * US, "pause %d: moved by %" PRId64 " after %" PRId64, pauses,
                  moved, ran_for);
            worst_slew = size(moved) > worst_slew ? size(moved) : worst_slew;
            /* A debt shrinks by what the bounds allow, and by no less. */
            int64_t now_owed = owed(), due = now_owed + moved;
            int64_t forth = most < FTCLOCK_REANCHOR ? most : FTCLOCK_REANCHOR;
            int64_t pause = sim.now - (int64_t)rule.stop.raw - late, back = pause < forth ? pause : forth;
            if (hit < 2) /* a preempted reading may be too blurred to steer by */
                forth = back = 0;
            int64_t left = due > 0 ? (due > forth ? due - forth : 0) : (-due > back ? -due - back : 0);
            if (page->follow.given_up > (uint64_t)year.big_steps) { /* a debt that grew too large */
                CHECK(size(page->follow.last_given) > FTCLOCK_FOLLOW_MAX && size(due) > FTCLOCK_FOLLOW_MAX - SEC,
                      "gave up %" PRId64, page->follow.last_given);
                year.big_steps++;
                year.given += page->follow.last_given;
                rebase();
                now_owed = 0;
            }
            CHECK(size(now_owed) <= left + base.loose + natural + 5 * US,
                  "pause %d: owes %" PRId64 " of %" PRId64 " after a run of %" PRId64 " and a pause of %" PRId64,
                  pauses, now_owed, due, ran_for, sim.now - (int64_t)rule.stop.raw);
            last_owed = now_owed;
            right_at = sim.now + sim.suspended;
        }
        if (size(last_owed) < 10 * US)
            since_paid = sim.now;
        else if (sim.now - since_paid > longest)
            longest = sim.now - since_paid;
        if (sim.now - year.calm_since > 2 * 86400 * SEC && !holds && size(owed()) < 10 * US) {
            /* Less the steps that it didn't follow. */
            int64_t error = guest() - k0 - (true_at(sim.now) - v0) + year.given;
            calm++;
            worst_calm = size(error) > worst_calm ? size(error) : worst_calm;
            worst_host = size(host_off()) > worst_host ? size(host_off()) : worst_host;
        }
    }
    CHECK(page->follow.given_up == (uint64_t)year.big_steps, "%" PRIu64 " steps not followed, %" PRId64 " big ones",
          page->follow.given_up, year.big_steps);
    CHECK(page->follow.leaps == 1 && page->follow.sleeps == (uint64_t)sleeps, "%" PRIu64 " leaps, %" PRIu64 " sleeps",
          page->follow.leaps, page->follow.sleeps);
    /* Where nothing was wrong with the host's clock for two days, guest and host are off UTC by about the same. */
    CHECK(holds || (worst_calm < MS && (calm > 100 || seed != 1)), "off UTC by %" PRId64 " in %d calm pauses",
          worst_calm, calm);
    printf("%s (seed %" PRIu64 "): %d pauses, %d sleeps, %d steps set, %" PRIu64 " seen, %" PRIu64
           " not followed, %d doubts; largest correction %" PRId64 " us, longest in debt %" PRId64
           " h; host - UTC %" PRId64 " us, guest - UTC %" PRId64 " us in %d calm pauses\n",
           name, seed, pauses, sleeps, steps, page->follow.steps, page->follow.given_up, lost_anchors, worst_slew / US,
           longest / (3600 * SEC), worst_host / US, worst_calm / US, calm);
}

/* --- anything in the page --- */

/* Whatever the page says, we never write what is below QEMU's value, nor above it by more than the pause and the slack.
 */
static void test_random_pages(int rounds) {
    attach("random pages");
    int64_t slack;
    int64_t writes = 0;
    for (int i = 0; i < rounds; i++) {
        unsigned char *bytes = (unsigned char *)&page->policy;
        for (size_t j = 0; j < sizeof(page->policy) + sizeof(page->order); j++)
            bytes[j] = (unsigned char)draw();
        if (draw() % 8) { /* values that lead somewhere, more often than not */
            page->policy.seq &= ~1u;
            page->order.seq &= ~1u;
            page->policy.checkpoint_do = page->policy.suspend_do = 1 + draw() % 2;
            page->policy.reference = draw() % 3;
            page->policy.checkpoint_limit >>= draw() % 64;
            page->policy.suspend_limit >>= draw() % 64;
            page->order.pause = draw() % 2 ? page->now.pause : draw();
            page->order.what = draw() % 4;
        }
        /* The rest of the page is the module's, and could be written all the same. */
        if (draw() % 16 == 0) {
            page->now.seq = (uint32_t)draw();
            page->anchor.clock = draw();
            page->anchor.seq = (uint32_t)draw();
        }
        set_rate(between(-230, 230));
        sim.clock_at = sim.now;
        sim.clock = guest_saw > guest() ? guest_saw : guest();
        if (draw() % 16 == 0)
            set_real(between(-5000 * SEC, 5000 * SEC), between(-100000, 100000));
        if (draw() % 16 == 0)
            sim.clock += between(0, 400 * MS);
        run(draw() % 8 ? between(MS, SEC) : between(SEC, 100000 * SEC));
        CHECK(stop() == 0, "stop");
        int64_t pause = draw() % 8 ? between(0, 100 * MS) : between(0, 1000 * SEC);
        int64_t from = sim.now;
        stand(pause);
        preempt(draw() % 16 ? 0 : (int)between(1, 24), between(0, 20 * MS));
        CHECK(cont() == 0, "cont");
        preempt(0, 0);
        NOT_BACK();
        if (sim.sets && !sim.own_last) {
            writes++;
            int64_t ahead = (int64_t)(sim.last.clock - kept.clock);
            slack = 2 * FTCLOCK_REANCHOR + 100 * US + (page->policy.reference == 1 ? FTCLOCK_FOLLOW_MAX : 0);
            CHECK(ahead >= 0 && ahead <= sim.now - from + slack,
                  "wrote QEMU's value and %" PRId64 " ns after a pause of %" PRId64, ahead, pause);
        }
        if (sim.sets && sim.own_last)
            CHECK(sim.last.clock == kept.clock && record()->decision >= FTCLOCK_HELD, "passed another value");
    }
    CHECK(writes > rounds / 100, "only %" PRId64 " writes in %d rounds: the test tests nothing", writes, rounds);
    printf("random pages: %d rounds, %" PRId64 " values written, %" PRIu64 " dropped, %" PRIu64 " held, %" PRIu64
           " passed\n",
           rounds, writes, page->counts.dropped, page->counts.held, page->counts.passed);
}

int main(int argc, char **argv) {
    seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    int years = argc > 2 ? atoi(argv[2]) : 2;
    page = aligned_alloc(4096, FTCLOCK_PAGE_SIZE);
    if (!page)
        return 2;
    test_start();
    test_tolerance();
    test_formula();
    test_own_rate();
    test_reanchor();
    test_hold();
    test_policy();
    test_orders();
    test_torn();
    test_errors();
    test_states();
    test_restore();
    test_migrate();
    test_tsc();
    test_secondary();
    test_realtime_flag();
    test_host_suspend();
    test_old_kernel();
    test_preempted();
    test_steering();
    test_following();
    test_random_pages(200000);

    test_many();
    for (int i = 0; i < years; i++, seed++) {
        test_year(false);
        test_year(true);
    }
    free(page);
    printf("seed %" PRIu64 ": %d failed\n", seed, failures);
    return failures != 0;
}
