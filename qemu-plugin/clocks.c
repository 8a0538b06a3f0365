/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * Theory of operation
 *
 * At each cont, behind KVM_SET_CLOCK and before any vCPU runs, QEMU has each vCPU's own thread make KVM_KVMCLOCK_CTRL
 * (hw/i386/kvm/clock.c). It is the one place where the module meets a vCPU that is sure to stand: asking for the state
 * of a vCPU that runs would wait until it leaves the guest.
 *
 * The kernel's answer says whether the guest has switched kvmclock on: EINVAL if it hasn't (kvm_set_guest_paused in
 * arch/x86/kvm/x86.c). For such a guest we ask further, at most once a second: whether QEMU offers it Hyper-V's
 * reference time, by CPUID, and if so, whether it has switched that on, by its MSRs (Hyper-V TLFS, chapter 12). So a
 * guest on kvmclock costs no call of the kernel.
 *
 * Any doubt means: not known.
 */
#include "clocks.h"

#include <errno.h>
#include <linux/kvm.h>

#define LOOK_AGAIN UINT64_C(1000000000)

/* Hyper-V's MSRs and CPUID leaf. */
#define GUEST_OS_ID              0x40000000
#define REFERENCE_TSC            0x40000021
#define REFERENCE_TSC_ENABLED    1
#define FEATURES                 0x40000003
#define FEATURES_REFERENCE_COUNT 2

/* Xen's signature, "XenV", in EBX of the first leaf of a hypervisor, of which there can be several 0x100 apart. */
#define XEN         0x566e6558
#define HYPERVISORS 0x40000000

/* As many as the kernel keeps of a vCPU (KVM_MAX_CPUID_ENTRIES). */
#define LEAVES 256

/* What QEMU offers the guest. It can't change once the vCPU has run. */
static bool ask_cpuid(struct clocks *c, int fd) {
    if (c->asked && c->vcpu == fd)
        return true;
    struct {
        uint32_t length, padding;
        struct kvm_cpuid_entry2 leaves[LEAVES];
    } cpuid;
    cpuid.length = LEAVES;
    if (c->vcpu_ioctl(fd, KVM_GET_CPUID2, &cpuid) != 0)
        return false;
    c->hyperv = c->foreign = false;
    for (uint32_t i = 0; i < cpuid.length && i < LEAVES; i++) {
        const struct kvm_cpuid_entry2 *leaf = &cpuid.leaves[i];
        if (leaf->function == FEATURES && (leaf->eax & FEATURES_REFERENCE_COUNT))
            c->hyperv = true;
        /* Its guests have kvmclock by another way, of which the kernel says nothing here. */
        if ((leaf->function & 0xffff00ff) == HYPERVISORS && leaf->ebx == XEN)
            c->foreign = true;
    }
    c->asked = true;
    c->vcpu = fd;
    return true;
}

static uint32_t find(struct clocks *c, int fd, int error) {
    struct {
        uint32_t length, padding;
        struct kvm_msr_entry entries[2];
    } msrs = {2, 0, {{.index = GUEST_OS_ID}, {.index = REFERENCE_TSC}}};
    if (error == 0)
        return FTCLOCK_CLOCK_KVMCLOCK;
    if (error != EINVAL || !ask_cpuid(c, fd) || c->foreign)
        return FTCLOCK_CLOCK_NOT_KNOWN;
    if (!c->hyperv)
        return 0;
    if (c->vcpu_ioctl(fd, KVM_GET_MSRS, &msrs) != 2)
        return FTCLOCK_CLOCK_NOT_KNOWN;
    return (msrs.entries[0].data ? FTCLOCK_CLOCK_HYPERV_COUNTER : 0) |
           (msrs.entries[1].data & REFERENCE_TSC_ENABLED ? FTCLOCK_CLOCK_HYPERV_PAGE : 0);
}

/* Writes our section, which has no other writer. */
static void publish(struct ftclock_clocks *to, const struct ftclock_clocks *from) {
    uint32_t odd = __atomic_load_n(&to->seq, __ATOMIC_RELAXED) | 1;
    __atomic_store_n(&to->seq, odd, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_RELEASE);
    __atomic_store_n(&to->on, from->on, __ATOMIC_RELAXED);
    __atomic_store_n(&to->at_raw, from->at_raw, __ATOMIC_RELAXED);
    __atomic_store_n(&to->without, from->without, __ATOMIC_RELAXED);
    __atomic_store_n(&to->looks, from->looks, __ATOMIC_RELAXED);
    __atomic_store_n(&to->failed, from->failed, __ATOMIC_RELAXED);
    __atomic_store_n(&to->seq, odd + 1, __ATOMIC_RELEASE);
}

void clocks_look(struct clocks *c, int fd, int error, uint64_t pause, uint64_t stop_raw) {
    struct ftclock_clocks *s = &c->seen;
    if (pause == c->pause) /* another vCPU of the same cont */
        return;
    uint64_t now = c->raw();
    if (c->pause && stop_raw > c->cont_raw)
        c->ran += stop_raw - c->cont_raw;
    c->pause = pause;
    c->cont_raw = now;
    if (s->looks && (s->on == FTCLOCK_CLOCK_KVMCLOCK) == (error == 0) && now - s->at_raw < LOOK_AGAIN)
        return;
    uint32_t on = find(c, fd, error);
    s->without = s->looks && s->on == 0 && on == 0 ? s->without + c->ran : 0;
    s->on = on;
    s->at_raw = now;
    s->looks++;
    s->failed += on == FTCLOCK_CLOCK_NOT_KNOWN;
    c->ran = 0;
    publish(&c->page->clocks, s);
}
