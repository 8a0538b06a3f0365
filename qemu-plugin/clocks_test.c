/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * Tests of what the module finds out about the guest's clocks, against a vCPU that is simulated: what it answers stands
 * in sim.
 */
#include "clocks.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>

#define MS UINT64_C(1000000)

static int failures;

#define CHECK(ok)                                                                                                      \
    do {                                                                                                               \
        if (!(ok)) {                                                                                                   \
            failures++;                                                                                                \
            printf("FAIL line %d: " #ok "; on %u without %" PRIu64 " looks %" PRIu64 " failed %" PRIu64 "\n",          \
                   __LINE__, page.clocks.on, page.clocks.without, page.clocks.looks, page.clocks.failed);              \
        }                                                                                                              \
    } while (0)

static struct {
    uint64_t now, pause;
    uint64_t guest_os_id, reference_tsc;
    uint32_t leaf, eax, ebx; /* of CPUID, beside one that says nothing */
    int cpuid_error, msrs;   /* errno; how many MSRs it gives */
    int cpuids, reads;       /* how often it was asked */
} sim;

static struct ftclock_page page;
static struct clocks clocks;

static uint64_t sim_raw(void) { return sim.now; }

static int sim_ioctl(int fd, unsigned long request, void *argument) {
    (void)fd;
    if (request == KVM_GET_CPUID2) {
        struct kvm_cpuid2 *cpuid = argument;
        sim.cpuids++;
        if (sim.cpuid_error || cpuid->nent < 2) {
            errno = sim.cpuid_error;
            return -1;
        }
        cpuid->nent = 2;
        memset(cpuid->entries, 0, 2 * sizeof(cpuid->entries[0]));
        cpuid->entries[1].function = sim.leaf;
        cpuid->entries[1].eax = sim.eax;
        cpuid->entries[1].ebx = sim.ebx;
        return 0;
    }
    struct kvm_msrs *msrs = argument;
    sim.reads++;
    if (request != KVM_GET_MSRS)
        return -1;
    for (int i = 0; i < sim.msrs; i++)
        msrs->entries[i].data = msrs->entries[i].index == 0x40000000   ? sim.guest_os_id
                                : msrs->entries[i].index == 0x40000021 ? sim.reference_tsc
                                                                       : ~UINT64_C(0);
    return sim.msrs;
}

static void begin(void) {
    memset(&sim, 0, sizeof(sim));
    memset(&page, 0, sizeof(page));
    sim.now = 1000 * MS;
    sim.msrs = 2;
    clocks = (struct clocks){.vcpu_ioctl = sim_ioctl, .raw = sim_raw, .page = &page};
}

/* The guest runs, stands for 5 ms, and goes on; the kernel answers QEMU's KVM_KVMCLOCK_CTRL with that error. */
static void pause_after(uint64_t ran, int error) {
    sim.now += ran;
    uint64_t stop = sim.now;
    sim.now += 5 * MS;
    clocks_look(&clocks, 7, error, ++sim.pause, stop);
}

static void test_kvmclock(void) {
    begin();
    CHECK(page.clocks.seq == 0);
    pause_after(100 * MS, 0);
    CHECK(page.clocks.seq == 2 && page.clocks.on == FTCLOCK_CLOCK_KVMCLOCK && page.clocks.at_raw == sim.now);
    pause_after(100 * MS, 0);
    CHECK(page.clocks.looks == 1); /* nothing new within a second */
    pause_after(1000 * MS, 0);
    CHECK(page.clocks.looks == 2 && page.clocks.on == FTCLOCK_CLOCK_KVMCLOCK && page.clocks.without == 0);
    CHECK(sim.cpuids == 0 && sim.reads == 0); /* the kernel isn't asked for what it says anyway */
}

static void test_none(void) {
    begin();
    pause_after(100 * MS, EINVAL);
    CHECK(page.clocks.looks == 1 && page.clocks.on == 0 && page.clocks.without == 0);
    for (int i = 0; i < 8; i++)
        pause_after(400 * MS, EINVAL);
    /* Looked at again after 1,215 and 2,430 ms, six runs. */
    CHECK(page.clocks.looks == 3 && page.clocks.on == 0 && page.clocks.without == 6 * 400 * MS);
    CHECK(sim.cpuids == 1 && sim.reads == 0);
    pause_after(100 * MS, 0);
    CHECK(page.clocks.looks == 4 && page.clocks.on == FTCLOCK_CLOCK_KVMCLOCK && page.clocks.without == 0);
    pause_after(100 * MS, EINVAL); /* it boots anew */
    CHECK(page.clocks.looks == 5 && page.clocks.on == 0 && page.clocks.without == 0);
    pause_after(2000 * MS, EINVAL);
    CHECK(page.clocks.without == 2000 * MS);
}

static void test_hyperv(void) {
    begin();
    sim.leaf = 0x40000003;
    sim.eax = 2;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == 0 && sim.reads == 1);
    sim.guest_os_id = 0x8100000000000000;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_HYPERV_COUNTER);
    sim.reference_tsc = 0x1234000;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_HYPERV_COUNTER);
    sim.reference_tsc |= 1;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == (FTCLOCK_CLOCK_HYPERV_COUNTER | FTCLOCK_CLOCK_HYPERV_PAGE));
    CHECK(sim.cpuids == 1 && sim.reads == 4 && page.clocks.failed == 0);

    begin(); /* Windows without hypervclock introduces itself as well */
    sim.leaf = 0x40000003;
    sim.eax = ~2u;
    sim.guest_os_id = 1;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == 0 && sim.reads == 0);
}

static void test_doubt(void) {
    begin();
    pause_after(1000 * MS, EFAULT);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_NOT_KNOWN && page.clocks.failed == 1 && sim.cpuids == 0);
    sim.cpuid_error = E2BIG;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_NOT_KNOWN && page.clocks.failed == 2);
    sim.cpuid_error = 0;
    sim.leaf = 0x40000003;
    sim.eax = 2;
    sim.msrs = 1;
    sim.guest_os_id = 1;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_NOT_KNOWN && page.clocks.failed == 3);
    sim.msrs = 2;
    sim.guest_os_id = 0;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == 0 && page.clocks.failed == 3 && page.clocks.without == 0);

    begin(); /* a Xen guest has kvmclock by its own way */
    sim.leaf = 0x40000100;
    sim.ebx = 0x566e6558;
    pause_after(1000 * MS, EINVAL);
    CHECK(page.clocks.on == FTCLOCK_CLOCK_NOT_KNOWN);
}

static void test_vcpus(void) {
    begin();
    pause_after(1000 * MS, EINVAL);
    clocks_look(&clocks, 8, 0, sim.pause, sim.now); /* another vCPU at the same cont */
    CHECK(page.clocks.looks == 1 && page.clocks.on == 0 && sim.cpuids == 1);
    sim.now += 1000 * MS;
    clocks_look(&clocks, 8, EINVAL, ++sim.pause, sim.now); /* another first vCPU */
    CHECK(page.clocks.looks == 2 && sim.cpuids == 2);
}

int main(void) {
    test_kvmclock();
    test_none();
    test_hyperv();
    test_doubt();
    test_vcpus();
    printf("%d failed\n", failures);
    return failures != 0;
}
