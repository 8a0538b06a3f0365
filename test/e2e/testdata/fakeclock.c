/* SPDX-License-Identifier: MIT */
/*
 * A fake, for tests only: a host whose clock is disciplined. Preloaded into QEMU, it lets CLOCK_MONOTONIC and what is
 * made of it (CLOCK_REALTIME, CLOCK_TAI, CLOCK_BOOTTIME) run faster than CLOCK_MONOTONIC_RAW by FAKECLOCK_PPM, from its
 * start on, and tells the same of the CLOCK_REALTIME that KVM_GET_CLOCK reports. FAKECLOCK_RAW_PPM lets
 * CLOCK_MONOTONIC_RAW run faster than kvmclock. The host's own clock isn't touched.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

static int (*real_gettime)(clockid_t, struct timespec *);
static int (*real_ioctl)(int, unsigned long, void *);
static int64_t start, ppm, raw_ppm;

static int64_t raw(void) {
    struct timespec t;
    real_gettime(CLOCK_MONOTONIC_RAW, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int64_t by(int64_t rate) { return (raw() - start) / 1000 * rate / 1000; }

static int64_t ahead(void) { return by(ppm); }

__attribute__((constructor)) static void begin(void) {
    real_gettime = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    real_ioctl = (int (*)(int, unsigned long, void *))dlsym(RTLD_NEXT, "ioctl");
    const char *text = getenv("FAKECLOCK_PPM");
    ppm = text ? atoll(text) : 0;
    text = getenv("FAKECLOCK_RAW_PPM");
    raw_ppm = text ? atoll(text) : 0;
    start = raw();
}

int clock_gettime(clockid_t id, struct timespec *t) {
    if (!real_gettime)
        begin();
    int rc = real_gettime(id, t);
    if (rc == 0 && id == CLOCK_MONOTONIC_RAW && raw_ppm) {
        int64_t ns = t->tv_sec * INT64_C(1000000000) + t->tv_nsec + by(raw_ppm);
        t->tv_sec = ns / INT64_C(1000000000);
        t->tv_nsec = ns % INT64_C(1000000000);
    }
    if (rc == 0 && (id == CLOCK_REALTIME || id == CLOCK_TAI || id == CLOCK_MONOTONIC || id == CLOCK_BOOTTIME)) {
        int64_t ns = t->tv_sec * INT64_C(1000000000) + t->tv_nsec + ahead();
        t->tv_sec = ns / INT64_C(1000000000);
        t->tv_nsec = ns % INT64_C(1000000000);
    }
    return rc;
}

int ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!real_ioctl)
        begin();
    int rc = real_ioctl(fd, request, argument);
    if (rc == 0 && (uint32_t)request == (uint32_t)KVM_GET_CLOCK) {
        struct kvm_clock_data *data = argument;
        if (data->flags & KVM_CLOCK_REALTIME)
            data->realtime += (uint64_t)ahead();
    }
    return rc;
}
