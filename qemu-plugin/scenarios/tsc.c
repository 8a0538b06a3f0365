/* SPDX-License-Identifier: MIT */
/* The guest's TSC goes where its clock goes: guests read their time from either, and compare the two. */
#include "engine.h"

/* QEMU sets the TSC of a state that it loads to what it read some time after the stop. */
static void load_tsc(int64_t tsc, int64_t late) {
    sim.guest_tsc = tsc + (int64_t)((__int128)late * HOST_KHZ / 1000000) - (int64_t)tsc_at(sim.now);
}

/* The reading's TSC isn't known, though its frequency is. */
#define UNKNOWN INT64_MIN

struct loaded {
    const char *name;
    int64_t away, late, loaded; /* read so long after the stop, loaded so long before the cont */
    int64_t tsc;                /* what the reading's TSC is wrong by, in ns: the guest was reset since */
    uint32_t khz, reading_khz;
    int error;
    uint8_t want;
};

/* The reading is of 70 s and of a TSC of 11e9, the state of 77 s. */
static void load(const struct loaded *c) {
    const int64_t clock = 70 * SEC, tsc = INT64_C(11000000000), saved = 77 * SEC, stopped = sim.now;
    int64_t tsc_saved = tsc + 7 * (c->reading_khz ? c->reading_khz : HOST_KHZ) * INT64_C(1000);
    stand(c->away - c->loaded);
    load_tsc(tsc_saved, c->late);
    stand(c->loaded);
    load_state(saved);
    write_import((struct ftclock_import){
        .leg = FTCLOCK_LEG_RAW,
        .clock = (uint64_t)clock,
        .at = (uint64_t)(stopped - 7 * SEC),
        .any = 1,
        .tsc = c->tsc == UNKNOWN ? 0 : (uint64_t)(tsc + (int64_t)((__int128)c->tsc * HOST_KHZ / 1000000)),
        .khz = c->reading_khz,
    });
    cont();
    DECIDED(ANCHORED, FROM_IMPORT);
    NEAR(guest() - saved - c->away, 20 * US);
    mark = (struct mark){.clock = saved, .tsc = tsc_saved};
}

static void pauses_move_neither(void) {
    int64_t moved = sim.moved_tsc;
    for (int j = 0; j < 3; j++) {
        dropped(SEC, 5 * MS);
        CHECK(record()->tsc == FTCLOCK_TSC_LEFT && sim.moved_tsc == moved);
    }
}

SCENARIO(the_tsc_of_a_loaded_state) {
    static const struct loaded cases[] = {
        {"a state that was away for 20 s", 20 * SEC, 80 * MS, 300 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a state that was away for 14 minutes", 840 * SEC, 0, 50 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a migration", 50 * MS, MS, 20 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"from a host of almost the same frequency", 50 * MS, MS, 20 * MS, 0, 0, HOST_KHZ + 3, 0, FTCLOCK_TSC_MOVED},
        {"a TSC that KVM took for synchronised", 6 * SEC, -640 * MS, 300 * MS, 0, 0, HOST_KHZ, 0, FTCLOCK_TSC_MOVED},
        {"a guest that was reset since", 50 * MS, MS, 20 * MS, 600 * SEC, 0, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a guest that was reset early", 50 * MS, MS, 20 * MS, -600 * SEC, 0, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a TSC that the kernel scales", SEC, MS, 20 * MS, 0, HOST_KHZ / 2, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a reading whose TSC isn't known", SEC, MS, 20 * MS, UNKNOWN, 0, HOST_KHZ, 0, FTCLOCK_TSC_UNMOVED},
        {"a reading without a TSC", SEC, MS, 20 * MS, 0, 0, 0, 0, FTCLOCK_TSC_UNMOVED},
        {"a kernel before 5.16", SEC, MS, 20 * MS, 0, 0, HOST_KHZ, 1, FTCLOCK_TSC_UNMOVED},
        {"a kernel that refuses", SEC, MS, 20 * MS, 0, 0, HOST_KHZ, 2, FTCLOCK_TSC_UNMOVED},
    };
    for (const struct loaded *c = cases; c < cases + LENGTH(cases); c++) {
        in_case("%s", c->name);
        attach();
        page->policy.restore_do = CATCH_UP;
        sim.tsc_error = c->error;
        sim.khz = c->khz;
        load(c);
        CHECK(record()->tsc == c->want);
        if (c->want == FTCLOCK_TSC_MOVED) {
            NEAR(apart(), US + 1);
            CHECK(sim.guest_tsc == rule.tsc_offset);
        } else {
            CHECK(sim.moved_tsc == 0);
        }
        pauses_move_neither();
        bool known = !c->khz && c->error != 1;
        CHECK((page->anchor.khz == HOST_KHZ) == known && (page->now.khz == HOST_KHZ) == known);
        if (known) {
            NEAR((int64_t)(page->anchor.tsc - tsc_at((int64_t)page->anchor.raw)) - sim.guest_tsc, 59);
            CHECK(page->now.tsc == page->anchor.tsc);
        }
    }
}

SCENARIO(a_long_look_for_the_vcpus_and_a_module_preempted_in_its_start) {
    for (int old = 0; old < 2; old++) {
        in_case("%s kernel", old ? "old" : "new");
        attach();
        start_module(2, MS);
        write_policy(usual);
        sim.no_vm_khz = old;
        sim.look = old ? 20 * MS : 5 * SEC;
        checkpoint(SEC, 5 * MS);
        CHECK(page->now.khz == HOST_KHZ);
    }
}

SCENARIO(the_tsc_of_an_older_state_of_the_same_process) {
    attach();
    page->policy.restore_do = CATCH_UP;
    sim.guest_tsc = -INT64_C(123456789012);
    checkpoint(SEC, 5 * MS);
    mark_twin();
    run(SEC);
    int64_t older = guest(), older_tsc = guest_tsc();
    stop_after(5 * SEC);
    stand(20 * MS);
    load_state(older);
    load_tsc(older_tsc, 3 * MS);
    stand(50 * MS);
    cont();
    DECIDED(ANCHORED, FROM_ANCHOR);
    CHECK(record()->tsc == FTCLOCK_TSC_MOVED);
    NEAR(apart(), US + 1);
}

SCENARIO(a_held_pause_has_its_anchor_at_its_end) {
    anchored_guest();
    held(SEC, 30 * MS);
    CHECK(sim.moved_tsc == 0);
    int64_t at = (int64_t)page->anchor.raw;
    NEAR((int64_t)(page->anchor.tsc - tsc_at(at)), 59);
    NEAR((int64_t)(page->anchor.clock - clock_at(at)), 21);
}
