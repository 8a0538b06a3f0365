/* SPDX-License-Identifier: MIT */
/*
 * Half a million pauses of random lengths, with a kvmclock that leaves CLOCK_MONOTONIC_RAW by up to 230 ns/s either
 * way. Disturbed: every fiftieth operation is preempted at a random place, and in every hundredth pause the kernel
 * moves the clock.
 */
#include "engine.h"

#define PAUSES 500000

struct statistics {
    int64_t worst;
    double first, last; /* means of the first and the last tenth */
    int anchored;
};

static void one_pause(bool disturb) {
    int64_t ran = between(MS, 200 * MS), pause = between(100 * US, 50 * MS), delay = between(10 * US, 10 * MS);
    bool in_stop = draw() % 2, hit = disturb && one_in(50);
    int place = (int)between(1, 24);
    run(ran);
    stop_preempted(hit && in_stop ? place : 0, delay);
    stand(pause);
    if (disturb && one_in(100)) /* less is taken for the clock's own doing */
        kernel_moves((draw() % 2 ? 1 : -1) * between(2 * US, 50 * US));
    cont_preempted(hit && !in_stop ? place : 0, delay);
    NOT_BACK();
    CAUGHT_UP();
}

static struct statistics many(bool disturb) {
    struct statistics s = {0};
    attach();
    checkpoint(0, 0);
    CHECK(page->anchor.valid);
    sim.moved = 0;
    for (int i = 0; i < PAUSES; i++) {
        if (i % 1000 == 0)
            set_rate(between(-230, 230));
        one_pause(disturb);
        s.anchored += record()->decision == FTCLOCK_ANCHORED;
        s.worst = size(sim.moved) > s.worst ? size(sim.moved) : s.worst;
        s.first += i < PAUSES / 10 ? (double)sim.moved / (PAUSES / 10) : 0;
        s.last += i >= PAUSES - PAUSES / 10 ? (double)sim.moved / (PAUSES / 10) : 0;
    }
    FIRST_ANCHOR_KEPT();
    CHECK(page->counts.pauses == PAUSES + 1);
    printf("%d pauses, %d anchored; guest - twin: worst %" PRId64
           " ns, mean %.0f ns in the first tenth, %.0f ns in the last\n",
           PAUSES, s.anchored, s.worst, s.first, s.last);
    return s;
}

SCENARIO(many_pauses) {
    struct statistics s = many(false);
    CHECK(s.worst == 0 && s.anchored == 0);
}

SCENARIO(many_disturbed_pauses) {
    struct statistics s = many(true);
    CHECK(s.anchored > 4000 && s.worst <= 5 * US);
}
