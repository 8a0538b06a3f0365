/* SPDX-License-Identifier: MIT */
/* Reference 1: the guest follows the host's disciplined clock, within the slew bound, never back. */
#include "engine.h"

/* A guest that follows a clock whose rate is so many ns/s off, and its first pause. */
static void following(int64_t rate) {
    attach();
    follow_utc();
    set_real(0, rate);
    checkpoint(SEC, 5 * MS);
    mark_twin();
}

/* Both signs of a case. */
#define BOTH_WAYS(sign) for (int sign = (in_case("forth"), 1); sign >= -1; sign -= 2, in_case("back"))

/* After so many more checkpoints the guest is where its reference is. */
static void settles(int pauses, int64_t to) {
    checkpoints(pauses, SEC, 50 * MS);
    NEAR(off_reference(), to);
}

/* --- steering --- */

SCENARIO(utc_follows_the_rate_of_realtime) {
    BOTH_WAYS(sign) {
        following(sign * 40000); /* 40 ppm: a bad crystal, disciplined */
        for (int j = 0; j < 20000; j++) {
            checkpoint(50 * MS, 5 * MS);
            NEAR(off_reference(), 5 * US);
            CAUGHT_UP();
        }
        CHECK(page->anchor.epoch == 1);
    }
}

SCENARIO(utc_does_not_follow_a_step_of_an_hour_but_the_rate_still) {
    BOTH_WAYS(sign) {
        following(40000);
        int64_t step = sign * HOUR;
        for (uint64_t steps = 1; steps <= 4; steps++, step = -step) {
            set_real(step, 40000);
            mark.real += (uint64_t)step;
            for (int k = 0; k < 100; k++) {
                checkpoint(50 * MS, 5 * MS);
                NEAR(off_reference(), 3 * US);
            }
            CHECK(page->follow.given_up == steps && page->follow.steps == steps);
            NEAR(page->follow.last_step - step, 3 * US);
            NEAR(page->follow.last_given - step, 3 * US);
        }
        FIRST_ANCHOR_KEPT();
        CHECK(page->follow.bases == 1);
    }
}

SCENARIO(utc_slews_a_step_of_five_seconds) {
    BOTH_WAYS(sign) {
        following(0);
        set_real(sign * 5 * SEC, 0);
        for (int j = 0; j < 10000; j++) {
            int64_t before = off_twin(), from = sim.now;
            checkpoint(50 * MS, 5 * MS);
            int64_t slew = size(off_twin() - before), most = (sim.now - from) * 500 / 1000000;
            CHECK(slew <= most + US);
            CHECK(j < 10 || slew >= most * 8 / 10);
            CHECK(record()->decision == FTCLOCK_ANCHORED && record()->residual_stop < 2 * US);
        }
        FIRST_ANCHOR_KEPT();
        CHECK(page->follow.steps == 1 && page->follow.given_up == 0);
    }
}

SCENARIO(utc_converges_after_a_step_of_2_ms) {
    BOTH_WAYS(sign) {
        following(0);
        set_real(sign * 2 * MS, 0);
        checkpoints(200, 50 * MS, 5 * MS);
        NEAR(off_reference(), 3 * US);
    }
}

/* The slew bound grows with the run: a step must not become one jump after a long one, and drift must not stay. */
SCENARIO(utc_gives_a_step_of_nine_seconds_in_a_run_of_five_hours_in_pieces) {
    BOTH_WAYS(sign) {
        attach();
        follow_utc();
        checkpoint(SEC, 5 * MS);
        set_real(0, sign * 20000);
        run(5 * HOUR);
        mark_twin();
        set_real(sign * 9 * SEC, 0);
        checkpoint(SEC, 2 * SEC);
        CHECK(record()->decision == FTCLOCK_ANCHORED);
        /* 20 ppm of five hours are 360 ms. */
        NEAR(size(off_twin()) - FTCLOCK_REANCHOR - 360 * MS, 10 * US);
        CHECK(page->anchor.valid && page->anchor.epoch == 1);
    }
}

/* Back by more than the pauses are long: no pause gives more than itself. */
SCENARIO(utc_goes_back_in_pauses_shorter_than_the_slew) {
    following(0);
    set_real(-300 * MS, 0);
    checkpoints(4000, SEC, 100 * US); /* the bound is 500 us, the pause 100 */
    FIRST_ANCHOR_KEPT();              /* else what was left to follow is forgotten */
    NEAR(off_reference(), 3 * US);
}

SCENARIO(utc_does_not_steer_by_held_pauses) {
    following(0);
    for (int j = 0; j < 100; j++) {
        held(50 * MS, 30 * MS);
        mark_twin();
        checkpoint(50 * MS, 5 * MS);
        NEAR(off_twin(), 2 * US);
    }
}

/* The guest stood until the kernel took the value, however late that was, and however late it was read back. */
SCENARIO(utc_does_not_steer_by_a_held_pause_that_is_preempted) {
    for (int place = 1; place <= 40; place++) {
        in_case("at place %d", place);
        following(0);
        stop_after(SEC);
        policy_says(HOLD);
        stand(30 * MS);
        cont_preempted(place, 7 * MS);
        mark_twin();
        settles(20, 3 * US);
    }
}

