/*
 * The program that the tests attach to. Its main thread sets every register to a known value, sits in ppoll, and looks
 * at every register again: general registers, flags, red zone, x87, SSE, AVX and AVX-512 as far as the processor has
 * them, signal mask and alternate signal stack. The first difference is printed as "bad ..." and ends it.
 *
 * A byte on its standard input is answered by a line, "ok ROUNDS SIGNALS". Its end ends the program.
 * Arguments: words of the list in main.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, R8, R9, R10, R11, R12, R13, R14, R15, RSP, REGS };
static const char *const names[REGS] = {"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8",
                                        "r9",  "r10", "r11", "r12", "r13", "r14", "r15", "rsp"};

#define HIDDEN __attribute__((visibility("hidden")))
HIDDEN uint64_t in_regs[REGS], out_regs[REGS], in_flags, out_flags, out_red[16], old_rsp;
HIDDEN uint32_t xmask;
HIDDEN uint8_t *in_xsave, *out_xsave;
HIDDEN uint32_t default_mxcsr = 0x1f80;
HIDDEN extern char after_syscall[];
void poll_once(void);

#define RED_PATTERN 0x7ed0000000000000ul

asm(".text\n"
    ".globl poll_once\n"
    ".hidden poll_once, after_syscall\n"
    ".globl after_syscall\n"
    "poll_once:\n"
    "push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
    "mov %rsp, old_rsp(%rip)\n"
    "mov %rsp, in_regs+15*8(%rip)\n"
    "mov xmask(%rip), %eax\n"
    "xor %edx, %edx\n"
    "mov in_xsave(%rip), %rcx\n"
    "xrstor64 (%rcx)\n"
    "pushq in_flags(%rip)\n"
    "popfq\n"
    ".set i, 0\n"
    ".rept 16\n"
    "movabs $0x7ed0000000000000+i, %rax\n"
    "mov %rax, -128+8*i(%rsp)\n"
    ".set i, i+1\n"
    ".endr\n"
    "mov in_regs+0*8(%rip), %rax\n"
    "mov in_regs+1*8(%rip), %rbx\n"
    "mov in_regs+2*8(%rip), %rcx\n"
    "mov in_regs+3*8(%rip), %rdx\n"
    "mov in_regs+4*8(%rip), %rsi\n"
    "mov in_regs+5*8(%rip), %rdi\n"
    "mov in_regs+6*8(%rip), %rbp\n"
    "mov in_regs+7*8(%rip), %r8\n"
    "mov in_regs+8*8(%rip), %r9\n"
    "mov in_regs+9*8(%rip), %r10\n"
    "mov in_regs+10*8(%rip), %r11\n"
    "mov in_regs+11*8(%rip), %r12\n"
    "mov in_regs+12*8(%rip), %r13\n"
    "mov in_regs+13*8(%rip), %r14\n"
    "mov in_regs+14*8(%rip), %r15\n"
    "syscall\n"
    "after_syscall:\n"
    "mov %rax, out_regs+0*8(%rip)\n"
    "mov %rbx, out_regs+1*8(%rip)\n"
    "mov %rcx, out_regs+2*8(%rip)\n"
    "mov %rdx, out_regs+3*8(%rip)\n"
    "mov %rsi, out_regs+4*8(%rip)\n"
    "mov %rdi, out_regs+5*8(%rip)\n"
    "mov %rbp, out_regs+6*8(%rip)\n"
    "mov %r8, out_regs+7*8(%rip)\n"
    "mov %r9, out_regs+8*8(%rip)\n"
    "mov %r10, out_regs+9*8(%rip)\n"
    "mov %r11, out_regs+10*8(%rip)\n"
    "mov %r12, out_regs+11*8(%rip)\n"
    "mov %r13, out_regs+12*8(%rip)\n"
    "mov %r14, out_regs+13*8(%rip)\n"
    "mov %r15, out_regs+14*8(%rip)\n"
    "mov %rsp, out_regs+15*8(%rip)\n"
    "mov old_rsp(%rip), %rsp\n"
    ".set i, 0\n"
    ".rept 16\n"
    "mov -128+8*i(%rsp), %rax\n"
    "mov %rax, out_red+8*i(%rip)\n"
    ".set i, i+1\n"
    ".endr\n"
    "pushfq\n"
    "popq out_flags(%rip)\n"
    "cld\n"
    "mov xmask(%rip), %eax\n"
    "xor %edx, %edx\n"
    "mov out_xsave(%rip), %rcx\n"
    "xsave64 (%rcx)\n"
    "fninit\n"
    "ldmxcsr default_mxcsr(%rip)\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
    "ret\n");

static unsigned long rounds;
static volatile unsigned long signals;
static int hammered; /* signals are expected, and so is EINTR */

