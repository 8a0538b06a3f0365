# ftclock: build, test, demo, install.
#
#   make build      bin/ftclock, bin/ftclock-hook, bin/ftclock-shim, bin/libftclock-qemu.so
#   make test       every test (FTCLOCK_LONG=1: some in a longer form); on a machine with /dev/kvm the end-to-end tests too
#   make demo       200 checkpoints without and with ftclock, in a private libvirt; a table and a picture
#   make splits     the relay's conversations cut at every byte, descriptors with every piece (a minute)
#   make hostile    a QEMU that a guest has taken over, and the domain beside it
#   make sweep      virsh with and without the shim
#   make sim        40 simulated years of pauses, against the rule's model
#   make chaos      kills of worker, keeper and libvirtd and upgrades, many times (about half an hour)
#   make test-packages  the packages' whole life on Debian 12 and 13, what takes long of their tests, and the units on 13
#   make agree      eight domains for two minutes: status, metrics, record, report and the guests' own clocks must say the same
#   make pictures   docs/pictures, by the tests that drive virt-manager, a browser and a terminal
#   make soak       a million pauses of one guest, and what is left of its clock (an hour or more)
#   make colo       QEMU's own checkpoint engine for five minutes at each of three delays
#   make bench      ftclock side by side with stock QEMU and other ways; writes docs/performance.md (below half an hour)
#   make bench-quick  the same in a short form that writes nothing, to see that all of it works
#   make cost       what the shim costs: round trip, memory, processor time
#   make fuzz       every fuzz target for FUZZTIME (10m)
#   make packages   build/packages/*.deb and *.rpm
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
UNITDIR ?= $(PREFIX)/lib/systemd/system
LOGROTATE = $(SYSCONFDIR)/logrotate.d/ftclock

GOFLAGS_ALL = -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
MODULE_CFLAGS = -std=c11 -O2 -g -fPIC -fvisibility=hidden -ffile-prefix-map=$(CURDIR)=. -Wall -Wextra -Werror
MODULE_LDFLAGS = -shared -Wl,-z,now,-z,relro,-z,defs,-z,nodelete
MODULE_SOURCES = qemu-plugin/module.c qemu-plugin/rule.c

TESTFLAGS ?=

