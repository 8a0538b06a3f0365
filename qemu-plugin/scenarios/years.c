/* SPDX-License-Identifier: MIT */
/*
 * A year of pauses with reference 1. The host's oscillator, which is CLOCK_MONOTONIC_RAW, is off by up to 50 ppm and
 * wanders. A client of NTP disciplines CLOCK_MONOTONIC: every 64 to 1024 s it measures with 30 us of noise, and slews
 * by a loop of the second order, or steps what is more than 128 ms. Now and then it is away for up to two days.
 * Somebody sets the clock wrong, a second leaps, the TAI offset is set, the host sleeps and has its time back from a
 * coarse clock. The module is preempted, and doubts.
 */
#include "engine.h"

#include <string.h>

static struct {
    int64_t truth, truth_from, truth_rate; /* UTC without leap seconds, from the year's start */
    int64_t next, away_until;              /* of the discipline */
    double frequency;                      /* what it believes the oscillator to be off by, ns/s */
    int64_t error0;
    int64_t pending, followed, big_steps; /* steps since the module looked, those to be followed, the others' number */
    int64_t given;                        /* the sum of the others */
    int64_t leaps;
    int64_t calm_since;
    int64_t start, leap_at, tai_at;
    /* Of the pause that is on. */
    int64_t run_from;  /* the last cont */
    int64_t ran;       /* what the module has of that */
    int64_t owed;      /* at the stop */
    int64_t host_stop; /* CLOCK_BOOTTIME */
    int64_t was_followed;
    int64_t right_at; /* the clock's own drift counts from here */
    int64_t late;     /* how long the cont was preempted */
    bool clear;       /* neither stop nor cont was */
    /* What is told in the end. */
    int pauses, calm, sleeps, steps, doubts;
    int64_t worst_calm, worst_host, worst_moved, longest_debt, paid_at;
} year;

/* --- the host's clock --- */

static int64_t true_at(int64_t t) {
    return year.truth + (t - year.truth_from) + (int64_t)((__int128)(t - year.truth_from) * year.truth_rate / SEC);
}

/* What the host's idea of UTC is off by. */
static int64_t host_off(void) {
    return (int64_t)real_at(sim.now) - INT64_C(1700000000) * SEC + year.leaps * SEC - true_at(sim.now) - year.error0;
}

static void step_clock(int64_t by) {
    sim.wall += by;
    year.pending += by;
    year.calm_since = sim.now;
}

static double uniform(void) { return (double)(draw() >> 11) / 9007199254740992.0; }

static double clamp(double v, double most) { return v > most ? most : v < -most ? -most : v; }

static void discipline(void) {
    int64_t wander = between(-20, 20);
    year.truth = true_at(sim.now);
    year.truth_from = sim.now;
    year.truth_rate += wander;
    int64_t interval = between(64, 1024);
    year.next = sim.now + interval * SEC;
    if (sim.now < year.away_until) {
        year.calm_since = sim.now;
        return;
    }
    if (one_in(5000))
        year.away_until = sim.now + between(3600, 48 * 3600) * SEC;
    double noise = 30e3 * (uniform() + uniform() + uniform() - 1.5) * 2;
    double measured = (double)host_off() + noise;
    if (size((int64_t)measured) > 128 * MS) {
        step_clock(-(int64_t)measured);
        measured = 0;
    }
    year.frequency -= 0.02 * measured / (double)interval;
    double rate = year.frequency - 0.25 * measured / (double)interval;
    year.frequency = clamp(year.frequency, 500e3);
    set_real(0, (int64_t)clamp(rate, 500e3));
}

/* Time passes, and the host's clock with it. */
static void pass_time(int64_t for_ns, void (*how)(int64_t)) {
    int64_t until = sim.now + for_ns;
    while (year.next < until) {
        if (year.next > sim.now)
            how(year.next - sim.now);
        discipline();
    }
    if (until > sim.now)
        how(until - sim.now);
}

static void sleeps(void) {
    int64_t slept = between(1, 8 * 3600) * SEC;
    int64_t error = one_in(2) ? between(-500 * MS, 500 * MS) : 0;
    year.truth = true_at(sim.now) + slept + error;
    year.truth_from = sim.now;
    host_sleeps(slept, true);
    year.next = sim.now + 10 * SEC;
    year.calm_since = sim.now;
    year.sleeps++;
}

static void events_of_the_run(void) {
    if (one_in(500))
        sleeps();
    if (one_in(1000)) {
        int64_t sign = one_in(2) ? 1 : -1;
        step_clock(sign * (one_in(2) ? between(200 * MS, 9 * SEC) : between(20 * SEC, 7200 * SEC)));
        year.steps++;
    }
    if (year.tai_at && sim.now > year.tai_at) {
        sim.tai += 37;
        year.tai_at = 0;
    }
    if (year.leap_at && sim.now > year.leap_at) {
        sim.wall -= SEC;
        sim.tai++;
        year.leaps++;
        year.leap_at = 0;
    }
}