static void die(const char *what, uint64_t is, uint64_t should) {
    char line[200];
    int n = snprintf(line, sizeof line, "bad %s in round %lu: %#lx instead of %#lx\n", what, rounds, is, should);
    if (write(1, line, n) != n)
        _exit(2);
    _exit(1);
}

static uint64_t pattern(unsigned long a, unsigned long b) {
    uint64_t x = a * 0x9e3779b97f4a7c15 + b * 0xbf58476d1ce4e5b9 + 1;
    x ^= x >> 30;
    x *= 0x94d049bb133111eb;
    return x ^ x >> 31;
}

static unsigned xsave_size;

static void make_xsave(void) {
    unsigned a, size, c, d;
    __cpuid_count(0xd, 0, a, size, c, d);
    xmask = a & 0xe7; /* x87, SSE, AVX, AVX-512; not the bounds registers, keys and tiles */
    xsave_size = size;
    if (posix_memalign((void **)&in_xsave, 64, size) || posix_memalign((void **)&out_xsave, 64, size))
        _exit(2);
    memset(in_xsave, 0, size);
    memset(out_xsave, 0, size);
}

static void fill(unsigned from, unsigned size) {
    for (unsigned at = from; at + 8 <= from + size; at += 8) {
        uint64_t x = pattern(rounds, at);
        memcpy(in_xsave + at, &x, 8);
    }
}

/* Bytes [from, from + size) of the area. */
static void compare(const char *what, unsigned from, unsigned size) {
    for (unsigned at = from; at < from + size; at++)
        if (in_xsave[at] != out_xsave[at]) {
            char where[64];
            snprintf(where, sizeof where, "%s, byte %u of the XSAVE area", what, at);
            die(where, out_xsave[at], in_xsave[at]);
        }
}

static void each_component(void (*do_it)(unsigned from, unsigned size)) {
    for (unsigned i = 2; i < 8; i++)
        if (xmask & 1u << i) {
            unsigned size, offset, c, d;
            __cpuid_count(0xd, i, size, offset, c, d);
            do_it(offset, size);
        }
}

static void compare_component(unsigned from, unsigned size) { compare("vector state", from, size); }

static void fill_xsave(void) {
    memset(in_xsave, 0, 576);
    memset(out_xsave, 0, xsave_size);
    uint16_t control = 0x27f;                     /* x87: double precision */
    uint32_t mxcsr = 0x1f80 | (rounds & 3) << 13; /* all rounding modes in turn */
    memcpy(in_xsave, &control, 2);
    in_xsave[4] = 0xff; /* all eight x87 registers hold something */
    memcpy(in_xsave + 24, &mxcsr, 4);
    for (unsigned i = 0; i < 8; i++) {
        uint64_t x = pattern(rounds, i) | 1ull << 63;
        memcpy(in_xsave + 32 + 16 * i, &x, 8);
        in_xsave[32 + 16 * i + 8] = 0x40 + i;
        in_xsave[32 + 16 * i + 9] = 0x3f;
    }
    fill(160, 256);
    each_component(fill);
    uint64_t in_use = xmask;
    memcpy(in_xsave + 512, &in_use, 8);
}

static stack_t alt_stack;
static sigset_t blocked, while_polling;
static int use_mask;

static void look_at_signals(void) {
    sigset_t now;
    stack_t stack;
    sigprocmask(SIG_SETMASK, NULL, &now);
    sigaltstack(NULL, &stack);
    for (int i = 1; i < 65; i++)
        if (sigismember(&now, i) != sigismember(&blocked, i))
            die("signal mask", i, 0);
    if (stack.ss_sp != alt_stack.ss_sp || stack.ss_size != alt_stack.ss_size || stack.ss_flags != alt_stack.ss_flags)
        die("alternate signal stack", (uint64_t)stack.ss_sp, (uint64_t)alt_stack.ss_sp);
}

