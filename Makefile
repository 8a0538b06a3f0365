# ftclock: build, test, demo, install.
#
#   make build      bin/ftclock, bin/ftclock-hook, bin/ftclock-shim, bin/libftclock-qemu.so
#   make demo       200 checkpoints without and with ftclock, in a private libvirt; a table and a picture
#   make test       every test (FTCLOCK_LONG=1: some in a longer form), the end-to-end ones on a KVM host
#   make e2e        the end-to-end tests alone; PACKAGES and TESTFLAGS choose among them
#   make power-cuts a whole host whose plug is pulled 100 times at random, and what its managed domains do then (two hours)
#   make unit-kills the unit of a domain's shim in a whole host: killed 1,000 times as a whole, systemd executed anew, upgraded (an hour)
#   make oomd       the same unit, killed by systemd-oomd
#   make host-life  a whole host of Debian 12, 13 and testing each, from the package's installation over upgrades, reboots and a power cut to its purge
#   make test-hosts the end-to-end tests with whole Debians, virt-manager and the benchmark: part of make test on native KVM
#   make shell      a shell on a KVM host with ftclock installed and a guest defined
#
# A KVM host is this machine where it has /dev/kvm, else an emulated one (docs/testing.md); FTCLOCK_HOST=native or
# emulated forces either.
#
#   make kernels    the main end-to-end tests on the kernels of Debian 12, 13 and unstable
#   make releases   the same on the whole of Debian 12, 13 and testing: kernel, libvirt and QEMU
#   make selinux    a whole Debian 12 whose SELinux enforces: start, restarts, save, upgrade, enable --live; nothing may be denied
#   make ansible    the Ansible role on a whole Debian 12: a check, the installation, a second run, a policy that is wrong
#   make podman     a whole Debian 12 whose libvirt is in a container, which is restarted 20 times under checkpoints
#   make host-sleep a whole host that is suspended to memory, also within pauses, and the clocks of two guests
#   make two-hosts  migrations between two whole hosts, whose clocks agree, are 50 ms apart or aren't synchronised
#   make vcpus      1,000 pauses of a stock Linux with 1, 2 and 4 vCPUs
#   make anchors    the anchor of a domain beside two that are migrated for minutes
#   make node       the service for QEMUs that nobody announces: in namespaces of their own, and 100 at random for ten minutes
#   make guest-clocks  a stock Linux on kvmclock, Hyper-V's reference time, acpi_pm and hpet
#   make splits     the relay's conversations cut at every byte, descriptors with every piece (a minute)
#   make hostile    a QEMU that a guest has taken over, and the domain beside it
#   make twin       a guest that is paused 100,000 times beside one that never is (hours on an emulated host)
#   make sweep      virsh with and without the shim
#   make sim        40 simulated years of pauses, against the rule's model
#   make chaos      kills of worker, keeper and libvirtd and upgrades, many times (about half an hour on native KVM)
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
NEEDRESTART = $(SYSCONFDIR)/needrestart/conf.d/ftclock.conf

GOFLAGS_ALL = -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
MODULE_CFLAGS = -std=c11 -O2 -g -fPIC -fvisibility=hidden -ffile-prefix-map=$(CURDIR)=. -Wall -Wextra -Werror
MODULE_LDFLAGS = -shared -Wl,-z,now,-z,relro,-z,defs,-z,nodelete
RULE_SOURCES = $(addprefix qemu-plugin/,rule.c rule_clocks.c rule_follow.c rule_restore.c rule_tsc.c)
RULE_HEADERS = $(addprefix qemu-plugin/,rule.h rule_page.h rule_parts.h)
MODULE_SOURCES = qemu-plugin/module.c $(RULE_SOURCES) qemu-plugin/clocks.c qemu-plugin/vcpus.c
MODULE_HEADERS = $(RULE_HEADERS) qemu-plugin/clocks.h qemu-plugin/vcpus.h

