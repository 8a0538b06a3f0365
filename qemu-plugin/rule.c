/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * Theory of operation
 *
 * A kvmclock doesn't stop when a guest is paused. QEMU reads it at the stop (KVM_GET_CLOCK) and writes the stale
 * reading back at the cont (KVM_SET_CLOCK): only that write makes the guest lose the pause. So the best correction is
 * to leave the write out.
 *
 * The measure is a guest that was never paused. Its kvmclock runs at a rate of its own, up to 230 ns a second off
 * CLOCK_MONOTONIC_RAW, and its NTP has learnt that. So CLOCK_MONOTONIC_RAW judges the pause, and never the run: each
 * stop takes an anchor, a pair of readings (kvmclock, CLOCK_MONOTONIC_RAW) of one instant, and until the next stop the
 * guest's clock should be
 *
 *     anchor.clock + (raw now - anchor.raw)
 *
 * At a cont that is to be caught up the rule reads the kernel's clock. If it is where the anchor says, within the
 * tolerance and what its own rate makes of the pause, the write is dropped, and the clock is to the nanosecond that of
 * a guest that wasn't paused: nothing can add up. If not, the anchor's value is written and read back. What it was
 * missed by is left to correct, and the next anchor is that much away from its reading. A clock that is written again
 * and again, an engine's secondary, has its own rate added to the anchor, which follows from the TSC's frequency: what
 * readings err by would add up if it were taken for that. A pause that is to be held is passed through, and its anchor
 * is taken when the kernel has taken the value.
 *
 * A host that sleeps has CLOCK_MONOTONIC_RAW and CLOCK_MONOTONIC stand still; CLOCK_BOOTTIME and kvmclock count the
 * time. So does the anchor: to "raw" above belongs what the host slept. Within a pause it is part of the pause.
 *
 * With reference 1 the guest follows CLOCK_TAI instead, which is CLOCK_REALTIME without its leap seconds. What the
 * guest's clock should read is then that clock less a base, and what is missing is its debt. At each cont the anchor is
 * steered by as much of the debt as the slew bound allows. The base is taken when the guest's clock begins, moved by
 * held pauses, and outlives the anchor: what one pause can't give, a later one does. A debt that no slew pays off in
 * reasonable time, a clock that was set to another day, is given up: the base moves by it, and the guest stays.
 *
 * Any doubt means: QEMU's own value goes through as if we weren't there, the anchor is given up and taken anew, and the
 * record says why.
 *
 * There is no allocation, no lock and no printing in here. The page can be written by the shim at any time and is only
 * ever copied from, with bounded retries; what the rule itself relies on is in struct rule.
 */
#include "rule.h"

#include <errno.h>
#include <string.h>

/* Readings of clocks that take longer than this were preempted, and are made again. */
#define READ_SLOW  INT64_C(2000)
#define READ_TRIES 3
/* A value that was missed is written again so often: where each call's time varies, some will hit. */
#define WRITES 8
/* The longest time that the kernel itself may take between the call of KVM_SET_CLOCK and its effect. */
#define LAG_MAX INT64_C(200000)
/* How long after a stop the TSC is read that is saved: QEMU first drains its disks. */
#define TSC_READ_LATE (60 * SECOND)
/* A value within a second of what a vCPU's TSC reads is taken for an attempt to synchronise vCPUs, and not set
 * (kvm_synchronize_tsc in arch/x86/kvm/x86.c). */
#define TSC_SLACK (SECOND + 1000000)
/* A reading whose instant is known less well isn't steered by. */
#define STEER_BLUR 20000
/* Ticks of the TSC, 1 us or more, in which CLOCK_MONOTONIC_RAW is read unless we are preempted. */
#define PAIR_SLOW 5000
/* How often a page section that is being written is read again. */
#define PAGE_TRIES 1000
/* Shortest span over which the TSC's rate is measured: 1 ms. */
#define RATE_SPAN INT64_C(1000000)
/* The clock that we write may be above QEMU's by the pause, give or take this: the residual that is corrected at once.
 */
#define WRITE_SLACK (2 * FTCLOCK_REANCHOR)
#define SECOND      INT64_C(1000000000)
/* What kvmclock may leave CLOCK_MONOTONIC_RAW by itself, ppb: both are the TSC, scaled by two factors that differ by up
 * to 230 (the resolution of the kernel's). */
#define OWN_RATE UINT64_C(300)
/* The kernel may tell how long the host slept by a clock of whole seconds. */
#define SLEEP_ERROR UINT64_C(2000000000)
/* A shorter sleep of the host isn't told from the time between two readings; it is corrected as any residual. */
#define SLEEP_LEAST INT64_C(100000)
/* A smaller step of CLOCK_REALTIME isn't counted, though it is followed: we may have been preempted between two
 * readings. */
#define STEP_LEAST INT64_C(100000000)
/* A guest that ran for longer, 11 days, isn't steered: the arithmetic of the slew bound is for less. */
#define LONGEST_RUN UINT64_C(1000000000000000)
/* The most that the host's clock errs by between two times that the shim asks, as the kernel has it (NTP's MAXFREQ). */
#define FREQUENCY_ERROR_PPM 500

/* --- the page --- */

#define STORE(word, value) __atomic_store_n(&(word), (value), __ATOMIC_RELAXED)

/* Sections are copied word by word, whatever their members' types are. */
typedef uint32_t __attribute__((may_alias)) half;
typedef uint64_t __attribute__((may_alias)) word;

/*
 * Sections are copied word by word, as readers in other processes need it. Each has a size that is known where it is
 * copied: without a loop that is a third less instructions at a cont (make bench).
 */
#define NO_LOOP            _Pragma("GCC unroll 64")
#define WHERE_IT_IS_CALLED inline __attribute__((always_inline))

