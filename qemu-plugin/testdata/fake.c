/* SPDX-License-Identifier: MIT */
/*
 * A program that does with KVM's clock what QEMU does, for the module's tests. It prints facts, one "name=value" a
 * line.
 *
 *   qemu-fake SLOT [MODULE...]
 *
 * SLOT is where its own file calls ioctl through: the offset of the GOT's slot. MODULEs are opened one after the other;
 * the module may be there already, by LD_PRELOAD.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../../clockpage/clockpage.h"

#define RAM 16384 /* bytes */

extern char __executable_start[];

/* QEMU's kvm_vm_ioctl and its like have the request as int: what has the 31st bit set arrives sign-extended. */
static int call(int fd, int request, void *argument) { return ioctl(fd, request, argument); }

/* The memfds that look like a page; the first one's descriptor, or -1. */
static int find_page(int *first) {
    int n = 0;
    *first = -1;
    for (int fd = 0; fd < 256; fd++) {
        char path[64], target[256];
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof(target) - 1);
        if (length <= 0)
            continue;
        target[length] = 0;
        if (strncmp(target, "/memfd:" FTCLOCK_PAGE_NAME, strlen("/memfd:" FTCLOCK_PAGE_NAME)) == 0 && n++ == 0) {
            *first = fd;
            printf("memfd=%s\n", target);
        }
    }
    return n;
}

static void show_errno(const char *what, int rc) {
    int error = errno;
    printf("%s=%d %s\n", what, rc, rc < 0 ? strerrorname_np(error) : error == 77 ? "untouched" : "touched");
    errno = 77;
}

static const char *const decisions[] = {"nothing", "dropped", "anchored", "held", "passed"};

static void show_record(const struct ftclock_page *page, const char *what) {
    if (!page)
        return;
    const struct ftclock_record *r = &page->ring[(page->counts.pauses - 1) % FTCLOCK_RING_LEN];
    printf("%s=%s reason %u\n", what, r->decision < 5 ? decisions[r->decision] : "unknown", r->reason);
}

/* QEMU says this to each vCPU at a cont, and the module sees what the guest has switched on. */
static void show_clocks(int vcpu, const struct ftclock_page *page) {
    int rc = call(vcpu, KVM_KVMCLOCK_CTRL, 0);
    show_errno("ctrl", rc);
    if (page)
        printf("clocks=%u\n", page->clocks.on);
}

/* The guest writes an MSR. */
static void set_msr(int vcpu, uint32_t index, uint64_t value) {
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msrs = {.head = {.nmsrs = 1}, .entry = {.index = index, .data = value}};
    if (call(vcpu, KVM_SET_MSRS, &msrs) != 1)
        printf("msr=%#x refused\n", index);
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IONBF, 0);
    if (argc < 2)
        return 2;
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) {
        perror("opening /dev/kvm");
        return 1;
    }
    int vm = call(kvm, KVM_CREATE_VM, 0), vcpu = call(vm, KVM_CREATE_VCPU, 0);
    void *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    struct kvm_userspace_memory_region memory = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    /* It offers Hyper-V's reference time, by counter and by page. */
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 leaves[3];
    } cpuid = {.head = {.nent = 3},
               .leaves = {{.function = 0x40000000, .eax = 0x40000005},
                          {.function = 0x40000001, .eax = 0x31237648 /* Hv#1 */},
                          {.function = 0x40000003, .eax = 1 << 1 | 1 << 9}}};
    if (vcpu < 0 || call(vm, KVM_SET_USER_MEMORY_REGION, &memory) < 0 || call(vcpu, KVM_SET_CPUID2, &cpuid) < 0) {
        perror("making a VM");
        return 1;
    }
    for (int i = 2; i < argc; i++)
        printf("dlopen%d=%s\n", i - 1, dlopen(argv[i], RTLD_NOW) ? "ok" : dlerror());

    int fd;
    printf("pages=%d\n", find_page(&fd));
    struct ftclock_page *page = NULL;
    if (fd >= 0) {
        printf("seals=%#x\n", fcntl(fd, F_GET_SEALS));
        printf("cloexec=%d\n", fcntl(fd, F_GETFD) & FD_CLOEXEC);
        page = mmap(NULL, FTCLOCK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page == MAP_FAILED)
            return 1;
        printf("head=%d\n", page->head.magic == FTCLOCK_PAGE_MAGIC && page->head.pid == (uint32_t)getpid());
        page->policy = (struct ftclock_policy){.enabled = 1,
                                               .checkpoint_do = FTCLOCK_DO_CATCH_UP,
                                               .suspend_do = FTCLOCK_DO_HOLD,
                                               .checkpoint_limit = FTCLOCK_LIMIT_MAX};
        __atomic_store_n(&page->policy.seq, 2, __ATOMIC_RELEASE);
    }

    /* The start: a write with no stop before it. */
    struct kvm_clock_data clock = {.clock = 1000000000};
    errno = 77;
    show_errno("set", call(vm, KVM_SET_CLOCK, &clock));
    show_record(page, "first");
    show_clocks(vcpu, page);
    const uint64_t paused = 300000000; /* ns: a busy host takes less from a write to the reading behind it */
    struct timespec run = {0, (long)paused};
    nanosleep(&run, NULL);

    /* A pause, twice: the first stop takes the anchor. */
    for (int i = 0; i < 2; i++) {
        clock = (struct kvm_clock_data){0};
        errno = 77;
        show_errno("get", call(vm, KVM_GET_CLOCK, &clock));
        printf("stable=%d\n", (clock.flags & KVM_CLOCK_TSC_STABLE) != 0);
        clock = (struct kvm_clock_data){.clock = clock.clock};
        nanosleep(&run, NULL);
        struct kvm_clock_data after = {0};
        int rc = call(vm, KVM_SET_CLOCK, &clock);
        int error = errno;
        call(vm, KVM_GET_CLOCK, &after);
        errno = error;
        show_errno("set", rc);
        show_record(page, "pause");
        if (i == 0) {
            set_msr(vcpu, 0x4b564d01, 4096 | 1);
        } else {
            set_msr(vcpu, 0x4b564d01, 0);
            set_msr(vcpu, 0x40000000, 1);
            set_msr(vcpu, 0x40000021, 8192 | 1);
        }
        show_clocks(vcpu, page);
        printf("caught-up=%d\n", after.clock - clock.clock >= paused);
    }

    /* All else goes to the kernel as it is. */
    errno = 77;
    show_errno("version", call(kvm, KVM_GET_API_VERSION, 0));
    show_errno("unknown", call(vm, (int)0x8000aeff, 0));
    show_errno("get-no-fd", call(-1, KVM_GET_CLOCK, &clock));
    show_errno("set-no-fd", call(-1, KVM_SET_CLOCK, &clock));
    show_errno("get-not-vm", call(kvm, KVM_GET_CLOCK, &clock));
    show_errno("get-bad-address", call(vm, KVM_GET_CLOCK, (void *)8));

    uintptr_t slot = (uintptr_t)__executable_start + strtoull(argv[1], NULL, 0);
    printf("slot=%#" PRIxPTR "\n", slot);
    printf("target=%#" PRIxPTR "\n", *(uintptr_t *)slot);
    if (page)
        printf("counts=%" PRIu64 " pauses, %" PRIu64 " busy\n", page->counts.pauses, page->counts.busy);
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4096];
    while (maps && fgets(line, sizeof(line), maps))
        printf("map=%s", line);
    return 0;
}
