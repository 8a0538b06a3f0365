/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * QEMU tells nobody which of its descriptors are vCPUs, but the kernel does, by the names of their links in
 * /proc/self/fd: "anon_inode:kvm-vcpu:N". They are looked up by number, because libvirt's AppArmor profile doesn't let
 * QEMU list that directory. vCPU 0's is kept: it is closed with the VM, not before. The others come and go, and are
 * looked up each time.
 */
#define _GNU_SOURCE
#include "vcpus.h"

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* As many as KVM has (KVM_MAX_VCPUS, 4096 at most). */
#define VCPUS 4096
/* Behind so many numbers without a descriptor there is none. */
#define GAP 256

#define LINK "anon_inode:kvm-vcpu:"

static ioctl_function *kernel;
static int first = -1; /* vCPU 0's descriptor */
static bool looked;

void vcpus_start(ioctl_function *function) { kernel = function; }

/* The number of the vCPU behind a descriptor; -1: none is, -2: there is no such descriptor. */
static int vcpu_of(int fd) {
    char path[40], target[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    ssize_t n = readlink(path, target, sizeof(target) - 1);
    if (n < 0)
        return -2;
    target[n] = 0;
    return strncmp(target, LINK, strlen(LINK)) == 0 ? atoi(target + strlen(LINK)) : -1;
}

static size_t find_vcpus(int *fds) {
    size_t n = 0;
    first = -1;
    looked = true;
    for (int fd = 0, gap = 0; gap < GAP && n < VCPUS; fd++) {
        int vcpu = vcpu_of(fd);
        gap = vcpu == -2 ? gap + 1 : 0;
        if (vcpu == 0)
            first = fd;
        if (vcpu >= 0)
            fds[n++] = fd;
    }
    return n;
}

static int offset_ioctl(int fd, unsigned long request, uint64_t *offset) {
    struct kvm_device_attr attribute = {
        .group = KVM_VCPU_TSC_CTRL,
        .attr = KVM_VCPU_TSC_OFFSET,
        .addr = (uintptr_t)offset,
    };
    return kernel(fd, request, &attribute);
}

static int fds[VCPUS];
static uint64_t offsets[VCPUS];

int vcpus_tsc_offset(int64_t *offset) {
    uint64_t value;
    if (!looked)
        find_vcpus(fds);
    if (first < 0 || offset_ioctl(first, KVM_GET_DEVICE_ATTR, &value) < 0)
        return -1;
    *offset = (int64_t)value;
    return 0;
}

/* All or none: vCPUs whose TSCs differ make a guest's clock go back. */
int vcpus_move_tsc(int64_t by) {
    size_t n = find_vcpus(fds), moved = 0;
    for (size_t i = 0; i < n; i++)
        if (offset_ioctl(fds[i], KVM_GET_DEVICE_ATTR, &offsets[i]) < 0)
            return -1;
    for (; moved < n; moved++) {
        uint64_t offset = offsets[moved] + (uint64_t)by;
        if (offset_ioctl(fds[moved], KVM_SET_DEVICE_ATTR, &offset) < 0)
            break;
    }
    if (n > 0 && moved == n)
        return 0;
    while (moved-- > 0)
        offset_ioctl(fds[moved], KVM_SET_DEVICE_ATTR, &offsets[moved]);
    return -1;
}

static uint32_t khz(int fd) {
    int value = kernel(fd, KVM_GET_TSC_KHZ, NULL);
    return value > 0 ? (uint32_t)value : 0;
}

uint32_t vcpus_vm_khz(int fd) { return khz(fd); }

uint32_t vcpus_khz(void) {
    if (!looked)
        find_vcpus(fds);
    return first < 0 ? 0 : khz(first);
}

/*
 * kvmclock's factor is as good as exact; that of CLOCK_MONOTONIC_RAW is rounded to some 23 bits
 * (__clocksource_update_freq_scale and clocks_calc_mult_shift in kernel/time/clocksource.c, Linux 6.1): as many as keep
 * 600 s of ticks below 2^64, and NTP's 11 % below 2^32.
 */
double vcpus_own_rate(uint32_t khz) {
    if (!khz)
        return 0;
    unsigned room = 32, shift = 32;
    for (uint64_t ticks = (uint64_t)600 * 1000 * khz >> 32; ticks; ticks >>= 1)
        room--;
    uint64_t multiplier = 0;
    for (; shift > 0; shift--) {
        multiplier = ((UINT64_C(1000000) << shift) + khz / 2) / khz;
        if (!(multiplier >> room))
            break;
    }
    for (; multiplier + multiplier * 11 / 100 > UINT32_MAX; shift--)
        multiplier >>= 1;
    return 1e6 / khz / ((double)multiplier / (double)(UINT64_C(1) << shift)) - 1;
}
