/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * The guest's TSC.
 *
 * kvmclock is the TSC, scaled by its frequency in whole kHz (kvm_guest_time_update), so that the two go on together
 * while nobody moves either. A guest's TSC that the kernel scales isn't followed: its factor isn't told. It doesn't
 * scale where the frequencies differ by less than 250 ppm (tsc_tolerance_ppm).
 */
#include "rule_parts.h"

/* How long after a stop the TSC is read that is saved: QEMU first drains its disks. */
#define TSC_READ_LATE (60 * SECOND)
/* A value within a second of what a vCPU's TSC reads is taken for an attempt to synchronise vCPUs, and not set
 * (kvm_synchronize_tsc in arch/x86/kvm/x86.c). */
#define TSC_SLACK (SECOND + 1000000)

void learn_tsc(struct rule *r, int fd) {
    const struct host *h = r->host;
    r->tsc_asked = true;
    r->khz = 0;
    if (h->tsc_offset(&r->tsc_offset) < 0)
        return;
    uint32_t guest = h->vcpu_khz(), vm = h->vm_khz(fd);
    uint64_t span = h->raw() - r->first_raw;
    double host = vm, near = 0.0003;
    if (!vm &&
        (int64_t)span > RATE_SPAN) { /* Linux before 5.18 doesn't say; measured on a busy host it is less exact */
        host = (double)(h->tsc() - r->first_tsc) * 1e6 / (double)span;
        near = 0.003;
    }
    if ((double)guest > host * (1 - near) && (double)guest < host * (1 + near))
        r->khz = vm ? vm : guest;
    r->own_rate_known = r->khz && vm;
    r->own_rate = r->own_rate_known ? h->own_rate(vm) : 0;
}

/* Ticks of a TSC in so many ns. */
static int64_t ticks(int64_t ns, uint32_t khz) { return (int64_t)((__int128)ns * khz / 1000000); }

/*
 * Moves the guest's TSC to where its clock was moved by a restore. QEMU set it to what it read at some time after the
 * stop, and it has run since QEMU was told. So what it lacks is at most what the clock was moved by, and less by at
 * most the time that this process is there, give or take what KVM makes of it: anything else isn't the TSC that the
 * reading is of, because the guest was reset since.
 */
uint8_t move_tsc(struct rule *r, int fd, uint64_t from_clock, uint64_t from_tsc, uint32_t from_khz,
                 const struct kvm_clock_data *loaded, const struct ftclock_record *rec) {
    struct reading now;
    learn_tsc(r, fd);
    if (!from_tsc || !from_khz || !r->khz || !read_stable(r, fd, &now))
        return FTCLOCK_TSC_UNMOVED;
    uint64_t clock = now.data.clock - (uint64_t)r->left; /* where the next pause has it */
    uint64_t has = guest_tsc(r, &now);
    if (!has)
        return FTCLOCK_TSC_UNMOVED;
    uint64_t should = from_tsc + (uint64_t)ticks((int64_t)(loaded->clock - from_clock), from_khz) +
                      (uint64_t)ticks((int64_t)(clock - loaded->clock), r->khz);
    int64_t by = (int64_t)(should - has);
    int64_t here = (int64_t)(now.at.raw - r->first_raw) + TSC_READ_LATE;
    if (by > ticks(rec->lost + TSC_SLACK, r->khz) || by < ticks(rec->lost - here - TSC_SLACK, r->khz) ||
        r->host->move_tsc(by) < 0)
        return FTCLOCK_TSC_UNMOVED;
    r->tsc_offset += by;
    return FTCLOCK_TSC_MOVED;
}