/* Right after a sleep, or with a kernel that doesn't tell when it read, a better reading tells when QEMU's was. */
SCENARIO(utc_does_not_steer_by_a_held_pause_whose_stop_is_preempted) {
    for (int i = 0; i < 2 * 40; i++) {
        bool old = i & 1;
        in_case("at place %d, %s kernel", i / 2 + 1, old ? "old" : "new");
        following(0);
        if (old)
            sim.flags = STABLE;
        run(SEC);
        if (!old)
            host_sleeps(5 * SEC, true);
        stop_preempted(i / 2 + 1, 7 * MS);
        policy_says(HOLD);
        stand(30 * MS);
        cont();
        mark_twin();
        settles(20, 3 * US);
    }
}

SCENARIO(utc_with_a_slew_of_any_size_in_the_page) {
    following(0);
    page->policy.slew_ppm = UINT32_MAX;
    checkpoint(SEC, 5 * MS);
    set_real(9 * SEC, 0);
    for (int j = 0; j < 100; j++) {
        checkpoint(SEC, 5 * MS);
        CHECK(record()->went_on <= kept.clock + (uint64_t)(record()->lost + 100 * MS + 10 * US));
    }
}

/* Right after a sleep an instant is known only to half the time that its reading took. */
SCENARIO(utc_does_not_steer_by_a_blurred_reading) {
    for (int place = 1; place <= 40; place++) {
        in_case("preempted at place %d", place);
        following(0);
        stop_after(20 * SEC);
        stand(20 * MS);
        host_sleeps(SEC, true);
        cont_preempted(place, 900 * US);
        NOT_BACK();
        NEAR(page->anchor.steer, 10 * US);
    }
}

/* --- leap seconds --- */

static void leap(int from, int to, int real, int in_a_pause) {
    attach();
    sim.tai = from;
    follow_utc();
    set_real(0, 40000);
    checkpoint(SEC, 5 * MS);
    mark_twin();
    run(SEC);
    if (in_a_pause)
        stop();
    sim.tai = to;
    set_real(real * SEC, 40000);
    mark.real += (uint64_t)(real * SEC);
    if (in_a_pause) {
        uint64_t before = real_at(sim.now);
        policy_says(in_a_pause);
        stand(20 * MS);
        cont();
        if (in_a_pause == HOLD)
            mark.real += real_at(sim.now) - before;
    }
}

SCENARIO(leap_seconds_and_a_tai_offset_that_is_set) {
    /* Seconds that CLOCK_TAI is ahead: before, after; what CLOCK_REALTIME moves by. */
    static const int leaps[][3] = {{37, 38, -1}, {37, 36, 1}, {0, 1, -1}, {0, 37, 0}, {37, 0, 0}, {36, 37, 0}};
    for (int i = 0; i < 3 * LENGTH(leaps); i++) {
        const int *l = leaps[i / 3], in_a_pause = i % 3; /* 0: in the run, else CATCH_UP or HOLD */
        in_case("%d to %d, CLOCK_REALTIME by %d s, %s", l[0], l[1], l[2],
                in_a_pause == HOLD ? "held"
                : in_a_pause       ? "caught up"
                                   : "in the run");
        leap(l[0], l[1], l[2], in_a_pause);
        for (int j = 0; j < 20; j++) {
            checkpoint(SEC, 5 * MS);
            NEAR(off_reference(), 3 * US);
        }
        CHECK(page->follow.leaps == (l[2] != 0) && page->follow.steps == 0 && page->follow.given_up == 0);
    }
}

/* --- what outlives the anchor --- */

enum doubt { TORN_POLICY, NO_READING, NO_WRITE, UNSTABLE, QEMUS_WRITE_FAILS, QEMU_ADDS };

static void doubtful_pause(enum doubt d) {
    run(SEC);
    if (d == TORN_POLICY)
        page->policy.seq |= 1;
    if (d == UNSTABLE)
        sim.flags &= ~STABLE;
    if (d == QEMU_ADDS)
        stop_with_realtime(0);
    else
        stop();
    sim.get_error = d == NO_READING ? EIO : 0;
    sim.set_error = d == NO_WRITE ? EIO : 0;
    sim.own_error = d == QEMUS_WRITE_FAILS ? EIO : 0;
    if (d >= QEMUS_WRITE_FAILS)
        policy_says(HOLD);
    stand(40 * MS);
    CHECK(try_cont() == (d == QEMUS_WRITE_FAILS ? -1 : 0));
    CHECK(!page->anchor.valid || page->anchor.epoch == 2);
    sim.get_error = sim.set_error = sim.own_error = 0;
    sim.flags = FLAGS;
    page->policy.seq += page->policy.seq & 1;
}

