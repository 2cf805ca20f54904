#!/usr/bin/env bash
# Build a Debian package of sectool for the system this runs on. `packaging/build-deb.sh --help` says how.
set -euo pipefail

HERE=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
readonly HERE
export LC_ALL=C.UTF-8
readonly NEEDED=(gcc libc6-dev python3 python3-dev python3-venv libnetfilter-queue-dev dpkg-dev)
readonly ROOT=usr/lib/sectool  # the environment, in the package

usage() {
  cat <<'HELP'
usage: packaging/build-deb.sh [--out DIR] [--revision N] [--compression xz|gzip|zstd]

Makes DIR/sectool_VERSION-N~CODENAME_ARCH.deb (default: the present folder, 1): Python packages in the versions of
requirements.lock, hashes checked, in an environment of their own below /usr/lib/sectool; manual pages, completion for
bash, zsh and fish, systemd unit. A package fits the Python and C library it was built with, so build it on the release
it is for. Needs no root, but the packages it names when they are missing.
HELP
}

say() { printf '>> %s\n' "$*" >&2; }
die() {
  printf 'build-deb: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '           %s\n' "$2" >&2
  exit 1
}

out=$PWD revision=1 compression=xz
while [ $# -gt 0 ]; do
  case $1 in
  --out) out=${2:?--out needs a folder} && shift ;;
  --revision) revision=${2:?--revision needs a number} && shift ;;
  --compression) compression=${2:?--compression needs a name} && shift ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    usage >&2
    die "there is no option '$1'"
    ;;
  esac
  shift
done
[[ $revision =~ ^[0-9]+$ ]] || die "--revision is a number"

lacking=()
for package in "${NEEDED[@]}"; do
  dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || lacking+=("$package")
done
[ "${#lacking[@]}" = 0 ] || die "packages to build with are missing" "apt-get install --no-install-recommends ${lacking[*]}"

# What is in it does not depend on when it is built, but on the sources: their date is the package's.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$HERE" log -1 --format=%ct 2>/dev/null || stat -c %Y "$HERE/pyproject.toml")}
export SOURCE_DATE_EPOCH
codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:?}")
architecture=$(dpkg --print-architecture)
upstream=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$HERE/pyproject.toml")
version=$upstream-$revision~$codename
# The system's own, whatever comes first in PATH: it is what the package will run with.
readonly PYTHON=/usr/bin/python3
minor=$($PYTHON -c 'import sys; print("3.%d" % sys.version_info[1])')
next=$($PYTHON -c 'import sys; print("3.%d" % (sys.version_info[1] + 1))')

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/stage
mkdir -p "$stage/DEBIAN" "$stage/usr/lib" "$out"
chmod 755 "$stage"

# --- the program -------------------------------------------------------------------------------------------

pip() { "$stage/$ROOT/bin/python3" -m pip --disable-pip-version-check "$@"; }

say "Python packages"
$PYTHON -m venv "$stage/$ROOT"
pip install -q --no-cache-dir --no-compile --require-hashes -r "$HERE/requirements.lock"
# Built from a copy: nothing is written into the tree.
mkdir "$work/tree"
tar -C "$HERE" --exclude=__pycache__ -cf - pyproject.toml README.md LICENSE sectool nfq store tui labs | tar -C "$work/tree" -xf -
pip install -q --no-cache-dir --no-compile --no-deps "$work/tree"

say "manual pages and completion"
run() { PYTHONDONTWRITEBYTECODE=1 "$stage/$ROOT/bin/python3" "$@"; }
run -m sectool.cli.manpages "$work/man"
for page in "$work"/man/*.1; do
  gzip -9n "$page"
  install -Dm644 "$page.gz" "$stage/usr/share/man/man1/$(basename "$page").gz"
done
for shell in bash zsh fish; do
  _SECTOOL_COMPLETE=source_$shell run "$stage/$ROOT/bin/sectool" >"$work/$shell" 2>/dev/null || true
  [ -s "$work/$shell" ] || die "the completion for $shell could not be made"
done
install -Dm644 "$work/bash" "$stage/usr/share/bash-completion/completions/sectool"
install -Dm644 "$work/zsh" "$stage/usr/share/zsh/vendor-completions/_sectool"
install -Dm644 "$work/fish" "$stage/usr/share/fish/vendor_completions.d/sectool.fish"

say "what is not needed to run goes"
pip uninstall -q -y pip setuptools 2>/dev/null || true
find "$stage/$ROOT/bin" -mindepth 1 ! -name sectool ! -name 'python*' -delete
find "$stage/$ROOT" -name __pycache__ -prune -exec rm -rf {} +
find "$stage/$ROOT" \( -name '*.h' -o -name '*.hpp' -o -name '*.pxd' -o -name '*.pyx' -o -name '*.c' -o -name '*.cc' -o -name '*.cpp' \
  -o -name '*.a' -o -name '*.cmake' -o -name direct_url.json \) -delete
find "$stage/$ROOT"/lib/python*/site-packages -depth -type d \( -name tests -o -name testing -o -name include \) \
  -path '*/pyarrow/*' -exec rm -rf {} +
