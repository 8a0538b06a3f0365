/* SPDX-License-Identifier: MIT */
#include "engine.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

uint64_t seed;
struct ftclock_page *page;

static struct scenario *first, *current;
static char row[128];
static jmp_buf failed;
static uint64_t seen; /* a digest of all records */

void add_scenario(struct scenario *s) {
    struct scenario **at = &first;
    while (*at)
        at = &(*at)->next;
    *at = s;
}

void in_case(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(row, sizeof(row), format, args);
    va_end(args);
}

void digest(const void *data, size_t bytes) {
    uint64_t word;
    for (size_t i = 0; i + sizeof(word) <= bytes; i += sizeof(word)) {
        memcpy(&word, (const char *)data + i, sizeof(word));
        seen = (seen ^ word) * UINT64_C(0x100000001b3);
        seen ^= seen >> 29;
    }
}

static void fail(const char *file, int line, const char *what) {
    printf("FAIL %s, seed %" PRIu64 "%s%s: %s:%d: %s; replay: FTCLOCK_SEED=%" PRIu64
           " go test -run 'TestRule/%s$' ./qemu-plugin\n",
           current->name, seed, *row ? ", " : "", row, file, line, what, seed, current->name);
    longjmp(failed, 1);
}

void check(bool ok, const char *file, int line, const char *what) {
    if (!ok)
        fail(file, line, what);
}

void check_near(int64_t value, int64_t most, const char *file, int line, const char *what) {
    char text[256];
    if (value > -most && value < most)
        return;
    snprintf(text, sizeof(text), "%s, but it is %" PRId64, what, value);
    fail(file, line, text);
}

void check_decision(unsigned decision, unsigned reason, const char *file, int line) {
    char text[128];
    if (record()->decision == decision && record()->reason == reason)
        return;
    snprintf(text, sizeof(text), "decision %u for reason %u, not %u for %u", record()->decision, record()->reason,
             decision, reason);
    fail(file, line, text);
}

static int run_scenario(struct scenario *s) {
    current = s;
    row[0] = 0;
    seen = seed;
    boot();
    if (setjmp(failed))
        return 1;
    s->run();
    printf("ok %s, seed %" PRIu64 ", digest %016" PRIx64 "\n", s->name, seed, seen);
    return 0;
}

int main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[1] : NULL;
    uint64_t from = argc > 2 ? strtoull(argv[2], NULL, 0) : 1, seeds = argc > 3 ? strtoull(argv[3], NULL, 0) : 1;
    bool found = false, list = name && strcmp(name, "-list") == 0;
    int failures = 0;
    page = aligned_alloc(4096, FTCLOCK_PAGE_SIZE);
    for (struct scenario *s = first; s && page; s = s->next) {
        if (list)
            puts(s->name);
        if (list || (name && strcmp(name, s->name) != 0))
            continue;
        found = true;
        for (seed = from; seed < from + seeds; seed++)
            failures += run_scenario(s);
    }
    free(page);
    if (!found && !list)
        fprintf(stderr, "no scenario is called %s; rule_test -list names them\n", name ? name : "so");
    return failures ? 1 : found || list ? 0 : 2;
}
