#!/usr/bin/env bash
# All the set-up for the tests on a fresh Debian machine with Node.js, then the tests. The peers that cowcatcher is
# tested against come from Debian's packages; where they are missing and this is not root, it says what to install.
#
#   test.sh           what CI runs
#   test.sh --long    the campaigns, which have more peers (npm run test:long leaves out those whose peers are missing)
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(acl attr fio gcc libc6-dev qemu-utils qemu-system-x86 qemu-guest-agent libnbd-bin python3-libnbd nbdkit e2fsprogs util-linux mandoc openssl systemd xz-utils
  ceph-mon ceph-osd ceph-common librbd1 qemu-block-extra)
long=$([ "${1:-}" = --long ] && echo 1 || true)
if [ -n "$long" ]; then
  packages+=(radosgw libvirt-daemon-system libvirt-clients libguestfs-tools fuse3 zsh fish lintian)
fi
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "the tests need Debian's packages: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  # A mirror may hiccup, and another apt-get may hold the lock.
  apt=(apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
  export DEBIAN_FRONTEND=noninteractive
  "${apt[@]}" update || "${apt[@]}" update
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" ||
    "${apt[@]}" install -y --no-install-recommends "${missing[@]}"
fi

npm ci --no-audit --no-fund || npm ci --no-audit --no-fund
if [ -n "$long" ]; then
  exec npm run test:long
fi
# Side by side, as each keeps one processor busy.
npm run lint:code &
code=$!
npm run typecheck
npm run lint:house
wait "$code"
# With a smoke of each of the other versions of Node.js that are promised.
TEST_NODES=1 npm test