/* Writes a section of which we are the only writer; its first word is the sequence. */
static WHERE_IT_IS_CALLED void publish(void *section, const void *from, size_t size) {
    half *seq = section;
    uint32_t odd = __atomic_load_n(seq, __ATOMIC_RELAXED) | 1;
    __atomic_store_n(seq, odd, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    STORE(seq[1], ((const half *)from)[1]);
    NO_LOOP
    for (size_t i = 1; i < size / 8; i++)
        STORE(((word *)section)[i], ((const word *)from)[i]);
    __atomic_store_n(seq, odd + 1, __ATOMIC_RELEASE);
}

/* Copies a section of the shim's. False: torn. */
static WHERE_IT_IS_CALLED bool consult(void *to, const void *section, size_t size) {
    const half *seq = section;
    for (int i = 0; i < PAGE_TRIES; i++) {
        uint32_t before = __atomic_load_n(seq, __ATOMIC_ACQUIRE);
        if (before & 1) {
            __builtin_ia32_pause();
            continue;
        }
        NO_LOOP
        for (size_t j = 0; j < size / 8; j++)
            ((word *)to)[j] = __atomic_load_n(&((const word *)section)[j], __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(seq, __ATOMIC_RELAXED) == before) {
            *(half *)to = before;
            return true;
        }
    }
    return false;
}

static void publish_counts(struct rule *r) {
    word *to = (word *)&r->page->counts;
    const word *from = (const word *)&r->counts;
    /* The number of pauses last: readers find the newest record by it. */
    NO_LOOP
    for (size_t i = 1; i < offsetof(struct ftclock_counts, reserved) / 8; i++)
        if (i != offsetof(struct ftclock_counts, busy) / 8) /* counted elsewhere */
            STORE(to[i], from[i]);
    __atomic_store_n(&to[0], from[0], __ATOMIC_RELEASE);
}

static void publish_now(struct rule *r) {
    struct ftclock_now now = {
        .paused = r->stopped,
        .pause = r->counts.pauses + 1,
        .saved = r->saved,
        .stop_raw = r->stop.raw,
        .stop_real = r->stop.real,
        .tsc = r->stop_tsc,
        .khz = r->khz,
    };
    publish(&r->page->now, &now, sizeof(now));
}

static void publish_follow(struct rule *r) { publish(&r->page->follow, &r->follow, sizeof(r->follow)); }

static void publish_anchor(struct rule *r) { publish(&r->page->anchor, &r->anchor, sizeof(r->anchor)); }

/* --- the clocks --- */

static uint64_t magnitude(int64_t v) { return v < 0 ? -(uint64_t)v : (uint64_t)v; }

static int64_t clamp(int64_t v, int64_t most) { return v > most ? most : v < -most ? -most : v; }

/* What the kernel's clock may have left the host's other clocks by itself from one moment to another, at most. */
static uint64_t own_drift(const struct moment *from, const struct moment *to) {
    uint64_t slept = to->slept - from->slept;
    uint64_t passed = to->raw - from->raw + slept;
    return passed / SECOND * OWN_RATE + passed % SECOND * OWN_RATE / SECOND + (slept ? SLEEP_ERROR : 0);
}

/*
 * What it did leave them by, where it was seen to leave them by so much. Where its rate is known, what is seen beyond
 * that is the error of our readings, and taken for its rate it would add up over states that are loaded, each of which
 * is written.
 */
static int64_t own(const struct rule *r, const struct moment *from, const struct moment *to, int64_t seen) {
    if (r->own_rate_known && to->slept == from->slept) {
        double by = (double)(int64_t)(to->raw - from->raw) * r->own_rate;
        return (int64_t)(by < 0 ? by - 0.5 : by + 0.5); /* not always towards zero: that adds up, too */
    }
    return clamp(seen, (int64_t)own_drift(from, to));
}

/*
 * Finds out whether the host slept. CLOCK_BOOTTIME and CLOCK_MONOTONIC run at one rate, and only a sleep moves them
 * apart. A reading that we were preempted in says nothing: the next one does.
 */
static void notice_sleep(struct rule *r) {
    const struct host *h = r->host;
    uint64_t before, boot, after;
    int tries = 0;
    do {
        before = h->mono();
        boot = h->boot();
        after = h->mono();
    } while (++tries < READ_TRIES && after - before > READ_SLOW);
    uint64_t slept = boot - (before + (after - before) / 2);
    if (after - before > READ_SLOW || (r->slept_known && magnitude((int64_t)(slept - r->slept)) < SLEEP_LEAST))
        return;
    if (r->slept_known) {
        r->follow.sleeps++;
        publish_follow(r);
        /* The TSC went on or began anew, while CLOCK_MONOTONIC_RAW stood: their rate is to be found again. */
        r->first_raw = h->raw();
        r->first_tsc = h->tsc();
    } else {
        r->anchor.slept = r->stop.slept = slept;
    }
    r->slept_known = true;
    r->slept = slept;
}

/* A reading of the kernel's clock, with the host's clocks of the same instant and the bound of their error. */
struct reading {
    struct kvm_clock_data data;
    struct moment at;
    uint64_t error;
};

/* The host's clocks of one moment, to the error that is returned: read again where we were preempted between them. */
static uint64_t read_moment(const struct rule *r, struct moment *now) {
    const struct host *h = r->host;
    uint64_t error = UINT64_MAX;
    for (int i = 0; i < READ_TRIES && error > READ_SLOW / 2; i++) {
        uint64_t before = h->raw();
        uint64_t real = h->real();
        uint64_t boot = h->boot();
        uint64_t half = (h->raw() - before + 1) / 2;
        if (half < error) {
            error = half;
            *now = (struct moment){.raw = before + half, .real = real, .boot = boot};
        }
    }
    return error;
}

/*
 * The reading's instant lies between two readings of CLOCK_MONOTONIC_RAW, which is as good as the time between them:
 * hundreds of ns, or milliseconds if we were preempted. The kernel gives the TSC of the instant, though
 * (KVM_CLOCK_HOST_TSC, Linux 5.16 and later), and CLOCK_MONOTONIC_RAW is the TSC scaled, whose rate we know from a pair
 * of long ago. So the instant is found to some ns, preempted or not.
 */
static int read_once(struct rule *r, int fd, struct kvm_clock_data *data, struct reading *out) {
    const struct host *h = r->host;
    uint64_t raw0 = h->raw();
    uint64_t tsc0 = h->tsc();
    int rc = h->clock_ioctl(fd, KVM_GET_CLOCK, data);
    int error = errno;
    if (rc < 0)
        return rc;
    uint64_t tsc1, raw1, tsc2;
    int tries = 0;
    do { /* this pair can be taken again if we are preempted within it */
        tsc1 = h->tsc();
        raw1 = h->raw();
        tsc2 = h->tsc();
    } while (++tries < READ_TRIES && tsc2 - tsc1 > PAIR_SLOW);

    out->data = *data;
    out->at.raw = raw0 + (raw1 - raw0) / 2;
    out->error = (raw1 - raw0 + 1) / 2;
    int64_t span_raw = (int64_t)(raw1 - r->first_raw);
    int64_t span_tsc = (int64_t)(tsc1 - r->first_tsc);
    uint64_t then = data->host_tsc;
    if ((data->flags & KVM_CLOCK_HOST_TSC) && then >= tsc0 && then <= tsc1 && span_raw > RATE_SPAN && span_tsc > 0) {
        double rate = (double)span_raw / (double)span_tsc;
        /* raw1 was read between tsc1 and tsc2. */
        double since = ((double)(tsc1 - then) + (double)(tsc2 - tsc1) / 2) * rate;
        uint64_t at = raw1 - (uint64_t)since;
        uint64_t bound = (uint64_t)((double)(tsc2 - tsc1) / 2 * rate) + 1;
        if (at >= raw0 && at <= raw1 && bound < out->error) {
            out->at.raw = at;
            out->error = bound;
        }
    }
    out->at.real = data->realtime;
    if (!(data->flags & KVM_CLOCK_REALTIME)) {
        struct moment now;
        read_moment(r, &now);
        out->at.real = now.real - (now.raw - out->at.raw);
    }
    uint64_t asked;
    tries = 0;
    do {
        asked = h->raw();
        out->at.boot = h->boot();
    } while (h->raw() - asked > READ_SLOW && ++tries < READ_TRIES);
    out->at.boot -= asked - out->at.raw;
    out->at.slept = r->slept;
    errno = error;
    return rc;
}

/* A reading that the host slept in is of no one instant, and made again. The caller has just noticed any sleep before
 * it. */
static int read_clock(struct rule *r, int fd, struct kvm_clock_data *data, struct reading *out) {
    for (int i = 0;; i++) {
        int rc = read_once(r, fd, data, out);
        if (rc < 0)
            return rc;
        int error = errno;
        notice_sleep(r);
        errno = error;
        if (out->at.slept == r->slept || i == 1)
            return rc;
    }
}

static uint64_t expected(const struct rule *r, uint64_t raw) {
    return r->anchor.clock + (raw - r->anchor.raw) + (r->slept - r->anchor.slept) + (uint64_t)r->anchor.steer;
}

/* What the guest's TSC read at the instant of a reading; 0: not known. */
static uint64_t guest_tsc(const struct rule *r, const struct reading *at) {
    return r->khz && at->data.flags & KVM_CLOCK_HOST_TSC ? at->data.host_tsc + (uint64_t)r->tsc_offset : 0;
}

/* Of this reading, from which the clock is left to be corrected by r->left. */
static void take_anchor(struct rule *r, const struct reading *from, uint64_t epoch) {
    r->anchor = (struct ftclock_anchor){
        .valid = 1,
        .epoch = epoch,
        .clock = from->data.clock - (uint64_t)r->left,
        .raw = from->at.raw,
        .real = from->at.real,
        .boot = from->at.boot,
        .error = from->error,
        .slept = from->at.slept,
        .tsc = guest_tsc(r, from),
        .khz = r->khz,
    };
    r->drifted_raw = from->at.raw;
    publish_anchor(r);
}

static void give_up_anchor(struct rule *r) {
    if (!r->anchor.valid)
        return;
    r->anchor.valid = 0;
    r->left = 0;
    publish_anchor(r);
}

/* --- the reference --- */

/* What the guest follows, at the time that CLOCK_REALTIME read real. */
static uint64_t reference(const struct rule *r, uint64_t real) { return real + (uint64_t)(r->tai * SECOND); }

/* The guest doesn't follow its reference over so much, and stays where it is. */
static void give_up(struct rule *r, int64_t what) {
    r->follow.base += (uint64_t)what;
    r->follow.given_up++;
    r->follow.last_given = what;
}

/*
 * Finds out by how many seconds CLOCK_TAI is ahead of CLOCK_REALTIME, and what became of both since the last time. A
 * leap second moves CLOCK_REALTIME, and the reference goes on. Somebody who tells the kernel the difference moves
 * CLOCK_TAI, and the base goes with it. A step moves both. CLOCK_BOOTTIME, which nobody sets, tells which it was.
 */
static void notice_steps(struct rule *r) {
    const struct host *h = r->host;
    uint64_t boot, real, tai;
    int tries = 0;
    do {
        boot = h->boot();
        real = h->real();
        tai = h->tai();
    } while (++tries < READ_TRIES && h->boot() - boot > READ_SLOW);
    int64_t ahead = (int64_t)(tai - real);
    ahead = (ahead + (ahead < 0 ? -SECOND / 2 : SECOND / 2)) / SECOND;
    int64_t real_moved = (int64_t)(real - boot - r->real_boot);
    int64_t tai_moved = (int64_t)(tai - boot - r->tai_boot);
    bool set = magnitude(real_moved) < magnitude(tai_moved);
    int64_t step = set ? real_moved : tai_moved;
    if (r->tai_known && ahead != r->tai) {
        if (set)
            r->follow.base += (uint64_t)((ahead - r->tai) * SECOND);
        else
            r->follow.leaps++;
    }
    if (r->tai_known && magnitude(step) > STEP_LEAST) {
        r->follow.steps++;
        r->follow.last_step = step;
        if (magnitude(step) > FTCLOCK_FOLLOW_MAX)
            give_up(r, step);
        else
            r->stepped += step;
    }
    r->tai = ahead;
    r->real_boot = real - boot;
    r->tai_boot = tai - boot;
    r->tai_known = true;
}

/* From now on the guest's clock is right as it reads. */
static void take_base(struct rule *r, uint64_t clock, uint64_t real) {
    r->follow.base = reference(r, real) - clock;
    r->follow.known = 1;
    r->follow.bases++;
    r->follow.debt = 0;
    r->stepped = 0;
    publish_follow(r);
}

/* What the guest's clock lacks of its reference. */
static int64_t debt(const struct rule *r, const struct moment *now) {
    return (int64_t)(reference(r, now->real) - r->follow.base - expected(r, now->raw));
}

/* Reads again while a reading is blurred, and keeps the best. A reading whose error is UINT64_MAX is none yet. */
static void read_better(struct rule *r, int fd, struct reading *best) {
    for (int i = 0; i < READ_TRIES && best->error > FTCLOCK_TOLERANCE; i++) {
        struct kvm_clock_data data = {0};
        struct reading other;
        if (read_clock(r, fd, &data, &other) == 0 && other.error < best->error &&
            (best->error == UINT64_MAX || other.data.flags == best->data.flags))
            *best = other;
    }
}

/* False: the kernel doesn't say, or its clock isn't stable. */
static bool read_stable(struct rule *r, int fd, struct reading *now) {
    struct kvm_clock_data data = {0};
    if (read_clock(r, fd, &data, now) < 0 || !(data.flags & KVM_CLOCK_TSC_STABLE))
        return false;
    read_better(r, fd, now);
    return true;
}

/* Begins anew with a guest whose clock was set by somebody else: it goes on from what its clock is now. */
static void begin_following(struct rule *r, int fd) {
    struct reading now = {.error = UINT64_MAX};
    read_better(r, fd, &now);
    r->follow.known = 0;
    if (now.error != UINT64_MAX)
        take_base(r, now.data.clock, now.at.real);
}

/* --- the guest's TSC --- */

/*
 * kvmclock is the TSC, scaled by its frequency in whole kHz (kvm_guest_time_update), so that the two go on together
 * while nobody moves either. A guest's TSC that the kernel scales isn't followed: its factor isn't told. It doesn't
 * scale where the frequencies differ by less than 250 ppm (tsc_tolerance_ppm).
 */
static void learn_tsc(struct rule *r, int fd) {
    const struct host *h = r->host;
    r->tsc_asked = true;
    r->khz = 0;
    if (h->tsc_offset(&r->tsc_offset) < 0)
        return;
    uint32_t guest = h->vcpu_khz(), vm = h->vm_khz(fd);
    uint64_t span = h->raw() - r->first_raw;
    double host = vm, near = 0.0003;
    if (!vm &&
        (int64_t)span > RATE_SPAN) { /* Linux before 5.18 doesn't say; measured on a busy host it is less exact */
        host = (double)(h->tsc() - r->first_tsc) * 1e6 / (double)span;
        near = 0.003;
    }
    if ((double)guest > host * (1 - near) && (double)guest < host * (1 + near))
        r->khz = vm ? vm : guest;
    r->own_rate_known = r->khz && vm;
    r->own_rate = r->own_rate_known ? h->own_rate(vm) : 0;
}

/* Ticks of a TSC in so many ns. */
static int64_t ticks(int64_t ns, uint32_t khz) { return (int64_t)((__int128)ns * khz / 1000000); }

/*
 * Moves the guest's TSC to where its clock was moved by a restore. QEMU set it to what it read at some time after the
 * stop, and it has run since QEMU was told. So what it lacks is at most what the clock was moved by, and less by at
 * most the time that this process is there, give or take what KVM makes of it: anything else isn't the TSC that the
 * reading is of, because the guest was reset since.
 */
static uint8_t move_tsc(struct rule *r, int fd, uint64_t from_clock, uint64_t from_tsc, uint32_t from_khz,
                        const struct kvm_clock_data *loaded, const struct ftclock_record *rec) {
    struct reading now;
    learn_tsc(r, fd);
    if (!from_khz || !r->khz || !read_stable(r, fd, &now))
        return FTCLOCK_TSC_UNMOVED;
    uint64_t clock = now.data.clock - (uint64_t)r->left; /* where the next pause has it */
    uint64_t has = guest_tsc(r, &now);
    if (!has)
        return FTCLOCK_TSC_UNMOVED;
    uint64_t should = from_tsc + (uint64_t)ticks((int64_t)(loaded->clock - from_clock), from_khz) +
                      (uint64_t)ticks((int64_t)(clock - loaded->clock), r->khz);
    int64_t by = (int64_t)(should - has);
    int64_t here = (int64_t)(now.at.raw - r->first_raw) + TSC_READ_LATE;
    if (by > ticks(rec->lost + TSC_SLACK, r->khz) || by < ticks(rec->lost - here - TSC_SLACK, r->khz) ||
        r->host->move_tsc(by) < 0)
        return FTCLOCK_TSC_UNMOVED;
    r->tsc_offset += by;
    return FTCLOCK_TSC_MOVED;
}

/* --- the stop --- */

/*
 * What the kernel's clock left CLOCK_MONOTONIC_RAW by in the run, by its own rate, is no pause's doing. What goes
 * beyond that, after a write, is the error of our own readings, which must not add up: it is left to correct. Else it
 * is somebody else's doing: a guest whose clock was set by him follows its reference from there.
 */
static void judge_run(struct rule *r, const struct reading *now) {
    struct moment from = {.raw = r->drifted_raw, .slept = r->anchor.slept};
    int64_t off = (int64_t)(now->data.clock - expected(r, now->at.raw)), by_itself = off - r->left;
    r->stop_residual =
        off - (r->wrote ? own(r, &from, &now->at, by_itself) : clamp(by_itself, (int64_t)own_drift(&from, &now->at)));
    if (r->wrote)
        r->left = r->stop_residual;
    if (magnitude(r->stop_residual) > FTCLOCK_REANCHOR) {
        r->counts.reanchored++;
        r->anchor.valid = 0;
        r->follow.known = 0;
        r->left = r->stop_residual = 0;
    } else if (magnitude(r->stop_residual) > r->counts.worst_residual) {
        r->counts.worst_residual = magnitude(r->stop_residual);
    }
}

int rule_get_clock(struct rule *r, int fd, struct kvm_clock_data *data) {
    struct reading now;
    notice_sleep(r);
    int rc = read_clock(r, fd, data, &now);
    if (rc < 0)
        return rc;
    int error = errno;
    notice_steps(r);

    /* QEMU may read more than once in a pause (before it migrates, say): the last value is the one that it writes back,
     * the first one says where the clock was. */
    bool again = r->stopped;
    r->stopped = true;
    r->stop_flags = now.data.flags;
    r->stop_stable = now.data.flags & KVM_CLOCK_TSC_STABLE;
    r->saved = now.data.clock;
    r->stop = now.at;
    if (r->stop_stable && !r->tsc_asked)
        learn_tsc(r, fd);
    else if (r->khz && r->host->tsc_offset(&r->tsc_offset) < 0)
        r->khz = 0;
    r->stop_tsc = r->stop_stable ? guest_tsc(r, &now) : 0;

    if (!r->stop_stable) {
        give_up_anchor(r);
        r->stop_residual = 0;
    } else if (!r->anchor.valid || !again) {
        r->stop_residual = 0;
        if (now.error > FTCLOCK_TOLERANCE)
            read_better(r, fd, &now);
        if (r->anchor.valid)
            judge_run(r, &now);
        take_anchor(r, &now, r->anchor.epoch + !r->anchor.valid);
        if (!r->follow.known)
            take_base(r, now.data.clock, now.at.real);
    }
    r->wrote = false;
    publish_counts(r);
    publish_now(r);
    errno = error;
    return rc;
}

/* --- the cont --- */

/* What is to be done with the pause that ends, by order or by the standing policy. */
struct verdict {
    uint32_t what; /* enum ftclock_do */
    uint16_t event;
    uint16_t reason; /* of a hold */
    bool ordered;
    bool torn;
};

static struct verdict judge(struct rule *r, const struct ftclock_policy *p, struct ftclock_record *rec) {
    struct verdict v = {.what = FTCLOCK_DO_HOLD, .reason = FTCLOCK_REASON_POLICY};
    uint64_t lost = (uint64_t)rec->lost + rec->slept;
    bool suspend = lost > p->checkpoint_limit;
    v.event = suspend ? FTCLOCK_EVENT_SUSPEND : FTCLOCK_EVENT_CHECKPOINT;
    v.what = suspend ? p->suspend_do : p->checkpoint_do;

    struct ftclock_order order;
    if (!consult(&order, &r->page->order, sizeof(order))) {
        v.torn = true;
        return v;
    }
    if (order.seq != r->order_seen) {
        r->order_seen = order.seq;
        /* An order belongs to a pause, and to a cont within it. */
        if (order.pause == rec->number && order.cont_raw >= rec->stop_raw && order.cont_raw <= rec->cont_raw) {
            v.ordered = true;
            rec->order_lost = order.lost;
            /* At the border the two sides may measure a pause on different sides of the limit: the order decides,
             * unless the host slept, which the shim doesn't measure. */
            bool measured = order.event == FTCLOCK_EVENT_CHECKPOINT || order.event == FTCLOCK_EVENT_SUSPEND;
            if (order.what != FTCLOCK_DO_POLICY && !(measured && rec->slept))
                v.what = order.what;
            if (measured && !rec->slept)
                v.event = (uint16_t)order.event;
            r->counts.orders++;
        } else if (order.pause) { /* 0: taken back */
            r->counts.stale_orders++;
        }
    }

    uint64_t limit = FTCLOCK_LIMIT_MAX;
    if (v.event == FTCLOCK_EVENT_SUSPEND && p->suspend_limit && p->suspend_limit < limit)
        limit = p->suspend_limit;
    if (!p->seq) {
        v.what = FTCLOCK_DO_HOLD;
        v.reason = FTCLOCK_REASON_NO_POLICY;
    } else if (!p->enabled) {
        v.what = FTCLOCK_DO_HOLD;
        v.reason = FTCLOCK_REASON_DISABLED;
    } else if (v.what == FTCLOCK_DO_CATCH_UP && lost > limit) {
        v.what = FTCLOCK_DO_HOLD;
        v.reason = FTCLOCK_REASON_OVER_LIMIT;
    }
    return v;
}

/*
 * Moves the anchor by what the guest lacks of its reference: by at most the slew bound of the time that it ran. What it
 * lacked before this run, after a step of the host's clock, comes in pieces that still count as a correction, however
 * long it ran. Back it goes no further than to the value read at the stop: what the guest can't be given would look
 * like a residual at the next stop. It stays a debt. Returns what the clock was moved by.
 */
static int64_t steer(struct rule *r, const struct ftclock_policy *p, const struct moment *now) {
    int64_t owed = debt(r, now);
    int64_t fresh = owed - r->follow.debt - r->stepped, by = 0;
    r->stepped = 0;
    if (p->reference == 1) {
        if (magnitude(owed) > FTCLOCK_FOLLOW_MAX) {
            give_up(r, owed);
            owed = 0;
        }
        uint64_t ran = r->ran_since_raw ? r->stop.raw - r->ran_since_raw : 0;
        uint64_t ppm = p->slew_ppm < FTCLOCK_SLEW_MAX ? p->slew_ppm : FTCLOCK_SLEW_MAX;
        uint64_t most = ran > LONGEST_RUN ? 0 : ran / 1000000 * ppm + ran % 1000000 * ppm / 1000000;
        if (most > FTCLOCK_REANCHOR + magnitude(fresh))
            most = FTCLOCK_REANCHOR + magnitude(fresh);
        int64_t room = (int64_t)(expected(r, now->raw) - r->saved);
        int64_t forth = (int64_t)most, back = room < 0 ? 0 : room < forth ? room : forth;
        by = owed > forth ? forth : owed < -back ? -back : owed;
        r->anchor.steer += by;
        r->follow.steered += by;
        publish_anchor(r);
    }
    r->follow.debt = owed - by;
    publish_follow(r);
    return by;
}

/* Makes QEMU's own write. */
static int pass(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec, uint16_t reason) {
    int rc = r->host->clock_ioctl(fd, KVM_SET_CLOCK, data);
    int error = errno;
    struct reading now;
    give_up_anchor(r);
    learn_tsc(r, fd); /* QEMU set it as well, where it loaded a state */
    if (rc >= 0 && read_stable(r, fd, &now))
        take_anchor(r, &now, r->anchor.epoch + 1);
    r->order_seen = __atomic_load_n(&r->page->order.seq, __ATOMIC_RELAXED); /* an order for this pause has had it */
    rec->decision = FTCLOCK_PASSED;
    rec->reason = reason;
    rec->went_on = data->clock;
    errno = error;
    return rc;
}

/* Makes QEMU's own write, and takes what follows from it: the guest stood still until the kernel took the value. */
static int hold(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec, uint16_t reason) {
    int rc = r->host->clock_ioctl(fd, KVM_SET_CLOCK, data);
    int error = errno;
    struct reading now;
    /* With KVM_CLOCK_REALTIME the kernel added the pause after all. */
    bool held = rc >= 0 && !(data->flags & KVM_CLOCK_REALTIME);
    bool known = held && read_stable(r, fd, &now);
    if (held) {
        /* By a clock that has the reference's rate, and no steps: a step within the pause stays a debt. */
        r->follow.base +=
            known ? now.at.boot - r->stop.boot - (now.data.clock - r->saved) : r->host->boot() - r->stop.boot;
        publish_follow(r);
    }
    if (known)
        take_anchor(r, &now, r->anchor.epoch);
    else
        give_up_anchor(r);
    rec->decision = rc < 0 ? FTCLOCK_PASSED : FTCLOCK_HELD;
    rec->reason = rc < 0 ? FTCLOCK_REASON_WRITE_FAILED : reason;
    rec->went_on = data->clock;
    errno = error;
    return rc;
}

/*
 * Writes what the guest's clock should be, never below what it was. The kernel takes the value some time after we made
 * it, by which the clock is late. So it is read back, and if it is off by more than the tolerance, written again with
 * that time added. False: the kernel refused it.
 */
static bool write_expected(struct rule *r, int fd, uint64_t least, struct ftclock_record *rec) {
    int64_t lag = 0;
    for (int i = 0; i < WRITES; i++) {
        uint64_t clock = expected(r, r->host->raw()) + (uint64_t)lag;
        bool back = (int64_t)(clock - least) < 0;
        if (back)
            clock = least;
        struct kvm_clock_data own = {.clock = clock}; /* no flags: the kernel is to add nothing of its own */
        if (r->host->clock_ioctl(fd, KVM_SET_CLOCK, &own) < 0)
            return i > 0; /* the first value stands */
        rec->went_on = clock;
        r->wrote = true;
        if (back)
            rec->reason = FTCLOCK_REASON_NEVER_BACK;
        struct reading now;
        if (!read_stable(r, fd, &now)) {
            give_up_anchor(r);
            break;
        }
        r->left = (int64_t)(now.data.clock - expected(r, now.at.raw));
        if (back || magnitude(r->left) <= FTCLOCK_TOLERANCE + now.error)
            break;
        /* A longer time isn't the kernel's: we were preempted, and won't be for as long again. */
        lag -= r->left;
        if (lag < 0 || lag > LAG_MAX)
            lag = 0;
    }
    return true;
}

/* Whether the kernel's clock went on in this pause as CLOCK_MONOTONIC_RAW did. What its own rate made of it is the
 * guest's. */
static bool judge_pause(struct rule *r, const struct reading *now) {
    int64_t drift = (int64_t)own_drift(&r->stop, &now->at);
    int64_t moved = (int64_t)(now->data.clock - expected(r, now->at.raw)) - r->left;
    uint64_t blur = r->anchor.error + now->error;
    /* In doubt the kernel's clock is right: nobody but QEMU sets it. */
    uint64_t tolerance = FTCLOCK_TOLERANCE + (uint64_t)drift + (blur > FTCLOCK_TOLERANCE ? blur : 0);
    if (magnitude(moved) > tolerance)
        return false;
    struct moment from = {.raw = r->drifted_raw, .slept = r->stop.slept};
    r->anchor.clock += (uint64_t)own(r, &from, &now->at, moved);
    r->drifted_raw = now->at.raw;
    return true;
}

static int catch_up(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec,
                    const struct ftclock_policy *p) {
    struct kvm_clock_data got = {0};
    struct reading now;
    if (read_clock(r, fd, &got, &now) < 0)
        return pass(r, fd, data, rec, FTCLOCK_REASON_READ_FAILED);
    if (!(got.flags & KVM_CLOCK_TSC_STABLE))
        return pass(r, fd, data, rec, FTCLOCK_REASON_UNSTABLE);
    if (now.error > FTCLOCK_TOLERANCE)
        read_better(r, fd, &now);
    rec->residual_cont = (int64_t)(now.data.clock - expected(r, now.at.raw));
    bool right = judge_pause(r, &now);
    /* A reading whose instant isn't known well would be taken for a debt; there is another pause. */
    int64_t steered = now.error <= STEER_BLUR ? steer(r, p, &now.at) : 0;
    if (right && magnitude(r->left - steered) <= FTCLOCK_TOLERANCE && now.data.clock >= r->saved) {
        r->left -= steered;
        rec->decision = FTCLOCK_DROPPED;
        rec->reason = FTCLOCK_REASON_IN_TOLERANCE;
        rec->went_on = now.data.clock;
        return 0;
    }
    publish_anchor(r);

    uint64_t raw = r->host->raw();
    uint64_t pause = raw - r->stop.raw + (r->slept - r->stop.slept);
    int64_t ahead = (int64_t)(expected(r, raw) - r->saved);
    if (ahead < -WRITE_SLACK ||
        ahead > (int64_t)(pause + own_drift(&r->stop, &now.at)) + WRITE_SLACK + (steered > 0 ? steered : 0))
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    rec->reason = FTCLOCK_REASON_OUT_OF_TOLERANCE;
    if (!write_expected(r, fd, r->saved, rec))
        return pass(r, fd, data, rec, FTCLOCK_REASON_WRITE_FAILED);
    rec->decision = FTCLOCK_ANCHORED;
    return 0;
}

/* How long the guest that a value is of hasn't run, ns, by the import. False: what it says can't be. */
static bool away_since(const struct ftclock_import *i, uint64_t clock, const struct moment *now, int64_t *away) {
    const int64_t most = INT64_C(10000000000000000); /* 115 days between reading and stop */
    int64_t ran = (int64_t)(clock - i->clock);
    if (ran > most || ran < -most || i->rate > 1000000 || i->rate < -1000000)
        return false;
    uint64_t leg = i->leg == FTCLOCK_LEG_RAW ? now->raw : now->real;
    int64_t faster = (int64_t)((double)ran * (double)i->rate / 1e9);
    *away = (int64_t)(leg - i->at - (uint64_t)ran - (uint64_t)faster);
    return true;
}

/* The same, of an imported state or of this process's own, now. */
static bool state_away(const struct rule *r, const struct ftclock_import *i, bool imported, uint64_t clock,
                       struct moment *now, int64_t *away, uint64_t *error) {
    *error = read_moment(r, now);
    if (!imported || i->leg == FTCLOCK_LEG_RAW)
        *error = 0; /* only one of the clocks counts */
    *away = (int64_t)(expected(r, now->raw) - clock);
    return !imported || away_since(i, clock, now, away);
}

/*
 * A write of another value than the one that was read at the stop: a state was loaded, saved by this process or
 * another. If the policy wants it caught up, the guest's clock goes on as if it had run since that state was saved: by
 * the anchor, which is this process's own guest's, or by the reading that the shim has from the earlier process.
 */
static int restore(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec) {
    struct ftclock_policy p;
    struct ftclock_import import;
    rec->event = FTCLOCK_EVENT_RESTORE;
    if (!consult(&p, &r->page->policy, sizeof(p)) || !consult(&import, &r->page->import, sizeof(import)))
        return pass(r, fd, data, rec, FTCLOCK_REASON_TORN);
    bool imported =
        import.seq && import.seq != r->import_used && import.at && (import.any || import.clock == data->clock);
    if (!p.seq || !p.enabled || !(imported || (r->anchor.valid && p.restore_do == FTCLOCK_DO_CATCH_UP))) {
        if (!r->stopped)
            rec->event = FTCLOCK_EVENT_START;
        return pass(r, fd, data, rec, r->stopped ? FTCLOCK_REASON_OTHER_VALUE : FTCLOCK_REASON_FIRST);
    }
    if (imported && import.event == FTCLOCK_EVENT_MIGRATE)
        rec->event = FTCLOCK_EVENT_MIGRATE;
    bool migrate = rec->event == FTCLOCK_EVENT_MIGRATE;
    uint64_t limit = migrate ? p.migrate_limit : p.restore_limit;
    if (!limit || limit > FTCLOCK_LIMIT_MAX)
        limit = FTCLOCK_LIMIT_MAX;

    struct reading here;
    if (!imported && r->stopped && read_stable(r, fd, &here))
        judge_pause(r, &here);
    struct moment now;
    int64_t away;
    uint64_t blur;
    if (!state_away(r, &import, imported, data->clock, &now, &away, &blur))
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    if (imported) {
        r->import_used = import.seq;
        if (import.error > rec->error) /* to what the guest goes on by, not this host alone */
            rec->error = import.error < INT64_MAX ? import.error : INT64_MAX;
    }
    rec->lost = away > 0 ? away : 0;
    uint16_t reason = imported ? FTCLOCK_REASON_FROM_IMPORT : FTCLOCK_REASON_FROM_ANCHOR;
    bool over = (uint64_t)rec->lost > limit;
    if ((migrate ? p.migrate_do : p.restore_do) != FTCLOCK_DO_CATCH_UP || over) {
        int rc = pass(r, fd, data, rec, over ? FTCLOCK_REASON_OVER_LIMIT : FTCLOCK_REASON_POLICY);
        rec->decision = rc < 0 ? FTCLOCK_PASSED : FTCLOCK_HELD;
        return rc;
    }
    if (away < 0) {
        /* By a clock of another host the guest is ahead. A little is that clock's error. */
        if (magnitude(away) > limit)
            return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
        reason = FTCLOCK_REASON_NEVER_BACK;
    }
    /* The TSC that belongs to the guest's clock: as it came with the reading, or as it was at this process's last stop.
     */
    uint64_t from_clock = imported ? import.clock : r->saved, from_tsc = imported ? import.tsc : r->stop_tsc;
    uint32_t from_khz = imported ? import.khz : r->stop_tsc ? r->khz : 0;
    struct ftclock_anchor before = r->anchor;
    r->anchor = (struct ftclock_anchor){
        .valid = 1,
        .epoch = r->anchor.epoch + 1,
        .clock = data->clock + (uint64_t)rec->lost,
        .raw = now.raw,
        .real = now.real,
        .boot = now.boot,
        .slept = r->slept,
        .error = imported ? import.error : r->anchor.error,
    };
    r->drifted_raw = now.raw;
    r->left = 0;
    uint64_t error = r->anchor.error > UINT64_MAX - blur ? UINT64_MAX : r->anchor.error + blur;
    if (!write_expected(r, fd, data->clock, rec)) {
        r->anchor = before;
        return pass(r, fd, data, rec, FTCLOCK_REASON_WRITE_FAILED);
    }
    rec->reason = reason;
    rec->tsc = move_tsc(r, fd, from_clock, from_tsc, from_khz, data, rec);
    /* The guest is off by what the write missed. Where that can't be read, it is no more than all of this took. */
    uint64_t missed = r->anchor.valid ? magnitude(r->left) : r->host->raw() - now.raw;
    r->anchor.error = error > UINT64_MAX - missed ? UINT64_MAX : error + missed;
    if (imported && r->anchor.error > rec->error)
        rec->error = r->anchor.error < INT64_MAX ? r->anchor.error : INT64_MAX;
    publish_anchor(r);
    /* A guest that is ahead owes it to its reference. An older state of the same guest goes on with its old base. */
    if (imported)
        take_base(r, data->clock + (uint64_t)away, now.real);
    rec->decision = FTCLOCK_ANCHORED;
    return 0;
}

/* What CLOCK_REALTIME may be off UTC by; 0: nobody said. */
static uint64_t host_error(struct rule *r, uint64_t raw) {
    struct ftclock_host host;
    if (!__atomic_load_n(&r->page->host.seq, __ATOMIC_RELAXED) || !consult(&host, &r->page->host, sizeof(host)) ||
        !host.seq || raw < host.at_raw)
        return 0;
    uint64_t since = (raw - host.at_raw) / 1000000 * FREQUENCY_ERROR_PPM;
    return host.error > UINT64_MAX - since ? UINT64_MAX : host.error + since;
}

static void count(struct rule *r, const struct ftclock_record *rec) {
    switch (rec->decision) {
    case FTCLOCK_DROPPED:
        r->counts.dropped++;
        r->counts.caught_up_ns += (uint64_t)rec->lost + rec->slept;
        break;
    case FTCLOCK_ANCHORED:
        r->counts.anchored++;
        r->counts.caught_up_ns += (uint64_t)rec->lost + rec->slept;
        break;
    case FTCLOCK_HELD:
        r->counts.held++;
        r->counts.held_ns += (uint64_t)rec->lost + rec->slept;
        r->counts.over_limit += rec->reason == FTCLOCK_REASON_OVER_LIMIT;
        break;
    default:
        r->counts.passed++;
    }
    if (rec->cost > r->counts.worst_cost)
        r->counts.worst_cost = rec->cost;
}

int rule_set_clock(struct rule *r, int fd, struct kvm_clock_data *data) {
    uint64_t begin = r->host->raw();
    struct ftclock_record rec = {
        .number = r->counts.pauses + 1,
        .flags = r->stop_flags,
        .saved = data->clock,
        .cont_raw = begin,
        .cont_real = r->host->real(),
        .event = FTCLOCK_EVENT_NONE,
    };
    rec.error = host_error(r, begin);
    notice_sleep(r);
    notice_steps(r);
    int rc;

    if (!r->stopped) {
        rc = restore(r, fd, data, &rec);
    } else {
        rec.stop_raw = r->stop.raw;
        rec.stop_real = r->stop.real;
        rec.residual_stop = r->stop_residual;
        rec.lost = (int64_t)(begin - r->stop.raw);
        rec.slept = r->slept - r->stop.slept;

        struct ftclock_policy policy;
        struct verdict v;
        if (data->clock != r->saved) {
            rc = restore(r, fd, data, &rec);
        } else if (!r->stop_stable || !r->anchor.valid) {
            /* QEMU reads the clock while it builds the machine, too: a first write without a run before it. */
            rec.event = r->counts.pauses ? FTCLOCK_EVENT_NONE : FTCLOCK_EVENT_START;
            rc = pass(r, fd, data, &rec, FTCLOCK_REASON_UNSTABLE);
        } else if (rec.lost < 0) {
            rc = pass(r, fd, data, &rec, FTCLOCK_REASON_BOUNDS);
        } else if (!consult(&policy, &r->page->policy, sizeof(policy))) {
            rc = pass(r, fd, data, &rec, FTCLOCK_REASON_TORN);
        } else if (v = judge(r, &policy, &rec), v.torn) {
            rc = pass(r, fd, data, &rec, FTCLOCK_REASON_TORN);
        } else {
            rec.event = v.event;
            rec.ordered = v.ordered;
            rc = v.what == FTCLOCK_DO_CATCH_UP ? catch_up(r, fd, data, &rec, &policy)
                                               : hold(r, fd, data, &rec, v.reason);
        }
    }
    int error = errno;
    if (rec.event >= FTCLOCK_EVENT_RESTORE && rec.decision != FTCLOCK_ANCHORED)
        begin_following(r, fd);

    r->stopped = false;
    uint64_t end = r->host->raw();
    r->ran_since_raw = end;
    rec.cost = end - begin;
    r->counts.pauses = rec.number;
    count(r, &rec);
    publish(&r->page->ring[(rec.number - 1) % FTCLOCK_RING_LEN], &rec, sizeof(rec));
    publish_counts(r);
    publish_now(r);
    errno = error;
    return rc;
}

void rule_start(struct rule *r, const struct host *host, struct ftclock_page *page, uint32_t pid) {
    memset(r, 0, sizeof(*r));
    r->host = host;
    r->page = page;
    r->first_raw = host->raw();
    r->first_tsc = host->tsc();
    notice_sleep(r);
    page->head.major = FTCLOCK_PAGE_MAJOR;
    page->head.minor = FTCLOCK_PAGE_MINOR;
    page->head.size = FTCLOCK_PAGE_SIZE;
    page->head.ring_len = FTCLOCK_RING_LEN;
    page->head.record_size = sizeof(struct ftclock_record);
    page->head.pid = pid;
    page->head.loaded_raw = r->first_raw;
    publish_now(r);
    __atomic_store_n(&page->head.magic, FTCLOCK_PAGE_MAGIC, __ATOMIC_RELEASE);
}
