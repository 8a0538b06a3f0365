/* SPDX-License-Identifier: MIT */
/* A state that came from elsewhere with a reading of the running clock, not of the stop: a migration, a failover. */
#include "engine.h"

#define READ  (70 * SEC)
#define SAVED (77 * SEC)
#define RAN   (SAVED - READ)

enum { RAW = FTCLOCK_LEG_RAW, REAL = FTCLOCK_LEG_REAL };

/* The reading was of 70 s, the state is of so much, and the reading's instant is `ago` before the cont. */
static void import_reading(int64_t clock, int64_t state, int64_t ago, uint32_t leg, int64_t rate) {
    load_state(state);
    write_import((struct ftclock_import){
        .leg = leg,
        .clock = (uint64_t)clock,
        .at = (leg == RAW ? (uint64_t)sim.now : real_at(sim.now)) - (uint64_t)ago,
        .rate = rate,
        .error = 1234,
        .event = FTCLOCK_EVENT_MIGRATE,
        .any = 1,
    });
}

/* What a migration leaves: an error that is known, a clock that goes on, and an import that is used up. */
static void lives_on(void) {
    CHECK(page->anchor.error > 1234 && page->anchor.error < 1234 + 20 * US && record()->error == page->anchor.error);
    mark_twin();
    checkpoint(SEC, 5 * MS);
    NEAR(off_twin(), 25 * US);
    /* The next state is this process's own, and by the rule for that. */
    stop_after(SEC);
    load_state((int64_t)kept.clock - MS);
    cont();
    DECIDED(PASSED, OTHER_VALUE);
    CHECK(record()->event == FTCLOCK_EVENT_RESTORE);
}

SCENARIO(a_migration_by_its_reading) {
    static const struct {
        const char *name;
        int64_t state, ago, rate;
        uint32_t leg;
        uint32_t migrate_do;
        uint16_t decision, reason;
        int64_t lost;
    } cases[] = {
        {"by RAW", SAVED, RAN + 300 * MS, 0, RAW, CATCH_UP, ENDS(ANCHORED, FROM_IMPORT), 300 * MS},
        {"by REALTIME", SAVED, RAN + 300 * MS, 0, REAL, CATCH_UP, ENDS(ANCHORED, FROM_IMPORT), 300 * MS},
        {"by a REALTIME 100 ppm fast", SAVED, RAN + 700 * US + 300 * MS, 100000, REAL, CATCH_UP,
         ENDS(ANCHORED, FROM_IMPORT), 300 * MS},
        {"of a state older than the reading", READ - 5 * SEC, 2 * SEC, 0, RAW, CATCH_UP, ENDS(ANCHORED, FROM_IMPORT),
         7 * SEC},
        {"the other host's clock is behind", SAVED, RAN - 5 * MS, 0, REAL, CATCH_UP, ENDS(ANCHORED, NEVER_BACK), 0},
        {"longer than its limit", SAVED, RAN + 61 * SEC, 0, REAL, CATCH_UP, ENDS(HELD, OVER_LIMIT), 0},
        {"the other host is in another age", SAVED, RAN - 61 * SEC, 0, REAL, CATCH_UP, ENDS(PASSED, BOUNDS), 0},
        {"held by the policy", SAVED, RAN + 300 * MS, 0, RAW, HOLD, ENDS(HELD, POLICY), 0},
        {"an impossible rate", SAVED, RAN + 300 * MS, INT64_MAX, REAL, CATCH_UP, ENDS(PASSED, BOUNDS), 0},
    };
    for (int i = 0; i < LENGTH(cases); i++) {
        in_case("%s", cases[i].name);
        attach();
        page->policy.migrate_do = cases[i].migrate_do;
        import_reading(READ, cases[i].state, cases[i].ago, cases[i].leg, cases[i].rate);
        cont();
        DECIDED_AS(cases[i].decision, cases[i].reason);
        NEAR(guest() - cases[i].state - cases[i].lost, 20 * US);
        CHECK(record()->event == FTCLOCK_EVENT_MIGRATE);
        if (cases[i].decision == FTCLOCK_ANCHORED)
            lives_on();
    }
}

/* Anywhere on the way to the write, by a time that would show. */
SCENARIO(a_migration_whose_cont_is_preempted) {
    for (int i = 0; i < 2 * 39; i++) {
        int place = i / 2 + 1;
        in_case("by %s, at place %d", i & 1 ? "REALTIME" : "RAW", place);
        attach();
        import_reading(SAVED, SAVED, SEC, i & 1 ? REAL : RAW, 0);
        page->import.error = 0;
        mark = (struct mark){.clock = SAVED, .at = sim.now - SEC};
        cont_preempted(place, 5 * MS);
        NEAR(off_twin(), 20 * US);
        NEAR(off_twin(), (int64_t)page->anchor.error + 1);
    }
}

/* The primary of an engine is fed by a fresher reading from time to time: each is good for one state. */
SCENARIO(a_fresh_import_after_a_used_one) {
    attach();
    for (int i = 0; i < 3; i++) {
        stop_after(SEC);
        import_reading((50 + i) * SEC, (50 + i) * SEC, 2 * SEC, RAW, 0);
        cont();
        DECIDED(ANCHORED, FROM_IMPORT);
        NEAR(guest() - (52 + i) * SEC, 20 * US);
    }
}

/*
 * An engine loads each checkpoint over a guest that ran on: its clock is written each time, so that our own errors
 * would add up. It stays with a guest that nothing was ever loaded over.
 */
static void engines_secondary(int64_t cold) {
    for (int64_t rate = -230; rate <= 230; rate += 230) {
        in_case("%" PRId64 " ns/s off CLOCK_MONOTONIC_RAW", rate);
        attach();
        page->policy.restore_do = CATCH_UP;
        set_rate(rate);
        checkpoint(SEC, 5 * MS);
        sim.moved = 0;
        int64_t worst = 0;
        for (int j = 0; j < 200000; j++) {
            run(between(20 * MS, 200 * MS));
            sim.cold = cold;
            stop();
            sim.cold = 0;
            stand(between(MS, 20 * MS));
            kept.clock -= (uint64_t)between(MS, 100 * MS); /* the primary's, of a moment ago */
            cont();
            DECIDED(ANCHORED, FROM_ANCHOR);
            NOT_BACK();
            worst = size(sim.moved) > worst ? size(sim.moved) : worst;
        }
        /* The simulated clock loses half a nanosecond at each write, as it has whole ones. */
        NEAR(worst, US + (rate ? 100 * US : 0));
        printf("200000 states loaded at %" PRId64 " ns/s, worst %" PRId64 " ns\n", rate, worst);
    }
}

SCENARIO(an_engines_secondary) { engines_secondary(0); }

SCENARIO(an_engines_secondary_from_cold_caches) { engines_secondary(400); }
