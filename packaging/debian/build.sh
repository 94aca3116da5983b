#!/bin/sh
# Makes a Debian package of what `npm run build` has made: build.sh [FOLDER] puts it there (dist/deb). With dpkg-deb alone, and
# no network: the packages that it runs with are those of node_modules, as package-lock.json has them.
set -eu
cd "$(dirname "$0")/../.."
out=${1:-dist/deb}
version=$(node -p 'require("./package.json").version')
architecture=$(dpkg --print-architecture)
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
umask 022
chmod 755 "$stage"

lib=$stage/usr/lib/cowcatcher
mkdir -p "$lib/dist" "$stage/usr/bin" "$stage/DEBIAN"
cp -R bin package.json "$lib/"
# Without the tests' and benchmarks' code, and without maps to sources that are not there.
cp -R dist/src dist/workers "$lib/dist/"
node packaging/debian/dependencies.mjs | while read -r package; do
  mkdir -p "$lib/$(dirname "$package")"
  cp -RL "$package" "$lib/$package"
done
# What is for those who work on these packages.
find "$lib/node_modules" \( -name '*.map' -o -name '*.d.ts' -o -name '*.d.mts' -o -name '*.d.cts' -o -name '.[a-z]*' -o -name test \
  -o -name tests -o -name benchmark -o -name benchmarks -o -name examples -o -name docs -o -name '*.html' -o -name '*.sh' \) -prune -exec rm -rf {} +
find "$lib" -name '*.map' -delete
# koffi's sources in C, and its compiled forms for another C library than Debian's.
rm -rf "$lib"/node_modules/koffi/vendor "$lib"/node_modules/koffi/lib "$lib"/node_modules/koffi/doc \
  "$lib"/node_modules/koffi/cnoke.cjs "$lib"/node_modules/@koromix/*/musl_*
find "$lib/node_modules/koffi/src" -type f ! -name '*.cjs' ! -name '*.js' -delete
find "$lib/node_modules/koffi/src" -type d -empty -delete
find "$lib" -type f -exec chmod 644 {} +
find "$lib" -type d -exec chmod 755 {} +
chmod 755 "$lib/bin/cowcatcher" "$lib/dist/src/cli/main.js"
ln -s ../lib/cowcatcher/bin/cowcatcher "$stage/usr/bin/cowcatcher"

put() { # FILE TARGET
  mkdir -p "$stage/$(dirname "$2")"
  install -m 644 "$1" "$stage/$2"
}
for page in dist/man/*; do
  part=${page##*.}
  put "$page" "usr/share/man/man$part/${page##*/}"
  gzip -9n "$stage/usr/share/man/man$part/${page##*/}"
done
put dist/completions/cowcatcher.bash usr/share/bash-completion/completions/cowcatcher
put dist/completions/_cowcatcher usr/share/zsh/vendor-completions/_cowcatcher
put dist/completions/cowcatcher.fish usr/share/fish/vendor_completions.d/cowcatcher.fish
for unit in packaging/systemd/*; do put "$unit" "lib/systemd/system/${unit##*/}"; done
put packaging/sysusers.d/cowcatcher.conf usr/lib/sysusers.d/cowcatcher.conf
put packaging/tmpfiles.d/cowcatcher.conf usr/lib/tmpfiles.d/cowcatcher.conf
put packaging/logrotate.d/cowcatcher etc/logrotate.d/cowcatcher
put packaging/apparmor.d/libvirt-qemu-cowcatcher etc/apparmor.d/abstractions/libvirt-qemu.d/cowcatcher
mkdir -p "$stage/etc/cowcatcher/jobs.d" "$stage/etc/cowcatcher/serve.d"
doc=usr/share/doc/cowcatcher
put packaging/debian/copyright $doc/copyright
put README.md $doc/README.md
put CHANGELOG.md $doc/NEWS.md
put packaging/debian/changelog $doc/changelog.Debian
sed -i "s/@VERSION@/$version/" "$stage/$doc/changelog.Debian"
gzip -9n "$stage/$doc/changelog.Debian"
for page in docs/*.md docs/schema/*.json; do put "$page" "$doc/$page"; done

cat >"$stage/DEBIAN/control" <<CONTROL
Package: cowcatcher
Version: $version-1
Architecture: $architecture
Maintainer: cowcatcher maintainers <maintainers@example.org>
Section: admin
Priority: optional
Installed-Size: $(du -sk --exclude=DEBIAN "$stage" | cut -f1)
Depends: nodejs (>= 20.19), libc6
Recommends: systemd
Suggests: libzstd1, librbd1, qemu-utils
Description: point-in-time backups of virtual-machine disks
 Copies raw and qcow2 disks as they were at one instant while the guest goes
 on writing, and the guest hardly notices, however slow the target is. It
 serves disks to guests over NBD, or backs up guests that QEMU runs; writes
 files, exports, Ceph RBD images or a deduplicating repository.
CONTROL
(cd "$stage" && find etc -type f | sort | sed 's|^|/|') >"$stage/DEBIAN/conffiles"
for script in postinst postrm; do install -m 755 "packaging/debian/$script" "$stage/DEBIAN/$script"; done
(cd "$stage" && find usr lib etc -type f -print0 | sort -z | xargs -0 md5sum) >"$stage/DEBIAN/md5sums"

mkdir -p "$out"
package=$out/cowcatcher_${version}-1_$architecture.deb
dpkg-deb --root-owner-group --build "$stage" "$package" >/dev/null
echo "$package"