/* The module looks at the host's clock: as many steps as there were since it looked are one. */
static void looked(void) {
    if (size(year.pending) > FTCLOCK_FOLLOW_MAX) {
        year.big_steps++;
        year.given += year.pending;
    } else
        year.followed += year.pending;
    year.pending = 0;
}

/* --- what the guest should read less what it reads, by the host's clock --- */

static struct {
    int64_t guest, host, held;
    int64_t loose; /* what we don't know of it: reading errors of held pauses and big steps */
} base;

static int64_t host_time(void) { return boot_at(sim.now) + year.followed; }

static int64_t owed(void) { return base.guest + host_time() - base.host - base.held - guest(); }

static void rebase(void) {
    base.guest = guest();
    base.host = host_time();
    base.held = 0;
    base.loose = 100;
}

static int64_t spread(int64_t least, int64_t most) { /* log-uniform */
    double ratio = (double)most / (double)least, v = (double)least, u = uniform();
    for (double part = 0.5, root = ratio; part > 1e-6; part /= 2) { /* ratio to the power of u, without libm */
        double guess = root;
        for (int i = 0; i < 60; i++)
            guess = (guess + root / guess) / 2;
        root = guess;
        if (u >= part) {
            u -= part;
            v *= root;
        }
    }
    return (int64_t)v;
}

/* --- one pause --- */

enum kind { UNSTABLE, CLOCK_SET, TORN, NO_READING, OTHER_STATE, ORDINARY };

static void next_pause_counts_from_now(void) {
    year.run_from = sim.now;
    year.right_at = sim.now + sim.suspended;
}

/* A debt that grew too large, of about so much, isn't paid: what the guest reads is right from then on. */
static void gave_up(int64_t due) {
    if (page->follow.given_up == (uint64_t)year.big_steps)
        return;
    CHECK(page->follow.given_up == (uint64_t)year.big_steps + 1);
    CHECK(size(page->follow.last_given) > FTCLOCK_FOLLOW_MAX && size(due) > FTCLOCK_FOLLOW_MAX - SEC);
    year.big_steps++;
    year.given += page->follow.last_given;
    rebase();
}

static void checkpoints_as_an_engine_makes_them(void) {
    for (int i = 0; i < 200; i++) {
        checkpoint(between(5 * MS, 50 * MS), between(MS, 10 * MS));
        looked();
        gave_up(owed());
    }
    next_pause_counts_from_now();
}

static enum kind draw_kind(bool holds) {
    int kind = (int)(draw() % 1000);
    /* Nobody could tell that a clock was set, with no anchor or a sleep since. */
    if (kind == CLOCK_SET && (!rule.anchor.valid || size(sim.suspended - (int64_t)rule.anchor.slept) > MS || !holds))
        return ORDINARY;
    return kind >= ORDINARY || (kind == OTHER_STATE && !holds) ? ORDINARY : (enum kind)kind;
}

static void year_stops(enum kind kind, int preempted_at) {
    if (kind == UNSTABLE)
        sim.flags &= ~STABLE;
    if (kind == CLOCK_SET)
        sim.clock += 150 * MS;
    guest_saw = guest();
    stop_preempted(preempted_at, spread(US, 20 * MS));
    looked();
    if (kind == CLOCK_SET) /* that is where it goes on from */
        rebase();
    year.ran = (int64_t)rule.stop.raw - year.run_from;
    year.host_stop = boot_at(sim.now);
    year.owed = owed();
    year.was_followed = year.followed;
}

/* What the guest's clock was moved by at the cont. */
static int64_t year_conts(enum kind kind, int preempted_at) {
    if (kind == TORN)
        page->policy.seq |= 1;
    sim.get_error = kind == NO_READING ? EIO : 0;
    if (kind == OTHER_STATE)
        kept.clock -= (uint64_t)(5 * SEC);
    int64_t untouched = guest(), at = sim.now;
    year.late = preempted_at ? spread(US, 20 * MS) : 0;
    cont_preempted(preempted_at, year.late);
    looked();
    page->policy.seq += page->policy.seq & 1;
    sim.get_error = 0;
    sim.flags = FLAGS;
    year.pauses++;
    year.doubts += kind != ORDINARY;
    return guest() - untouched - (sim.now - at) - (int64_t)((__int128)(sim.now - at) * sim.rate / SEC);
}

/*
 * The guest stood still by the host's clock, from the module's reading to its write: to some 100 ns, but what we know
 * of it is our own readings around that. So its word is taken, and checked against them.
 */
static void held_well(void) {
    base.held += boot_at(sim.now) - year.host_stop;
    int64_t before = year.owed + year.followed - year.was_followed;
    NEAR(owed() - before, 45 * MS);
    base.held += owed() - before;
    base.loose += US;
}

