#!/bin/sh
# setup.sh GROUP...: installs what a part of ftclock's build and tests needs from Debian's packages. Says what it does;
# does nothing where all is there. Go itself has to be there already.
set -eu

# To build ftclock and what its tests run.
build="gcc libc6-dev make pkg-config libvirt-dev musl-tools"
# A KVM host in which a libvirt of its own can run, emulated where this machine is none.
host="libvirt-daemon-system libvirt-clients qemu-system-x86 qemu-utils dbus iproute2 xz-utils dpkg-dev"
# Everything that make test looks at.
test="clang-format libxml2-utils strace socat valgrind prometheus debootstrap systemd-container cpio
 ansible-core tmux chromium poppler-utils lintian rpmlint rpm mandoc man-db groff shellcheck zsh fish apparmor checkpolicy semodule-utils setools
 virt-manager virtinst xvfb imagemagick at-spi2-core gir1.2-atspi-2.0 dconf-gsettings-backend adwaita-icon-theme fonts-dejavu-core"

packages=""
for group in "$@"; do
    case $group in
    build) packages="$packages $build" ;;
    host) packages="$packages $host" ;;
    test) packages="$packages $test" ;;
    *)
        echo "usage: setup.sh [build] [host] [test]" >&2
        exit 2
        ;;
    esac
done

# What is built goes there, and the emulated host's kernel.
case " $* " in *" host "*)
    there=$(dirname "$0")/../build
    mkdir -p "$there"
    room=$(df -Pm "$there" | tail -n 1 | tr -s ' ' | cut -d ' ' -f 4)
    if [ ! -e "$there/host/kernel/vmlinuz" ] && [ "$room" -lt 1024 ]; then
        echo "setup: build/ has room for $room MiB, 1024 are needed; fix: make room there (df -h build)" >&2
        exit 1
    fi
    ;;
esac

missing=""
for package in $packages; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: this isn't Debian; please install what these packages hold:$missing" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "setup: please run as root: apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "setup: installing from Debian's packages:" $missing
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! "$(dirname "$0")/progress.sh" setup sh -c 'exec >"$0" 2>&1; apt-get update && apt-get install -y --no-install-recommends '"$missing" "$log"; then
    tail -n 20 "$log" >&2
    echo "setup: installing failed: $(grep '^E: ' "$log" | tail -n 1); fix: see that Debian's packages can be reached and that there is room (apt-get update; df -h /)" >&2
    exit 1
fi
echo "setup: done"
