#!/bin/sh
# Installs what building and testing ftclock need from Debian's packages. Says what it does; does nothing where all
# is there. Go itself has to be there already.
set -eu

packages="gcc libc6-dev make pkg-config clang-format libvirt-dev libvirt-daemon-system libvirt-clients
 qemu-system-x86 qemu-utils dbus libxml2-utils xz-utils iproute2 strace socat valgrind prometheus debootstrap systemd-container
 tmux chromium poppler-utils lintian rpmlint rpm mandoc man-db groff shellcheck zsh fish apparmor checkpolicy semodule-utils setools dpkg-dev
 virt-manager virtinst xvfb imagemagick at-spi2-core gir1.2-atspi-2.0 dconf-gsettings-backend adwaita-icon-theme fonts-dejavu-core"

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
echo "setup: installing from Debian's packages:$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { apt-get update && apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "setup: installing failed; its output is above" >&2
    exit 1
fi
rm -f "$log"
echo "setup: done"