TESTFLAGS ?=

.PHONY: build built host images test native whole-hosts test-hosts power-cuts unit-kills oomd host-life e2e kernels releases selinux ansible podman host-sleep two-hosts vcpus anchors node guest-clocks guest-kernels shell test-packages pictures demo splits hostile twin sweep sim chaos agree soak colo bench bench-quick cost fuzz packages install uninstall lint fmt clean setup setup-build setup-host FORCE

build: $(BINARIES)

PIE = -buildmode=pie
# Go knows best what is out of date.
.PHONY: bin/ftclock bin/ftclock-hook bin/ftclock-shim
bin/ftclock:
	CGO_ENABLED=1 $(GO) build $(PIE) $(GOFLAGS_ALL) -o $@ ./cmd/ftclock
bin/ftclock-hook bin/ftclock-shim:
	CGO_ENABLED=0 $(GO) build $(GOFLAGS_ALL) -o $@ ./cmd/$(@F)
bin/libftclock-qemu.so: $(MODULE_SOURCES) $(MODULE_HEADERS) clockpage/clockpage.h
	@mkdir -p bin
	$(CC) $(MODULE_CFLAGS) $(MODULE_LDFLAGS) -o $@ $(MODULE_SOURCES)

# What tests run besides ftclock itself, see package test/built. Nothing is compiled while a test runs.
BUILT_CLOCK = build/test/clock build/test/walltime
BUILT_SHIMS = build/test/shim-one build/test/shim-two
BUILT_MODULES = build/test/module-1.1.so build/test/module-2.0.so
BUILT_LIBRARIES = build/test/fakeclock.so build/test/downtime.so build/test/realtime.so build/test/busy.so
# See attach/testdata and qemu-plugin/testdata.
BUILT_TARGETS = $(addprefix build/test/,target target-lazy target-static target-musl target-module.so target-stops.so)
BUILT_FAKES = $(addprefix build/test/,qemu-fake-hardened qemu-fake-noplt qemu-fake-lazy qemu-fake-norelro qemu-fake-fixed fake qemu-noioctl)
BUILT = $(BUILT_TARGETS) $(BUILT_FAKES) build/test/guest.elf build/test/init build/test/cont $(BUILT_LIBRARIES) $(BUILT_MODULES) $(BUILT_SHIMS) $(BUILT_CLOCK)
built: $(BUILT)

TEST_CFLAGS = -std=c11 -O2 -Wall -Wextra -Werror
# The kvmclock guest has no libc and keeps to plain integer instructions of the i386.
BARE_CFLAGS = $(TEST_CFLAGS) -m32 -march=i386 -mgeneral-regs-only -ffreestanding -fno-pic -fno-stack-protector -fcf-protection=none \
	-fno-asynchronous-unwind-tables -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,noexecstack

build/test:
	@mkdir -p $@
