#!/bin/sh
# Makes what the benchmark's guest with an agent boots, below the directory named: Debian's stock kernel, and the tree of an
# initramfs with qemu-guest-agent, chrony, hwclock and busybox. Installs nothing. Does nothing where this script has done so before.
set -eu

out=$1
this=$(cksum <"$0")
[ "$(cat "$out/done" 2>/dev/null)" != "$this" ] || exit 0
rm -rf "$out"
mkdir -p "$out/debs" "$out/tree" "$out/root/lib/modules"
chmod 755 "$out" "$out/debs"

echo "bench: fetching a kernel and programs for a guest from Debian's packages"
kernel=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$kernel" ] || { echo "bench: apt knows no linux-image-cloud-amd64; fix: apt-get update" >&2; exit 1; }
(cd "$out/debs" && apt-get -q download -o APT::Sandbox::User=root "$kernel" busybox-static chrony qemu-guest-agent >/dev/null)
for deb in "$out"/debs/*.deb; do dpkg-deb -x "$deb" "$out/tree"; done
cp "$out"/tree/boot/vmlinuz-* "$out/vmlinuz"

cd "$out/root"
mkdir -p bin sbin usr/sbin usr/bin etc/chrony dev proc sys run/chrony var/lib/chrony tmp lib64
cp ../tree/bin/busybox bin/
cp ../tree/usr/sbin/chronyd ../tree/usr/sbin/qemu-ga usr/sbin/
cp ../tree/usr/bin/chronyc usr/bin/
cp "$(command -v hwclock || echo /usr/sbin/hwclock)" sbin/hwclock
# The libraries are this machine's, of the same release.
for program in usr/sbin/chronyd usr/sbin/qemu-ga usr/bin/chronyc sbin/hwclock; do
    ldd "$program" >../needs
    if grep 'not found' ../needs; then
        echo "bench: $program needs what isn't here; fix: apt-get install chrony qemu-guest-agent" >&2
        exit 1
    fi
    awk '$3 ~ /^\// { print $3 } $1 ~ /^\// { print $1 }' ../needs
done >../libraries
sort -u ../libraries | while read -r library; do
    mkdir -p ".${library%/*}"
    cp -L "$library" ".$library"
done
# In the order in which they are loaded.
for module in virtio_ring virtio virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_console failover net_failover virtio_net; do
    find ../tree/lib/modules -name "$module.ko" -exec cp {} lib/modules/ \;
    [ ! -e "lib/modules/$module.ko" ] || echo "$module" >>lib/modules/order
done
printf 'root:x:0:0:root:/:/bin/sh\n_chrony:x:100:100::/var/lib/chrony:/bin/sh\n' >etc/passwd
printf 'root:x:0:\n_chrony:x:100:\n' >etc/group
# The first one steps the clock at its start only, as Debian's does, and slews it later; the second steps it whenever it is off.
for steps in 3 -1; do
    printf 'server 10.0.2.2 iburst minpoll 0 maxpoll 0 xleave\nmaxdistance 16\nmakestep 0.001 %s\n' "$steps" >"etc/chrony/steps$steps.conf"
done
cat >init <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod /lib/modules/$module.ko; done </lib/modules/order
for tries in 1 2 3 4 5 6 7 8 9 10; do ls /dev/vport* >/dev/null 2>&1 && break; sleep 1; done
steps=$(sed -n 's/.*chrony-steps=\([-0-9]*\).*/\1/p' /proc/cmdline)
if [ -n "$steps" ]; then
    ip link set lo up
    ip link set eth0 up
    ip addr add 10.0.2.15/24 dev eth0
    chronyd -d -u root -f "/etc/chrony/steps$steps.conf" &
fi
mkdir -p /var/run
qemu-ga -m virtio-serial -p "$(ls /dev/vport* | head -n 1)" -t /run &
exec /clock
END
chmod 755 init
rm -rf ../debs ../tree ../needs ../libraries
echo "$this" >../done
