#!/usr/bin/env bash
# What makes a machine of the Vagrantfile a host of the lab. It lies in the checkout that was copied to /srv/sectool.
#
#   provision.sh machine NAME    packages, sectool by install.sh, sample services; on ops the CA. Safe to repeat.
#   provision.sh token NAME      on ops: a join token for NAME, on stdout
#   provision.sh join NAME       join by the token on stdin, then enforce
#   provision.sh joined NAME     on ops: NAME is in
set -euo pipefail

HERE=$(dirname "$(readlink -f "$0")")
TREE=$(dirname "$(dirname "$HERE")")
readonly HERE TREE WHEELS=/var/cache/sectool-wheels STATE=/var/lib/sectool
readonly CA=https://10.77.0.40:8443 DOMAIN=lab.example
readonly NETWORKS=(--network 10.77.0.0/24 --network fd77::/64)
export PATH="$PATH:/usr/local/bin:/usr/local/sbin:/usr/sbin:/sbin" LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

say() { printf '>> %s: %s\n' "$(hostname)" "$*" >&2; }

# What the host of a name may vouch for: as labs/topology.py has it. ops stands for `batch`, too.
vouches() {
  case $1 in
  web) printf '%s\n' --label env=prod --label zone=front --allow 'app=*' --allow 'vuln=*' --allow 'vuln-age=*' ;;
  db) printf '%s\n' --label env=prod --label zone=back --allow 'app=*' ;;
  ops) printf '%s\n' --label zone=back --allow 'app=*' --allow env=dev --allow env=prod ;;
  rogue) printf '%s\n' --label env=prod --label zone=front --allow 'app=*' ;;
  *) echo "provision.sh: there is no machine $1 in this lab" >&2; return 2 ;;
  esac
}

# The same with what a host has to be allowed to say of itself: its own labels are no exception.
constrained() { vouches "$1" | awk '{ print } before == "--label" { print "--allow"; print } { before = $0 }'; }

packages() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ "${#missing[@]}" -gt 0 ] || return 0
  say "packages: ${missing[*]}"
  apt-get update -q >/dev/null
  apt-get install -y -q --no-install-recommends "${missing[@]}" >/dev/null
}

install_sectool() {
  [ ! -e /opt/sectool/current ] || [ -n "${SECTOOL_VM_UPGRADE-}" ] || return 0
  if [ -d "$WHEELS" ]; then # a box that brings them: this machine need not reach a package index
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
  fi
  say "install.sh"
  "$TREE/install.sh"
}

# Emulated processors (not even KVM) are tens of times slower: the same unit, with patience.
be_patient() {
  [ "$(systemd-detect-virt)" = qemu ] || return 0
  mkdir -p /etc/systemd/system/sectool.service.d
  printf '[Service]\nTimeoutStartSec=900\nWatchdogSec=600\n' >/etc/systemd/system/sectool.service.d/emulated.conf
  systemctl daemon-reload
}

serve_pages() {
  packages nginx-light postgresql-client curl
  echo "hello from web" >/var/www/html/index.html
  systemctl enable -q --now nginx
}

serve_orders() {
  packages postgresql postgresql-client curl
  local folder
  folder=$(echo /etc/postgresql/*/main)
  if [ ! -e "$folder/conf.d/lab.conf" ]; then
    echo "listen_addresses = '*'" >"$folder/conf.d/lab.conf"
    # Whoever gets through the network may log in: policy alone decides.
    echo "host postgres shop 10.77.0.0/24 trust" >>"$folder/pg_hba.conf"
    systemctl enable -q postgresql
    systemctl restart postgresql
    runuser -u postgres -- createuser shop
    # In the database that scenarios ask, on namespaces as here.
    runuser -u postgres -- psql -q -d postgres -c "create table orders (id int primary key, article text not null);
      insert into orders select n, 'article ' || n % 7 from generate_series(1, 1000) n; grant select on orders to shop"
  fi
}

# The root's key is on ops alone; other machines get in by `sectool ca serve`, a service of its own.
certify() {
  if [ ! -e "$STATE/ca/root.key" ]; then
    say "the root of $DOMAIN"
    sectool -q ca init --trust-domain "$DOMAIN"
  fi
  cat >/etc/systemd/system/sectool-ca.service <<UNIT
[Unit]
Description=CA of the lab: hosts join and hear of roots and revocations
After=network.target

[Service]
ExecStart=/usr/local/bin/sectool ca serve --listen 10.77.0.40:8443
Restart=always
RestartSec=2
UMask=0077

[Install]
WantedBy=multi-user.target
UNIT
  systemctl daemon-reload
  systemctl enable -q --now sectool-ca
}

enrol_here() {
  [ -e "$STATE/host/host.crt" ] || constrained "$1" | xargs -d '\n' sectool host enroll --name "$1" --ca "$STATE/ca" "${NETWORKS[@]}"
}

# From now on, and after each boot. Until the policy is there only connections that are open already go on, like ours.
enforce() {
  touch /etc/sectool-playground
  systemctl enable -q --now sectool
  sectool policy apply "$@" --reason "the lab's policy"
  sectool status || [ $? = 1 ] # 1: it enforces, and has something to say
}

machine() {
  local name=$1
  vouches "$name" >/dev/null
  install_sectool
  be_patient
  case $name in
  web) serve_pages ;;
  db) serve_orders ;;
  ops)
    packages postgresql-client curl
    certify
    enrol_here ops
    enforce "$TREE/labs/policies/shop.yaml" "$HERE/machines.yaml"
    ;;
  rogue)
    packages postgresql-client curl
    [ -e "$STATE/ca/root.key" ] || sectool -q ca init --trust-domain rogue.example
    enrol_here rogue
    enforce "$TREE/labs/policies/rogue.yaml" "$HERE/machines.yaml"
    ;;
  esac
}

main() {
  [ $# = 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; return 2; }
  local action=$1 name=$2
  case $action in
  machine) machine "$name" ;;
  token)
    # Who joins has no identity yet, so ops has to hear it without one for that long: on record.
    sectool -q mode observe --reason "$name joins" >&2 || [ $? = 1 ] # 1: nothing is denied now
    constrained "$name" | xargs -d '\n' sectool ca token create --url "$CA" --name "$name" --ttl 30m
    ;;
  join)
    if [ ! -e "$STATE/host/host.crt" ]; then
      local token
      token=$(cat)
      printf '%s' "$token" | sectool host enroll --name "$name" --join - "${NETWORKS[@]}"
    fi
    enforce "$TREE/labs/policies/shop.yaml" "$HERE/machines.yaml"
    ;;
  joined) sectool -q mode enforce --reason "$name joined" >&2 ;;
  *) echo "provision.sh: there is no action $action" >&2; return 2 ;;
  esac
}

main "$@"
