/* SPDX-License-Identifier: MIT */
/* Any doubt: QEMU's own value goes through, the anchor is given up and taken anew, and the record says why. */
#include "engine.h"

SCENARIO(a_section_that_is_being_written) {
    for (int i = 0; i < 2; i++) {
        in_case("torn %s", i ? "order" : "policy");
        anchored_guest();
        uint32_t *seq = i ? &page->order.seq : &page->policy.seq;
        *seq |= 1;
        checkpoint(SEC, 5 * MS);
        DECIDED(PASSED, TORN);
        CHECK(sim.own_last && sim.sets == 1 && page->counts.passed == 1 && page->anchor.epoch == 2);
        NEAR((int64_t)page->counts.passed_ns - 5 * MS, 100 * US);
        *seq += 1;
        dropped(SEC, 5 * MS);
        CHECK(page->anchor.epoch == 2);
    }
}

SCENARIO(a_stop_whose_reading_fails) {
    anchored_guest();
    sim.get_error = ENXIO;
    errno = 0;
    CHECK(try_stop() == -1 && errno == ENXIO);
    sim.get_error = 0;
    CHECK(rule_get_clock(&rule, 7, NOWHERE) == -1 && errno == EFAULT);
    CHECK(!page->now.paused);
    dropped(SEC, 5 * MS);
}

SCENARIO(a_doubt_at_the_cont) {
    static const struct {
        const char *name;
        int get_error, set_error, own_error;
        int64_t kernel_moves, time_goes_back;
        bool unstable;
        uint16_t reason;
        int sets;
    } cases[] = {
        {"the reading fails", ENXIO, 0, 0, 0, 0, false, FTCLOCK_REASON_READ_FAILED, 1},
        {"reading and QEMU's own write fail", ENXIO, 0, EINVAL, 0, 0, false, FTCLOCK_REASON_READ_FAILED, 1},
        {"the anchor's value is refused", 0, EINVAL, 0, 50 * US, 0, false, FTCLOCK_REASON_WRITE_FAILED, 2},
        {"both values are refused", 0, EINVAL, EPERM, 50 * US, 0, false, FTCLOCK_REASON_WRITE_FAILED, 2},
        {"the clock is unstable", 0, 0, 0, 0, 0, true, FTCLOCK_REASON_UNSTABLE, 1},
        {"CLOCK_MONOTONIC_RAW goes back", 0, 0, 0, 0, 50 * MS, false, FTCLOCK_REASON_BOUNDS, 1},
    };
    for (int i = 0; i < LENGTH(cases); i++) {
        in_case("%s", cases[i].name);
        anchored_guest();
        stop_after(SEC);
        stand(5 * MS - cases[i].time_goes_back);
        kernel_moves(cases[i].kernel_moves);
        sim.get_error = cases[i].get_error;
        sim.set_error = cases[i].set_error;
        sim.own_error = cases[i].own_error;
        sim.flags &= ~(cases[i].unstable ? STABLE : 0);
        errno = 0;
        CHECK(cases[i].own_error ? try_cont() == -1 && errno == cases[i].own_error : try_cont() == 0);
        DECIDED_AS(FTCLOCK_PASSED, cases[i].reason);
        CHECK(sim.own_last && sim.own_sets == 1 && sim.sets == cases[i].sets && record()->went_on == kept.clock);
        /* The anchor is given up, and taken anew where the kernel says what its clock is. */
        bool known = !cases[i].get_error && !cases[i].own_error && !cases[i].unstable;
        CHECK(page->anchor.valid == known && page->anchor.epoch == 1 + (uint64_t)known);
        CHECK(cases[i].own_error || size(guest() - (int64_t)kept.clock) < 2 * US);
        sim.get_error = sim.set_error = sim.own_error = 0;
        sim.flags = FLAGS;
        dropped(SEC, 5 * MS);
        CHECK(page->anchor.epoch == 2);
    }
}

SCENARIO(an_unstable_clock_at_the_stop) {
    anchored_guest();
    sim.flags &= ~STABLE;
    stop();
    CHECK(!page->anchor.valid);
    sim.flags = FLAGS;
    cont();
    DECIDED(PASSED, UNSTABLE);
    CHECK(sim.own_last);
    CHECK(record()->event == FTCLOCK_EVENT_NONE);
    dropped(SEC, 5 * MS);
}

SCENARIO(a_write_without_a_reading) {
    anchored_guest();
    load_state(99);
    cont();
    DECIDED(PASSED, FIRST);
    CHECK(sim.own_last);
    CHECK(page->anchor.epoch == 2);
}

/* --- QEMU has the kernel add the downtime (KVM_CLOCK_REALTIME): it is left to do so, and isn't counted twice --- */

SCENARIO(qemus_own_accounting_of_downtime_is_passed) {
    attach();
    stop_with_realtime(0);
    uint64_t real = kept.realtime;
    stand(50 * MS);
    kept.clock++;
    cont();
    CHECK(sim.last.flags == KVM_CLOCK_REALTIME && sim.last.realtime == real);
    DECIDED(PASSED, OTHER_VALUE);
}

SCENARIO(qemus_own_accounting_of_downtime_in_a_pause) {
    for (int i = 0; i < 4; i++) {
        bool hold = i & 1, longer = i & 2;
        in_case("%s pause that is %s", longer ? "longer" : "short", hold ? "held" : "caught up");
        anchored_guest();
        mark_twin();
        stop_with_realtime(SEC);
        stand(longer ? 500 * MS : 50 * MS);
        sim.clock += longer && !hold ? 50 * US : 0;
        if (hold)
            policy_says(HOLD);
        cont();
        CHECK(!hold || (sim.own_last && sim.last.flags == KVM_CLOCK_REALTIME));
        NEAR(off_twin(), US);
        for (int j = 0; j < 20; j++) {
            checkpoint(SEC, 5 * MS);
            NEAR(off_twin(), 2 * US);
        }
    }
}
