/*
 * The kvmclock guest: a freestanding 32-bit program that reads kvmclock as a
 * Linux guest does, for ever, and writes what it saw to the page at 2 MiB,
 * where the host reads it (guest.go).
 *
 * It may run under a hypervisor that emulates every instruction, at a few
 * million a second: integer instructions only, no interrupts, no hypercalls.
 *
 * Between two readings it does what the host asks of it in the next page
 * (hands.go): it reads or writes a port, or dies by a triple fault. That is
 * how a test gets at devices for which the guest has no driver.
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

#define REQUEST_ADDRESS 0x201000u

/* What the host asks for. It writes the rest, then what; the guest clears what before it acts, so that nothing is done
 * twice over a reset, and counts done afterwards. hands.go mirrors it. */
struct request {
    uint32_t what;
    uint32_t port;
    uint32_t value; /* written, or read */
    uint32_t times; /* how often it is written */
    uint32_t done;
};

enum { REQUEST_NONE, REQUEST_OUT8, REQUEST_OUT16, REQUEST_IN8, REQUEST_TRIPLE_FAULT };

static inline void wrmsr(uint32_t msr, uint64_t value) {
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

/* Without a table of interrupts the second and third fault follow the first. */
static void triple_fault(void) {
    static const struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) none = {0, 0};

    __asm__ volatile("lidt %0; ud2" ::"m"(none));
}

static void serve(volatile struct request *q) {
    uint32_t what = q->what;
    uint16_t port = (uint16_t)q->port;
    uint8_t byte;

    q->what = REQUEST_NONE;
    switch (what) {
    case REQUEST_OUT8:
        for (uint32_t i = 0; i < q->times; i++)
            __asm__ volatile("outb %0, %1" ::"a"((uint8_t)q->value), "d"(port) : "memory");
        break;
    case REQUEST_OUT16:
        for (uint32_t i = 0; i < q->times; i++)
            __asm__ volatile("outw %0, %1" ::"a"((uint16_t)q->value), "d"(port) : "memory");
        break;
    case REQUEST_IN8:
        __asm__ volatile("inb %1, %0" : "=a"(byte) : "d"(port) : "memory");
        q->value = byte;
        break;
    case REQUEST_TRIPLE_FAULT:
        triple_fault();
    }
    barrier();
    q->done++;
}

void guest_main(void) {
    volatile struct record *r = (volatile struct record *)RECORD_ADDRESS;
    volatile struct request *request = (volatile struct request *)REQUEST_ADDRESS;
    static struct history h;
    uint32_t last_version = 0, updates = 0;

    for (uint32_t i = 0; i < sizeof(*r) / 4; i++)
        ((volatile uint32_t *)r)[i] = 0;
    request->what = REQUEST_NONE;
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
        if (request->what != REQUEST_NONE)
            serve(request);

        if (version != last_version)
            updates++;
        last_version = version;
    }
}
