/* SPDX-License-Identifier: MIT */
/* States that are loaded: of this process's own guest, of an earlier process, from another host. */
#include "engine.h"

SCENARIO(another_state_that_the_policy_holds) {
    for (int i = 0; i < 3; i++) {
        anchored_guest();
        stop_after(SEC);
        stand(50 * MS);
        int64_t saved = (int64_t)kept.clock;
        load_state(i == 0 ? saved - 5 * SEC : i == 1 ? saved + 1 : INT64_MAX / 2);
        cont();
        DECIDED(PASSED, OTHER_VALUE);
        CHECK(record()->event == FTCLOCK_EVENT_RESTORE && sim.own_last && sim.sets == 1 && page->anchor.epoch == 2);
        mark_twin();
        dropped(SEC, 5 * MS);
        NEAR(off_twin(), 40);
        CHECK(page->anchor.epoch == 2 && page->counts.reanchored == 0);
    }
}

SCENARIO(an_older_state_of_the_same_process) {
    attach();
    page->policy.restore_do = CATCH_UP;
    checkpoint(SEC, 5 * MS);
    mark_twin();
    stop_after(SEC);
    stand(50 * MS);
    kept.clock -= (uint64_t)(SEC / 2);
    cont();
    DECIDED(ANCHORED, FROM_ANCHOR);
    CHECK(record()->event == FTCLOCK_EVENT_RESTORE);
    NEAR(record()->lost - SEC / 2 - 50 * MS, MS);
    NEAR(off_twin(), 2 * US);
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
    CHECK(page->counts.passed == 0);
}

SCENARIO(an_older_state_that_is_loaded_while_the_host_sleeps) {
    attach();
    page->policy.restore_do = CATCH_UP;
    checkpoint(SEC, 5 * MS);
    uint64_t before = page->counts.caught_up_ns;
    stop_after(SEC);
    stand(50 * MS);
    host_sleeps(100 * SEC, true);
    kept.clock -= (uint64_t)(SEC / 2);
    uint64_t loaded = kept.clock;
    cont();
    DECIDED(ANCHORED, FROM_ANCHOR);
    /* What the guest was given back is what stock QEMU would have taken: once. */
    NEAR((int64_t)(page->counts.caught_up_ns - before) - (guest() - (int64_t)loaded), MS);
    NEAR(guest() - (int64_t)loaded - 100 * SEC - SEC / 2 - 50 * MS, MS);
    CHECK((uint64_t)record()->lost + record()->slept == page->counts.caught_up_ns - before);
}

/* A new process loads a state of 77 s. Its import says of which value it is, and how long ago that was. */
static void restored(uint64_t value, int64_t ago, uint32_t restore_do, int64_t limit) {
    attach();
    page->policy.restore_do = restore_do;
    page->policy.restore_limit = (uint64_t)limit;
    load_state(77 * SEC);
    write_import((struct ftclock_import){.clock = value, .at = real_at(sim.now) - (uint64_t)ago});
    cont();
}

SCENARIO(a_state_of_an_earlier_process_that_is_not_known) {
    restored((uint64_t)(77 * SEC) + 1, 3 * SEC, CATCH_UP, 0);
    DECIDED(PASSED, FIRST);
    NEAR(guest() - 77 * SEC, MS);
}

SCENARIO(a_state_of_an_earlier_process) {
    restored((uint64_t)(77 * SEC), 3 * SEC, CATCH_UP, 0);
    DECIDED(ANCHORED, FROM_IMPORT);
    NEAR(guest() - 80 * SEC, MS);
    mark_twin();
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
    /* The import is for that one value only. */
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 2 * US);
}

SCENARIO(a_state_of_an_earlier_process_goes_by_policy_and_limit) {
    static const struct {
        const char *name;
        int64_t away, limit;
        uint32_t restore_do;
        uint16_t decision, reason;
    } cases[] = {
        {"within the limit", 3 * SEC, 5 * SEC, CATCH_UP, ENDS(ANCHORED, FROM_IMPORT)},
        {"over the limit", 6 * SEC, 5 * SEC, CATCH_UP, ENDS(HELD, OVER_LIMIT)},
        {"over every limit", 901 * SEC, 0, CATCH_UP, ENDS(HELD, OVER_LIMIT)},
        {"from the future", -SEC, 0, CATCH_UP, ENDS(ANCHORED, NEVER_BACK)},
        {"from a far future", -901 * SEC, 0, CATCH_UP, ENDS(PASSED, BOUNDS)},
        {"held by the policy", 3 * SEC, 0, HOLD, ENDS(HELD, POLICY)},
        {"from the future, held", -SEC, 0, HOLD, ENDS(HELD, POLICY)},
    };
    for (int i = 0; i < LENGTH(cases); i++) {
        in_case("%s", cases[i].name);
        restored((uint64_t)(77 * SEC), cases[i].away, cases[i].restore_do, cases[i].limit);
        DECIDED_AS(cases[i].decision, cases[i].reason);
        bool moved = cases[i].decision == FTCLOCK_ANCHORED && cases[i].away > 0;
        NEAR(guest() - 77 * SEC - (moved ? cases[i].away : 0), MS);
        CHECK(record()->event == FTCLOCK_EVENT_RESTORE && page->counts.held_ns < (uint64_t)(1000 * SEC));
    }
}