build/test/guest.elf: $(wildcard test/guest/src/*) | build/test
	$(CC) $(BARE_CFLAGS) -T test/guest/src/guest.ld -o $@ test/guest/src/start.S test/guest/src/guest.c
build/test/init: test/linuxguest/src/init.c test/guest/src/record.h | build/test
	$(CC) $(TEST_CFLAGS) -static -pthread -Itest/guest/src -o $@ $<
build/test/cont: qemu-plugin/testdata/cont.c $(RULE_SOURCES) $(RULE_HEADERS) clockpage/clockpage.h | build/test
	$(CC) $(TEST_CFLAGS) -g -fPIC -fvisibility=hidden -o $@ qemu-plugin/testdata/cont.c $(RULE_SOURCES)
# The rule's scenarios for a debugger: build/test/rule_test NAME SEED. Tests build their own.
build/test/rule_test: $(wildcard qemu-plugin/scenarios/*) $(RULE_SOURCES) $(RULE_HEADERS) qemu-plugin/vcpus.c clockpage/clockpage.h | build/test
	$(CC) $(TEST_CFLAGS) -g -o $@ $(filter %.c,$^)
TARGET_CFLAGS = -O2 -Wall -Wextra -Werror
build/test/target: FLAGS = -fPIE -pie -Wl,-z,now
build/test/target-lazy: FLAGS = -fPIE -pie -Wl,-z,lazy
build/test/target-static: FLAGS = -static
build/test/target-module.so: FLAGS = -shared -fPIC
build/test/target-stops.so: FLAGS = -shared -fPIC -DSTOP
build/test/target build/test/target-lazy build/test/target-static: attach/testdata/target.c | build/test
	$(CC) $(TARGET_CFLAGS) -o $@ $< $(FLAGS)
# musl has none of the kernel's headers.
build/test/target-musl: attach/testdata/target.c | build/test
	musl-gcc $(TARGET_CFLAGS) -o $@ $< -fPIE -pie -Wl,-z,now -idirafter /usr/include -idirafter /usr/include/x86_64-linux-gnu
build/test/target-module.so build/test/target-stops.so: attach/testdata/module.c | build/test
	$(CC) $(TARGET_CFLAGS) -o $@ $< $(FLAGS)
build/test/qemu-fake-hardened build/test/fake build/test/qemu-noioctl: FLAGS = -fPIE -pie -Wl,-z,now,-z,relro
build/test/qemu-fake-noplt: FLAGS = -fno-plt -fPIE -pie -Wl,-z,now,-z,relro
build/test/qemu-fake-lazy: FLAGS = -fPIE -pie -Wl,-z,lazy,-z,relro
build/test/qemu-fake-norelro: FLAGS = -fPIE -pie -Wl,-z,lazy,-z,norelro
build/test/qemu-fake-fixed: FLAGS = -fno-pie -no-pie -Wl,-z,now,-z,relro
$(filter-out build/test/qemu-noioctl,$(BUILT_FAKES)): qemu-plugin/testdata/fake.c clockpage/clockpage.h | build/test
	$(CC) $(TEST_CFLAGS) -o $@ $< $(FLAGS)
build/test/qemu-noioctl: qemu-plugin/testdata/noioctl.c clockpage/clockpage.h | build/test
	$(CC) $(TEST_CFLAGS) -o $@ $< $(FLAGS)
build/test/%.so: test/e2e/testdata/%.c | build/test
	$(CC) $(TEST_CFLAGS) -fPIC -shared -o $@ $< -ldl
build/test/%.so: test/bench/testdata/%.c | build/test
	$(CC) $(TEST_CFLAGS) -fPIC -shared -o $@ $< -ldl
# The module with another version of the clock page.
build/test/module-%.so: $(MODULE_SOURCES) $(MODULE_HEADERS) clockpage/clockpage.h | build/test
	@mkdir -p build/test/module-$*/qemu-plugin build/test/module-$*/clockpage
	@cp $(MODULE_SOURCES) $(MODULE_HEADERS) build/test/module-$*/qemu-plugin/
	@sed -E 's/^(#define FTCLOCK_PAGE_MAJOR) .*/\1 $(basename $*)/; s/^(#define FTCLOCK_PAGE_MINOR) .*/\1 $(patsubst .%,%,$(suffix $*))/' \
		clockpage/clockpage.h >build/test/module-$*/clockpage/clockpage.h
	cd build/test/module-$* && $(CC) $(MODULE_CFLAGS) $(MODULE_LDFLAGS) -o ../module-$*.so $(MODULE_SOURCES)
# Go knows best what is out of date.
.PHONY: $(BUILT_SHIMS) $(BUILT_CLOCK)
$(BUILT_CLOCK): | build/test
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./test/$(@F)
$(BUILT_SHIMS): build/test/shim-%: | build/test
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$*' -o $@ ./cmd/ftclock-shim

# Runs a command on a KVM host, see package test/kvmhost.
HOST = build/host/run
host: $(HOST) build/host/init
.PHONY: host $(HOST) build/host/init
$(HOST):
	CGO_ENABLED=0 $(GO) build -trimpath -o $@ ./test/kvmhost/run
build/host/init:
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w' -o $@ ./test/kvmhost/init

# Installs what a part of all this needs from Debian's packages, and says so. Does nothing where all is there.
setup:
	@test/setup.sh build host test
setup-build:
	@test/setup.sh build
setup-host:
	@test/setup.sh build host
PROGRESS = test/progress.sh

# The packages with end-to-end tests, which need a KVM host. Those whose tests are all of that kind are run there as a whole.
KVM_PACKAGES = test/platform/hypervisor test/privatelibvirt test/demo test/e2e test/docs test/soak test/node attach qemu-plugin
# Those with whole hosts, with desktops and with benchmarks: they take half an hour more in an emulated host.
KVM_HOSTS = test/container test/systemd test/packages test/virtmanager test/bench
WHOLE_PACKAGES = $(filter-out attach qemu-plugin,$(KVM_PACKAGES)) test/virtmanager test/bench
NATIVE_PACKAGES = $$($(GO) list ./... | grep -v -x -F "$$(printf 'ftclock/%s\n' $(WHOLE_PACKAGES))")

# What is there already: nothing is compiled anew below tests that run.
PREPARED = $(addprefix -o ,setup build built host images build/test/packages)

test: setup build built host images build/test/packages
	CGO_ENABLED=1 $(GO) vet -race ./...
	test/together.sh 'test/kvm.sh $(TESTFLAGS) -- $(KVM_PACKAGES)' '$(MAKE) $(PREPARED) native'
	$(MAKE) $(PREPARED) whole-hosts
	@if [ "$$(build/host/run --where)" = native ]; then $(MAKE) test-hosts; \
	else echo "LEFT OUT on an emulated host, for the time that they take: $(KVM_HOSTS); make test-hosts runs them"; fi

# The tests that need no KVM host.
native: setup build built host
	CGO_ENABLED=1 $(GO) test -race -timeout 1h -p 1 -skip '^TestKVM' $(TESTFLAGS) $(NATIVE_PACKAGES)

# What whole hosts are for, in short forms.
whole-hosts: setup build built host images build/test/packages
	for target in 'power-cuts CUTS=' 'unit-kills KILLS='; do \
		$(MAKE) $(PREPARED) $$target || { [ "$$RETRY_FAILED" = 1 ] && echo "kvm: FAILED, once more: $$target" && $(MAKE) $(PREPARED) $$target; } || exit 1; \
	done

test-hosts: setup build built host images build/test/packages
	test/kvm.sh $(TESTFLAGS) -- $(KVM_HOSTS)

# Whole hosts, which boot on emulated machines on any machine, and whose plugs are pulled: CUTS times, with four domains, or
# once with two.
CUTS ?= 100
power-cuts: setup build built host images build/test/packages
	FTCLOCK_REQUIRE=1 FTCLOCK_CUTS=$(CUTS) $(GO) test -count=1 -timeout 6h -v -run PowerCuts ./test/wholehost

# A host's life with the package, from its installation to its purge.
host-life: setup build built host build/test/packages
	for suite in $(RELEASES); do \
		$(MAKE) -o setup -o build -o built -o host images SUITES=$$suite && \
		FTCLOCK_REQUIRE=1 FTCLOCK_SUITE=$$suite $(GO) test -count=1 -timeout 2h -v -run AHostsLife ./test/wholehost || exit 1; \
	done

# A whole host, in which everything that ends a unit is done to a shim's, KILLS times and more.
KILLS ?= 1000
unit-kills: setup build built host images build/test/packages
	FTCLOCK_REQUIRE=1 FTCLOCK_UNIT_KILLS=$(KILLS) $(GO) test -count=1 -timeout 6h -v -run NothingEndsTheUnit ./test/wholehost

# The same by systemd-oomd, on a host that is short of memory.
oomd: setup build built host build/test/packages
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 1h -v -run OomdEndsNothing ./test/wholehost

# A whole host whose SELinux enforces.
selinux: setup build built host build/test/packages
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 2h -v -run KVMSELinux ./test/wholehost

# A whole host that Ansible sets up.
ansible: setup build built host build/test/packages
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 2h -v -run KVMAnsible ./test/wholehost

# A whole host whose libvirt is in a podman container, as OpenStack's kolla has it, that is restarted 20 times.
podman: setup build built host build/test/packages
	FTCLOCK_REQUIRE=1 FTCLOCK_LONG=1 $(GO) test -count=1 -timeout 3h -v -run KVMPodman ./test/wholehost

# A whole host that is suspended to memory, with guests.
host-sleep: setup build built host build/test/packages
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 1h -v -run TheHostSleeps ./test/wholehost

# Two whole hosts with a network between them, and a domain that is migrated there and back.
two-hosts: setup build built host images build/test/packages
	FTCLOCK_REQUIRE=1 $(GO) test -count=1 -timeout 2h -v -run TwoHosts ./test/wholehost

# What the tests of units and packages boot: whole Debians, made once and kept in the user's cache.
images: | build
	$(PROGRESS) images $(GO) run ./test/container/prepare $(SUITES)
SUITES ?= bookworm

# The end-to-end tests alone, or some: make e2e PACKAGES=test/e2e TESTFLAGS='-v -run TestKVMLinuxGuest'
PACKAGES ?= $(KVM_PACKAGES)
e2e: setup-host build built host
	test/kvm.sh $(TESTFLAGS) -- $(PACKAGES)

# Further forms of the end-to-end tests: $(call on-kvm,FLAGS,PACKAGES). FTCLOCK_* variables come along.
on-kvm = FTCLOCK_REQUIRE=1 test/kvm.sh -v $(1) -- $(2)

# Checkpoints, restores, migrations and guests with several vCPUs on host and guest kernels of other Debians.
KERNELS ?= bookworm trixie sid
kernels: setup-host build built host
	for suite in $(KERNELS); do \
		FTCLOCK_HOST=emulated HOSTFLAGS="--suite $$suite" $(call on-kvm,-run 'Checkpoints|Restore|Migration|LinuxGuest',test/e2e) || exit 1; \
	done

# The same with libvirt and QEMU of these Debians, too. What runs there is compiled here, so here is the oldest of them, and
# its kernel is the guests'.
RELEASES ?= bookworm trixie testing
releases: setup build built host
	kernel=$$(build/host/run --kernel bookworm) && for suite in $(RELEASES); do \
		FTCLOCK_TEST_KERNEL=$$kernel FTCLOCK_HOST=emulated HOSTFLAGS="--debian $$suite" $(call on-kvm,-run 'Checkpoints|Restore|Migration',test/e2e) || exit 1; \
	done

# 1,000 pauses of a stock Linux with 1, 2 and 4 vCPUs.
vcpus: setup-host build built host
	FTCLOCK_LONG=1 $(call on-kvm,-run TestKVMLinuxGuest,test/e2e)

# A domain whose anchor is published beside two under a long job of libvirt's.
anchors: setup-host build built host
	FTCLOCK_LONG=1 $(call on-kvm,-run TestKVMAnchorsBesideLongJobs,test/e2e)

# The node service: QEMUs in namespaces of their own, and 100 that start and end at random for ten minutes.
node: setup-host build built host
	FTCLOCK_LONG=1 $(call on-kvm,-run TestKVMNode,test/node)

# A stock Linux on each kind of clock, and what is said of one that isn't kept when it has run for three minutes.
guest-clocks: setup-host build built host
	FTCLOCK_LONG=1 $(call on-kvm,-run TestKVMGuestClocks,test/e2e)

# Stock guests of other Debians' kernels: several vCPUs, restores, a quarter of an hour away.
GUESTS ?= bullseye bookworm trixie sid
guest-kernels: setup-host build built host
	for suite in $(GUESTS); do \
		kernel=$$(build/host/run --kernel $$suite) || exit 1; \
		FTCLOCK_TEST_KERNEL=$$kernel $(call on-kvm,-run 'LinuxGuest|ATSCGuest|AQuarterOfAnHour',test/e2e) || exit 1; \
	done

# A shell on a KVM host, with a libvirt of its own, ftclock installed and a guest defined.
shell: setup-host build built host build/test/shell
	build/host/run --terminal build/test/shell
.PHONY: build/test/shell build/test/demo
build/test/shell: | build/test
	CGO_ENABLED=1 $(GO) build -buildmode=pie $(GOFLAGS_ALL) -o $@ ./test/shell

build/test/packages: FORCE
	$(PROGRESS) packages $(GO) run ./test/packages/prepare $@
FORCE:

test-packages: setup build built host build/test/packages
	$(MAKE) images SUITES='bookworm trixie'
	FTCLOCK_REQUIRE=1 FTCLOCK_LONG=1 $(GO) test -count=1 -timeout 3h -v ./packaging
	FTCLOCK_LONG=1 $(call on-kvm,,test/packages)
	FTCLOCK_SUITE=trixie $(call on-kvm,,test/systemd)

pictures: setup build built host
	mkdir -p docs/pictures
	FTCLOCK_PICTURES=$(CURDIR)/docs/pictures HOSTFLAGS='--write docs/pictures' $(call on-kvm,,test/virtmanager)
	FTCLOCK_PICTURES=$(CURDIR)/docs/pictures $(GO) test -count=1 -timeout 1h -run 'Browser|Watch|Fleet' ./report ./cmd/ftclock

# What it installs is what it needs. Without PIE Go compiles each package once, for all programs: a minute less on a bare machine.
demo: setup-host
	@$(PROGRESS) build $(MAKE) --no-print-directory PIE= build build/test/guest.elf host build/test/demo || { \
		echo "demo: building failed, see above; fix: where a module can't be had, see that $$($(GO) env GOPROXY) can be reached, or set GOPROXY to another" >&2; exit 1; }
	@mkdir -p build/demo
	cd build && host/run --write demo -- sh -c 'cd demo && exec ../test/demo'
	cp build/demo/demo.svg build/demo/demo.png .
build/test/demo: | build/test
	CGO_ENABLED=1 $(GO) build $(PIE) $(GOFLAGS_ALL) -o $@ ./test/demo

splits: setup
	FTCLOCK_REQUIRE=1 FTCLOCK_LONG=1 $(GO) test -race -count=1 -timeout 30m -v -run 'CutAnywhere|AnyPiece|BehindOther' ./relay

hostile: setup
	FTCLOCK_REQUIRE=1 $(GO) test -race -count=1 -timeout 30m -v -run 'Nonsense|AnyPage|LeavesInTheMiddle|Hostile|Generations|Odd|Fuzz' ./qmp-shim ./relay ./test/reliability ./clockpage

twin: setup-host build built host
	FTCLOCK_TWIN=100000 $(call on-kvm,-timeout 12h -run TestKVMATwin,test/e2e)

sweep: setup-host build built host
	FTCLOCK_LONG=1 $(call on-kvm,-run Sweep,test/e2e)

sim: setup
# With bin/ftclock's flags Go has compiled most of it already.
	FTCLOCK_REQUIRE=1 FTCLOCK_SIM_SEEDS=40 $(GO) test -count=1 -timeout 1h -v -run TestRule ./qemu-plugin

CHAOS = FTCLOCK_WORKER_KILLS=1000 FTCLOCK_KEEPER_KILLS=200 FTCLOCK_LIBVIRTD_KILLS=100 FTCLOCK_UPGRADES=100 FTCLOCK_RECONNECTS=300
chaos: setup build built host
	$(CHAOS) $(call on-kvm,-timeout 6h -run Chaos,test/e2e)
	FTCLOCK_REQUIRE=1 $(CHAOS) $(GO) test -count=1 -timeout 6h -v -run Peers ./test/reliability

# Every figure of eight checkpointed domains against every other, each with a guest of its own to be measured.
agree: setup-host build built host
	FTCLOCK_RECORD_TIME=2m $(call on-kvm,-run TestKVMStatusExporterAndRecordAgree,test/e2e)

SOAKFLAGS ?= -picture docs/pictures/soak.svg
soak: setup-host build built host
	$(GO) build -o build/test/soak ./test/soak
	build/host/run --write docs/pictures -- build/test/soak $(SOAKFLAGS)

# COLO for five minutes at each of three checkpoint delays, then the primary's death.
colo: setup-host build built host
	FTCLOCK_COLO_SECONDS=300 FTCLOCK_PICTURES=$(CURDIR)/docs/pictures HOSTFLAGS='--write docs/pictures' $(call on-kvm,-run TestKVMCOLO,test/e2e)

# What needs KVM is measured where there is /dev/kvm, and left out elsewhere: a figure of time means nothing in an emulated host.
BENCHFLAGS ?=
bench: setup build built
	test/bench/fetch.sh build/bench-guest || echo "bench: going on without the guest with an agent"
	$(GO) run ./test/bench $(BENCHFLAGS)

bench-quick: setup build built host
	$(GO) build -o build/test/bench ./test/bench
	build/host/run -- build/test/bench -quick -page - -pictures ''

cost: setup build built
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
packages: setup-build build
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
	install -m 644 xml-templates/*.rng $(DESTDIR)$(PREFIX)/share/ftclock/
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
	install -D -m 644 packaging/needrestart/ftclock.conf $(DESTDIR)$(NEEDRESTART)
	ln -sfn $(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(HOOK)
	@echo "libvirt looks for hooks when it starts: restart libvirtd (or virtqemud) once if it had no hook before."

uninstall:
	rm -f $(DESTDIR)$(HOOK) $(DESTDIR)$(LOGROTATE) $(DESTDIR)$(NEEDRESTART) $(DESTDIR)$(PREFIX)/bin/ftclock $(DESTDIR)$(PREFIX)/sbin/ftclock-hook $(DESTDIR)$(PREFIX)/sbin/ftclock-shim
	rm -f $(addprefix $(DESTDIR)$(UNITDIR)/,$(notdir $(UNITS))) $(DESTDIR)$(PREFIX)/share/man/man[158]/ftclock*.[158]
	rm -f $(DESTDIR)$(PREFIX)/share/bash-completion/completions/ftclock $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_ftclock
	rm -f $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/ftclock.fish
	rm -rf $(DESTDIR)$(PREFIX)/lib/ftclock $(DESTDIR)$(PREFIX)/share/ftclock $(DESTDIR)$(PREFIX)/share/doc/ftclock

# What programs may not do, and no linter knows: a domain's directory belongs to QEMU's user, and changing modes by path as root
# follows its links; a hook's standard output replaces the domain's XML, so programs write to the writers that run was given.
GIT = git -c safe.directory='*'
BANNED = os\.(Chmod|Chown|Lchown)\(|fmt\.Print
lint: setup
	CGO_ENABLED=1 $(GO) vet -race ./...
	$(GO) run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...
	test -z "$$(gofmt -l .)"
	$(GIT) grep -nE '$(BANNED)' -- '*.go' ':!*_test.go' ':!test/' ':!cmd/ftclock-shim/main.go'; test $$? = 1
	clang-format --dry-run -Werror $$($(GIT) ls-files '*.c' '*.h')

fmt:
	gofmt -w .
	clang-format -i $$(git ls-files '*.c' '*.h')

clean:
	rm -rf bin build demo.svg demo.png
