# ftclock: build, test, demo, install.
#
#   make build      bin/ftclock, bin/ftclock-hook, bin/ftclock-shim, bin/libftclock-qemu.so
#   make test       every test; on a machine with /dev/kvm the end-to-end tests too
#   make demo       200 checkpoints without and with ftclock, in a private libvirt; a table and a picture
#   make chaos      kills of worker, keeper and libvirtd and upgrades, many times (about half an hour)
#   make cost       what the shim costs: round trip, memory, processor time
#   make fuzz       every fuzz target for FUZZTIME (10m)
#   make install    to $(DESTDIR)$(PREFIX) and $(DESTDIR)$(SYSCONFDIR)
#   make uninstall  takes the same files away
#   make lint fmt   what CONTRIBUTING asks for

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=
GO ?= go
CC ?= gcc
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

BINARIES = bin/ftclock bin/ftclock-hook bin/ftclock-shim bin/libftclock-qemu.so
HOOK = $(SYSCONFDIR)/libvirt/hooks/qemu.d/50-ftclock

GOFLAGS_ALL = -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
MODULE_CFLAGS = -std=c11 -O2 -g -fPIC -fvisibility=hidden -Wall -Wextra -Werror
MODULE_LDFLAGS = -shared -Wl,-z,now,-z,relro,-z,defs,-z,nodelete
MODULE_SOURCES = qemu-plugin/module.c qemu-plugin/rule.c

TESTFLAGS ?=

# A Linux kernel for the test with a whole Linux guest, if a directory beside this one has it; without
# one, that test says what it leaves out.
FTCLOCK_TEST_KERNEL ?= $(abspath $(firstword $(wildcard ../*/linux-guest/vmlinux.xz)))
export FTCLOCK_TEST_KERNEL

.PHONY: build test demo chaos cost fuzz install uninstall lint fmt clean setup

build: $(BINARIES)

# Go knows best what is out of date.
.PHONY: bin/ftclock bin/ftclock-hook bin/ftclock-shim
bin/ftclock:
	CGO_ENABLED=1 $(GO) build $(GOFLAGS_ALL) -o $@ ./cmd/ftclock
bin/ftclock-hook bin/ftclock-shim:
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_ALL) -o $@ ./cmd/$(@F)
bin/libftclock-qemu.so: $(MODULE_SOURCES) qemu-plugin/rule.h clockpage/clockpage.h
	@mkdir -p bin
	$(CC) $(MODULE_CFLAGS) $(MODULE_LDFLAGS) -o $@ $(MODULE_SOURCES)

# Installs what building and testing need from Debian's packages, and says so. Does nothing where all is there.
setup:
	@test/setup.sh

test: setup build
	@$(GO) run ./test/missing
	$(GO) vet ./...
	CGO_ENABLED=1 $(GO) test -race -timeout 40m -p 1 $(TESTFLAGS) ./...

demo: setup build
	$(GO) run ./test/demo

chaos: setup build
	FTCLOCK_REQUIRE=1 FTCLOCK_WORKER_KILLS=1000 FTCLOCK_KEEPER_KILLS=200 FTCLOCK_LIBVIRTD_KILLS=100 FTCLOCK_UPGRADES=100 \
		$(GO) test -count=1 -timeout 2h -v -run 'Chaos|Peers' ./test/e2e ./test/reliability

cost: setup build
	$(GO) run ./test/cost

FUZZTIME ?= 10m
fuzz:
	@for package in $$($(GO) list ./...); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$package || exit 1; \
		done; \
	done

install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/sbin $(DESTDIR)$(PREFIX)/lib/ftclock $(DESTDIR)$(dir $(HOOK))
	install -m 755 bin/ftclock $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/ftclock-hook bin/ftclock-shim $(DESTDIR)$(PREFIX)/sbin/
	install -m 644 bin/libftclock-qemu.so $(DESTDIR)$(PREFIX)/lib/ftclock/.new
	mv -f $(DESTDIR)$(PREFIX)/lib/ftclock/.new $(DESTDIR)$(PREFIX)/lib/ftclock/libftclock-qemu.so
	ln -sfn $(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(HOOK)
	@echo "libvirt looks for hooks when it starts: restart libvirtd (or virtqemud) once if it had no hook before."

uninstall:
	rm -f $(DESTDIR)$(HOOK) $(DESTDIR)$(PREFIX)/bin/ftclock $(DESTDIR)$(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(PREFIX)/sbin/ftclock-shim
	rm -rf $(DESTDIR)$(PREFIX)/lib/ftclock

lint: setup
	$(GO) vet ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	test -z "$$(gofmt -l .)"
	clang-format --dry-run -Werror $$(git ls-files '*.c' '*.h')

fmt:
	gofmt -w .
	clang-format -i $$(git ls-files '*.c' '*.h')

clean:
	rm -rf bin build demo.svg demo.png
