#!/usr/bin/env bash
# Build a Vagrant box for libvirt from nothing but Debian's mirror: `labs/vm/box.sh OUT.box`. Needs root, no loop device.
#
# The box has what install.sh and the sample services ask apt and pip for, because machines of the test have no way out:
# Debian packages are installed, Python packages lie in /var/cache/sectool-wheels, the versions and hashes of
# requirements.lock. sectool itself is not in it: that comes from the checkout, by labs/vm/provision.sh.
set -euo pipefail

readonly SUITE=bookworm WHEELS=/var/cache/sectool-wheels GIB=4
readonly MIRROR=${SECTOOL_MIRROR:-http://deb.debian.org/debian}
readonly KEY=${VAGRANT_PUBLIC_KEY:-/usr/share/rubygems-integration/all/gems/vagrant-2.3.4/keys/vagrant.pub}
readonly MACHINE=(systemd systemd-sysv udev dbus linux-image-amd64 initramfs-tools ifupdown isc-dhcp-client netbase
  iproute2 openssh-server sudo rsync kmod procps iputils-ping ca-certificates grub-pc-bin)
# install.sh: what it needs, and what it needs to build the one package that has no wheel.
readonly INSTALL=(iptables nftables python3 python3-venv python3-dev gcc libc6-dev libnetfilter-queue1 libnetfilter-queue-dev)
readonly SAMPLES=(nginx-light postgresql postgresql-client curl tcpdump conntrack dnsmasq-base)

[ $# = 1 ] || { echo "usage: labs/vm/box.sh OUT.box" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "box.sh: needs root, to make another system's files; run it with sudo" >&2; exit 1; }
[ -r "$KEY" ] || { echo "box.sh: there is no $KEY; install vagrant, or name its public key in VAGRANT_PUBLIC_KEY" >&2; exit 1; }
here=$(dirname "$(readlink -f "$0")")
python=${PYTHON:-python3.11} # Debian 12's: wheels are for one version of Python
"$python" -c 'import pip, sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
  { echo "box.sh: $python is not Python 3.11 with pip, which downloads what Debian 12 needs; name one in PYTHON" >&2; exit 1; }
tree=$(dirname "$(dirname "$here")")
out=$(readlink -f "$(dirname "$1")")/$(basename "$1")
work=$(mktemp -d -p "$(dirname "$out")" box.XXXXXX)
trap 'rm -rf "$work"' EXIT
root=$work/root
inside() { DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 chroot "$root" "$@"; }
step() { printf '>> box: %s\n' "$*" >&2; }

step "Debian $SUITE"
wanted=$(IFS=,; echo "${MACHINE[*]},${INSTALL[*]}")
debootstrap --variant=minbase --include="$wanted" "$SUITE" "$root" "$MIRROR" >"$out.log" 2>&1
# Nothing starts in a folder.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
step "sample services: ${SAMPLES[*]}"
[ ! -e /etc/resolv.conf ] || cp -L /etc/resolv.conf "$root/etc/resolv.conf"
inside apt-get install -y -q --no-install-recommends "${SAMPLES[@]}" >>"$out.log" 2>&1
rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf"

step "Python packages of requirements.lock"
mkdir -p "$root$WHEELS"
"$python" -m pip download -q --disable-pip-version-check --require-hashes -r "$tree/requirements.lock" -d "$root$WHEELS" 2>>"$out.log"
# To build with: install.sh's pip makes the project itself, and what came as source (NetfilterQueue, in Cython).
"$python" -m pip download -q --disable-pip-version-check 'setuptools>=77' wheel cython -d "$root$WHEELS" 2>>"$out.log"

step "a machine of it"
printf '/dev/vda1 / ext4 defaults,noatime 0 1\n' >"$root/etc/fstab"
printf 'box\n' >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 box\n' >"$root/etc/hosts"
cat >"$root/etc/network/interfaces" <<'CONF'
auto lo eth0
iface lo inet loopback
iface eth0 inet dhcp
source /etc/network/interfaces.d/*
CONF
inside useradd --create-home --shell /bin/bash vagrant
install -m 440 /dev/stdin "$root/etc/sudoers.d/vagrant" <<<'vagrant ALL=(ALL) NOPASSWD: ALL'
install -d -m 700 "$root/home/vagrant/.ssh"
install -m 600 "$KEY" "$root/home/vagrant/.ssh/authorized_keys"
inside chown -R vagrant: /home/vagrant
printf 'UseDNS no\n' >"$root/etc/ssh/sshd_config.d/vagrant.conf"
inside systemctl -q disable nginx postgresql 2>>"$out.log"
# Housekeeping of a machine that lives for an hour.
inside systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
  e2scrub_reap.service man-db.timer logrotate.timer 2>>"$out.log"
# Only the drivers such a machine has: small, and quick to load where processors are emulated.
printf '%s\n' virtio_pci virtio_blk virtio_net ext4 >>"$root/etc/initramfs-tools/modules"
sed -i -e 's/^MODULES=.*/MODULES=list/' -e 's/^COMPRESS=.*/COMPRESS=gzip/' "$root/etc/initramfs-tools/initramfs.conf"
inside update-initramfs -u -k all >>"$out.log" 2>&1
kernel=$(basename "$root"/boot/vmlinuz-*)
kernel=${kernel#vmlinuz-}
mkdir -p "$root/boot/grub"
cat >"$root/boot/grub/grub.cfg" <<CONF
set timeout=0
set root=(hd0,msdos1)
serial --unit=0 --speed=115200
terminal_output serial console
linux /boot/vmlinuz-$kernel root=/dev/vda1 rw console=ttyS0 net.ifnames=0 mitigations=off quiet
initrd /boot/initrd.img-$kernel
boot
CONF
inside grub-mkimage -O i386-pc -p '(hd0,msdos1)/boot/grub' -o /core.img \
  biosdisk part_msdos ext2 normal configfile linux serial terminal echo boot minicmd
mv "$root/core.img" "$work/core.img"
cp "$root/usr/lib/grub/i386-pc/boot.img" "$work/boot.img"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,locale,man}/*

step "its disk"
# A partition from the first MiB on, filled by mkfs; GRUB in the sectors before it. No loop device, no mount.
mke2fs -q -F -t ext4 -L root -d "$root" "$work/part.raw" "$((GIB * 1024 - 1))M"
truncate -s "${GIB}G" "$work/disk.raw"
dd if="$work/part.raw" of="$work/disk.raw" bs=1M seek=1 conv=notrunc,sparse status=none
rm -rf "$root" "$work/part.raw"
python3 - "$work" "$GIB" <<'CODE'
import struct, sys
from pathlib import Path

work, gib = Path(sys.argv[1]), int(sys.argv[2])
core, boot = (work / "core.img").read_bytes(), (work / "boot.img").read_bytes()
assert len(core) <= 2047 * 512, "GRUB does not fit before the partition"
first, sectors = 2048, gib * 2**21 - 2048
entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, sectors)
with (work / "disk.raw").open("r+b") as disk:
    disk.write(boot[:440])
    disk.seek(446)
    disk.write(entry + bytes(48) + b"\x55\xaa" + core)
CODE
qemu-img convert -c -O qcow2 "$work/disk.raw" "$work/box.img"
printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": %s}\n' "$GIB" >"$work/metadata.json"
printf 'Vagrant.configure("2") { |config| }\n' >"$work/Vagrantfile"
tar -C "$work" -cf "$out" metadata.json Vagrantfile box.img
step "$out: $(du -h "$out" | cut -f1), Linux $kernel, built $(date -u +%FT%TZ)"
