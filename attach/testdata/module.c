/*
 * The library that the tests load. It announces itself as ftclock's module does, by a memfd, and leaves no vector, x87
 * or general register as it found it that a function may change.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((constructor)) static void start(void) {
    memfd_create("ftclock-page", MFD_CLOEXEC);
    char *waste[100];
    for (int i = 0; i < 100; i++)
        memset(waste[i] = malloc(100 + 37 * i), i, 100);
    for (int i = 0; i < 100; i++)
        free(waste[i]);
    if (__builtin_cpu_supports("avx512f"))
        asm volatile(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
                     "vpternlogd $0xff, %zmm\\n, %zmm\\n, %zmm\\n\n"
                     ".endr\n"
                     ".irp n,0,1,2,3,4,5,6,7\n"
                     "kxnorw %k\\n, %k\\n, %k\\n\n"
                     ".endr\n");
    else if (__builtin_cpu_supports("avx"))
        asm volatile("vzeroall");
    asm volatile("fninit\n fldpi\n fldpi\n fninit");
#ifdef STOP
    kill(getpid(), SIGSTOP);
#endif
}
