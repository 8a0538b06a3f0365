/* SPDX-License-Identifier: MIT */
/* Checkpoints on one host: what is dropped, what is corrected, and what is the clock's own doing. */
#include "engine.h"

SCENARIO(a_clock_within_the_tolerance_is_left_alone) {
    anchored_guest();
    disturbed(SEC, 5 * MS, 900);
    DROPPED();
    NEAR(record()->residual_stop, 40);
    NEAR(record()->residual_cont - 900, 40);
    CHECK(record()->lost > 5 * MS && record()->lost < 5 * MS + 2 * US);
    CHECK(page->counts.dropped == 2 && page->counts.caught_up_ns > (uint64_t)(10 * MS));
    CHECK(record()->went_on >= kept.clock && record()->saved == kept.clock);
}

SCENARIO(a_clock_beyond_the_tolerance_is_corrected) {
    anchored_guest();
    for (int sign = 1; sign >= -1; sign -= 2) {
        in_case("by %d", sign);
        disturbed(SEC, 5 * MS, sign * 50 * US);
        DECIDED(ANCHORED, OUT_OF_TOLERANCE);
        NEAR(sim.moved, US);
        CHECK(!sim.own_last && sim.last.clock == record()->went_on);
        NEAR(size(record()->residual_cont) - 50 * US, 200);
    }
    CHECK(page->anchor.epoch == 1 && page->counts.worst_residual <= (uint64_t)US);
    dropped(SEC, 5 * MS);
}

SCENARIO(a_clock_that_the_kernel_threw_back_is_corrected) {
    anchored_guest();
    disturbed(SEC, 5 * MS, -20 * MS); /* below what was read at the stop */
    DECIDED(ANCHORED, OUT_OF_TOLERANCE);
    NEAR(sim.moved, US);
}

SCENARIO(never_back_though_within_the_tolerance) {
    anchored_guest();
    /* A pause so short that the clock is below what was read at the stop. */
    disturbed(SEC, 0, -900);
}

SCENARIO(a_run_of_any_length_keeps_the_clocks_own_rate) {
    static const int64_t runs[] = {5 * MS, SEC, 200 * SEC, DAY, 90 * DAY};
    for (int i = 0; i < LENGTH(runs); i++) {
        for (int64_t rate = -230; rate <= 230; rate += 230) {
            in_case("runs of %" PRId64 " ns at %" PRId64 " ns/s", runs[i], rate);
            attach();
            set_rate(rate);
            checkpoint(SEC, 5 * MS);
            for (int j = 0; j < 3; j++) {
                dropped(runs[i], 5 * MS);
                CHECK(sim.moved == 0);
            }
            /* Nor is what a long pause made of it taken back. */
            page->policy.suspend_do = CATCH_UP;
            dropped(runs[i], 800 * SEC);
            CHECK(sim.moved == 0);
            FIRST_ANCHOR_KEPT();
            CHECK(page->counts.worst_residual < (uint64_t)US);
            /* A write in a pause takes the clock where the pause would have left it. */
            disturbed(runs[i], 5 * MS, 70 * MS);
            DECIDED(ANCHORED, OUT_OF_TOLERANCE);
            NEAR(sim.moved, US);
        }
    }
}

SCENARIO(a_running_clock_that_somebody_set_goes_on_from_there) {
    for (int sign = 1; sign >= -1; sign -= 2) {
        in_case("by %d", sign);
        anchored_guest();
        sim.clock += sign * 150 * MS;
        guest_saw = 0;
        mark_twin();
        dropped(SEC, 5 * MS);
        NEAR(off_twin(), 40);
        CHECK(page->counts.reanchored == 1 && page->anchor.epoch == 2 && record()->residual_stop == 0);
    }
}

static void several_readings(void) {
    run(SEC);
    for (int i = 0; i < 3; i++) {
        stop();
        stand(40 * MS);
    }
}