find "$stage/$ROOT" -depth -type d -empty -delete
sed -i "1s|^#!.*|#!/$ROOT/bin/python3|" "$stage/$ROOT/bin/sectool"
sed -i -e "s|$stage||g" "$stage/$ROOT/pyvenv.cfg"
ln -sfn ../../../bin/python3 "$stage/$ROOT/bin/python3"
if grep -rIlF "$work" "$stage/$ROOT" >&2; then die "the files above name the folder it was built in"; fi
chmod -R u=rwX,go=rX "$stage/usr"
find "$stage/$ROOT/lib" -name '*.so*' -type f -exec chmod 644 {} +

mkdir -p "$stage/usr/bin" "$stage/usr/lib/systemd/system" "$stage/usr/lib/sysusers.d"
ln -s "../lib/sectool/bin/sectool" "$stage/usr/bin/sectool"
sed 's|/usr/local/bin/sectool|/usr/bin/sectool|' "$HERE/packaging/sectool.service" >"$stage/usr/lib/systemd/system/sectool.service"
install -m644 "$HERE/packaging/sectool.sysusers" "$stage/usr/lib/sysusers.d/sectool.conf"

# --- what Debian wants to know -------------------------------------------------------------------------------

doc=$stage/usr/share/doc/sectool
mkdir -p "$doc" "$stage/usr/share/lintian/overrides"
install -m644 "$HERE/packaging/debian/copyright" "$doc/copyright"
install -m644 "$HERE/packaging/debian/lintian-overrides" "$stage/usr/share/lintian/overrides/sectool"
{
  printf 'sectool (%s) %s; urgency=medium\n\n' "$version" "$codename"
  printf '  * Version %s. What is new is in CHANGELOG.md of the sources.\n\n' "$upstream"
  printf ' -- sectool maintainers <maintainers@sectool.invalid>  %s\n' "$(date -R -u -d "@$SOURCE_DATE_EPOCH")"
} | gzip -9n >"$doc/changelog.Debian.gz"
for script in postinst prerm postrm; do
  install -m755 "$HERE/packaging/debian/$script" "$stage/DEBIAN/$script"
done
cat >"$stage/DEBIAN/control" <<CONTROL
Package: sectool
Version: $version
Architecture: $architecture
Maintainer: sectool maintainers <maintainers@sectool.invalid>
Section: net
Priority: optional
Installed-Size: $(du -sk --exclude=DEBIAN "$stage" | cut -f1)
Depends: python3 (>= $minor), python3 (<< $next), iptables, libc6 (>= $(dpkg-query -W -f '${Version}' libc6 | cut -d- -f1 | cut -d+ -f1)), libgcc-s1, libstdc++6, libnetfilter-queue1, libnfnetlink0, passwd
Recommends: nftables
Homepage: https://sectool.invalid/
Description: identity for every connection of plain Linux hosts
 Every connection between hosts carries the identity of the workload behind it
 in its TCP handshake. Policy says in sentences who may call whom; what no rule
 allows is denied on both ends, and everything is on record.
 .
 Installing starts nothing and changes no kernel rule: enforcing begins with
 "sectool up" or "systemctl enable --now sectool".
CONTROL
(cd "$stage" && find usr -type f -print0 | sort -z | xargs -0 md5sum) >"$stage/DEBIAN/md5sums"
chmod 644 "$stage/DEBIAN/control" "$stage/DEBIAN/md5sums"
find "$stage" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

say "the package"
file=$out/sectool_${version}_$architecture.deb
dpkg-deb --root-owner-group -Z"$compression" -z1 --threads-max=2 --build "$stage" "$file" >/dev/null 2>&1 ||
  dpkg-deb --root-owner-group -Z"$compression" -z1 --build "$stage" "$file" >/dev/null
printf '%s\n' "$file"
