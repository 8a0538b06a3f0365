/* SPDX-License-Identifier: MIT */
/* The host sleeps: kvmclock and CLOCK_BOOTTIME go on, CLOCK_MONOTONIC_RAW doesn't; the TSC may. */
#include "engine.h"

SCENARIO(the_host_slept_while_the_guest_ran) {
    anchored_guest();
    run(SEC);
    host_sleeps(HOUR, true);
    sim.clock += 600 * MS; /* the TSC counted the sleep to the nanosecond, CLOCK_BOOTTIME to the second */
    guest_saw = guest();
    mark_twin();
    dropped(SEC, 5 * MS);
    NEAR(off_twin(), US);
    FIRST_ANCHOR_KEPT();
    CHECK(page->follow.sleeps == 1 && record()->slept == 0 && record()->residual_stop == 0);

    /* The TSC's rate is known again, so that a preempted reading is as good as before. */
    stop_after(SEC);
    stand(5 * MS);
    cont_preempted(13, 7 * MS);
    DROPPED();
}

struct sleep {
    const char *name;
    int64_t slept;
    uint32_t suspend_do;
    uint16_t reason; /* of a hold; NONE: caught up */
    bool ordered;    /* by a shim that took it for a checkpoint */
};

static void slept_in_a_pause(const struct sleep *c, bool tsc_goes_on) {
    attach();
    page->policy.suspend_do = c->suspend_do;
    checkpoint(SEC, 5 * MS);
    stop_after(SEC);
    stand(2 * MS);
    host_sleeps(c->slept, tsc_goes_on);
    stand(2 * MS);
    if (c->ordered)
        write_order(page->now.pause, (uint64_t)(4 * MS));
    cont();
    NOT_BACK();
    CHECK(record()->event == (c->slept > 10 * SEC ? FTCLOCK_EVENT_SUSPEND : FTCLOCK_EVENT_CHECKPOINT));
    NEAR((int64_t)record()->slept - c->slept, US);
    NEAR(record()->lost - 4 * MS, MS);
}

SCENARIO(the_host_slept_in_a_pause) {
    static const struct sleep cases[] = {
        {"for an hour", HOUR, HOLD, FTCLOCK_REASON_POLICY, false},
        {"for an hour that the shim took for a checkpoint", HOUR, HOLD, FTCLOCK_REASON_POLICY, true},
        {"for ten minutes, to be caught up", 600 * SEC, CATCH_UP, FTCLOCK_REASON_NONE, false},
        {"for an hour, to be caught up", HOUR, CATCH_UP, FTCLOCK_REASON_OVER_LIMIT, true},
        {"for a second", SEC, HOLD, FTCLOCK_REASON_NONE, false},
    };
    for (int i = 0; i < 2 * LENGTH(cases); i++) {
        const struct sleep *c = &cases[i / 2];
        bool tsc_goes_on = i & 1;
        in_case("%s, a TSC that %s", c->name, tsc_goes_on ? "goes on" : "begins anew");
        slept_in_a_pause(c, tsc_goes_on);
        int64_t went_on = guest() - (int64_t)kept.clock;
        if (c->reason == FTCLOCK_REASON_NONE) {
            NEAR(went_on - c->slept - 4 * MS, 10 * US);
            CHECK(record()->decision == (tsc_goes_on ? FTCLOCK_DROPPED : FTCLOCK_ANCHORED));
        } else {
            CHECK(went_on < US);
            DECIDED_AS(FTCLOCK_HELD, c->reason);
        }
        mark_twin();
        checkpoint(SEC, 5 * MS);
        if (tsc_goes_on) {
            DROPPED();
            NEAR(off_twin(), 2 * US);
        } else { /* KVM says no longer that the clock is stable */
            DECIDED(PASSED, UNSTABLE);
        }
    }
}

static void slept_at(int place, bool in_stop, bool hold) {
    attach();
    page->policy.suspend_do = CATCH_UP;
    checkpoint(SEC, 5 * MS);
    mark_twin();
    run(SEC);
    preempt(in_stop ? place : 0, 100 * SEC);
    sim.preempt_asleep = true;
    stop();
    if (hold)
        policy_says(HOLD);
    stand(5 * MS);
    preempt(in_stop ? 0 : place, 100 * SEC);
    sim.preempt_asleep = true;
    cont();
    preempt(0, 0);
    NOT_BACK();
    if (hold)
        mark_twin();
    else
        mark.clock += sim.suspended;
    NEAR(off_twin(), 2 * US);
    /* What it slept behind the last look at it is the next pause's to see. */
    for (int i = 0; i < 3; i++) {
        checkpoint(SEC, 5 * MS);
        NEAR(off_twin(), 2 * US);
    }
    DROPPED();
    CHECK(page->anchor.epoch == 1);
}

SCENARIO(the_host_slept_at_any_moment_of_the_modules_own_work) {
    for (int i = 0; i < 4 * 60; i++) {
        int place = i / 4 + 1;
        bool in_stop = i & 1, hold = i & 2;
        in_case("at place %d of the %s, %s", place, in_stop ? "stop" : "cont", hold ? "held" : "caught up");
        slept_at(place, in_stop, hold);
    }
}

/* Sleeps that the host doesn't count, as a real one does: a guest that runs sees them, and one in whose pause they fall
 * goes on as if it had run. */
SCENARIO(a_sleep_that_the_host_does_not_count) {
    static const int64_t lengths[] = {20 * US, 3 * MS, 900 * MS};
    for (int i = 0; i < 2 * LENGTH(lengths); i++) {
        int64_t slept = lengths[i / 2];
        bool in_a_pause = i & 1;
        in_case("of %" PRId64 " us, %s", slept / US, in_a_pause ? "in a pause" : "while the guest runs");
        anchored_guest();
        checkpoint(SEC, 5 * MS);
        mark_twin();
        stop_after(SEC);
        stand(2 * MS);
        if (in_a_pause)
            host_sleeps_uncounted(slept);
        cont();
        DROPPED();
        if (in_a_pause)
            NEAR((int64_t)record()->slept - slept, 2 * US);
        run(SEC);
        if (!in_a_pause)
            host_sleeps_uncounted(slept);
        for (int n = 0; n < 3; n++) {
            dropped(SEC, 5 * MS);
            NEAR(off_twin() - slept, 2 * US);
            CHECK(record()->residual_stop == 0);
        }
        FIRST_ANCHOR_KEPT();
    }
}

/* What a pause took from the clock, and not from the TSC, is no measure of what moves both. */
SCENARIO(a_sleep_that_the_host_does_not_count_after_a_held_pause) {
    for (int i = 0; i < 4; i++) {
        bool set = i & 1, in_a_pause = i & 2;
        in_case("%s, %s", set ? "set" : "slept", in_a_pause ? "after a sleep in a pause" : "after a held pause");
        anchored_guest();
        stop_after(SEC);
        if (in_a_pause)
            host_sleeps_uncounted(150 * MS);
        else
            policy_says(HOLD);
        stand(150 * MS);
        cont();
        mark_twin();
        run(SEC);
        if (set)
            kernel_moves(150 * MS);
        else
            host_sleeps_uncounted(150 * MS);
        checkpoint(SEC, 5 * MS);
        NEAR(off_twin() - 150 * MS, 2 * US);
        CHECK(page->counts.reanchored == set);
    }
}
