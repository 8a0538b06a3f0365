/*
 * The kvmclock guest: a freestanding 32-bit program that reads kvmclock as a
 * Linux guest does, for ever, and writes what it saw to the page at 2 MiB,
 * where the host reads it (guest.go).
 *
 * It may run under a hypervisor that emulates every instruction, at a few
 * million a second: integer instructions only, no hypercalls, no interrupt but
 * the one that ends its rests.
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
    uint32_t busy; /* not 0: the guest never rests */
};

enum { REQUEST_NONE, REQUEST_OUT8, REQUEST_OUT16, REQUEST_IN8, REQUEST_TRIPLE_FAULT };

static inline void wrmsr(uint32_t msr, uint64_t value) {
    __asm__ volatile("wrmsr" ::"c"(msr), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}

/* The guest is awake for some ms of ten, as most guests are for less: who shares the host's processors with it has the
 * rest. */
#define AWAKE  5000000u  /* cycles of the TSC, 1 to 3 ms */
#define PERIOD 10000000u /* ns: the APIC timer counts those under KVM and QEMU, divided by 1 */

#define APIC_SPURIOUS 0xfee000f0u
#define APIC_TIMER    0xfee00320u
#define APIC_INITIAL  0xfee00380u
#define APIC_DIVIDE   0xfee003e0u
#define PERIODIC      (1u << 17)
#define TICK          0x20u /* the timer's vector */

void tick(void); /* start.S */

static inline void outb(uint16_t port, uint8_t value) {
    __asm__ volatile("outb %0, %1" ::"a"(value), "d"(port) : "memory");
}

static void apic(uint32_t reg, uint32_t value) { *(volatile uint32_t *)reg = value; }

/* Sets up the timer. */
static void prepare_rests(void) {
    static struct { uint16_t low, selector, type, high; } __attribute__((packed, aligned(8))) gates[TICK + 1];
    const struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) table = {sizeof(gates) - 1, (uint32_t)gates};

    gates[TICK].low = (uint16_t)(uint32_t)tick;
    gates[TICK].selector = 8;
    gates[TICK].type = 0x8e00; /* present, interrupt gate of 32 bits */
    gates[TICK].high = (uint16_t)((uint32_t)tick >> 16);
    __asm__ volatile("lidt %0" ::"m"(table));
    outb(0x21, 0xff); /* both 8259s: the firmware's devices are quiet */
    outb(0xa1, 0xff);
    apic(APIC_SPURIOUS, 0x1ff); /* on */
    apic(APIC_DIVIDE, 0xb);
    apic(APIC_TIMER, PERIODIC | TICK);
    apic(APIC_INITIAL, PERIOD);
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
            outb(port, (uint8_t)q->value);
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
    uint64_t awake = 0;

    for (uint32_t i = 0; i < sizeof(*r) / 4; i++)
        ((volatile uint32_t *)r)[i] = 0;
    request->what = REQUEST_NONE;
    request->busy = 0;
    prepare_rests();
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
        if (tsc - awake > AWAKE && !request->busy) {
            __asm__ volatile("sti; hlt; cli" ::: "memory");
            awake = rdtsc();
        }
    }
}
