/* SPDX-License-Identifier: MIT */
/* A program that never calls ioctl, for the module's tests: qemu-noioctl MODULE prints how many memfds there are then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc < 2 || !dlopen(argv[1], RTLD_NOW)) {
        fprintf(stderr, "opening the module: %s\n", argc < 2 ? "none" : dlerror());
        return 1;
    }
    int n = 0;
    for (int fd = 0; fd < 256; fd++) {
        char path[64], target[256] = "";
        snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
        if (readlink(path, target, sizeof(target) - 1) > 0)
            n += strncmp(target, "/memfd:", 7) == 0;
    }
    printf("pages=%d\n", n);
    return 0;
}
