#!/usr/bin/env bash
# A Ceph of one monitor and one OSD on loopback, for tests and benchmarks: real daemons from Debian's packages ceph-mon,
# ceph-osd and ceph-common, with cephx, BlueStore on a sparse file, and a pool `rbd`. Nothing of a Ceph that this machine may
# have is touched.
#
#   ceph-cluster.sh run FOLDER    makes FOLDER, starts the cluster, prints `ready`, and goes on until its standard input
#                                 ends; then it stops the daemons and removes FOLDER. So a cluster never outlives
#                                 whoever started it, however that ended.
#   ceph-cluster.sh osd FOLDER    becomes the OSD of that cluster, after a test has killed it
#
# FOLDER has ceph.conf (with client.admin's keyring), mon.pid, osd.pid and log/. COWCATCHER_CEPH_BYTES: size of the store.
# COWCATCHER_CEPH_FILLED=1: all of it is written first, as a place of the file that is written for the first time takes three times
# as long as one that was used before, and a benchmark's contestants are to meet the same.
set -euo pipefail

command=${1:-} folder=${2:-}
if [ -z "$folder" ]; then
  sed -n '/^#   ceph/,/^#  *who/p' "$0" >&2
  exit 2
fi
conf=$folder/ceph.conf
store_bytes=${COWCATCHER_CEPH_BYTES:-8589934592}

admin() { ceph -c "$conf" --connect-timeout 20 "$@"; }

# The monitor has two ports, of its two protocols. What is free now may be taken in a moment: then the start fails and says so.
free_port() {
  local port
  for _ in $(seq 50); do
    port=$((20000 + RANDOM % 10000))
    if ! (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && ! (: <"/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  echo "no free port" >&2
  return 1
}

write_conf() {
  local port=$1
  cat >"$conf" <<CONF
[global]
  fsid = $(cat /proc/sys/kernel/random/uuid)
  mon initial members = m
  mon host = [v2:127.0.0.1:$port/0,v1:127.0.0.1:$((port + 1))/0]
  public addr = 127.0.0.1
  cluster addr = 127.0.0.1
  ms bind ipv6 = false
  keyring = $folder/\$name.keyring
  run dir = $folder/run
  admin socket = $folder/run/\$name.\$pid.asok
  log file = $folder/log/\$name.log
  log to stderr = false
  # One copy on one OSD, few placement groups, nobody to scale them.
  osd pool default size = 1
  osd pool default min size = 1
  osd pool default pg num = 16
  osd pool default pg autoscale mode = off
  osd crush chooseleaf type = 0
  mon allow pool size one = true
[client]
  admin socket =
  log file =
[mon]
  mon data = $folder/mon
  mon cluster log file = $folder/log/cluster.log
  # Changes of the cluster's maps at once, not after a second.
  paxos propose interval = 0.02
  paxos min wait = 0.01
  # However full the disk below is: the store is bounded by itself.
  mon data avail crit = 1
  mon data avail warn = 1
[osd]
  osd data = $folder/osd
  osd objectstore = bluestore
  bluestore block size = $store_bytes
  osd memory target = 1073741824
  osd class update on start = false
  # What stops for a test is not to be reported down by its own heartbeats.
  osd heartbeat grace = 3600
CONF
}

start() {
  mkdir -p "$folder"/{mon,osd,log,run}
  chmod 700 "$folder"
  local port
  port=$(free_port)
  write_conf "$port"
  ceph-authtool -C "$folder/mon.m.keyring" -n mon. --gen-key --cap mon 'allow *' >/dev/null
  ceph-authtool -C "$folder/client.admin.keyring" -n client.admin --gen-key \
    --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
  ceph-authtool "$folder/mon.m.keyring" --import-keyring "$folder/client.admin.keyring" >/dev/null
  monmaptool --create --fsid "$(sed -n 's/^ *fsid = //p' "$conf")" \
    --addv m "[v2:127.0.0.1:$port,v1:127.0.0.1:$((port + 1))]" "$folder/monmap" >/dev/null
  ceph-mon -c "$conf" -i m --mkfs --monmap "$folder/monmap" --keyring "$folder/mon.m.keyring"
  ceph-mon -c "$conf" -i m -f --keyring "$folder/mon.m.keyring" >"$folder/log/mon.out" 2>&1 </dev/null &
  echo $! >"$folder/mon.pid"
  local id
  id=$(cat /proc/sys/kernel/random/uuid)
  admin osd new "$id" >/dev/null
  admin auth get-or-create osd.0 mon 'allow profile osd' osd 'allow *' >"$folder/osd.0.keyring"
  if [ -n "${COWCATCHER_CEPH_FILLED:-}" ]; then
    dd if=/dev/zero of="$folder/osd/block" bs=4M count="$((store_bytes / 4194304))" oflag=direct status=none
  fi
  ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$id" >"$folder/log/osd.out" 2>&1
  "$0" osd "$folder" </dev/null &
  admin osd pool create rbd >/dev/null 2>&1
  for _ in $(seq 400); do
    if admin osd stat -f json | grep -q '"num_up_osds":1,'; then break; fi
    sleep 0.05
  done
  timeout 60 rbd -c "$conf" pool init rbd
}

# Runs in whatever state the start has left.
stop() {
  local daemon pid
  for daemon in osd mon; do
    pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
    # The number may be another's by now.
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "ceph-$daemon" ]; then kill -KILL "$pid" || true; fi
  done
  # Whoever was interrupted may have removed the folder, and the numbers with it.
  jobs -p | xargs -r kill -KILL 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf -- "$folder"
}

case $command in
  osd)
    echo $$ >"$folder/osd.pid"
    exec ceph-osd -c "$conf" -i 0 -f >>"$folder/log/osd.out" 2>&1
    ;;
  run)
    trap stop EXIT
    trap 'exit 1' INT TERM HUP
    start
    echo ready
    # The end of the input. A signal ends the wait, too.
    cat <&0 >/dev/null &
    wait $! || true
    ;;
  *)
    echo "ceph-cluster.sh: run or osd, not '$command'" >&2
    exit 2
    ;;
esac
