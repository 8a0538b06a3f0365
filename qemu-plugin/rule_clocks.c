/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/* The rule's readings of the kernel's clock and the host's, and how well their instants are known. */
#include "rule_parts.h"

/* Ticks of the TSC, 1 us or more, in which CLOCK_MONOTONIC_RAW is read unless we are preempted. */
#define PAIR_SLOW 5000
/* A shorter sleep of the host isn't told from the time between two readings. */
#define SLEEP_LEAST INT64_C(100000)

/*
 * What it did leave them by, where it was seen to leave them by so much. Where its rate is known, what is seen beyond
 * that is the error of our readings, and taken for its rate it would add up over states that are loaded, each of which
 * is written.
 */
int64_t own(const struct rule *r, const struct moment *from, const struct moment *to, int64_t seen) {
    if (r->own_rate_known && to->slept == from->slept) {
        double by = (double)(int64_t)(to->raw - from->raw) * r->own_rate;
        return (int64_t)(by < 0 ? by - 0.5 : by + 0.5); /* not always towards zero: that adds up, too */
    }
    return clamp(seen, (int64_t)own_drift(from, to));
}

/*
 * Whether the kernel's clock is ahead by so much because the host slept and didn't count that: it may count by a clock
 * of whole seconds. CLOCK_MONOTONIC_RAW stood still then, and the clock went on with the TSC since the anchor.
 * One that somebody has set didn't.
 */
bool slept_uncounted(const struct rule *r, int64_t ahead, const struct reading *now) {
    uint64_t tsc = guest_tsc(r, now);
    if (ahead <= 0 || !r->anchor.tsc || !tsc)
        return false;
    int64_t went_on = (int64_t)((__int128)(int64_t)(tsc - r->anchor.tsc) * 1000000 / r->khz);
    return magnitude((int64_t)(now->data.clock - r->anchor_read) - went_on) < (uint64_t)ahead / 2;
}

/*
 * Finds out whether the host slept. CLOCK_BOOTTIME and CLOCK_MONOTONIC run at one rate, and only a sleep moves them
 * apart. A reading that we were preempted in says nothing: the next one does.
 */
void notice_sleep(struct rule *r) {
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

/* The host's clocks of one moment, to the error that is returned: read again where we were preempted between them. */
uint64_t read_moment(const struct rule *r, struct moment *now) {
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
static WHERE_IT_IS_CALLED int read_once(struct rule *r, int fd, struct kvm_clock_data *data, struct reading *out) {
    const struct host *h = r->host;
    uint64_t raw0 = h->raw();
    uint64_t tsc0 = h->tsc();
    int rc = h->clock_ioctl(fd, KVM_GET_CLOCK, data);
    if (rc < 0)
        return rc;
    if (data != &out->data)
        out->data = *data;
    uint64_t tsc1, raw1, tsc2;
    int tries = 0;
    do { /* this pair can be taken again if we are preempted within it */
        tsc1 = h->tsc();
        raw1 = h->raw();
        tsc2 = h->tsc();
    } while (++tries < READ_TRIES && tsc2 - tsc1 > PAIR_SLOW);

    out->at.raw = raw0 + (raw1 - raw0) / 2;
    out->error = (raw1 - raw0 + 1) / 2;
    int64_t span_raw = (int64_t)(raw1 - r->first_raw);
    int64_t span_tsc = (int64_t)(tsc1 - r->first_tsc);
    uint64_t then = out->data.host_tsc;
    if ((out->data.flags & KVM_CLOCK_HOST_TSC) && then >= tsc0 && then <= tsc1 && span_raw > RATE_SPAN &&
        span_tsc > 0) {
        double rate = (double)span_raw / (double)span_tsc;
        /* raw1 was read between tsc1 and tsc2. Signed numbers, which become floating-point ones by one instruction. */
        double half = (double)(int64_t)(tsc2 - tsc1) / 2;
        uint64_t at = raw1 - (uint64_t)(int64_t)(((double)(int64_t)(tsc1 - then) + half) * rate);
        uint64_t bound = (uint64_t)(int64_t)(half * rate) + 1;
        if (at >= raw0 && at <= raw1 && bound < out->error) {
            out->at.raw = at;
            out->error = bound;
        }
    }
    out->at.real = out->data.realtime;
    if (!(out->data.flags & KVM_CLOCK_REALTIME)) {
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
    return rc;
}

/* A reading that the host slept in is of no one instant, and made again. The caller has just noticed any sleep before
 * it. errno is the kernel's where that fails: nothing else in here sets it. The kernel writes to data, which may be
 * out's own: where QEMU asks, data is QEMU's, an address that the kernel may refuse. */
int read_clock(struct rule *r, int fd, struct kvm_clock_data *data, struct reading *out) {
    for (int i = 0;; i++) {
        int rc = read_once(r, fd, data, out);
        if (rc < 0)
            return rc;
        notice_sleep(r);
        if (out->at.slept == r->slept || i == 1)
            return rc;
    }
}

/* Reads again while a reading is blurred, and keeps the best. A reading whose error is UINT64_MAX is none yet. */
void read_better(struct rule *r, int fd, struct reading *best) {
    for (int i = 0; i < READ_TRIES && best->error > FTCLOCK_TOLERANCE; i++) {
        struct reading other;
        if (read_clock(r, fd, &other.data, &other) == 0 && other.error < best->error &&
            (best->error == UINT64_MAX || other.data.flags == best->data.flags))
            *best = other;
    }
}

/* False: the kernel doesn't say, or its clock isn't stable. */
bool read_stable(struct rule *r, int fd, struct reading *now) {
    if (read_clock(r, fd, &now->data, now) < 0 || !(now->data.flags & KVM_CLOCK_TSC_STABLE))
        return false;
    read_better(r, fd, now);
    return true;
}

/* Of this reading, from which the clock is left to be corrected by r->left. */
void take_anchor(struct rule *r, const struct reading *from, uint64_t epoch) {
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
    r->anchor_read = from->data.clock;
    r->drifted_raw = from->at.raw;
    publish_anchor(r);
}

void give_up_anchor(struct rule *r) {
    if (!r->anchor.valid)
        return;
    r->anchor.valid = 0;
    r->left = 0;
    publish_anchor(r);
}
