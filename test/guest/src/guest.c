/*
 * The kvmclock guest: a freestanding 32-bit program that reads kvmclock as a
 * Linux guest does, for ever, and writes what it saw to the page at 2 MiB,
 * where the host reads it (guest.go).
 *
 * It may run under a hypervisor that emulates every instruction, at a few
 * million a second: integer instructions only, no interrupts, no hypercalls.
 */
#include "record.h"

#define RECORD_ADDRESS          0x200000u
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01u

/* The kernel's struct pvclock_vcpu_time_info (Documentation/virt/kvm/x86/msr.rst). */
struct pvclock {
    uint32_t version; /* odd: an update is under way */
    uint32_t pad0;
    uint64_t tsc_timestamp;
    uint64_t system_time; /* ns */
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags;
    uint8_t pad[2];
};

static volatile struct pvclock pvclock __attribute__((aligned(64)));

static inline void wrmsr(uint32_t msr, uint64_t value) {
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

void guest_main(void) {
    volatile struct record *r = (volatile struct record *)RECORD_ADDRESS;
    static struct history h;
    uint32_t last_version = 0, updates = 0;

    for (uint32_t i = 0; i < sizeof(*r) / 4; i++)
        ((volatile uint32_t *)r)[i] = 0;
    wrmsr(MSR_KVM_SYSTEM_TIME_NEW, (uint32_t)&pvclock | 1);
    while (pvclock.version == 0)
        ;

    for (;;) {
        uint32_t version, mul, low, high;
        uint64_t tsc, delta, clock;

        record_begin(r, &h);
        r->pvclock_updates = updates;
        do {
            uint64_t timestamp, system_time;
            int shift;

            version = pvclock.version;
            barrier();
            timestamp = pvclock.tsc_timestamp;
            system_time = pvclock.system_time;
            mul = pvclock.tsc_to_system_mul;
            shift = pvclock.tsc_shift;
            tsc = rdtsc();
            delta = tsc - timestamp;
            delta = shift < 0 ? delta >> -shift : delta << shift;
            low = (uint32_t)delta;
            high = (uint32_t)(delta >> 32);
            clock = system_time + (uint64_t)high * mul + ((uint64_t)low * mul >> 32);
            barrier();
        } while ((version & 1) || version != pvclock.version);
        r->pvclock_flags = pvclock.flags;
        r->pvclock_version = version;
        record_end(r, &h, clock, tsc);
        record_rest();

        if (version != last_version)
            updates++;
        last_version = version;
    }
}
