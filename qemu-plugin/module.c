/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * libftclock-qemu.so: what puts the rule of the clock between QEMU and the kernel.
 *
 * The constructor runs inside QEMU, either because the dynamic linker loaded the module before QEMU's main
 * (LD_PRELOAD), or because ftclock's loader made QEMU's main thread call dlopen. In both cases it does the same: it
 * makes the page, finds the slots through which QEMU's own program file calls ioctl, and puts our function there.
 * Nothing is exported, so that no symbol of ours can get in the way of QEMU's, and other libraries' calls of ioctl stay
 * as they were.
 *
 * The page's memfd is the announcement. If anything isn't as it should be there is none, and QEMU runs on as if we had
 * never come.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "clocks.h"
#include "rule.h"
#include "vcpus.h"

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 8U
#endif

#if !defined(__x86_64__)
#error kvmclock is a clock of x86; the slots are found for x86-64 only
#endif

static ioctl_function *next; /* what was in the slot */
static struct rule rule;
static struct clocks clocks;
static int inside;

static uint64_t clock_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t raw_ns(void) { return clock_ns(CLOCK_MONOTONIC_RAW); }

static uint64_t real_ns(void) { return clock_ns(CLOCK_REALTIME); }

static uint64_t boot_ns(void) { return clock_ns(CLOCK_BOOTTIME); }

static uint64_t mono_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static uint64_t tai_ns(void) { return clock_ns(CLOCK_TAI); }

/* The fence does what RDTSCP would, which older processor models of virtual hosts don't have. */
static uint64_t host_tsc(void) {
    _mm_lfence();
    return __rdtsc();
}

static int clock_ioctl(int fd, unsigned long request, struct kvm_clock_data *data) { return next(fd, request, data); }

static const struct host host = {
    .clock_ioctl = clock_ioctl,
    .raw = raw_ns,
    .real = real_ns,
    .boot = boot_ns,
    .mono = mono_ns,
    .tai = tai_ns,
    .tsc = host_tsc,
    .tsc_offset = vcpus_tsc_offset,
    .move_tsc = vcpus_move_tsc,
    .vm_khz = vcpus_vm_khz,
    .vcpu_khz = vcpus_khz,
    .own_rate = vcpus_own_rate,
};

/* The answer tells of the guest's clocks. */
static int clock_ctrl(int fd, unsigned long request, void *argument) {
    int rc = next(fd, request, argument);
    int error = errno;
    if (!__atomic_exchange_n(&inside, 1, __ATOMIC_ACQUIRE)) {
        clocks_look(&clocks, fd, rc < 0 ? error : 0, rule.counts.pauses, rule.stop.raw);
        __atomic_store_n(&inside, 0, __ATOMIC_RELEASE);
    }
    errno = error;
    return rc;
}

/*
 * In QEMU's place of ioctl. QEMU declares requests as int (accel/kvm/kvm-all.c, kvm_vm_ioctl), so they come
 * sign-extended: 32 bits are compared. QEMU calls both requests under its big lock; should two ever meet, the second
 * goes through unseen.
 */
static int our_ioctl(int fd, unsigned long request, void *argument) {
    uint32_t what = (uint32_t)request;
    if (__builtin_expect(what == KVM_KVMCLOCK_CTRL, 0))
        return clock_ctrl(fd, request, argument);
    if (__builtin_expect(what != (uint32_t)KVM_SET_CLOCK && what != (uint32_t)KVM_GET_CLOCK, 1))
        return next(fd, request, argument);
    if (__atomic_exchange_n(&inside, 1, __ATOMIC_ACQUIRE)) {
        __atomic_fetch_add(&rule.page->counts.busy, 1, __ATOMIC_RELAXED);
        return next(fd, request, argument);
    }
    int rc =
        what == (uint32_t)KVM_SET_CLOCK ? rule_set_clock(&rule, fd, argument) : rule_get_clock(&rule, fd, argument);
    __atomic_store_n(&inside, 0, __ATOMIC_RELEASE);
    return rc;
}

/* --- the slots --- */

/* What the dynamic section of QEMU's own file says. */
struct program {
    ElfW(Addr) base, end;
    const ElfW(Sym) * symbols;
    const char *strings;
    const ElfW(Rela) * tables[2]; /* DT_RELA, DT_JMPREL */
    size_t lengths[2];
    ElfW(Addr) relro, relro_end;
};

/* glibc has made these addresses absolute for the objects it loaded. */
static int read_program(struct dl_phdr_info *info, size_t size, void *out) {
    (void)size;
    struct program *p = out;
    const ElfW(Dyn) *dynamic = NULL;
    p->base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *ph = &info->dlpi_phdr[i];
        if (ph->p_type == PT_DYNAMIC)
            dynamic = (const ElfW(Dyn) *)(p->base + ph->p_vaddr);
        if (ph->p_type == PT_LOAD && p->base + ph->p_vaddr + ph->p_memsz > p->end)
            p->end = p->base + ph->p_vaddr + ph->p_memsz;
        if (ph->p_type == PT_GNU_RELRO) {
            p->relro = p->base + ph->p_vaddr;
            p->relro_end = p->relro + ph->p_memsz;
        }
    }
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        switch (dynamic->d_tag) {
        case DT_SYMTAB:
            p->symbols = (const ElfW(Sym) *)dynamic->d_un.d_ptr;
            break;
        case DT_STRTAB:
            p->strings = (const char *)dynamic->d_un.d_ptr;
            break;
        case DT_RELA:
            p->tables[0] = (const ElfW(Rela) *)dynamic->d_un.d_ptr;
            break;
        case DT_RELASZ:
            p->lengths[0] = dynamic->d_un.d_val / sizeof(ElfW(Rela));
            break;
        case DT_JMPREL:
            p->tables[1] = (const ElfW(Rela) *)dynamic->d_un.d_ptr;
            break;
        case DT_PLTRELSZ:
            p->lengths[1] = dynamic->d_un.d_val / sizeof(ElfW(Rela));
            break;
        }
    }
    return 1; /* the first object is the program */
}

