/*
 * The only process of the Linux guest. One thread a vCPU, bound to it, publishes CLOCK_MONOTONIC and CLOCK_REALTIME,
 * each as a record of its own, in a page of its memory, which the host finds by PAGE_MAGIC. The threads also compare
 * CLOCK_MONOTONIC across vCPUs. The first one prints on the console, once a second of its own time, both clocks and
 * what the kernel has logged meanwhile.
 */
#define _GNU_SOURCE
#include "record.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* linuxguest.go mirrors this. Written at run time, so that the copies of this program that lie about in the guest's
 * memory don't carry it. */
#define PAGE_MAGIC_A 0x6b636f6c63746667ull
#define PAGE_MAGIC_B 0x31646e696c657867ull
#define MOST_CPUS    64
#define SOURCES      "/sys/devices/system/clocksource/clocksource0/"

/* The first vCPU reads all the time: one that slept would stand still for good where an emulated host loses the
 * interrupt of its timer. The others are awake for 3 ms of 12: a host with fewer processors than vCPUs has to run QEMU
 * and everything else beside them. */
#define AWAKE  3000000u /* ns */
#define ASLEEP 9000000u /* ns */

struct page {
    uint64_t magic[2];
    uint64_t cpu, cpus;
    uint64_t across;         /* how often CLOCK_MONOTONIC was behind what another vCPU had read before */
    uint64_t largest_across; /* ns */
    uint64_t pad[2];
    struct record monotonic; /* at 64 */
    struct record realtime;  /* at 64 + sizeof(struct record) */
} __attribute__((aligned(4096)));

static volatile struct page pages[MOST_CPUS];
static _Atomic uint64_t newest; /* the largest CLOCK_MONOTONIC that any vCPU has read, ns */
static int cpus;
/* When the guest suspends itself to memory, CLOCK_MONOTONIC in ns. */
static uint64_t sleep_at = UINT64_MAX;

static uint64_t now(clockid_t clock) {
    struct timespec ts = {0, 0};

    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t publish(volatile struct record *r, struct history *h, clockid_t clock) {
    uint64_t ns;

    record_begin(r, h);
    ns = now(clock);
    record_end(r, h, ns, rdtsc());
    record_rest();
    return ns;
}

/* The kernel orders the reading of the TSC behind the load of newest: what is below it went back. */
static void compare(volatile struct page *page) {
    uint64_t before = atomic_load(&newest), ns = now(CLOCK_MONOTONIC);

    if (ns < before) {
        page->across++;
        if (before - ns > page->largest_across)
            page->largest_across = before - ns;
        return;
    }
    while (before < ns && !atomic_compare_exchange_weak(&newest, &before, ns))
        ;
}

static void write_file(const char *path, const char *text) {
    FILE *f = fopen(path, "w");

    if (f) {
        fputs(text, f);
        fclose(f);
    }
}

/* What the kernel's command line has and the kernel doesn't know is our environment: boots on a slow clock take too
 * long, so it is changed to afterwards. */
static void change_source(void) {
    const char *name = getenv("ftclock_source");

    if (name)
        write_file(SOURCES "current_clocksource", name);
}

static void print_file(const char *path) {
    char text[100] = "?";
    FILE *f = fopen(path, "r");

    if (f) {
        if (!fgets(text, sizeof(text), f))
            strcpy(text, "?");
        fclose(f);
    }
    text[strcspn(text, "\n")] = 0;
    printf("%s\n", text);
}

/* A record of /dev/kmsg is "priority,sequence,microseconds,-;text\n", see the kernel's
 * Documentation/ABI/testing/dev-kmsg. */
static void forward_kernel_log(int kmsg) {
    static char text[8192];
    ssize_t n;

    while ((n = read(kmsg, text, sizeof(text) - 1)) > 0) {
        char *message;

        text[n] = 0;
        message = strchr(text, ';');
        if (message)
            printf("ftclock kernel %.*s\n", (int)strcspn(message + 1, "\n"), message + 1);
    }
}

static void *run(void *argument) {
    int cpu = (int)(intptr_t)argument, kmsg = -1;
    volatile struct page *page = &pages[cpu];
    struct history monotonic = {0}, realtime = {0};
    const struct timespec asleep = {0, ASLEEP};
    uint64_t due = 0;
    cpu_set_t one;

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    if (cpu == 0)
        kmsg = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
    page->cpu = (uint64_t)cpu;
    page->cpus = (uint64_t)cpus;
    page->magic[0] = PAGE_MAGIC_A;
    page->magic[1] = PAGE_MAGIC_B;
    for (;;) {
        uint64_t ns = publish(&page->monotonic, &monotonic, CLOCK_MONOTONIC);
        uint64_t real = publish(&page->realtime, &realtime, CLOCK_REALTIME);

        compare(page);
        if (cpu == 0 && ns > sleep_at) {
            sleep_at = UINT64_MAX;
            write_file("/sys/power/state", "mem");
        }
        if (ns < due)
            continue;
        if (cpu != 0) {
            nanosleep(&asleep, NULL);
            due = now(CLOCK_MONOTONIC) + AWAKE;
            continue;
        }
        due = ns + 1000000000u;
        printf("ftclock clock realtime=%llu monotonic=%llu tsc=%llu source=", (unsigned long long)real,
               (unsigned long long)ns, (unsigned long long)rdtsc());
        print_file(SOURCES "current_clocksource");
        forward_kernel_log(kmsg);
        fflush(stdout);
    }
    return NULL;
}

int main(void) {
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    setpriority(PRIO_PROCESS, 0, 19); /* the kernel's threads go first */
    mlockall(MCL_CURRENT | MCL_FUTURE);

    change_source();
    if (getenv("ftclock_sleep")) /* in seconds from now */
        sleep_at = now(CLOCK_MONOTONIC) + strtoull(getenv("ftclock_sleep"), NULL, 10) * 1000000000u;
    cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
    if (cpus > MOST_CPUS)
        cpus = MOST_CPUS;
    printf("ftclock init cpus=%d available=", cpus);
    print_file(SOURCES "available_clocksource");
    fflush(stdout);
    for (int cpu = 1; cpu < cpus; cpu++) {
        pthread_t thread;

        if (pthread_create(&thread, NULL, run, (void *)(intptr_t)cpu) != 0)
            printf("ftclock init no thread for vCPU %d\n", cpu);
    }
    run((void *)0);
}