/* A debt shrinks by what the bounds allow, and by no less. */
static void caught_up_well(int64_t moved) {
    int64_t natural = (int64_t)((__int128)(sim.now + sim.suspended - year.right_at) * size(sim.rate) / SEC);
    int64_t most = year.ran * 500 / 1000000;
    /* Slew bound, tolerance on both sides, and kvmclock's own drift since it was last right. */
    NEAR(moved, most + natural + 3 * US + 1);
    year.worst_moved = size(moved) > year.worst_moved ? size(moved) : year.worst_moved;
    int64_t due = owed() + moved, pause = sim.now - (int64_t)rule.stop.raw - year.late;
    int64_t forth = most < FTCLOCK_REANCHOR ? most : FTCLOCK_REANCHOR, back = pause < forth ? pause : forth;
    if (!year.clear) /* a preempted reading may be too blurred to steer by */
        forth = back = 0;
    int64_t left = due > forth ? due - forth : due < -back ? -due - back : 0;
    gave_up(due);
    NEAR(owed(), left + base.loose + natural + 5 * US + 1);
    year.right_at = sim.now + sim.suspended;
    if (size(owed()) < 10 * US)
        year.paid_at = sim.now;
    if (sim.now - year.paid_at > year.longest_debt)
        year.longest_debt = sim.now - year.paid_at;
}

/* Where nothing was wrong with the host's clock for two days, guest and host are off UTC by about the same. */
static void compare_with_utc(int64_t k0, int64_t v0) {
    if (sim.now - year.calm_since <= 2 * DAY || size(owed()) >= 10 * US)
        return;
    int64_t error = guest() - k0 - (true_at(sim.now) - v0) + year.given; /* less the steps that it didn't follow */
    year.calm++;
    year.worst_calm = size(error) > year.worst_calm ? size(error) : year.worst_calm;
    year.worst_host = size(host_off()) > year.worst_host ? size(host_off()) : year.worst_host;
}

static void pause_of_the_year(bool holds) {
    int64_t ran = spread(5 * MS, 4 * HOUR);
    year.run_from = sim.now;
    if (one_in(500))
        checkpoints_as_an_engine_makes_them();
    pass_time(ran / 2, run);
    events_of_the_run();
    pass_time(ran - ran / 2, run);
    enum kind kind = draw_kind(holds);
    int place = (int)between(1, 60), hit = (int)(draw() % 40);
    year.clear = hit >= 2;
    year_stops(kind, hit == 0 ? place : 0);
    int64_t wait = spread(MS, 200 * MS);
    if (kind == ORDINARY && one_in(50))
        wait = spread(SEC, holds ? 1200 * SEC : 800 * SEC);
    pass_time(wait, stand);
    if (holds && one_in(1000))
        sleeps();
    int64_t moved = year_conts(kind, hit == 1 ? place : 0);
    if (kind == OTHER_STATE) {
        guest_saw = guest();
        rebase();
        return;
    }
    NOT_BACK();
    if (record()->decision == FTCLOCK_HELD)
        held_well();
    else if (record()->decision != FTCLOCK_PASSED)
        caught_up_well(moved);
}

/* --- the year --- */

static void begin_year(bool holds) {
    attach();
    memset(&year, 0, sizeof(year));
    follow_utc();
    page->policy.suspend_do = holds ? HOLD : CATCH_UP;
    year.truth_from = year.start = sim.now;
    year.truth_rate = between(-50000, 50000);
    year.frequency = (double)year.truth_rate + (double)between(-2000, 2000);
    set_real(0, (int64_t)year.frequency);
    year.error0 = (int64_t)real_at(sim.now) - INT64_C(1700000000) * SEC;
    year.next = sim.now + 64 * SEC;
    set_rate(between(-20, 20));
    year.leap_at = sim.now + between(100, 300) * DAY;
    year.tai_at = sim.now + between(1, 99) * DAY;
    year.right_at = year.paid_at = sim.now;
}

static void a_year(bool holds) {
    begin_year(holds);
    stop();
    int64_t k0 = guest(), v0 = true_at(sim.now);
    rebase();
    cont();
    while (sim.now - year.start < 365 * DAY) {
        pause_of_the_year(holds);
        if (!holds)
            compare_with_utc(k0, v0);
    }
    CHECK(page->follow.given_up == (uint64_t)year.big_steps);
    CHECK(page->follow.leaps == 1 && page->follow.sleeps == (uint64_t)year.sleeps);
    CHECK(holds || (year.worst_calm < MS && (year.calm > 100 || seed != 1)));
    printf("%d pauses, %d sleeps, %d steps set, %" PRIu64 " seen, %" PRIu64 " not followed, %d doubts; ", year.pauses,
           year.sleeps, year.steps, page->follow.steps, page->follow.given_up, year.doubts);
    printf("largest correction %" PRId64 " us, longest in debt %" PRId64 " h; ", year.worst_moved / US,
           year.longest_debt / HOUR);
    printf("host - UTC %" PRId64 " us, guest - UTC %" PRId64 " us in %d calm pauses\n", year.worst_host / US,
           year.worst_calm / US, year.calm);
}

SCENARIO(a_year_of_pauses_all_caught_up) { a_year(false); }

SCENARIO(a_year_of_pauses_with_held_ones) { a_year(true); }
