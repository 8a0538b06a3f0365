/* SPDX-License-Identifier: MIT */
/* How a guest's clock begins: QEMU's start, the module in a running QEMU, the page, and the rate of the host's clock.
 */
#include "../vcpus.h"
#include "engine.h"

SCENARIO(the_page_says_whose_it_is) {
    boot();
    CHECK(page->head.magic == FTCLOCK_PAGE_MAGIC && page->head.major == 1 && page->head.size == FTCLOCK_PAGE_SIZE);
    CHECK(page->head.ring_len == FTCLOCK_RING_LEN && page->head.record_size == 128);
    CHECK(page->head.pid == 4711 && page->head.loaded_raw > 0);
    CHECK(page->now.pause == 1 && !page->now.paused && page->anchor.valid == 0);
}

SCENARIO(the_first_write_after_the_start_is_no_pause) {
    boot();
    kept.clock = 12345;
    cont();
    DECIDED(PASSED, FIRST);
    CHECK(record()->event == FTCLOCK_EVENT_START && sim.own_sets == 1 && sim.clock == 12345);
    CHECK(page->anchor.valid && page->anchor.epoch == 1 && page->counts.passed == 1);

    /* From then on it's a life like any other. */
    write_policy(usual);
    dropped(SEC, 5 * MS);
}

SCENARIO(a_start_with_ld_preload) {
    boot();
    write_policy(usual);
    sim.flags = 0;
    stop(); /* QEMU reads the clock while it builds the machine */
    CHECK(!page->anchor.valid);
    stand(2 * SEC);
    cont();
    DECIDED(PASSED, UNSTABLE);
    CHECK(record()->event == FTCLOCK_EVENT_START && sim.own_sets == 1);

    /* The first stable stop has the anchor: clocks of one instant. */
    sim.flags = FLAGS;
    stop_after(3 * SEC);
    CHECK(page->anchor.valid && page->anchor.epoch == 1);
    int64_t at = (int64_t)page->anchor.raw;
    NEAR((int64_t)(page->anchor.clock - clock_at(at)), 21);
    NEAR((int64_t)(page->anchor.real - real_at(at)), 21);
    NEAR((int64_t)page->anchor.boot - boot_at(at), 201);
    CHECK(page->now.paused && page->now.saved == kept.clock && page->now.pause == 2);
    mark = (struct mark){.clock = (int64_t)page->anchor.clock, .at = at};
    stand(5 * MS);
    cont();
    DROPPED();
    NEAR(off_twin(), 21);
}

SCENARIO(loaded_while_the_guest_is_paused) {
    attach();
    kept.clock = clock_at(sim.now);
    stand(5 * MS);
    cont();
    DECIDED(PASSED, FIRST);
    dropped(SEC, 5 * MS);
}

/* As package kvmclock has it, which has measured it. */
SCENARIO(kvmclocks_own_rate_follows_from_the_hosts_frequency) {
    static const struct {
        uint32_t khz;
        double ppb;
    } cases[] = {{0, 0}, {1000000, 0}, {2000000, 0}, {2095995, 5.13}, {2900000, -17.88}};
    for (int i = 0; i < LENGTH(cases); i++) {
        in_case("%" PRIu32 " kHz", cases[i].khz);
        double off = vcpus_own_rate(cases[i].khz) * 1e9 - cases[i].ppb;
        CHECK(off > -0.01 && off < 0.01);
    }
}