# A Linux kernel for the test with a whole Linux guest, if a directory beside this one has it; without
# one, that test says what it leaves out.
FTCLOCK_TEST_KERNEL ?= $(abspath $(firstword $(wildcard ../*/linux-guest/vmlinux.xz)))
export FTCLOCK_TEST_KERNEL

.PHONY: build test test-packages pictures demo splits hostile sweep sim chaos agree soak colo bench bench-quick cost fuzz packages install uninstall lint fmt clean setup

build: $(BINARIES)

# Go knows best what is out of date.
.PHONY: bin/ftclock bin/ftclock-hook bin/ftclock-shim
bin/ftclock:
	CGO_ENABLED=1 $(GO) build -buildmode=pie $(GOFLAGS_ALL) -o $@ ./cmd/ftclock
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
	CGO_ENABLED=1 $(GO) test -race -timeout 3h -p 1 $(TESTFLAGS) ./...

test-packages: setup build
	FTCLOCK_REQUIRE=1 FTCLOCK_LONG=1 $(GO) test -count=1 -timeout 3h -v ./packaging ./test/packages
	FTCLOCK_REQUIRE=1 FTCLOCK_SUITE=trixie $(GO) test -count=1 -timeout 3h -v ./test/systemd

pictures: setup build
	mkdir -p docs/pictures
	FTCLOCK_REQUIRE=1 FTCLOCK_PICTURES=$(CURDIR)/docs/pictures $(GO) test -count=1 -timeout 1h ./test/virtmanager
	FTCLOCK_PICTURES=$(CURDIR)/docs/pictures $(GO) test -count=1 -timeout 1h -run 'Browser|Watch' ./report ./cmd/ftclock

demo: setup build
	$(GO) run ./test/demo

splits: setup
	FTCLOCK_REQUIRE=1 FTCLOCK_LONG=1 $(GO) test -race -count=1 -timeout 30m -v -run 'CutAnywhere|AnyPiece|BehindOther' ./qmp-shim

hostile: setup
	FTCLOCK_REQUIRE=1 $(GO) test -race -count=1 -timeout 30m -v -run 'Nonsense|AnyPage|LeavesInTheMiddle|Hostile|Generations|Odd|Fuzz' ./qmp-shim ./test/reliability ./clockpage

sweep: setup build
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 1h -v -run Sweep ./test/e2e

sim: setup
	FTCLOCK_REQUIRE=1 FTCLOCK_SIM_SEEDS=40 $(GO) test -count=1 -timeout 1h -v -run TestRule ./qemu-plugin

chaos: setup build
	FTCLOCK_REQUIRE=1 FTCLOCK_WORKER_KILLS=1000 FTCLOCK_KEEPER_KILLS=200 FTCLOCK_LIBVIRTD_KILLS=100 FTCLOCK_UPGRADES=100 FTCLOCK_RECONNECTS=300 \
		$(GO) test -count=1 -timeout 6h -v -run 'Chaos|Peers' ./test/e2e ./test/reliability

# Every figure of eight checkpointed domains against every other, each with a guest of its own to be measured.
agree: setup build
	FTCLOCK_REQUIRE=1 FTCLOCK_RECORD_TIME=2m $(GO) test -count=1 -timeout 1h -v -run TestKVMStatusExporterAndRecordAgree ./test/e2e

SOAKFLAGS ?= -picture docs/pictures/soak.svg
soak: setup build
	$(GO) run ./test/soak $(SOAKFLAGS)

# COLO for five minutes at each of three checkpoint delays, then the primary's death.
colo: setup build
	FTCLOCK_REQUIRE=1 FTCLOCK_COLO_SECONDS=300 FTCLOCK_PICTURES=$(CURDIR)/docs/pictures $(GO) test -count=1 -timeout 3h -v -run TestKVMCOLO ./test/e2e

BENCHFLAGS ?=
bench: setup build
	test/bench/fetch.sh build/bench-guest || echo "bench: going on without the guest with an agent"
	$(GO) run ./test/bench $(BENCHFLAGS)

bench-quick: setup build
	$(GO) run ./test/bench -quick -page - -pictures ''

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

# The same commit gives the same bytes.
packages: setup build
	VERSION='$(VERSION)' packaging/build

DIRECTORIES = bin sbin lib/ftclock share/ftclock/snippets share/doc/ftclock share/man/man1 share/man/man5 share/man/man8 \
	share/bash-completion/completions share/zsh/site-functions share/fish/vendor_completions.d
UNITS = $(wildcard packaging/systemd/*)

install: build
	install -d $(addprefix $(DESTDIR)$(PREFIX)/,$(DIRECTORIES)) $(DESTDIR)$(dir $(HOOK))
	install -m 755 bin/ftclock $(DESTDIR)$(PREFIX)/bin/
	install -m 755 bin/ftclock-hook bin/ftclock-shim $(DESTDIR)$(PREFIX)/sbin/
	install -m 644 bin/libftclock-qemu.so $(DESTDIR)$(PREFIX)/lib/ftclock/.new
	mv -f $(DESTDIR)$(PREFIX)/lib/ftclock/.new $(DESTDIR)$(PREFIX)/lib/ftclock/libftclock-qemu.so
	install -m 644 xml-templates/ftclock.rng $(DESTDIR)$(PREFIX)/share/ftclock/
	install -m 644 xml-templates/snippets/*.xml $(DESTDIR)$(PREFIX)/share/ftclock/snippets/
	install -m 644 packaging/prometheus/ftclock.rules.yml packaging/grafana/ftclock.json $(DESTDIR)$(PREFIX)/share/ftclock/
	install -m 644 docs/*.md $(DESTDIR)$(PREFIX)/share/doc/ftclock/
	for section in 1 5 8; do install -m 644 packaging/man/*.$$section $(DESTDIR)$(PREFIX)/share/man/man$$section/ || exit 1; done
	install -m 644 packaging/completions/ftclock.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/ftclock
	install -m 644 packaging/completions/_ftclock $(DESTDIR)$(PREFIX)/share/zsh/site-functions/
	install -m 644 packaging/completions/ftclock.fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/
	install -d $(DESTDIR)$(UNITDIR)
	for unit in $(UNITS); do \
		sed -e 's|@sbindir@|$(PREFIX)/sbin|' -e 's|@bindir@|$(PREFIX)/bin|' $$unit >$(DESTDIR)$(UNITDIR)/$${unit##*/} || exit 1; \
	done
	install -D -m 644 packaging/logrotate/ftclock $(DESTDIR)$(LOGROTATE)
	ln -sfn $(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(HOOK)
	@echo "libvirt looks for hooks when it starts: restart libvirtd (or virtqemud) once if it had no hook before."

uninstall:
	rm -f $(DESTDIR)$(HOOK) $(DESTDIR)$(LOGROTATE) $(DESTDIR)$(PREFIX)/bin/ftclock $(DESTDIR)$(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(PREFIX)/sbin/ftclock-shim
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS))) $(DESTDIR)$(PREFIX)/share/man/man[158]/ftclock*.[158]
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/ftclock $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_ftclock
	rm -f $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ftclock.fish
	rm -rf $(DESTDIR)$(PREFIX)/lib/ftclock $(DESTDIR)$(PREFIX)/share/ftclock $(DESTDIR)$(PREFIX)/share/doc/ftclock

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