SCENARIO(several_readings_in_one_pause_are_one_pause) {
    anchored_guest();
    mark_twin();
    several_readings();
    cont();
    DROPPED();
    NEAR(off_twin(), 40);
    CHECK(page->counts.pauses == 2);

    several_readings();
    policy_says(HOLD);
    cont();
    DECIDED(HELD, POLICY);
    mark_twin();
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
}

/* A kernel before 5.16 gives neither the TSC nor CLOCK_REALTIME: instants are known to half of an ioctl's time. */
SCENARIO(an_old_kernel_without_the_tsc_of_a_reading) {
    attach();
    sim.flags = STABLE;
    set_rate(200);
    for (int i = 0; i < 20000; i++)
        dropped(50 * MS, 5 * MS);
    CHECK(sim.moved == 0 && page->anchor.epoch == 1);
    NEAR((int64_t)(page->anchor.real - real_at((int64_t)page->anchor.raw)), 300);
}

/* A kernel's call that always takes longer than the tolerance: the time is found out and allowed for. */
SCENARIO(a_slow_kernel) {
    attach();
    sim.slow = 5 * US;
    checkpoint(SEC, 5 * MS);
    mark_twin();
    disturbed(SEC, 5 * MS, 20 * US);
    checkpoints(1000, 50 * MS, 5 * MS);
    NEAR(off_twin(), US);
    CHECK(page->counts.dropped >= 1000);
}

/* --- preempted --- */

static void preempted_at(int place, bool in_stop, bool moved, uint32_t flags) {
    attach();
    sim.flags = flags;
    checkpoint(SEC, 5 * MS);
    mark_twin();
    run(SEC);
    stop_preempted(in_stop ? place : 0, 7 * MS);
    stand(5 * MS);
    kernel_moves(moved ? -30 * US : 0);
    cont_preempted(in_stop ? 0 : place, 7 * MS);
    NOT_BACK();
    CAUGHT_UP();
    NEAR(off_twin(), 2 * US);
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
    CHECK(page->anchor.epoch == 1);
}

SCENARIO(preempted_anywhere) {
    for (int i = 0; i < 8 * 40; i++) {
        int place = i / 8 + 1;
        bool in_stop = i & 1, moved = i & 2, old = i & 4;
        in_case("at place %d of the %s, to be %s, %s kernel", place, in_stop ? "stop" : "cont",
                moved ? "corrected" : "dropped", old ? "old" : "new");
        preempted_at(place, in_stop, moved, old ? STABLE : FLAGS);
    }
}

/* The pair from which the TSC's rate is known must be as good as the rest. */
SCENARIO(preempted_at_the_modules_start_and_its_first_anchor) {
    for (int place = 1; place <= 12; place++) {
        in_case("start preempted at place %d", place);
        boot();
        start_module(place, 20 * MS);
        write_policy(usual);
        run(100 * MS);
        stop_preempted(7, 7 * MS); /* after the kernel read its clock */
        mark_twin();
        stand(5 * MS);
        cont();
        checkpoint(SEC, 5 * MS);
        NEAR(off_twin(), 2 * US);
        /* The anchor's error is within its bound. */
        NEAR((int64_t)(page->anchor.clock - clock_at((int64_t)page->anchor.raw)), (int64_t)page->anchor.error + 21);
    }
}

/* QEMU reads the clock once more when it saves the state of a guest that it stopped itself: minutes later, where the
 * guest is large. */
SCENARIO(a_second_reading_in_a_pause) {
    for (int i = 0; i < 2; i++) {
        in_case("a kernel that tells its frequency: %s", i ? "no" : "yes");
        attach();
        sim.no_vm_khz = i;
        set_rate(200);
        checkpoint(SEC, 5 * MS);
        mark_twin();
        stop_after(SEC);
        stand(120 * SEC);
        stop();
        stand(5 * MS);
        cont();
        DROPPED();
        CHECK(record()->event == FTCLOCK_EVENT_CHECKPOINT && record()->lost < 6 * MS);
        dropped(SEC, 5 * MS);
        FIRST_ANCHOR_KEPT();
    }
}
