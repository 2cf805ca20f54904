#!/usr/bin/env bash
# Install sectool on this host, upgrade it, or remove it again. `sudo ./install.sh --help` says how.
set -euo pipefail

HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
readonly HERE
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" LC_ALL=C.UTF-8
readonly ROOT=/opt/sectool
readonly BIN=/usr/local/bin/sectool UNIT=/etc/systemd/system/sectool.service
readonly SYSUSERS=/usr/local/lib/sysusers.d/sectool.conf
readonly MAN=/usr/local/share/man/man1
readonly BASH_WORDS=/usr/local/share/bash-completion/completions/sectool
readonly ZSH_WORDS=/usr/local/share/zsh/site-functions/_sectool
readonly FISH_WORDS=/usr/local/share/fish/vendor_completions.d/sectool.fish
readonly NEEDED=(iptables python3 python3-venv libnetfilter-queue1)
readonly TO_BUILD=(gcc libc6-dev python3-dev libnetfilter-queue-dev)  # only while installing
readonly MANIFEST=$ROOT/installed PACKAGES=$ROOT/packages ZONE=(/etc/localtime /etc/timezone)

usage() {
  cat <<'HELP'
usage: sudo ./install.sh [--from FILE]       install, or upgrade in place (connections go on)
       sudo ./install.sh --uninstall         stop enforcing and remove the program; keys, history and policy stay
       sudo ./install.sh --uninstall --purge remove those, too

  --from FILE   install this wheel or source archive of sectool instead of the tree beside this script

For Debian 12, Debian 13 and Ubuntu 24.04. Python packages go into an environment of their own below /opt/sectool
(locked versions, hashes checked); nothing is started, and nothing is enforced until `sectool up` or
`systemctl enable --now sectool`.
HELP
}

say() { printf '>> %s\n' "$*" >&2; }
die() {
  printf 'install: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '         %s\n' "$2" >&2
  exit 1
}

# Run a command quietly; show its words only if it fails.
quietly() {
  local message=$1 log
  shift
  log=$(mktemp)
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 25 "$log" >&2
    rm -f "$log"
    die "$message"
  fi
  rm -f "$log"
}

need_root() { [ "$(id -u)" = 0 ] || die "needs root: it writes to /opt, /usr/local and /etc" "run it again as: sudo ./install.sh"; }

# --- what this system is -----------------------------------------------------------------------------------

supported() {
  local ID='' VERSION_ID='' PRETTY_NAME='an unknown system'
  # shellcheck source=/dev/null
  [ ! -r /etc/os-release ] || . /etc/os-release
  case "$ID $VERSION_ID" in
  "debian 12" | "debian 13" | "ubuntu 24.04") return 0 ;;
  esac
  die "$PRETTY_NAME is not among the systems this script knows: Debian 12, Debian 13, Ubuntu 24.04" \
    "elsewhere: Python 3.11 or later, iptables (nft), libnetfilter_queue, a kernel with NFQUEUE, conntrack and cgroup v2; then: pip install sectool"
}

# --- system packages -------------------------------------------------------------------------------------

missing() {
  local package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$package" 2>/dev/null | grep -qx installed || printf '%s\n' "$package"
  done
}

all_packages() { dpkg-query -W -f '${db:Status-Status} ${Package}:${Architecture}\n' | sed -n 's/^installed //p' | sort; }

apt() {
  DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
}

apt_install() { apt install "$@" || { apt update && apt install "$@"; }; }

