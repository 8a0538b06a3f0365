/* SPDX-License-Identifier: MIT */
#include "engine.h"

#include <string.h>

#include "../vcpus.h"

static uint64_t random_state;

uint64_t draw(void) { /* splitmix64 */
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

int64_t between(int64_t least, int64_t most) { return least + (int64_t)(draw() % (uint64_t)(most - least + 1)); }

/* --- the simulated host --- */

struct sim sim;

static int64_t share(int64_t ns, int64_t rate) { return (int64_t)((__int128)ns * rate / SEC); }

static int64_t mono_at(int64_t t) { return sim.mono + (t - sim.mono_from) + share(t - sim.mono_from, sim.mono_rate); }

int64_t boot_at(int64_t t) { return mono_at(t) + sim.suspended; }

uint64_t real_at(int64_t t) { return (uint64_t)(boot_at(t) + sim.wall); }

uint64_t tsc_at(int64_t t) { return (uint64_t)((__int128)(t + 7 * SEC + sim.tsc_extra) * 29 / 10); }

uint64_t clock_at(int64_t t) { return (uint64_t)(sim.clock + (t - sim.clock_at) + share(t - sim.clock_at, sim.rate)); }

int64_t guest(void) { return (int64_t)clock_at(sim.now); }

int64_t guest_tsc(void) { return (int64_t)tsc_at(sim.now) + sim.guest_tsc; }

void set_real(int64_t step, int64_t rate) {
    sim.mono = mono_at(sim.now);
    sim.mono_from = sim.now;
    sim.mono_rate = rate;
    sim.wall += step;
}

static double own_rate(uint32_t khz) { return khz == HOST_KHZ ? (double)sim.rate / SEC : 0; }

void set_rate(int64_t rate) {
    sim.clock = guest();
    sim.clock_at = sim.now;
    sim.rate = rate;
    if (rule.own_rate_known)
        rule.own_rate = own_rate(HOST_KHZ);
}

/*
 * CLOCK_MONOTONIC and CLOCK_MONOTONIC_RAW stand, the others go on, and so does kvmclock, which counts from
 * CLOCK_MONOTONIC_RAW and the time slept (get_kvmclock_base_ns). A TSC that begins anew has KVM give the master clock
 * up for good, and KVM_CLOCK_TSC_STABLE with it, once a vCPU ran or the clock was set (kvm_arch_hardware_enable,
 * pvclock_update_vm_gtod_copy).
 */
void host_sleeps(int64_t for_ns, bool tsc_goes_on) {
    sim.suspended += for_ns;
    sim.clock += for_ns;
    if (tsc_goes_on)
        sim.tsc_extra += for_ns;
    else {
        sim.tsc_extra = -sim.now - 7 * SEC + SEC;
        sim.tsc_reset = sim.garbage = true;
    }
}

/* As a sleep that ends before a clock of whole seconds went on. */
void host_sleeps_uncounted(int64_t for_ns) {
    sim.clock += for_ns;
    sim.tsc_extra += for_ns;
}

void kernel_moves(int64_t by) {
    sim.clock += by;
    sim.moved += by;
}

void preempt(int at, int64_t for_ns) {
    sim.place = 0;
    sim.preempt_at = at;
    sim.preempt_for = for_ns;
    sim.preempt_asleep = false;
}

/* Time passes between two instructions that matter. */
static void place(int64_t least, int64_t most) {
    int64_t cost = between(least, most);
    if (sim.preempt_at > 0 && ++sim.place == sim.preempt_at) {
        if (sim.preempt_asleep)
            host_sleeps(sim.preempt_for, true);
        else
            sim.now += sim.preempt_for;
    }
    sim.now += cost;
}

static uint64_t sim_raw(void) {
    place(15, 25);
    int64_t read = sim.now;
    sim.now += sim.cold;
    return (uint64_t)read;
}

#define CLOCK(name, least, most, value)                                                                                \
    static uint64_t sim_##name(void) {                                                                                 \
        place(least, most);                                                                                            \
        return (uint64_t)(value);                                                                                      \
    }
CLOCK(real, 15, 25, real_at(sim.now))
CLOCK(boot, 15, 25, boot_at(sim.now))
CLOCK(mono, 15, 25, mono_at(sim.now))
CLOCK(tai, 15, 25, real_at(sim.now) + (uint64_t)(sim.tai * SEC))
CLOCK(tsc, 5, 15, tsc_at(sim.now))

static int fail(int error) {
    errno = error;
    return -1;
}

