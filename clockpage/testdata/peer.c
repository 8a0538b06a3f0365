/* SPDX-License-Identifier: MIT */
/*
 * The C side of the clock page's tests. It publishes and reads by the functions of the module itself, from
 * rule_page.h; what is in each section comes from members.inc, which the test makes from clockpage.h.
 *
 *   peer layout      prints every offset, size, constant and enumerator
 *   peer fill        fills the module's sections of the page behind fd 3, each member with a value of its own
 *   peer dump        prints the shim's sections
 *   peer storm       writes the module's sections for ever, all words of a section being of one generation
 *   peer watch N     reads the shim's sections until it saw them change N times; fails if one is of two generations
 */
#include "rule_page.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* SECTION(name), MEMBER(section, member) for all but reserved members, VALUE(name) for constants and enumerators. */
#define SECTION(s)
#define MEMBER(s, m)
#define VALUE(v)

static int layout(void) {
#undef SECTION
#undef MEMBER
#undef VALUE
#define SECTION(s) printf("%s %zu %d\n", #s, sizeof(struct ftclock_##s), 0);
#define MEMBER(s, m)                                                                                                   \
    printf("%s.%s %zu %zu\n", #s, #m, offsetof(struct ftclock_##s, m), sizeof(((struct ftclock_##s *)0)->m));
#define VALUE(v) printf("%s %" PRIu64 " %d\n", #v, (uint64_t)(v), 0);
#include "members.inc"
    printf("FTCLOCK_PAGE_NAME %s 0\n", FTCLOCK_PAGE_NAME);
    return 0;
}

/* Values that differ from each other in each 16 bits. */
static uint64_t nth(uint64_t n) { return n * UINT64_C(0x0001000300050007); }

static struct ftclock_head head;
static struct ftclock_policy policy;
static struct ftclock_order order;
static struct ftclock_counts counts;
static struct ftclock_now now;
static struct ftclock_anchor anchor;
static struct ftclock_record record;
static struct ftclock_import import;
static struct ftclock_host host;
static struct ftclock_follow follow;
static struct ftclock_clocks clocks;

static void store_counts(struct ftclock_page *page) {
    for (size_t i = 0; i < sizeof(counts) / 8; i++) {
        uint64_t word;
        memcpy(&word, (char *)&counts + 8 * i, 8);
        STORE(((uint64_t *)&page->counts)[i], word);
    }
}

static void store_head(struct ftclock_page *page) {
    head = (struct ftclock_head){
        .major = FTCLOCK_PAGE_MAJOR,
        .minor = FTCLOCK_PAGE_MINOR,
        .size = FTCLOCK_PAGE_SIZE,
        .ring_len = FTCLOCK_RING_LEN,
        .record_size = sizeof(struct ftclock_record),
        .pid = 4711,
        .loaded_raw = nth(1),
    };
    page->head = head;
    __atomic_store_n(&page->head.magic, FTCLOCK_PAGE_MAGIC, __ATOMIC_RELEASE);
}

static int fill(struct ftclock_page *page) {
    uint64_t n = 1;
#undef SECTION
#undef MEMBER
#undef VALUE
#define SECTION(s)   n = 1;
#define MEMBER(s, m) s.m = (__typeof__(s.m))nth(n++);
#define VALUE(v)
#include "members.inc"
    (void)n;
    store_head(page);
    store_counts(page);
    publish(&page->now, &now, sizeof(now));
    publish(&page->anchor, &anchor, sizeof(anchor));
    publish(&page->follow, &follow, sizeof(follow));
    publish(&page->clocks, &clocks, sizeof(clocks));
    for (uint64_t i = 0; i < FTCLOCK_RING_LEN; i++) {
        record.number = i + 1;
        publish(&page->ring[i], &record, sizeof(record));
    }
    return 0;
}

static int dump(const struct ftclock_page *page) {
    if (!consult(&policy, &page->policy, sizeof(policy)) || !consult(&order, &page->order, sizeof(order)) ||
        !consult(&import, &page->import, sizeof(import)) || !consult(&host, &page->host, sizeof(host))) {
        fprintf(stderr, "torn with no writer at work\n");
        return 1;
    }
#undef SECTION
#undef MEMBER
#define SECTION(s)
#define MEMBER(s, m) printf("%s.%s %" PRIu64 "\n", #s, #m, (uint64_t)s.m);
#include "members.inc"
    return 0;
}

/* A gap of up to some microseconds, so that readers meet writers at work, in gaps, and at their edges. */
static void gap(uint64_t *state) {
    *state = *state * UINT64_C(6364136223846793005) + 1442695040888963407;
    for (volatile uint64_t i = *state >> 53; i > 0; i--)
        ;
}

_Noreturn static void storm(struct ftclock_page *page) {
    uint64_t state = 1;
    store_head(page);
    for (uint64_t generation = 1;; generation++) {
#undef SECTION
#undef MEMBER
#define SECTION(s)
#define MEMBER(s, m) s.m = (__typeof__(s.m))generation;
#include "members.inc"
        publish(&page->anchor, &anchor, sizeof(anchor));
        publish(&page->follow, &follow, sizeof(follow));
        publish(&page->clocks, &clocks, sizeof(clocks));
        publish(&page->ring[0], &record, sizeof(record));
        publish(&page->now, &now, sizeof(now)); /* last: a reader waits for it */
        gap(&state);
    }
}

static int watch(const struct ftclock_page *page, long want) {
    const long enough = 1000000000;
    long whole = 0, torn = 0, changes = 0;
    uint64_t last = 0;
    while (changes < want && whole + torn < enough) {
        if (!consult(&policy, &page->policy, sizeof(policy)) || !consult(&order, &page->order, sizeof(order))) {
            torn++;
            continue;
        }
        whole++;
        changes += order.pause != last;
        last = order.pause;
        uint64_t in_policy = policy.migrate_limit, in_order = order.pause;
#undef SECTION
#undef MEMBER
#define SECTION(s)                                                                                                     \
    const char *of_##s = #s;                                                                                           \
    (void)of_##s;
#define MEMBER(s, m)                                                                                                   \
    if ((!strcmp(#s, "policy") && strcmp(#m, "seq") && s.m != (__typeof__(s.m))in_policy) ||                           \
        (!strcmp(#s, "order") && strcmp(#m, "seq") && s.m != (__typeof__(s.m))in_order)) {                             \
        fprintf(stderr, "%s.%s is of another generation: %" PRIu64 "\n", #s, #m, (uint64_t)s.m);                       \
        return 1;                                                                                                      \
    }
#include "members.inc"
    }
    printf("%ld whole, %ld torn, %ld changes\n", whole, torn, changes);
    return 0;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "layout"))
        return layout();
    struct ftclock_page *page = mmap(NULL, FTCLOCK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, 3, 0);
    if (page == MAP_FAILED) {
        perror("mapping fd 3");
        return 2;
    }
    if (!strcmp(what, "fill"))
        return fill(page);
    if (!strcmp(what, "dump"))
        return dump(page);
    if (!strcmp(what, "storm"))
        storm(page);
    if (!strcmp(what, "watch") && argc > 2)
        return watch(page, atol(argv[2]));
    fprintf(stderr, "usage: peer layout | fill | dump | storm | watch N\n");
    return 2;
}