/* What a doubt took from the guest, and what was owed before it, comes back. */
SCENARIO(a_debt_outlives_a_doubt) {
    static const char *const names[] = {
        "torn policy",          "KVM_GET_CLOCK fails",          "KVM_SET_CLOCK fails",
        "unstable at the stop", "a write of QEMU's that fails", "QEMU has the kernel add the pause"};
    for (int i = TORN_POLICY; i <= QEMU_ADDS; i++) {
        in_case("%s", names[i]);
        following(-40000);
        set_real(300 * MS, -40000);
        checkpoint(SEC, 5 * MS);
        int64_t owed = page->follow.debt;
        NEAR(owed - 300 * MS, MS);
        doubtful_pause(i);
        checkpoint(SEC, 5 * MS);
        CHECK(page->anchor.epoch == 2 && page->follow.bases == 1 && page->follow.debt > owed - 2 * MS);
        settles(1000, 3 * US);
    }
}

/* Who sets a running clock, or loads another state, means it. */
SCENARIO(a_clock_that_somebody_set_begins_a_new_base) {
    for (int loaded = 0; loaded < 2; loaded++) {
        in_case("%s", loaded ? "another state" : "a running clock that somebody set");
        following(40000);
        run(SEC);
        sim.clock += loaded ? 0 : 150 * MS;
        stop();
        stand(5 * MS);
        if (loaded)
            load_state((int64_t)kept.clock - 500 * MS);
        cont();
        mark_twin();
        settles(100, 3 * US);
        CHECK(page->follow.bases == 2);
    }
}

SCENARIO(an_older_state_that_is_caught_up_owes_what_it_owed) {
    following(0);
    page->policy.restore_do = CATCH_UP;
    set_real(200 * MS, 0);
    checkpoint(SEC, 5 * MS);
    stop_after(SEC);
    kept.clock -= (uint64_t)(500 * MS);
    cont();
    DECIDED(ANCHORED, FROM_ANCHOR);
    settles(1000, 3 * US);
    CHECK(page->follow.bases == 1);
}

/* The base is that of the guest's start, however late its first pause comes. */
SCENARIO(an_hour_before_the_first_pause_is_followed) {
    boot();
    follow_utc();
    set_real(0, 40000);
    kept.clock = 12345;
    cont();
    mark_twin();
    run(HOUR);
    settles(1000, 3 * US);
    CHECK(page->follow.bases == 1);
}

/* From raw to utc in a running guest: what was missed meanwhile comes in pieces. */
SCENARIO(utc_after_a_day_of_raw) {
    attach();
    set_real(0, 40000);
    checkpoint(SEC, 5 * MS);
    mark_twin();
    checkpoints(24, HOUR, 5 * MS);
    int64_t before = off_reference();
    CHECK(before < -3 * SEC && page->follow.steered == 0);
    follow_utc();
    checkpoint(HOUR, 5 * MS);
    NEAR(off_reference() - before - FTCLOCK_REANCHOR, MS);
    settles(10000, 3 * US);
}

SCENARIO(a_guest_from_a_host_whose_clock_is_ahead_or_behind) {
    for (int ahead = 0; ahead < 2; ahead++) {
        in_case("%s", ahead ? "ahead" : "behind");
        attach();
        follow_utc();
        page->policy.restore_do = CATCH_UP;
        load_state(77 * SEC);
        mark = (struct mark){.clock = 77 * SEC, .real = real_at(sim.now) - (uint64_t)(ahead ? -2 * SEC : 3 * SEC)};
        write_import((struct ftclock_import){.clock = kept.clock, .at = mark.real});
        cont();
        DECIDED_AS(FTCLOCK_ANCHORED, ahead ? FTCLOCK_REASON_NEVER_BACK : FTCLOCK_REASON_FROM_IMPORT);
        CHECK(guest() >= 77 * SEC);
        settles(10000, 3 * US);
    }
}

SCENARIO(a_step_within_a_held_pause_is_not_lost) {
    following(0);
    for (int i = 0; i < 50; i++) {
        stop_after(SEC);
        policy_says(HOLD);
        uint64_t from = real_at(sim.now);
        stand(30 * MS);
        mark.real += real_at(sim.now) - from;
        set_real(i ? 0 : 200 * MS, 0);
        from = real_at(sim.now);
        cont();
        mark.real += real_at(sim.now) - from;
    }
    /* Each time the call ends some 200 ns after the kernel took the value. */
    settles(1000, 20 * US);
}

SCENARIO(the_record_says_how_good_the_hosts_clock_is) {
    anchored_guest();
    CHECK(record()->error == 0); /* nobody said */
    page->host = (struct ftclock_host){.seq = 2, .at_raw = (uint64_t)sim.now, .error = (uint64_t)(3 * MS)};
    checkpoint(1000 * SEC, 5 * MS);
    NEAR((int64_t)record()->error - 503 * MS, MS);
    page->host.error = UINT64_MAX - 5;
    checkpoint(SEC, 5 * MS);
    CHECK(record()->error == UINT64_MAX);
    page->host.seq |= 1;
    checkpoint(SEC, 5 * MS);
    CHECK(record()->error == 0);
}