static int get_clock(struct kvm_clock_data *data) {
    sim.gets++;
    if (sim.get_error)
        return fail(sim.get_error);
    if (data == NOWHERE)
        return fail(EFAULT);
    *data = (struct kvm_clock_data){.clock = clock_at(sim.now), .flags = sim.flags};
    if (sim.garbage)
        data->clock -= UINT64_C(7777) * (uint64_t)SEC;
    if (sim.flags & KVM_CLOCK_REALTIME)
        data->realtime = real_at(sim.now);
    if (sim.flags & KVM_CLOCK_HOST_TSC)
        data->host_tsc = tsc_at(sim.now);
    return 0;
}

static int set_clock(const struct kvm_clock_data *data) {
    sim.sets++;
    sim.own_last = data == sim.own;
    sim.own_sets += sim.own_last;
    sim.last = *data;
    /* The kernel isn't asked to add anything to a value of ours. */
    CHECK(sim.own_last || (data->flags == 0 && data->realtime == 0 && data->host_tsc == 0));
    int error = sim.own_last ? sim.own_error : sim.set_error;
    if (error)
        return fail(error);
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
    return 0;
}

static int sim_ioctl(int fd, unsigned long request, struct kvm_clock_data *data) {
    CHECK(fd == 7 && (request == KVM_GET_CLOCK || request == KVM_SET_CLOCK));
    place(60 + sim.slow, 120 + sim.slow);
    if ((request == KVM_GET_CLOCK ? get_clock(data) : set_clock(data)) < 0)
        return -1;
    place(60, 120);
    return 0;
}

static int sim_tsc_offset(int64_t *offset) {
    place(60 + sim.look, 120 + sim.look);
    sim.look = 0;
    *offset = sim.guest_tsc;
    return sim.tsc_error == 1 ? -1 : 0;
}

static int sim_move_tsc(int64_t by) {
    place(60, 120);
    if (sim.tsc_error)
        return -1;
    sim.guest_tsc += by;
    sim.moved_tsc += by;
    return 0;
}

static uint32_t sim_vm_khz(int fd) { return fd == 7 && !sim.no_vm_khz ? HOST_KHZ : 0; }

static uint32_t sim_vcpu_khz(void) { return sim.khz ? sim.khz : HOST_KHZ; }

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
    .own_rate = own_rate,
};

/* --- the simulated QEMU, guest and shim --- */

struct rule rule;
struct kvm_clock_data kept;
int64_t guest_saw;
struct mark mark;

void start_module(int preempted_at, int64_t for_ns) {
    memset(page, 0, FTCLOCK_PAGE_SIZE);
    preempt(preempted_at, for_ns);
    rule_start(&rule, &host, page, 4711);
    preempt(0, 0);
}

void boot(void) {
    random_state = seed;
    memset(&sim, 0, sizeof(sim));
    memset(&kept, 0, sizeof(kept));
    sim.now = 1000 * SEC;
    sim.mono = sim.mono_from = sim.now;
    sim.wall = INT64_C(1700000000) * SEC;
    sim.clock_at = sim.now;
    sim.clock = 5 * MS;
    sim.flags = FLAGS;
    guest_saw = 0;
    start_module(0, 0);
    stand(100 * MS);
}

const struct ftclock_policy usual = {
    .enabled = 1,
    .checkpoint_do = CATCH_UP,
    .suspend_do = HOLD,
    .restore_do = HOLD,
    .migrate_do = CATCH_UP,
    .checkpoint_limit = (uint64_t)(10 * SEC),
    .migrate_limit = (uint64_t)(60 * SEC),
};

void write_policy(struct ftclock_policy policy) {
    policy.seq = (page->policy.seq | 1) + 1;
    page->policy = policy;
}

void follow_utc(void) {
    struct ftclock_policy policy = usual;
    policy.reference = 1;
    policy.slew_ppm = 500;
    write_policy(policy);
}

void attach(void) {
    boot();
    write_policy(usual);
    run(10 * SEC);
}

void anchored_guest(void) {
    attach();
    checkpoint(SEC, 5 * MS);
}

void write_order(uint64_t pause, uint64_t lost) {
    page->order = (struct ftclock_order){
        .seq = (page->order.seq | 1) + 1, .pause = pause, .cont_raw = (uint64_t)sim.now, .lost = lost};
}

/* What the policy said before policy_says, of that pause. */
static struct {
    uint64_t of;
    uint32_t checkpoint_do, suspend_do;
} said;

void policy_says(uint32_t what) {
    said.of = page->now.pause;
    said.checkpoint_do = page->policy.checkpoint_do;
    said.suspend_do = page->policy.suspend_do;
    page->policy.checkpoint_do = page->policy.suspend_do = what;
}