# Install packages and name, in $NEW, all that came with them.
bring() {
  local before
  NEW=()
  [ $# -gt 0 ] || return 0
  before=$(all_packages)
  quietly "apt-get could not install $*" apt_install "$@"
  mapfile -t NEW < <(comm -13 <(printf '%s\n' "$before") <(all_packages))
}

# The host's time zone: tzdata, which Python brings on Ubuntu, writes it anew when installed and takes it along when purged.
keep_zone() {
  local file
  mkdir -p "$1"
  for file in "${ZONE[@]}"; do
    if [ -e "$file" ] || [ -L "$file" ]; then cp -a "$file" "$1/"; fi
  done
}

# As it was before tzdata came, unless somebody has chosen another one since.
restore_zone() {
  local file name from
  for file in "${ZONE[@]}"; do
    name=$(basename "$file")
    from=$1/before/$name
    diff -q --no-dereference "$1/after/$name" "$1/now/$name" >/dev/null 2>&1 || from=$1/now/$name
    if [ -n "$(missing tzdata)" ] && { [ -e "$from" ] || [ -L "$from" ]; }; then
      rm -f "$file"
      cp -a "$from" "$file"
    fi
  done
}

# --- installing ------------------------------------------------------------------------------------------

record() { printf '%s\n' "$@" >>"$MANIFEST.new"; }

# Put a file in place, whole or not at all, and remember it.
put() {
  local from=$1 to=$2 mode=${3:-644} folder
  folder=$(dirname "$to")
  while [ ! -d "$folder" ]; do
    made_folders+=("$folder")
    folder=$(dirname "$folder")
  done
  mkdir -p "$(dirname "$to")"
  install -m "$mode" "$from" "$to.new"
  mv -f "$to.new" "$to"
  record "$to"
}

install_all() {
  local from=${1:-} build=() needed=() made_folders=() where old='' work
  supported
  command -v apt-get >/dev/null || die "there is no apt-get here"
  [ -f "$HERE/requirements.lock" ] || die "requirements.lock is not beside this script" "run it from a checkout or an unpacked source archive"
  [ -z "$from" ] || [ -f "$from" ] || die "there is no file $from"
  mkdir -p "$ROOT"
  chmod 755 "$ROOT"
  exec 9>"$ROOT/.lock"
  flock -n 9 || die "another install.sh is at work"

  mapfile -t needed < <(missing "${NEEDED[@]}")
  if [ "${#needed[@]}" -gt 0 ]; then
    say "system packages: ${needed[*]}"
    [ -z "$(missing tzdata)" ] || keep_zone "$ROOT/zone/before"
    bring "${needed[@]}"
    if [ -d "$ROOT/zone" ] && [ ! -d "$ROOT/zone/after" ]; then keep_zone "$ROOT/zone/after"; fi
    printf '%s\n' "${NEW[@]}" >>"$PACKAGES"
  fi
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "python3 is older than 3.11 here"
  mapfile -t build < <(missing "${TO_BUILD[@]}")
  if [ "${#build[@]}" -gt 0 ]; then
    say "packages to build with, removed afterwards: ${build[*]}"
    bring "${build[@]}"
    build=("${NEW[@]}")
  fi

  where=$ROOT/$(date -u +%Y%m%dT%H%M%SZ)
  [ ! -e "$where" ] || die "$where exists already" "wait a second and try again"
  trap 'rm -rf "$where" "${work:-}"' EXIT
  work=$(mktemp -d)
  say "Python packages, below $where"
  quietly "python3 could not make an environment" python3 -m venv "$where"
  quietly "pip could not install the locked packages" "$where/bin/python" -m pip install -q --disable-pip-version-check \
    --no-cache-dir --require-hashes -r "$HERE/requirements.lock"
  if [ -n "$from" ]; then
    cp "$from" "$work/"
    from=$work/$(basename "$from")
  else
    # Built from a copy: nothing is written into the tree.
    mkdir "$work/tree"
    tar -C "$HERE" -cf - pyproject.toml README.md LICENSE sectool nfq store tui labs | tar -C "$work/tree" -xf -
    from=$work/tree
  fi
  quietly "pip could not install sectool itself" "$where/bin/python" -m pip install -q --disable-pip-version-check \
    --no-cache-dir --no-deps "$from"
  "$where/bin/sectool" --version >/dev/null || die "the installed program does not start"
  if [ "${#build[@]}" -gt 0 ]; then
    quietly "apt-get could not remove ${build[*]}" apt purge "${build[@]}"
  fi

  : >"$MANIFEST.new"
  # The new program takes the place of the old one in one step.
  [ ! -L "$ROOT/current" ] || old=$(readlink -f "$ROOT/current")
  ln -sfn "$where" "$ROOT/current.new"
  mv -Tf "$ROOT/current.new" "$ROOT/current"
  trap 'rm -rf "${work:-}"' EXIT
  mkdir -p "$(dirname "$BIN")"
  ln -sfn "$ROOT/current/bin/sectool" "$BIN"
  record "$BIN"

  quietly "the manual pages could not be made" "$where/bin/python" -m sectool.cli.manpages "$work/man"
  local page shell
  for page in "$work"/man/*.1; do
    gzip -9n "$page"
    put "$page.gz" "$MAN/$(basename "$page").gz"
  done
  for shell in bash zsh fish; do
    _SECTOOL_COMPLETE=source_$shell "$where/bin/sectool" >"$work/$shell" 2>/dev/null || true
    [ -s "$work/$shell" ] || die "the completion for $shell could not be made"
  done
  put "$work/bash" "$BASH_WORDS"
  put "$work/zsh" "$ZSH_WORDS"
  put "$work/fish" "$FISH_WORDS"
  put "$HERE/packaging/sectool.service" "$UNIT"
  put "$HERE/packaging/sectool.sysusers" "$SYSUSERS"
  install -m 755 "$HERE/install.sh" "$ROOT/install.sh"
  if ! getent group sectool >/dev/null; then
    groupadd --system sectool
    touch "$ROOT/made-group"
  fi
  [ ! -d /run/systemd/system ] || systemctl daemon-reload

  # Files of an older version that are no longer part of this one.
  if [ -f "$MANIFEST" ]; then
    comm -23 <(sort "$MANIFEST") <(sort "$MANIFEST.new") | while read -r file; do rm -f "$file"; done
  fi
  mv -f "$MANIFEST.new" "$MANIFEST"
  [ "${#made_folders[@]}" = 0 ] || printf '%s\n' "${made_folders[@]}" >>"$ROOT/folders"

  local running=0
  "$BIN" -q status >/dev/null 2>&1 || running=$?  # 3: there is no daemon; 1: there is, and it has something to say
  if [ "$running" -le 1 ]; then
    say "replacing the running daemon; connections go on"
    "$BIN" restart || die "the running daemon could not be replaced; the old one goes on" "see sudo sectool status, then: sudo sectool restart"
  fi
  if [ -n "$old" ] && [ "$old" != "$where" ]; then rm -rf "$old"; fi
  say "sectool $("$BIN" --version | cut -d' ' -f2) is installed"
  "$BIN" doctor || true
  cat >&2 <<'NEXT'

Next:
  sudo sectool ca init --trust-domain shop.example      once, on one host
  sudo sectool host enroll --name NAME                  on each host
  sudo sectool up --background --policy shop.yaml       or: sudo systemctl enable --now sectool
Man pages: man sectool. To remove it: sudo /opt/sectool/install.sh --uninstall
NEXT
}

# --- removing --------------------------------------------------------------------------------------------

uninstall() {
  local purge=$1 file packages=()
  [ -d "$ROOT" ] || die "sectool is not installed here: there is no $ROOT"
  if [ -d /run/systemd/system ]; then
    systemctl disable --now -q sectool 2>/dev/null || true
  fi
  if [ -x "$BIN" ]; then
    "$BIN" -q down || die "the daemon could not be stopped, nothing was removed" "see sudo sectool status"
  fi
  if [ -f "$MANIFEST" ]; then
    while read -r file; do rm -f "$file"; done <"$MANIFEST"
  fi
  if [ -f "$ROOT/folders" ]; then
    sort -ru "$ROOT/folders" | while read -r file; do rmdir "$file" 2>/dev/null || true; done
  fi
  [ ! -d /run/systemd/system ] || systemctl daemon-reload
  if [ -e "$ROOT/made-group" ]; then groupdel sectool 2>/dev/null || true; fi
  rm -rf /run/sectool
  if [ -f "$PACKAGES" ]; then
    # Only what came with us, and only what nothing else has come to need since.
    mapfile -t packages < <(comm -12 <(sort -u "$PACKAGES") <(all_packages))
    if [ "${#packages[@]}" -gt 0 ]; then
      apt-mark -q auto "${packages[@]}" >/dev/null
      say "system packages that came with it and nothing needs: removed"
      [ ! -d "$ROOT/zone" ] || keep_zone "$ROOT/zone/now"
      quietly "apt-get could not remove what came with it" apt autoremove --purge -o APT::AutoRemove::RecommendsImportant=false
      [ ! -d "$ROOT/zone" ] || restore_zone "$ROOT/zone"
    fi
  fi
  rm -rf "$ROOT"
  if [ "$purge" = yes ]; then
    rm -rf /var/lib/sectool
    say "removed, with keys, history and policy"
  elif [ -d /var/lib/sectool ]; then
    say "removed; keys, history and policy are still in /var/lib/sectool"
  else
    say "removed"
  fi
}

main() {
  local from='' action=install purge=no
  while [ $# -gt 0 ]; do
    case $1 in
    --from)
      [ $# -gt 1 ] || die "--from needs a file"
      from=$2
      shift
      ;;
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    -h | --help)
      usage
      return 0
      ;;
    *)
      usage >&2
      die "there is no option '$1'"
      ;;
    esac
    shift
  done
  need_root
  case $action in
  install) install_all "$from" ;;
  uninstall) uninstall "$purge" ;;
  esac
}

main "$@"
