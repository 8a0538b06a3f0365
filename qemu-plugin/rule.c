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
#include "rule_parts.h"

#include <errno.h>
#include <string.h>

/* A value that was missed is written again so often: where each call's time varies, some will hit. */
#define WRITES 8
/* The longest time that the kernel itself may take between the call of KVM_SET_CLOCK and its effect. */
#define LAG_MAX INT64_C(200000)
/* A reading whose instant is known less well isn't steered by. */
#define STEER_BLUR 20000
/* The clock that we write may be above QEMU's by the pause, give or take this: the residual that is corrected at once.
 */
#define WRITE_SLACK (2 * FTCLOCK_REANCHOR)
/* The most that the host's clock errs by between two times that the shim asks, as the kernel has it (NTP's MAXFREQ). */
#define FREQUENCY_ERROR_PPM 500

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
    if (r->stop_residual > FTCLOCK_TOLERANCE && !r->wrote && slept_uncounted(r, r->stop_residual, now))
        r->stop_residual = r->left;
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

/* The reading at the stop is blurred: from a better one, its clock tells when it was. */
static void find_stop(struct rule *r, int fd, struct reading *now) {
    uint64_t blur = now->error;
    read_better(r, fd, now);
    int64_t late = (int64_t)(now->at.raw - (now->data.clock - r->saved) - r->stop.raw);
    if (now->at.slept != r->stop.slept || magnitude(late) > blur + FTCLOCK_TOLERANCE)
        return;
    r->stop.raw += (uint64_t)late;
    r->stop.boot += (uint64_t)late;
    if (!(r->stop_flags & KVM_CLOCK_REALTIME)) /* else the kernel told it with the clock */
        r->stop.real += (uint64_t)late;
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
    if (r->stop_stable && now.error > FTCLOCK_TOLERANCE)
        find_stop(r, fd, &now);

    if (!r->stop_stable) {
        give_up_anchor(r);
        r->stop_residual = 0;
    } else if (!r->anchor.valid || !again) {
        r->stop_residual = 0;
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

/* What is to be done with the pause that ends, by the standing policy. */
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
            r->counts.orders++;
        } else if (order.pause) { /* 0: taken back */
            r->counts.stale_orders++;
        }
    }

    uint64_t limit = FTCLOCK_LIMIT_MAX;
    if (suspend && p->suspend_limit && p->suspend_limit < limit)
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

/* Makes QEMU's own write. */
int pass(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec, uint16_t reason) {
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
bool write_expected(struct rule *r, int fd, uint64_t least, struct ftclock_record *rec) {
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
 * guest's, and so is a sleep that the host didn't count: a guest that runs sees it. */
bool judge_pause(struct rule *r, const struct reading *now, struct ftclock_record *rec) {
    /* The anchor is of the first reading in this pause, the stop of the last one. */
    struct moment from = {.raw = r->drifted_raw, .slept = r->anchor.slept};
    int64_t drift = (int64_t)own_drift(&from, &now->at);
    int64_t moved = (int64_t)(now->data.clock - expected(r, now->at.raw)) - r->left;
    uint64_t blur = r->anchor.error + now->error;
    /* In doubt the kernel's clock is right: nobody but QEMU sets it. */
    uint64_t tolerance = FTCLOCK_TOLERANCE + (uint64_t)drift + (blur > FTCLOCK_TOLERANCE ? blur : 0);
    int64_t by_itself = moved;
    if (magnitude(moved) <= tolerance)
        by_itself = own(r, &from, &now->at, moved);
    else if (slept_uncounted(r, moved, now))
        rec->slept += (uint64_t)(moved - own(r, &from, &now->at, moved));
    else
        return false;
    r->anchor.clock += (uint64_t)by_itself;
    r->drifted_raw = now->at.raw;
    return true;
}

static int catch_up(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec,
                    const struct ftclock_policy *p) {
    struct reading now;
    if (read_clock(r, fd, &now.data, &now) < 0)
        return pass(r, fd, data, rec, FTCLOCK_REASON_READ_FAILED);
    if (!(now.data.flags & KVM_CLOCK_TSC_STABLE))
        return pass(r, fd, data, rec, FTCLOCK_REASON_UNSTABLE);
    if (now.error > FTCLOCK_TOLERANCE)
        read_better(r, fd, &now);
    rec->residual_cont = (int64_t)(now.data.clock - expected(r, now.at.raw));
    bool right = judge_pause(r, &now, rec);
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
    uint64_t took = (uint64_t)(rec->lost > 0 ? rec->lost : 0) + rec->slept;
    switch (rec->decision) {
    case FTCLOCK_DROPPED:
        r->counts.dropped++;
        r->counts.caught_up_ns += took;
        break;
    case FTCLOCK_ANCHORED:
        r->counts.anchored++;
        r->counts.caught_up_ns += took;
        break;
    case FTCLOCK_HELD:
        r->counts.held++;
        r->counts.held_ns += took;
        r->counts.over_limit += rec->reason == FTCLOCK_REASON_OVER_LIMIT;
        break;
    default:
        r->counts.passed++;
        r->counts.passed_ns += took;
    }
    if (rec->cost > r->counts.worst_cost)
        r->counts.worst_cost = rec->cost;
}

/* Ends a pause that began with the kernel's own reading. */
static int end_pause(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec) {
    struct ftclock_policy policy;
    rec->stop_raw = r->stop.raw;
    rec->stop_real = r->stop.real;
    rec->residual_stop = r->stop_residual;
    rec->lost = (int64_t)(rec->cont_raw - r->stop.raw);
    rec->slept = r->slept - r->stop.slept;
    if (data->clock != r->saved)
        return restore(r, fd, data, rec);
    if (!r->stop_stable || !r->anchor.valid) {
        /* QEMU reads the clock while it builds the machine, too: a first write without a run before it. */
        rec->event = r->counts.pauses ? FTCLOCK_EVENT_NONE : FTCLOCK_EVENT_START;
        return pass(r, fd, data, rec, FTCLOCK_REASON_UNSTABLE);
    }
    if (rec->lost < 0)
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    if (!consult(&policy, &r->page->policy, sizeof(policy)))
        return pass(r, fd, data, rec, FTCLOCK_REASON_TORN);
    struct verdict v = judge(r, &policy, rec);
    if (v.torn)
        return pass(r, fd, data, rec, FTCLOCK_REASON_TORN);
    rec->event = v.event;
    rec->ordered = v.ordered;
    return v.what == FTCLOCK_DO_CATCH_UP ? catch_up(r, fd, data, rec, &policy) : hold(r, fd, data, rec, v.reason);
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
    int rc = r->stopped ? end_pause(r, fd, data, &rec) : restore(r, fd, data, &rec);
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
    publish_cont(r);
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