void write_import(struct ftclock_import import) {
    import.seq = page->import.seq + 2;
    page->import.seq++;
    page->import = import;
}

static void guest_looks(void) { guest_saw = guest() > guest_saw ? guest() : guest_saw; }

void run(int64_t for_ns) {
    sim.now += for_ns;
    if (sim.garbage) {
        sim.garbage = false;
        sim.flags = 0;
    }
    guest_looks();
}

void stand(int64_t for_ns) { sim.now += for_ns; }

int try_stop(void) {
    guest_looks();
    struct kvm_clock_data data = {0};
    sim.own = &data;
    int rc = rule_get_clock(&rule, 7, &data);
    if (rc == 0)
        kept = (struct kvm_clock_data){.clock = data.clock}; /* QEMU keeps the clock alone */
    return rc;
}

const struct ftclock_record *record(void) { return &page->ring[(page->counts.pauses - 1) % FTCLOCK_RING_LEN]; }

/* What the kernel was asked is counted from here. */
int try_cont(void) {
    struct kvm_clock_data data = kept, before = data;
    sim.own = &data;
    sim.gets = sim.sets = sim.own_sets = 0;
    uint64_t pauses = page->counts.pauses;
    int rc = rule_set_clock(&rule, 7, &data);
    if (said.of == pauses + 1) {
        page->policy.checkpoint_do = said.checkpoint_do;
        page->policy.suspend_do = said.suspend_do;
        said.of = 0;
    }
    CHECK(memcmp(&data, &before, sizeof(data)) == 0);
    const struct ftclock_counts *c = &page->counts;
    CHECK(c->pauses == pauses + 1 && c->dropped + c->anchored + c->held + c->passed == c->pauses);
    CHECK(!page->now.paused && page->now.pause == pauses + 2);
    CHECK(record()->number == pauses + 1 && !(record()->seq & 1));
    CHECK((record()->decision == FTCLOCK_DROPPED) == (sim.sets == 0));
    /* Readers find all of it in the page. */
    size_t base = offsetof(struct ftclock_follow, base);
    CHECK(memcmp(&page->follow.base, &rule.follow.base, sizeof(rule.follow) - base) == 0);
    CHECK(page->now.saved == rule.saved && page->now.khz == rule.khz && page->now.stop_raw == rule.stop.raw);
    int64_t now = guest();
    digest(record(), sizeof(*record()));
    digest(&rule.follow.base, sizeof(rule.follow) - base);
    digest(&now, sizeof(now));
    return rc;
}

void stop(void) { CHECK(try_stop() == 0); }

void stop_after(int64_t ran) {
    run(ran);
    stop();
}

void cont(void) { CHECK(try_cont() == 0); }

void stop_preempted(int at, int64_t for_ns) {
    preempt(at, for_ns);
    stop();
    preempt(0, 0);
}

void cont_preempted(int at, int64_t for_ns) {
    preempt(at, for_ns);
    cont();
    preempt(0, 0);
}

void load_state(int64_t clock) {
    kept.clock = (uint64_t)clock;
    guest_saw = 0;
}

void checkpoint(int64_t ran, int64_t pause) { disturbed(ran, pause, 0); }

void checkpoints(int n, int64_t ran, int64_t pause) {
    for (int i = 0; i < n; i++)
        checkpoint(ran, pause);
}

void dropped(int64_t ran, int64_t pause) {
    checkpoint(ran, pause);
    DROPPED();
}

void disturbed(int64_t ran, int64_t pause, int64_t by) {
    stop_after(ran);
    stand(pause / 2);
    kernel_moves(by);
    stand(pause - pause / 2);
    cont();
    NOT_BACK();
}

void held(int64_t ran, int64_t pause) {
    stop_after(ran);
    policy_says(HOLD);
    stand(pause);
    cont();
    DECIDED(HELD, POLICY);
    NOT_BACK();
}

void stop_with_realtime(int64_t ran) {
    stop_after(ran);
    kept.flags = KVM_CLOCK_REALTIME;
    kept.realtime = real_at(sim.now);
}

void mark_twin(void) {
    mark = (struct mark){.clock = guest(), .at = sim.now, .tsc = guest_tsc(), .real = real_at(sim.now)};
}

int64_t off_twin(void) { return guest() - mark.clock - (sim.now - mark.at); }

int64_t off_reference(void) { return guest() - mark.clock - (int64_t)(real_at(sim.now) - mark.real); }

int64_t apart(void) {
    return (int64_t)((__int128)(guest_tsc() - mark.tsc) * 1000000 / HOST_KHZ) - (guest() - mark.clock);
}
