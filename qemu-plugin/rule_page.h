/* SPDX-License-Identifier: MIT */
/* How the rule writes the clock page's sections, and reads those of the shim. */
#ifndef FTCLOCK_RULE_PAGE_H
#define FTCLOCK_RULE_PAGE_H

#include "rule.h"

/* How often a page section that is being written is read again. */
#define PAGE_TRIES 1000

#define STORE(word, value) __atomic_store_n(&(word), (value), __ATOMIC_RELAXED)

/* Sections are copied word by word, whatever their members' types are. */
typedef uint32_t __attribute__((may_alias)) half;
typedef uint64_t __attribute__((may_alias)) word;

/*
 * Sections are copied word by word, as readers in other processes need it. Each has a size that is known where it is
 * copied: without a loop that is a third less instructions at a cont (make bench).
 */
#define NO_LOOP            _Pragma("GCC unroll 64")
#define WHERE_IT_IS_CALLED inline __attribute__((always_inline))

/* Begins to write a section, which its sequence, one more than the result, ends. */
static inline uint32_t begin_writing(uint32_t *seq) {
    uint32_t odd = __atomic_load_n(seq, __ATOMIC_RELAXED) | 1;
    __atomic_store_n(seq, odd, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    return odd;
}

/* Writes a section of which we are the only writer; its first word is the sequence. */
static WHERE_IT_IS_CALLED void publish(void *section, const void *from, size_t size) {
    half *seq = section;
    uint32_t odd = begin_writing(seq);
    STORE(seq[1], ((const half *)from)[1]);
    NO_LOOP
    for (size_t i = 1; i < size / 8; i++)
        STORE(((word *)section)[i], ((const word *)from)[i]);
    __atomic_store_n(seq, odd + 1, __ATOMIC_RELEASE);
}

/* Copies a section of the shim's. False: torn. */
static WHERE_IT_IS_CALLED bool consult(void *to, const void *section, size_t size) {
    const half *seq = section;
    for (int i = 0; i < PAGE_TRIES; i++) {
        uint32_t before = __atomic_load_n(seq, __ATOMIC_ACQUIRE);
        if (before & 1) {
            __builtin_ia32_pause();
            continue;
        }
        NO_LOOP
        for (size_t j = 0; j < size / 8; j++)
            ((word *)to)[j] = __atomic_load_n(&((const word *)section)[j], __ATOMIC_RELAXED);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (__atomic_load_n(seq, __ATOMIC_RELAXED) == before) {
            *(half *)to = before;
            return true;
        }
    }
    return false;
}

static inline void publish_counts(struct rule *r) {
    word *to = (word *)&r->page->counts;
    const word *from = (const word *)&r->counts;
    /* The number of pauses last: readers find the newest record by it. */
    NO_LOOP
    for (size_t i = 1; i < offsetof(struct ftclock_counts, reserved) / 8; i++)
        if (i != offsetof(struct ftclock_counts, busy) / 8) /* counted elsewhere */
            STORE(to[i], from[i]);
    __atomic_store_n(&to[0], from[0], __ATOMIC_RELEASE);
}

static inline void publish_now(struct rule *r) {
    struct ftclock_now now = {
        .paused = r->stopped,
        .pause = r->counts.pauses + 1,
        .saved = r->saved,
        .stop_raw = r->stop.raw,
        .stop_real = r->stop.real,
        .tsc = r->stop_tsc,
        .khz = r->khz,
    };
    publish(&r->page->now, &now, sizeof(now));
}

/* A cont changes no more of it than that. */
static inline void publish_cont(struct rule *r) {
    struct ftclock_now *now = &r->page->now;
    uint32_t odd = begin_writing(&now->seq);
    STORE(now->paused, r->stopped);
    STORE(now->pause, r->counts.pauses + 1);
    STORE(now->khz, r->khz);
    __atomic_store_n(&now->seq, odd + 1, __ATOMIC_RELEASE);
}

static inline void publish_follow(struct rule *r) { publish(&r->page->follow, &r->follow, sizeof(r->follow)); }

/* A cont that doesn't steer changes no more of it than that, unless the host's clock did something. */
static inline void publish_debt(struct rule *r) {
    struct ftclock_follow *follow = &r->page->follow;
    uint32_t odd = begin_writing(&follow->seq);
    STORE(follow->debt, r->follow.debt);
    __atomic_store_n(&follow->seq, odd + 1, __ATOMIC_RELEASE);
}

static inline void publish_anchor(struct rule *r) { publish(&r->page->anchor, &r->anchor, sizeof(r->anchor)); }

#endif
