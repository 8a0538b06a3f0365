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

/* The same, of an imported state or of this process's own, now. */
static bool state_away(const struct rule *r, const struct ftclock_import *i, bool imported, uint64_t clock,
                       struct moment *now, int64_t *away, uint64_t *error) {
    *error = read_moment(r, now);
    if (!imported || i->leg == FTCLOCK_LEG_RAW)
        *error = 0; /* only one of the clocks counts */
    *away = (int64_t)(expected(r, now->raw) - clock);
    return !imported || away_since(i, clock, now, away);
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
        judge_pause(r, &here);
    struct moment now;
    int64_t away;
    uint64_t blur;
    if (!state_away(r, &import, imported, data->clock, &now, &away, &blur))
        return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
    if (imported) {
        r->import_used = import.seq;
        if (import.error > rec->error) /* to what the guest goes on by, not this host alone */
            rec->error = import.error < INT64_MAX ? import.error : INT64_MAX;
    }
    rec->lost = away > 0 ? away : 0;
    uint16_t reason = imported ? FTCLOCK_REASON_FROM_IMPORT : FTCLOCK_REASON_FROM_ANCHOR;
    bool over = (uint64_t)rec->lost > limit;
    if ((migrate ? p.migrate_do : p.restore_do) != FTCLOCK_DO_CATCH_UP || over) {
        int rc = pass(r, fd, data, rec, over ? FTCLOCK_REASON_OVER_LIMIT : FTCLOCK_REASON_POLICY);
        rec->decision = rc < 0 ? FTCLOCK_PASSED : FTCLOCK_HELD;
        return rc;
    }
    if (away < 0) {
        /* By a clock of another host the guest is ahead. A little is that clock's error. */
        if (magnitude(away) > limit)
            return pass(r, fd, data, rec, FTCLOCK_REASON_BOUNDS);
        reason = FTCLOCK_REASON_NEVER_BACK;
    }
    /* The TSC that belongs to the guest's clock: as it came with the reading, or as it was at this process's last stop.
     */
    uint64_t from_clock = imported ? import.clock : r->saved, from_tsc = imported ? import.tsc : r->stop_tsc;
    uint32_t from_khz = imported ? import.khz : r->stop_tsc ? r->khz : 0;
    struct ftclock_anchor before = r->anchor;
    r->anchor = (struct ftclock_anchor){
        .valid = 1,
        .epoch = r->anchor.epoch + 1,
        .clock = data->clock + (uint64_t)rec->lost,
        .raw = now.raw,
        .real = now.real,
        .boot = now.boot,
        .slept = r->slept,
        .error = imported ? import.error : r->anchor.error,
    };
    r->drifted_raw = now.raw;
    r->left = 0;
    uint64_t error = r->anchor.error > UINT64_MAX - blur ? UINT64_MAX : r->anchor.error + blur;
    if (!write_expected(r, fd, data->clock, rec)) {
        r->anchor = before;
        return pass(r, fd, data, rec, FTCLOCK_REASON_WRITE_FAILED);
    }
    rec->reason = reason;
    rec->tsc = move_tsc(r, fd, from_clock, from_tsc, from_khz, data, rec);
    /* The guest is off by what the write missed. Where that can't be read, it is no more than all of this took. */
    uint64_t missed = r->anchor.valid ? magnitude(r->left) : r->host->raw() - now.raw;
    r->anchor.error = error > UINT64_MAX - missed ? UINT64_MAX : error + missed;
    if (imported && r->anchor.error > rec->error)
        rec->error = r->anchor.error < INT64_MAX ? r->anchor.error : INT64_MAX;
    publish_anchor(r);
    /* A guest that is ahead owes it to its reference. An older state of the same guest goes on with its old base. */
    if (imported)
        take_base(r, data->clock + (uint64_t)away, now.real);
    rec->decision = FTCLOCK_ANCHORED;
    return 0;
}
