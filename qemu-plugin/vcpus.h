/* SPDX-License-Identifier: MIT */
/*
 * The vCPUs of QEMU's VM, and their TSC. Only to be asked while no vCPU runs: the kernel keeps callers waiting
 * otherwise.
 */
#ifndef FTCLOCK_VCPUS_H
#define FTCLOCK_VCPUS_H

#include <stdint.h>

typedef int ioctl_function(int fd, unsigned long request, void *argument);

/* Makes vCPUs known by the ioctl of the kernel. */
void vcpus_start(ioctl_function *kernel);

/* What vCPU 0's TSC is ahead of the host's by, in ticks. Negative result: the kernel doesn't say (Linux before 5.16).
 */
int vcpus_tsc_offset(int64_t *offset);

/* Moves every vCPU's TSC by so many ticks. Negative result: none was moved. */
int vcpus_move_tsc(int64_t by);

/* How many kHz the TSC has, of the VM behind fd, or of vCPU 0 where the kernel doesn't say so of VMs (Linux
 * before 5.18). 0: not known. */
uint32_t vcpus_vm_khz(int fd);
uint32_t vcpus_khz(void);

/* What kvmclock runs faster than CLOCK_MONOTONIC_RAW by, in ns a ns, on a host whose clock source is a TSC of so many
 * kHz: see the Go package kvmclock, which is the same. */
double vcpus_own_rate(uint32_t khz);

#endif
