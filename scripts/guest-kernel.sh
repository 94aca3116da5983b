#!/usr/bin/env bash
# Puts what the real-guest test boots into FOLDER: Debian's kernel for clouds, the modules that it needs for a virtio
# disk, and busybox. Nothing is installed: the packages are downloaded and unpacked. Does nothing if all is there.
#   scripts/guest-kernel.sh FOLDER
set -euo pipefail
folder=${1:?usage: guest-kernel.sh FOLDER}
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk)

[ -e "$folder/complete" ] && exit 0
if [ "$(dpkg --print-architecture)" != amd64 ]; then
  echo "guest-kernel.sh: only for amd64" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt's download user must be able to write here.
chmod 755 "$work"
cd "$work"

# linux-image-cloud-amd64 itself is empty; it depends on the kernel of the day.
find_kernel() {
  apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}
kernel=$(find_kernel)
if [ -z "$kernel" ] || ! apt-get download -q "$kernel" busybox-static >/dev/null 2>&1; then
  # The lists may be missing, or older than what the mirror still has.
  apt-get update -qq
  kernel=$(find_kernel)
  apt-get download -q "$kernel" busybox-static >/dev/null
fi
for package in ./*.deb; do dpkg -x "$package" unpacked; done

mkdir -p "$folder"
cp unpacked/boot/vmlinuz-* "$folder/vmlinuz"
cp "$(find unpacked -type f -path '*/bin/busybox' | head -n 1)" "$folder/busybox"
for module in "${modules[@]}"; do
  file=$(find unpacked -name "$module.ko*" | head -n 1)
  case $file in
    *.ko) cp "$file" "$folder/" ;;
    *.ko.xz) xz -dc "$file" >"$folder/$module.ko" ;;
    *.ko.zst) zstd -dcq "$file" >"$folder/$module.ko" ;;
    # Built into the kernel.
    *) ;;
  esac
done
touch "$folder/complete"
