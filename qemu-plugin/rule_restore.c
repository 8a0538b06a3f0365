/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/* States that are loaded: by a restore, a migration or an engine, of this process's own guest or another's. */
#include "rule_parts.h"

/* How long the guest that a value is of hasn't run, ns, by the import. False: what it says can't be. */
static bool away_since(const struct ftclock_import *i, uint64_t clock, const struct moment *now, int64_t *away) {
    const int64_t most = INT64_C(10000000000000000); /* 115 days between reading and stop */
    int64_t ran = (int64_t)(clock - i->clock);
    if (ran > most || ran < -most || i->rate > 1000000 || i->rate < -1000000)
        return false;
    uint64_t leg = i->leg == FTCLOCK_LEG_RAW ? now->raw : now->real;
    int64_t faster = (int64_t)((double)ran * (double)i->rate / 1e9);
    *away = (int64_t)(leg - i->at - (uint64_t)ran - (uint64_t)faster);
    return true;
}

/* A state that is loaded. */
struct state {
    const struct ftclock_import *import; /* NULL: it is of this process's own guest */
    struct moment now;
    int64_t away;  /* how long its guest hasn't run, ns */
    uint64_t blur; /* what is not known of now */
};

/* Finds out the rest of a state whose import is known. False: what it says can't be. */
static bool state_away(const struct rule *r, struct state *s, uint64_t clock) {
    s->blur = read_moment(r, &s->now);
    if (!s->import || s->import->leg == FTCLOCK_LEG_RAW)
        s->blur = 0; /* only one of the clocks counts */
    s->away = (int64_t)(expected(r, s->now.raw) - clock);
    return !s->import || away_since(s->import, clock, &s->now, &s->away);
}

/* Writes the clock of a state that is caught up, and moves the TSC with it. */
static int write_state(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec,
                       const struct state *s) {
    /* The TSC that belongs to the guest's clock: as it came with the reading, or as it was at this process's last stop.
     */
    const struct ftclock_import *i = s->import;
    uint64_t from_clock = i ? i->clock : r->saved, from_tsc = i ? i->tsc : r->stop_tsc;
    uint32_t from_khz = i ? i->khz : r->khz;
    struct ftclock_anchor before = r->anchor;
    r->anchor = (struct ftclock_anchor){
        .valid = 1,
        .epoch = r->anchor.epoch + 1,
        .clock = data->clock + (uint64_t)rec->lost,
        .raw = s->now.raw,
        .real = s->now.real,
        .boot = s->now.boot,
        .slept = r->slept,
        .error = i ? i->error : r->anchor.error,
    };
    r->drifted_raw = s->now.raw;
    r->left = 0;
    uint64_t error = r->anchor.error > UINT64_MAX - s->blur ? UINT64_MAX : r->anchor.error + s->blur;
    if (!write_expected(r, fd, data->clock, rec)) {
        r->anchor = before;
        return pass(r, fd, data, rec, FTCLOCK_REASON_WRITE_FAILED);
    }
    rec->reason = i ? FTCLOCK_REASON_FROM_IMPORT : FTCLOCK_REASON_FROM_ANCHOR;
    if (s->away < 0)
        rec->reason = FTCLOCK_REASON_NEVER_BACK;
    rec->tsc = move_tsc(r, fd, from_clock, from_tsc, from_khz, data, rec);
    /* The guest is off by what the write missed. Where that can't be read, it is no more than all of this took. */
    uint64_t missed = r->anchor.valid ? magnitude(r->left) : r->host->raw() - s->now.raw;
    r->anchor.error = error > UINT64_MAX - missed ? UINT64_MAX : error + missed;
    if (i && r->anchor.error > rec->error)
        rec->error = r->anchor.error < INT64_MAX ? r->anchor.error : INT64_MAX;
    publish_anchor(r);
    /* A guest that is ahead owes it to its reference. An older state of the same guest goes on with its old base. */
    if (i)
        take_base(r, data->clock + (uint64_t)s->away, s->now.real);
    rec->decision = FTCLOCK_ANCHORED;
    return 0;
}

/*
 * A write of another value than the one that was read at the stop: a state was loaded, saved by this process or
 * another. If the policy wants it caught up, the guest's clock goes on as if it had run since that state was saved: by
 * the anchor, which is this process's own guest's, or by the reading that the shim has from the earlier process.
 */
int restore(struct rule *r, int fd, struct kvm_clock_data *data, struct ftclock_record *rec) {
    struct ftclock_policy p;
    struct ftclock_import import;
    rec->event = FTCLOCK_EVENT_RESTORE;
    if (!consult(&p, &r->page->policy, sizeof(p)) || !consult(&import, &r->page->import, sizeof(import)))
        return pass(r, fd, data, rec, FTCLOCK_REASON_TORN);
    bool imported =
        import.seq && import.seq != r->import_used && import.at && (import.any || import.clock == data->clock);
    if (!p.seq || !p.enabled || !(imported || (r->anchor.valid && p.restore_do == FTCLOCK_DO_CATCH_UP))) {
        if (!r->stopped)
            rec->event = FTCLOCK_EVENT_START;
        return pass(r, fd, data, rec, r->stopped ? FTCLOCK_REASON_OTHER_VALUE : FTCLOCK_REASON_FIRST);
    }
    if (imported && import.event == FTCLOCK_EVENT_MIGRATE)
        rec->event = FTCLOCK_EVENT_MIGRATE;
    bool migrate = rec->event == FTCLOCK_EVENT_MIGRATE;
    uint64_t limit = migrate ? p.migrate_limit : p.restore_limit;
    if (!limit || limit > FTCLOCK_LIMIT_MAX)
        limit = FTCLOCK_LIMIT_MAX;

    struct reading here;
    if (!imported && r->stopped && read_stable(r, fd, &here))
        judge_pause(r, &here, rec);
    struct state s = {.import = imported ? &import : NULL};
    if (!state_away(r, &s, data->clock))
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    if (imported) {
        r->import_used = import.seq;
        if (import.error > rec->error) /* to what the guest goes on by, not this host alone */
            rec->error = import.error < INT64_MAX ? import.error : INT64_MAX;
    }
    rec->lost = s.away > 0 ? s.away : 0;
    rec->slept = 0; /* that is in it */
    bool over = (uint64_t)rec->lost > limit;
    if ((migrate ? p.migrate_do : p.restore_do) != FTCLOCK_DO_CATCH_UP || over) {
        int rc = pass(r, fd, data, rec, over ? FTCLOCK_REASON_OVER_LIMIT : FTCLOCK_REASON_POLICY);
        rec->decision = rc < 0 ? FTCLOCK_PASSED : FTCLOCK_HELD;
        return rc;
    }
    /* By a clock of another host the guest is ahead. A little is that clock's error. */
    if (s.away < 0 && magnitude(s.away) > limit)
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    return write_state(r, fd, data, rec, &s);
}