/*
 * The function behind a slot. One that isn't bound yet (lazy binding) leads back into the program, to a stub that would
 * have the dynamic linker overwrite the slot: ioctl as we have it ourselves is what it would be bound to.
 */
static ioctl_function *function_of(const struct program *p, ioctl_function *const *slot) {
    uintptr_t at = (uintptr_t)*slot;
    return at >= p->base && at < p->end ? (ioctl_function *)(void (*)(void))ioctl : *slot;
}

struct owner {
    uintptr_t at;
    int ours;
};

/* Whether an address is in a copy of this module: the file may have been replaced since that one was loaded. One that
 * the loader gave in a memory file has the name of a descriptor. */
static int find_owner(struct dl_phdr_info *info, size_t size, void *out) {
    (void)size;
    struct owner *owner = out;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *ph = &info->dlpi_phdr[i];
        if (ph->p_type == PT_LOAD && owner->at - info->dlpi_addr - ph->p_vaddr < ph->p_memsz) {
            owner->ours = strstr(info->dlpi_name, "libftclock-qemu") != NULL ||
                          strncmp(info->dlpi_name, "/proc/self/fd/", strlen("/proc/self/fd/")) == 0;
            return 1;
        }
    }
    return 0;
}

/* The number of slots, of which the first max are stored; all must hold the same function, else 0. */
static size_t find_slots(const struct program *p, ioctl_function ***slots, size_t max) {
    size_t n = 0;
    for (int t = 0; t < 2 && p->symbols && p->strings; t++) {
        for (size_t i = 0; p->tables[t] && i < p->lengths[t]; i++) {
            const ElfW(Rela) *rel = &p->tables[t][i];
            unsigned long type = ELF64_R_TYPE(rel->r_info);
            if (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT)
                continue;
            const ElfW(Sym) *symbol = &p->symbols[ELF64_R_SYM(rel->r_info)];
            if (strcmp(p->strings + symbol->st_name, "ioctl") != 0)
                continue;
            ioctl_function **slot = (ioctl_function **)(p->base + rel->r_offset);
            if (n == max || (n && function_of(p, slot) != function_of(p, slots[0])))
                return 0;
            slots[n++] = slot;
        }
    }
    return n;
}

static int set_slot(const struct program *p, ioctl_function **slot) {
    uintptr_t size = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t at = (uintptr_t)slot & ~(size - 1);
    /* The dynamic linker protects whole pages of the RELRO segment, its end rounded down (elf/dl-reloc.c). */
    int relro = (uintptr_t)slot >= (p->relro & ~(size - 1)) && (uintptr_t)slot < (p->relro_end & ~(size - 1));
    if (relro && mprotect((void *)at, size, PROT_READ | PROT_WRITE) != 0)
        return -1;
    __atomic_store_n(slot, our_ioctl, __ATOMIC_RELEASE);
    if (relro)
        mprotect((void *)at, size, PROT_READ);
    return 0;
}

/* --- the page --- */

static struct ftclock_page *make_page(int *fd) {
    /* Where vm.memfd_noexec is 2 the flag is a must; kernels before 6.3 don't know it. */
    *fd = memfd_create(FTCLOCK_PAGE_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL);
    if (*fd < 0 && errno == EINVAL)
        *fd = memfd_create(FTCLOCK_PAGE_NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (*fd < 0)
        return NULL;
    void *page = MAP_FAILED;
    if (ftruncate(*fd, FTCLOCK_PAGE_SIZE) == 0 &&
        fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        page = mmap(NULL, FTCLOCK_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, *fd, 0);
    if (page == MAP_FAILED) {
        close(*fd);
        return NULL;
    }
    return page;
}

/* LD_PRELOAD could be set for any program: only one that is called like QEMU is served. Its tools of such names, which
 * have no VM, lose nothing by it. */
static int is_qemu(void) {
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (n <= 0)
        return 0;
    path[n] = 0;
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    return strstr(name, "qemu") != NULL || strcmp(name, "kvm") == 0;
}

__attribute__((constructor)) static void start(void) {
    struct program program = {0};
    ioctl_function **slots[8];
    if (!is_qemu())
        return;
    dl_iterate_phdr(read_program, &program);
    size_t n = find_slots(&program, slots, sizeof(slots) / sizeof(slots[0]));
    if (n == 0)
        return;
    struct owner owner = {.at = (uintptr_t)*slots[0]};
    dl_iterate_phdr(find_owner, &owner);
    if (owner.ours)
        return;
    int fd;
    struct ftclock_page *page = make_page(&fd);
    if (!page)
        return;
    next = function_of(&program, slots[0]);
    vcpus_start(next);
    clocks = (struct clocks){.vcpu_ioctl = next, .raw = raw_ns, .page = page};
    rule_start(&rule, &host, page, (uint32_t)getpid());
    size_t set = 0;
    while (set < n && set_slot(&program, slots[set]) == 0)
        set++;
    if (set == 0) {
        munmap(page, FTCLOCK_PAGE_SIZE);
        close(fd);
    }
}
