/*
 * The only process of the Linux guest. It publishes CLOCK_MONOTONIC and
 * CLOCK_REALTIME, each as a record of its own, in a page of its memory, which
 * the host finds by PAGE_MAGIC; and it prints on the console, once a second
 * of its own time, both clocks and what the kernel has logged meanwhile.
 *
 * No libc: it must run where the CPU's feature bits don't tell the truth, and
 * it needs the vDSO, without which a reading costs a system call.
 */
#include "record.h"

#include <elf.h>
#include <stddef.h>

/* linuxguest.go mirrors this. Written at run time, so that the copies of this
 * program that lie about in the guest's memory don't carry it. */
#define PAGE_MAGIC_A 0x6b636f6c63746667ull
#define PAGE_MAGIC_B 0x31646e696c657867ull

struct page {
    uint64_t magic[2];
    uint64_t pad[6];
    struct record monotonic; /* at 64 */
    struct record realtime;  /* at 64 + sizeof(struct record) */
} __attribute__((aligned(4096)));

struct timespec {
    long seconds, nanoseconds;
};

static volatile struct page page;
static struct history monotonic, realtime;

static long (*vdso_clock_gettime)(int, struct timespec *);

static long call5(long n, long a, long b, long c, long d, long e) {
    long r;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;

    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8) : "rcx", "r11", "memory");
    return r;
}

enum {
    SYS_read,
    SYS_write,
    SYS_open,
    SYS_close,
    SYS_mkdir = 83,
    SYS_setpriority = 141,
    SYS_mlockall = 151,
    SYS_mount = 165,
    SYS_clock_gettime = 228
};
#define call(n, a, b, c) call5(n, (long)(a), (long)(b), (long)(c), 0, 0)

/* Without a libc the compiler still calls these. */
void *memset(void *p, int c, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile char *)p)[i] = (char)c;
    return p;
}

static char line[512];
static unsigned length;

static void put(const char *s) {
    while (*s && length < sizeof(line))
        line[length++] = *s++;
}

static void put_number(uint64_t x) {
    char digits[21];
    int i = sizeof(digits);

    digits[--i] = 0;
    do {
        digits[--i] = '0' + x % 10;
        x /= 10;
    } while (x);
    put(digits + i);
}

static void flush(void) {
    call(SYS_write, 1, line, length);
    length = 0;
}

/* vdso finds clock_gettime in the kernel's shared object. */
static void find_vdso(const char *base) {
    const Elf64_Ehdr *header = (const void *)base;
    const Elf64_Phdr *segment = (const void *)(base + header->e_phoff);
    const Elf64_Dyn *dynamic = NULL;
    const Elf64_Sym *symbols = NULL;
    const char *strings = NULL;
    const uint32_t *hash = NULL;

    for (int i = 0; i < header->e_phnum; i++)
        if (segment[i].p_type == PT_DYNAMIC)
            dynamic = (const void *)(base + segment[i].p_offset);
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        const char *at = base + dynamic->d_un.d_ptr;

        if (dynamic->d_tag == DT_SYMTAB)
            symbols = (const void *)at;
        else if (dynamic->d_tag == DT_STRTAB)
            strings = at;
        else if (dynamic->d_tag == DT_HASH)
            hash = (const void *)at;
    }
    if (!symbols || !strings)
        return;
    /* Newer kernels have DT_GNU_HASH only; the string table follows the symbols in the vDSO. */
    size_t count = hash ? hash[1] : (size_t)(strings - (const char *)symbols) / sizeof(*symbols);
    for (size_t i = 0; i < count; i++) {
        const char *want = "__vdso_clock_gettime", *name = strings + symbols[i].st_name;

        while (*want && *want == *name)
            want++, name++;
        if (*want == 0 && *name == 0 && symbols[i].st_value)
            vdso_clock_gettime = (void *)(base + symbols[i].st_value);
    }
}

static uint64_t now(int clock) {
    struct timespec ts = {0, 0};

    if (!vdso_clock_gettime || vdso_clock_gettime(clock, &ts) != 0)
        call(SYS_clock_gettime, clock, &ts, 0);
    return (uint64_t)ts.seconds * 1000000000u + (uint64_t)ts.nanoseconds;
}

static void publish(volatile struct record *r, struct history *h, int clock) {
    uint64_t ns;

    record_begin(r, h);
    ns = now(clock);
    record_end(r, h, ns, rdtsc());
    record_rest();
}

static void put_file(const char *path) {
    char text[100];
    long fd = call(SYS_open, path, 0, 0), n = -1;

    if (fd >= 0) {
        n = call(SYS_read, fd, text, sizeof(text) - 1);
        call(SYS_close, fd, 0, 0);
    }
    for (long i = 0; i < n; i++)
        if (text[i] == '\n')
            text[i] = ' ';
    text[n > 0 ? n : 0] = 0;
    put(n > 0 ? text : "?");
}

/* A record of /dev/kmsg is "priority,sequence,microseconds,-;text\n", see
 * the kernel's Documentation/ABI/testing/dev-kmsg. */
static void forward_kernel_log(long kmsg) {
    static char text[2048];
    long n;

    while ((n = call(SYS_read, kmsg, text, sizeof(text) - 1)) > 0) {
        long i = 0;

        while (i < n && text[i] != ';')
            i++;
        put("ftclock kernel ");
        for (i++; i < n && text[i] != '\n' && length < sizeof(line) - 1; i++)
            line[length++] = text[i];
        put("\n");
        flush();
    }
}

__attribute__((noreturn)) void init_main(const long *stack) {
    const long *p = stack + 1 + stack[0] + 1; /* behind argc and argv */
    uint64_t due = 0;
    long kmsg;

    while (*p++) /* the environment */
        ;
    for (; *p; p += 2)
        if (*p == 33) /* AT_SYSINFO_EHDR */
            find_vdso((const char *)p[1]);

    call(SYS_mkdir, "/sys", 0755, 0);
    call(SYS_mkdir, "/dev", 0755, 0);
    call5(SYS_mount, (long)"sys", (long)"/sys", (long)"sysfs", 0, 0);
    call5(SYS_mount, (long)"dev", (long)"/dev", (long)"devtmpfs", 0, 0);
    kmsg = call(SYS_open, "/dev/kmsg", 04000 /* O_RDONLY|O_NONBLOCK */, 0);
    call(SYS_setpriority, 0, 0, 19); /* the kernel's threads go first */
    call(SYS_mlockall, 3, 0, 0);

    put("ftclock init vdso=");
    put(vdso_clock_gettime ? "yes" : "no");
    put(" available=");
    put_file("/sys/devices/system/clocksource/clocksource0/available_clocksource");
    put("\n");
    flush();

    page.magic[0] = PAGE_MAGIC_A;
    page.magic[1] = PAGE_MAGIC_B;
    for (;;) {
        publish(&page.monotonic, &monotonic, 1);
        publish(&page.realtime, &realtime, 0);
        if (monotonic.previous < due)
            continue;
        due = monotonic.previous + 1000000000u;
        put("ftclock clock realtime=");
        put_number(realtime.previous);
        put(" monotonic=");
        put_number(monotonic.previous);
        put(" tsc=");
        put_number(rdtsc());
        put(" source=");
        put_file("/sys/devices/system/clocksource/clocksource0/current_clocksource");
        put("\n");
        flush();
        forward_kernel_log(kmsg);
    }
}

__asm__(".globl _start\n"
        "_start: mov %rsp, %rdi\n"
        "	and $-16, %rsp\n"
        "	call init_main\n");
