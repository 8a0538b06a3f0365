/* SPDX-License-Identifier: MIT */
/* What the standing policy and the shim's orders say of a pause, and pauses that are held. */
#include "engine.h"

/* --- held pauses --- */

SCENARIO(a_hold_ends_when_the_kernel_takes_the_value_not_before) {
    anchored_guest();
    sim.slow = 15 * US;
    held(0, 30 * MS);
    sim.slow = 0;
    int64_t moved = sim.moved;
    for (int i = 0; i < 3; i++)
        dropped(50 * MS, 5 * MS);
    CHECK(sim.moved == moved);
}

SCENARIO(a_hold_is_not_caught_up_later) {
    anchored_guest();
    set_rate(100);
    for (int i = 0; i < 1000; i++) {
        held(50 * MS, 30 * MS);
        CHECK(sim.own_last && sim.sets == 1 && guest() - (int64_t)kept.clock < US);
        mark_twin();
        checkpoint(50 * MS, 5 * MS);
        NEAR(off_twin(), 2 * US);
        CAUGHT_UP();
    }
    CHECK(page->anchor.epoch == 1 && page->counts.held == 1000 && page->counts.held_ns >= (uint64_t)(30 * SEC));
}

SCENARIO(a_hold_that_is_preempted) {
    for (int i = 0; i < 24; i++) {
        bool in_stop = i & 1;
        int place = i / 2 + 1;
        in_case("at place %d of the %s", place, in_stop ? "stop" : "cont");
        anchored_guest();
        run(50 * MS);
        stop_preempted(in_stop ? place : 0, 7 * MS);
        policy_says(HOLD);
        stand(30 * MS);
        cont_preempted(in_stop ? 0 : place, 7 * MS);
        mark_twin();
        checkpoint(50 * MS, 5 * MS);
        NEAR(off_twin(), 2 * US);
    }
}

SCENARIO(a_hold_whose_write_fails_gives_the_anchor_up) {
    anchored_guest();
    stop();
    policy_says(HOLD);
    stand(30 * MS);
    sim.own_error = EPERM;
    errno = 0;
    CHECK(try_cont() == -1 && errno == EPERM);
    CHECK(!page->anchor.valid);
}

/* --- the policy --- */

SCENARIO(each_pause_goes_by_the_policy_and_its_limits) {
    const uint64_t limit = (uint64_t)(10 * SEC), most = UINT64_MAX;
    struct {
        const char *name;
        int64_t pause;
        uint32_t checkpoint_do, suspend_do;
        uint64_t checkpoint_limit, suspend_limit;
        uint16_t event, reason; /* of a hold; IN_TOLERANCE: dropped */
    } cases[] = {
#define SUSPEND(r)    FTCLOCK_EVENT_SUSPEND, FTCLOCK_REASON_##r
#define CHECKPOINT(r) FTCLOCK_EVENT_CHECKPOINT, FTCLOCK_REASON_##r
        {"longer than a checkpoint, held", 11 * SEC, CATCH_UP, HOLD, limit, 0, SUSPEND(POLICY)},
        {"longer than a checkpoint, caught up", 11 * SEC, CATCH_UP, CATCH_UP, limit, 0, SUSPEND(IN_TOLERANCE)},
        {"a suspend within its limit", 19 * SEC, CATCH_UP, CATCH_UP, limit, 2 * limit, SUSPEND(IN_TOLERANCE)},
        {"a suspend over its limit", 21 * SEC, CATCH_UP, CATCH_UP, limit, 2 * limit, SUSPEND(OVER_LIMIT)},
        {"15 minutes, less a second", 899 * SEC, CATCH_UP, CATCH_UP, limit, 0, SUSPEND(IN_TOLERANCE)},
        {"15 minutes and a second", 901 * SEC, CATCH_UP, CATCH_UP, limit, 0, SUSPEND(OVER_LIMIT)},
        {"15 minutes, whatever the policy says", 901 * SEC, CATCH_UP, CATCH_UP, limit, most, SUSPEND(OVER_LIMIT)},
        {"15 minutes, as a checkpoint", 901 * SEC, CATCH_UP, CATCH_UP, most, most, CHECKPOINT(OVER_LIMIT)},
        {"a checkpoint that is held", 5 * MS, HOLD, HOLD, limit, 0, CHECKPOINT(POLICY)},
        {"a value of a later version", 5 * MS, 77, HOLD, limit, 0, CHECKPOINT(POLICY)},
    };
    for (int i = 0; i < LENGTH(cases); i++) {
        bool drop = cases[i].reason == FTCLOCK_REASON_IN_TOLERANCE, over = cases[i].reason == FTCLOCK_REASON_OVER_LIMIT;
        in_case("%s", cases[i].name);
        anchored_guest();
        page->policy.checkpoint_do = cases[i].checkpoint_do;
        page->policy.suspend_do = cases[i].suspend_do;
        page->policy.checkpoint_limit = cases[i].checkpoint_limit;
        page->policy.suspend_limit = cases[i].suspend_limit;
        checkpoint(SEC, cases[i].pause);
        DECIDED_AS(drop ? FTCLOCK_DROPPED : FTCLOCK_HELD, cases[i].reason);
        CHECK(record()->event == cases[i].event);
        CHECK(page->counts.over_limit == over && page->counts.held == !drop);
        /* What was held isn't caught up after all. */
        page->policy.checkpoint_do = CATCH_UP;
        mark_twin();
        checkpoint(SEC, 5 * MS);
        NEAR(off_twin(), 2 * US);
    }
}