/* One ppoll, and what it returned. */
static long round_of(struct pollfd *fds, int n, long timeout_ns) {
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    rounds++;
    for (int i = 0; i < REGS; i++)
        in_regs[i] = pattern(rounds, 100 + i);
    in_regs[RAX] = SYS_ppoll;
    in_regs[RDI] = (uint64_t)fds;
    in_regs[RSI] = n;
    in_regs[RDX] = timeout_ns < 0 ? 0 : (uint64_t)&timeout;
    in_regs[R10] = use_mask ? (uint64_t)&while_polling : 0;
    in_regs[R8] = 8;
    /* Carry, parity, zero, sign, overflow in changing sets, and the direction flag in every other round. */
    in_flags = 0x202 | (pattern(rounds, 99) & 0x8c5) | (rounds & 1) << 10;
    fill_xsave();
    poll_once();
    in_regs[RCX] = (uint64_t)after_syscall;
    for (int i = RBX; i < REGS; i++)
        if (i != R11 && out_regs[i] != in_regs[i])
            die(names[i], out_regs[i], in_regs[i]);
    if ((out_regs[R11] ^ in_flags) & 0xcd5)
        die("r11", out_regs[R11], in_flags);
    if ((out_flags ^ in_flags) & 0xcd5)
        die("flags", out_flags, in_flags);
    for (int i = 0; i < 16; i++)
        if (out_red[i] != RED_PATTERN + i)
            die("red zone", out_red[i], RED_PATTERN + i);
    compare("x87 control", 0, 6);
    compare("mxcsr", 24, 4);
    for (int i = 0; i < 8; i++)
        compare("x87", 32 + 16 * i, 10);
    compare("xmm", 160, 256);
    each_component(compare_component);
    look_at_signals();
    long result = out_regs[RAX];
    if (result < 0 && !(result == -EINTR && hammered))
        die("result of ppoll", result, 0);
    if (result > 0 && (result > n || !fds->revents))
        die("result of ppoll", result, 1);
    return result;
}

static void on_signal(int number) {
    (void)number;
    signals++;
    asm volatile("pxor %%xmm0, %%xmm0\n pxor %%xmm7, %%xmm7\n fninit" ::: "xmm0", "xmm7");
}

/* Allocates and frees, most of the time inside the allocator's lock. */
static void churn(long times) {
    static void *held[64];
    for (; times; times--) {
        unsigned i = pattern(times, rounds) % 64;
        free(held[i]);
        held[i] = malloc(1 + pattern(rounds, times) % 5000);
        memset(held[i], 1, 1);
    }
}

/* The parent of a vfork waits in the kernel, and nothing but SIGKILL gets it out. */
__attribute__((noinline)) static void sleep_uninterruptibly(void) {
    struct timespec time = {0, 200000000};
    pid_t child = vfork();
    if (child == 0) {
        nanosleep(&time, NULL);
        _exit(0);
    }
    waitpid(child, NULL, 0);
}

static int word(int argc, char **argv, const char *is) {
    for (int i = 1; i < argc; i++)
        if (!strcmp(argv[i], is))
            return 1;
    return 0;
}

int main(int argc, char **argv) {
    hammered = word(argc, argv, "signals");  /* takes SIGUSR1, and SIGALRM 2000 times a second */
    use_mask = word(argc, argv, "mask");     /* ppoll changes the signal mask */
    int busy = word(argc, argv, "busy");     /* never polls */
    int mixed = word(argc, argv, "mixed");   /* allocates between its polls */
    int waits = word(argc, argv, "forever"); /* ppoll has no timeout */

    int vforks = word(argc, argv, "vforks"); /* sleeps uninterruptibly, in vfork */

    if (word(argc, argv, "kvm")) { /* has a virtual machine */
        int kvm = open("/dev/kvm", O_RDWR);
        if (kvm < 0 || ioctl(kvm, KVM_CREATE_VM, 0) < 0)
            return 2;
    }
    static char stack[65536];
    alt_stack = (stack_t){.ss_sp = stack, .ss_size = sizeof stack};
    sigaltstack(&alt_stack, NULL);
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, SIGRTMIN + 3);
    if (use_mask)
        sigaddset(&blocked, SIGUSR1);
    sigprocmask(SIG_SETMASK, &blocked, NULL);
    sigemptyset(&while_polling);
    sigaddset(&while_polling, SIGWINCH);
    if (hammered) {
        struct sigaction action = {.sa_handler = on_signal};
        sigaction(SIGUSR1, &action, NULL);
        action.sa_flags = SA_RESTART | SA_ONSTACK;
        sigaction(SIGALRM, &action, NULL);
        struct itimerval every = {{0, 500}, {0, 500}};
        setitimer(ITIMER_REAL, &every, NULL);
    }
    make_xsave();
    if (write(1, "ready\n", 6) != 6)
        return 2;
    for (;;) {
        struct pollfd input = {.fd = 0, .events = POLLIN};
        if (vforks)
            sleep_uninterruptibly();
        if (busy || vforks) {
            churn(1000);
            poll(&input, 1, 0); /* not ppoll */
        } else {
            if (mixed)
                churn(pattern(rounds, 1) % 2000);
            if (round_of(&input, 1, waits ? -1 : (long)(pattern(rounds, 2) % 3000000)) <= 0)
                continue;
        }
        if (!(input.revents & (POLLIN | POLLHUP)))
            continue;
        char question;
        ssize_t n = read(0, &question, 1);
        if (n < 0 && errno == EINTR)
            continue;
        if (n != 1)
            return 0;
        char line[100];
        int length = snprintf(line, sizeof line, "ok %lu %lu\n", rounds, signals);
        if (write(1, line, length) != length)
            return 2;
    }
}
