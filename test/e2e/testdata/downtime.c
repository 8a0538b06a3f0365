/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * A stand-in for a QEMU that makes up for downtime itself: one that notes the host's CLOCK_REALTIME when it reads the
 * guest's clock, and has KVM_SET_CLOCK add what has passed since (KVM_CLOCK_REALTIME, Linux 5.16 and later). No
 * distribution ships one yet, so this library, preloaded into a stock QEMU, adds flag and time to QEMU's own call.
 *
 * It has to do so above ftclock's module, where QEMU would. QEMU's calls of ioctl go through one slot, which leads
 * here at first; the module puts itself there and calls what it found. As soon as this library sees that, it puts
 * itself into the slot again, before the module.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

typedef int function(int fd, unsigned long request, void *argument);

int ioctl(int fd, unsigned long request, ...);
static int account(int fd, unsigned long request, void *argument);

static function **slot, *libc_ioctl, *under;

/* Every reading of the clock, with CLOCK_REALTIME. QEMU makes these calls under its lock. */
static struct { uint64_t clock, realtime; } readings[1024];
static unsigned taken;

static int find_slot(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *ph = &info->dlpi_phdr[i];
        if (ph->p_type != PT_GNU_RELRO)
            continue;
        uintptr_t *word = (uintptr_t *)(info->dlpi_addr + ph->p_vaddr);
        for (size_t n = ph->p_memsz / sizeof(*word); n-- > 0; word++)
            if (*word == (uintptr_t)ioctl)
                slot = (function **)word;
    }
    return 1; /* the first object is the program */
}

__attribute__((constructor)) static void start(void) { dl_iterate_phdr(find_slot, NULL); }

/* Whether the module is there, now below us. */
static int above_the_module(void) {
    function *in_slot = slot ? __atomic_load_n(slot, __ATOMIC_ACQUIRE) : NULL;
    if (!in_slot || in_slot == (function *)ioctl)
        return 0;
    if (in_slot != account) {
        void *page = (void *)((uintptr_t)slot & ~(uintptr_t)4095);
        under = in_slot;
        if (mprotect(page, 4096, PROT_READ | PROT_WRITE) != 0)
            __builtin_trap();
        __atomic_store_n(slot, account, __ATOMIC_RELEASE);
        mprotect(page, 4096, PROT_READ);
    }
    return 1;
}

/* In QEMU's place. QEMU's requests come sign-extended. */
static int account(int fd, unsigned long request, void *argument) {
    function *call = under ? under : libc_ioctl;
    if ((uint32_t)request == (uint32_t)KVM_GET_CLOCK) {
        struct kvm_clock_data *data = argument;
        int rc = call(fd, request, data);
        if (rc == 0 && (data->flags & KVM_CLOCK_REALTIME)) {
            unsigned i = taken++ % (sizeof(readings) / sizeof(readings[0]));
            readings[i].clock = data->clock;
            readings[i].realtime = data->realtime;
        }
        return rc;
    }
    if ((uint32_t)request == (uint32_t)KVM_SET_CLOCK) {
        struct kvm_clock_data data = *(struct kvm_clock_data *)argument;
        for (unsigned i = 0; i < sizeof(readings) / sizeof(readings[0]); i++) {
            if (data.clock && readings[i].clock == data.clock) {
                data.flags |= KVM_CLOCK_REALTIME;
                data.realtime = readings[i].realtime;
            }
        }
        return call(fd, request, &data);
    }
    return call(fd, request, argument);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!libc_ioctl)
        libc_ioctl = (function *)dlsym(RTLD_NEXT, "ioctl");
    return above_the_module() ? libc_ioctl(fd, request, argument) : account(fd, request, argument);
}