SCENARIO(what_was_only_watched_is_not_caught_up) {
    anchored_guest();
    page->policy.enabled = 0;
    checkpoint(SEC, 5 * MS);
    DECIDED(HELD, DISABLED);
    page->policy.enabled = 1;
    mark_twin();
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
}

SCENARIO(without_a_policy_everything_is_held) {
    boot();
    run(SEC);
    checkpoint(SEC, 5 * MS);
    DECIDED(HELD, NO_POLICY);
    write_order(page->now.pause, 0);
    checkpoint(SEC, 5 * MS);
    DECIDED(HELD, NO_POLICY);
}

/* --- orders --- */

SCENARIO(an_order_is_followed_once) {
    anchored_guest();
    stop_after(SEC);
    stand(5 * MS);
    write_order(page->now.pause, 4711);
    cont();
    DROPPED();
    CHECK(record()->ordered == 1 && record()->order_lost == 4711 && page->counts.orders == 1);
    dropped(SEC, 5 * MS);
    CHECK(record()->ordered == 0 && record()->order_lost == 0);
    CHECK(page->counts.orders == 1 && page->counts.stale_orders == 0);
}

SCENARIO(a_stale_order_is_counted_once) {
    anchored_guest();
    write_order(page->now.pause - 1, 0);
    dropped(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 1 && page->counts.orders == 0 && !record()->ordered);
    checkpoint(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 1);

    /* One for a pause to come isn't kept for it: the shim writes orders while the pause is on. */
    write_order(page->now.pause + 1, 0);
    checkpoint(SEC, 5 * MS);
    dropped(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 2);
}

SCENARIO(an_order_out_of_its_pause_is_not_followed) {
    static const char *const kinds[] = {"before its stop", "after its cont", "for the last pause",
                                        "for the next pause"};
    for (int i = 0; i < LENGTH(kinds); i++) {
        in_case("%s", kinds[i]);
        anchored_guest();
        if (i == 0)
            write_order(page->now.pause, 0);
        stop_after(SEC);
        stand(5 * MS);
        if (i > 0)
            write_order(page->now.pause + (uint64_t)(i == 2 ? -1 : i == 3), 0);
        if (i == 1)
            page->order.cont_raw += SEC;
        cont();
        DROPPED();
        CHECK(page->counts.stale_orders == 1 && page->counts.orders == 0 && !record()->ordered);
    }
}

SCENARIO(an_order_whose_pause_was_passed_is_not_stale) {
    anchored_guest();
    stop();
    write_order(page->now.pause, 0);
    load_state((int64_t)kept.clock + 1000 * SEC);
    cont();
    DECIDED(PASSED, OTHER_VALUE);
    checkpoint(SEC, 5 * MS);
    CHECK(page->counts.stale_orders == 0);
}
