/*
 * What a guest writes for the host to read: one struct record at a time, under
 * a sequence that is odd while it is being written. guest.go mirrors it;
 * TestRecordLayout compares both. The guest is the only writer.
 *
 * What is published is read as late as possible: the statistics of a reading
 * go out with the next one, so that little lies between the reading and the
 * word that the host waits for. How long that little took is published, too:
 * where each instruction is emulated it is tens of microseconds, and as many
 * more or less as the machine is slower or faster at the moment.
 */
#ifndef FTCLOCK_TEST_RECORD_H
#define FTCLOCK_TEST_RECORD_H

#include <stdint.h>

#define RECORD_MAGIC 0x31435446u /* "FTC1" */

struct record {
    uint32_t magic;
    uint32_t sequence; /* odd: being written */
    uint64_t clock;    /* ns */
    uint64_t tsc;      /* of the same instant, or a little later */
    uint64_t largest;  /* ns, the largest clock ever seen */
    uint64_t backsteps;
    uint64_t largest_backstep; /* ns */
    uint64_t largest_gap;      /* ns between two readings, forward */
    uint64_t largest_gap_at;   /* ns, the clock behind that gap */
    uint64_t loops;
    uint32_t pvclock_flags; /* these three: only where the guest reads pvclock itself */
    uint32_t pvclock_version;
    uint32_t pvclock_updates; /* changes of the version that were seen */
    uint32_t published;       /* the TSC's lower half just before the record was published */
};

/* The guest's own copy of what it publishes with its next reading. */
struct history {
    uint64_t previous, largest, backsteps, largest_backstep, largest_gap, largest_gap_at, loops;
    uint32_t sequence;
};

/* The compiler keeps the order of the stores, x86 keeps it visible. */
#define barrier() __asm__ volatile("" ::: "memory")

static inline uint64_t rdtsc(void) {
    uint32_t low, high;

    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (uint64_t)high << 32 | low;
}

static inline void record_begin(volatile struct record *r, struct history *h) {
    r->sequence = ++h->sequence;
    barrier();
    r->largest = h->largest;
    r->backsteps = h->backsteps;
    r->largest_backstep = h->largest_backstep;
    r->largest_gap = h->largest_gap;
    r->largest_gap_at = h->largest_gap_at;
    r->loops = h->loops;
}

static inline void record_end(volatile struct record *r, struct history *h, uint64_t clock, uint64_t tsc) {
    uint32_t sequence;

    r->clock = clock;
    r->tsc = tsc;
    r->magic = RECORD_MAGIC;
    sequence = ++h->sequence;
    barrier();
    r->published = (uint32_t)rdtsc();
    barrier();
    r->sequence = sequence;

    if (h->loops > 0 && clock < h->previous) {
        h->backsteps++;
        if (h->previous - clock > h->largest_backstep)
            h->largest_backstep = h->previous - clock;
    } else if (h->loops > 0 && clock - h->previous > h->largest_gap) {
        h->largest_gap = clock - h->previous;
        h->largest_gap_at = clock;
    }
    if (clock > h->largest)
        h->largest = clock;
    h->previous = clock;
    h->loops++;
}

/* Leaves the host the time to read what was published: 10,000 cycles are a few microseconds. */
static inline void record_rest(void) {
    uint64_t start = rdtsc();

    while (rdtsc() - start < 10000)
        ;
}

#endif
