/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * The reference: what the guest's clock lacks of the host's disciplined clock, as a debt, and by how much a pause may
 * pay it off.
 */
#include "rule_parts.h"

/* A smaller step of CLOCK_REALTIME isn't counted, though it is followed: we may have been preempted between two
 * readings. */
#define STEP_LEAST INT64_C(100000000)
/* A guest that ran for longer, 11 days, isn't steered: the arithmetic of the slew bound is for less. */
#define LONGEST_RUN UINT64_C(1000000000000000)

/* What the guest follows, at the time that CLOCK_REALTIME read real. */
static uint64_t reference(const struct rule *r, uint64_t real) { return real + (uint64_t)(r->tai * SECOND); }

/* The guest doesn't follow its reference over so much, and stays where it is. */
static void give_up(struct rule *r, int64_t what) {
    r->follow.base += (uint64_t)what;
    r->follow.given_up++;
    r->follow.last_given = what;
}

/*
 * Finds out by how many seconds CLOCK_TAI is ahead of CLOCK_REALTIME, and how both changed since the last time. A
 * leap second moves CLOCK_REALTIME, and the reference goes on. Somebody who tells the kernel the difference moves
 * CLOCK_TAI, and the base goes with it. A step moves both. CLOCK_BOOTTIME, which nobody sets, tells which it was.
 */
void notice_steps(struct rule *r) {
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
    bool seen = r->tai_known && (ahead != r->tai || magnitude(step) > STEP_LEAST);
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
    if (seen)
        publish_follow(r);
}

/* From now on the guest's clock is right as it reads. */
void take_base(struct rule *r, uint64_t clock, uint64_t real) {
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

/* Begins anew with a guest whose clock was set by somebody else: it goes on from what its clock is now. */
void begin_following(struct rule *r, int fd) {
    struct reading now = {.error = UINT64_MAX};
    read_better(r, fd, &now);
    r->follow.known = 0;
    if (now.error != UINT64_MAX)
        take_base(r, now.data.clock, now.at.real);
    else
        publish_follow(r);
}

/*
 * Moves the anchor by what the guest lacks of its reference: by at most the slew bound of the time that it ran. What it
 * lacked before this run, after a step of the host's clock, comes in pieces that still count as a correction, however
 * long it ran. Back it goes no further than to the value read at the stop: what the guest can't be given would look
 * like a residual at the next stop. It stays a debt. Returns what the clock was moved by.
 */
int64_t steer(struct rule *r, const struct ftclock_policy *p, const struct moment *now) {
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
    if (p->reference == 1)
        publish_follow(r);
    else
        publish_debt(r);
    return by;
}
