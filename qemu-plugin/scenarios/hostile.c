/* SPDX-License-Identifier: MIT */
/* Anything can be in the page. */
#include "engine.h"

static void random_page(void) {
    unsigned char *bytes = (unsigned char *)&page->policy;
    for (size_t j = 0; j < sizeof(page->policy) + sizeof(page->order); j++)
        bytes[j] = (unsigned char)draw();
    if (!one_in(8)) { /* values that lead somewhere, more often than not */
        page->policy.seq &= ~1u;
        page->order.seq &= ~1u;
        page->policy.checkpoint_do = page->policy.suspend_do = 1 + draw() % 2;
        page->policy.reference = draw() % 3;
        page->policy.checkpoint_limit >>= draw() % 64;
        page->policy.suspend_limit >>= draw() % 64;
        page->order.pause = draw() % 2 ? page->now.pause : draw();
    }
    /* The rest of the page is the module's, and could be written all the same. */
    if (one_in(16)) {
        page->now.seq = (uint32_t)draw();
        page->anchor.clock = draw();
        page->anchor.seq = (uint32_t)draw();
    }
}

static void random_host(void) {
    set_rate(between(-230, 230));
    sim.clock = guest_saw > guest() ? guest_saw : guest();
    if (one_in(16))
        set_real(between(-5000 * SEC, 5000 * SEC), between(-100000, 100000));
    if (one_in(16))
        sim.clock += between(0, 400 * MS);
}

/* We never write what is below QEMU's value, nor above it by more than the pause and the slack. */
static void written_within_bounds(int64_t pause) {
    int64_t ahead = (int64_t)(sim.last.clock - kept.clock);
    int64_t slack = 2 * FTCLOCK_REANCHOR + 100 * US + (page->policy.reference == 1 ? FTCLOCK_FOLLOW_MAX : 0);
    CHECK(ahead >= 0 && ahead <= pause + slack);
}

SCENARIO(random_pages) {
    const int rounds = 200000;
    int writes = 0;
    attach();
    for (int i = 0; i < rounds; i++) {
        random_page();
        random_host();
        stop_after(one_in(8) ? between(SEC, 100000 * SEC) : between(MS, SEC));
        int64_t from = sim.now;
        stand(one_in(8) ? between(0, 1000 * SEC) : between(0, 100 * MS));
        bool hit = one_in(16);
        int place = (int)between(1, 24);
        cont_preempted(hit ? place : 0, between(0, 20 * MS));
        NOT_BACK();
        if (sim.sets && sim.own_last) {
            CHECK(sim.last.clock == kept.clock && record()->decision >= FTCLOCK_HELD);
        } else if (sim.sets) {
            writes++;
            written_within_bounds(sim.now - from);
        }
    }
    CHECK(writes > rounds / 100); /* else the scenario tests nothing */
    printf("%d rounds, %d values written, %" PRIu64 " dropped, %" PRIu64 " held, %" PRIu64 " passed\n", rounds, writes,
           page->counts.dropped, page->counts.held, page->counts.passed);
}
