/* SPDX-License-Identifier: MIT */
/* clang-format off */
//go:build ignore
/* clang-format on */
/*
 * Pauses and continues a guest so many times: cont N. The host is a simulated one whose calls cost next to nothing, so
 * that what callgrind counts in rule*.c is the module's own. An order lies there for each pause, as from a shim. With
 * a second argument the kernel's clock is always off, so that each cont writes the anchor's value. In the end it says
 * what was decided, and how often the kernel and clocks were asked at all stops and at all conts.
 */
#include "../rule.h"

#include <stdio.h>
#include <stdlib.h>

static uint64_t now = 1000000000, off;
static unsigned long calls, readings; /* of the kernel, of clocks */
static struct ftclock_page page;
static struct rule rule;

static int kernel(int fd, unsigned long request, struct kvm_clock_data *data) {
    (void)fd;
    calls++;
    now += 100;
    if (request == KVM_GET_CLOCK)
        *data = (struct kvm_clock_data){.clock = now - off,
                                        .flags = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
                                        .realtime = now,
                                        .host_tsc = now};
    else
        off = now - data->clock;
    return 0;
}

static uint64_t clock_now(void) {
    readings++;
    return now += 20;
}

static int offset(int64_t *value) {
    *value = 0;
    calls++;
    return 0;
}

static int move(int64_t by) { return by ? -1 : 0; }

static uint32_t vm_khz(int fd) { return fd ? 1000000 : 0; }

static uint32_t vcpu_khz(void) { return 1000000; }

static double own_rate(uint32_t khz) { return khz ? 1e-9 : 0; }

static const struct host host = {kernel,    clock_now, clock_now, clock_now, clock_now, clock_now,
                                 clock_now, offset,    move,      vm_khz,    vcpu_khz,  own_rate};

int main(int argc, char **argv) {
    unsigned long times = argc > 1 ? strtoul(argv[1], NULL, 10) : 1;
    unsigned long at_stop[2] = {0}, at_cont[2] = {0}, n;

    rule_start(&rule, &host, &page, 1);
    page.policy = (struct ftclock_policy){
        .seq = 2,
        .enabled = 1,
        .checkpoint_do = FTCLOCK_DO_CATCH_UP,
        .suspend_do = FTCLOCK_DO_HOLD,
        .restore_do = FTCLOCK_DO_HOLD,
        .migrate_do = FTCLOCK_DO_HOLD,
        .checkpoint_limit = 10000000000,
    };
    for (n = 0; n < times; n++) {
        struct kvm_clock_data data = {0};

        now += 20000000;
        calls = readings = 0;
        if (rule_get_clock(&rule, 3, &data) != 0)
            return 1;
        at_stop[0] += calls;
        at_stop[1] += readings;
        data = (struct kvm_clock_data){.clock = data.clock};
        page.order = (struct ftclock_order){.seq = page.order.seq + 2, .pause = page.now.pause, .stop_raw = now};
        now += 5000000;
        page.order.cont_raw = now;
        page.order.lost = now - page.order.stop_raw;
        if (n > 0 && argc > 2)
            off += 5000;
        calls = readings = 0;
        if (rule_set_clock(&rule, 3, &data) != 0)
            return 1;
        at_cont[0] += calls;
        at_cont[1] += readings;
    }
    printf("dropped %lu anchored %lu ordered %lu stop %lu %lu cont %lu %lu\n", (unsigned long)rule.counts.dropped,
           (unsigned long)rule.counts.anchored, (unsigned long)rule.counts.orders, at_stop[0], at_stop[1], at_cont[0],
           at_cont[1]);
    return 0;
}
