#!/usr/bin/env bash
# A throw-away, single-machine, multi-node SLURM cluster for tests (Debian 12, Slurm 22.05, no systemd, no cgroups).
#   slurm_dev_cluster.sh install            apt packages (root, ~10 s)
#   slurm_dev_cluster.sh start|stop|status  all daemons, state under $SLURM_DEV_ROOT
#   eval "$(slurm_dev_cluster.sh env)"      SLURM_CONF for sbatch/squeue/submitit
#   slurm_dev_cluster.sh kill-node n2       hard node loss (daemon + every process of every job on it)
#   slurm_dev_cluster.sh start-node n2      bring it back
#   slurm_dev_cluster.sh freeze-node|thaw-node n2   daemon silent, tasks alive: the requeued copy runs beside the old one
#   slurm_dev_cluster.sh kill-ctld|start-ctld   controller crash and recovery (jobs go on meanwhile)
#   slurm_dev_cluster.sh logs               tail of every log (for CI on failure)
set -euo pipefail
R=${SLURM_DEV_ROOT:-/tmp/slurm-dev-$(id -u)}
N=${SLURM_DEV_NODES:-4}             # nodes n1..nN
GPUS=${SLURM_DEV_GPUS:-2}           # fake GPUs a node (0 = none)
DB=${SLURM_DEV_DB:-1}               # 1 = mariadbd + slurmdbd, so that sacct (hence submitit's job.state) works
ISO=${SLURM_DEV_ISOLATE:-auto}      # 1 = each node in its own mount+uts+pid namespace (root, or user namespaces)
P=${SLURM_DEV_PORT:-16800}          # P+6 mysql, P+17 slurmctld, P+19 slurmdbd, P+100+i slurmd i
DBDIR=${SLURM_DEV_DBDIR:-$R/mysql}  # put it on tmpfs (/dev/shm/...) to save 3.6 s of fsync
PATH=/usr/sbin:/sbin:$PATH
NS=(unshare --mount --uts --pid --fork --kill-child=SIGKILL --mount-proc)
[ "$(id -u)" = 0 ] || NS+=(--user --map-current-user --keep-caps)
[ "$ISO" = auto ] && { "${NS[@]}" true 2>/dev/null && ISO=1 || ISO=0; }
HOST=$(hostname -s)
ME=$(id -un)
export SLURM_CONF=$R/etc/slurm.conf

say() { echo "[slurm-dev] $*" >&2; }
alive() { # pidfile -> 0 if that process runs and is ours (its environment carries our SLURM_DEV_TAG)
  [ -s "$1" ] && local p && p=$(cat "$1") && [ -d "/proc/$p" ] && { tr '\0' '\n' <"/proc/$p/environ" | grep -qx "SLURM_DEV_TAG=$R"; } 2>/dev/null; }
spawn() { # name cmd... : run in the background, own session, pid in run/name.pid
  local name=$1; shift
  alive "$R/run/$name.pid" && return 0
  SLURM_DEV_TAG=$R setsid "$@" </dev/null >>"$R/log/$name.out" 2>&1 &
  echo $! >"$R/run/$name.pid"; }
halt() { # name [signal] [seconds] : stop what spawn started, escalate to KILL
  local f=$R/run/$1.pid sig=${2:-TERM} i p
  if alive "$f"; then p=$(cat "$f"); kill -"$sig" "$p" || true
    for ((i = 0; i < ${3:-50}; i++)); do [ -d "/proc/$p" ] && ! grep -qs '^State:.Z' "/proc/$p/status" || break; sleep .1; done
    [ -d "/proc/$p" ] && kill -KILL "$p" 2>/dev/null || true
  fi; rm -f "$f"; }
wait_for() { # seconds what cmd... (each try bounded: Slurm clients block ~10 s when the controller is away)
  local t=$(($1 * 10)) what=$2 i; shift 2
  for ((i = 0; i < t; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep .1; done
  say "TIMEOUT waiting for $what"; return 1; }
nodes_idle() { [ "$(timeout 5 sinfo -h -N -p dev -t idle,mix,alloc -o %N --responding | sort -u | wc -l)" -eq "$N" ]; }

configure() {
  umask 022; mkdir -p "$R"/{etc,run,log,spool,state,dev} ; mkdir -p -m 700 "$R/munge"
  [ -s "$R/munge/munge.key" ] || { (umask 077; head -c 1024 /dev/urandom >"$R/munge/munge.key"); chmod 400 "$R/munge/munge.key"; }
  local S=$R/run/munge/munge.socket i gres="" acct naming
  mkdir -p "$R/run/munge"; chmod 755 "$R/run/munge"
  if [ "$GPUS" -gt 0 ]; then
    gres=" Gres=gpu:$GPUS"
    if [ "$(id -u)" = 0 ]; then   # File= must be a char device; a clone of /dev/null does. It makes Slurm set CUDA_VISIBLE_DEVICES.
      for ((i = 0; i < GPUS; i++)); do [ -e "$R/dev/gpu$i" ] || mknod "$R/dev/gpu$i" c 1 3; done
      echo "NodeName=n[1-$N] Name=gpu File=$R/dev/gpu[0-$((GPUS - 1))]" >"$R/etc/gres.conf"
    else                          # no mknod: any existing char devices, numbered
      echo "NodeName=n[1-$N] Name=gpu File=/dev/tty[0-$((GPUS - 1))]" >"$R/etc/gres.conf"
    fi
  else : >"$R/etc/gres.conf"; fi
  if [ "$DB" = 1 ]; then
    acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((P + 19))
AccountingStoragePass=$S
AccountingStorageTRES=gres/gpu"
  else acct="AccountingStorageType=accounting_storage/none"; fi
  [ "$ISO" = 1 ] && naming="NodeHostname=n[1-$N]" || naming="NodeHostname=$HOST"
  cat >"$SLURM_CONF" <<CONF
ClusterName=dev
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$((P + 17))
SlurmUser=$ME
SlurmdUser=$ME
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also the delay before a requeued job may start again (default 120 s; 5 is the least)
AuthInfo=socket=$S,cred_expire=${SLURM_DEV_CRED_EXPIRE:-5}
StateSaveLocation=$R/state
SlurmdSpoolDir=$R/spool/%n
SlurmctldPidFile=$R/run/slurmctld.own.pid
SlurmdPidFile=$R/run/slurmd.%n.own.pid
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no PMI, no mail
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/${SLURM_DEV_GATHER:-none}$([ "${SLURM_DEV_GATHER:-none}" = none ] || printf '\nJobAcctGatherFrequency=task=1\nJobAcctGatherParams=OverMemoryKill')
MpiDefault=none
MailProg=/bin/true
$acct
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=256
# let each node claim more cores than the machine has
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
# ids never repeat over restarts: a reused id makes submitit read an old <id>_result.pkl
FirstJobId=${SLURM_DEV_FIRST_JOB_ID:-$(($(date +%s) % 40000000))}
MaxJobId=67000000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
SlurmctldTimeout=30
# a silent node is DOWN after this (default 300 s)
SlurmdTimeout=${SLURM_DEV_SLURMD_TIMEOUT:-10}
KillWait=5
InactiveLimit=0
CompleteWait=0
MinJobAge=86400
# refuse at submission what can never run (default: PENDING for ever)
EnforcePartLimits=ALL
NodeName=n[1-$N] $naming NodeAddr=127.0.0.1 Port=[$((P + 101))-$((P + 100 + N))] Sockets=1 CoresPerSocket=${SLURM_DEV_CPUS:-4} ThreadsPerCore=1 RealMemory=2000$gres State=UNKNOWN
PartitionName=dev  Nodes=n[1-$N] Default=YES MaxTime=120 DefaultTime=5 State=UP PriorityTier=1  PreemptMode=REQUEUE GraceTime=${SLURM_DEV_GRACE:-10}
PartitionName=high Nodes=n[1-$N] MaxTime=120 DefaultTime=5 State=UP PriorityTier=10 PreemptMode=OFF
CONF
  [ "$N" = 1 ] && sed -i -e 's/n\[1-1\]/n1/g' -e "s/\[$((P + 101))-$((P + 101))\]/$((P + 101))/" "$SLURM_CONF" "$R/etc/gres.conf"
  (umask 077; cat >"$R/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$S
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((P + 19))
SlurmUser=$ME
DebugLevel=info
LogFile=$R/log/slurmdbd.log
PidFile=$R/run/slurmdbd.own.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((P + 6))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
  )
  cat >"$R/etc/init.sql" <<'CONF'
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
CONF
  { cat /etc/hosts; for ((i = 1; i <= N; i++)); do echo "127.0.0.1 n$i"; done; } >"$R/etc/hosts"
  # what runs as pid 1 of an isolated node: own hostname, n1..nN resolvable, and it reaps orphans
  cat >"$R/etc/node-init.sh" <<'CONF'
#!/bin/bash
# args: node root
hostname "$1"
mount --bind "$2/etc/hosts" /etc/hosts
[ -d /etc/slurm ] && mount --bind "$2/etc" /etc/slurm   # submitit's clean_env() drops SLURM_CONF
/usr/sbin/slurmd -D -N "$1" -f "$2/etc/slurm.conf" & d=$!
trap 'kill -TERM $d' TERM INT
while kill -0 $d 2>/dev/null; do wait $d; done
CONF
  chmod 755 "$R/etc/node-init.sh"
}

start_ctld() { spawn slurmctld slurmctld -D -f "$SLURM_CONF"; }
start_node() {
  mkdir -p "$R/spool/$1"
  if [ "$ISO" = 1 ]; then
    spawn "node-$1" "${NS[@]}" "$R/etc/node-init.sh" "$1" "$R"
  else
    spawn "node-$1" slurmd -D -N "$1" -f "$SLURM_CONF"
  fi; }
stop_node() { # graceful; in a namespace TERM must go to slurmd's parent, i.e. the only child of unshare
  local f=$R/run/node-$1.pid c i
  if [ "$ISO" = 1 ] && alive "$f"; then
    c=$(cat "/proc/$(cat "$f")/task/$(cat "$f")/children"); [ -n "$c" ] && kill -TERM $c 2>/dev/null || true
    for ((i = 0; i < 30; i++)); do alive "$f" || break; sleep .1; done
  fi
  halt "node-$1" TERM 30; }
kill_node() { # the machine disappears: nothing is told to anyone
  local f=$R/run/node-$1.pid
  alive "$f" || { say "$1 is not running"; return 1; }
  if [ "$ISO" = 1 ]; then kill -KILL "$(cat "$f")"          # unshare --kill-child takes pid 1, hence the whole pid namespace
  else # no namespace: every task carries SLURMD_NODENAME; its parent is the slurmstepd (which hides its own environment)
    local p q
    for p in $(pgrep -u "$(id -u)" || true); do
      { tr '\0' '\n' <"/proc/$p/environ" | grep -qx "SLURMD_NODENAME=$1"; } 2>/dev/null || continue
      q=$(ps -o ppid= -p "$p" | tr -d ' '); [ "$(ps -o comm= -p "${q:-0}" 2>/dev/null)" = slurmstepd ] && kill -KILL "$q" 2>/dev/null || true
      kill -KILL "$p" 2>/dev/null || true
    done
    kill -KILL "$(cat "$f")"
  fi; rm -f "$f"; }

slurmd_pid() { # node -> pid of its slurmd
  local p; p=$(cat "$R/run/node-$1.pid")
  if [ "$ISO" = 1 ]; then p=$(cat "/proc/$p/task/$p/children"); p=$(pgrep -P "${p// /}" -f '^/usr/sbin/slurmd '); fi; echo "$p"; }

lap() { local n; n=$(date +%s%N); say "$1: $(((n - T0) / 1000000)) ms"; T0=$n; }
start() {
  T0=$(date +%s%N)
  [ -d "$R/run" ] && alive "$R/run/slurmctld.pid" && { say "already running in $R"; return 0; }
  local d; for d in munged slurmctld slurmd $([ "$DB" = 1 ] && echo slurmdbd mariadbd mariadb-install-db); do
    command -v "$d" >/dev/null || { say "no $d on this machine: slurm_dev_cluster.sh install"; return 1; }
  done
  rm -rf "$R/state" "$R/spool" "$R/log" "$R/etc"; configure; lap configure
  spawn munged munged -F --key-file="$R/munge/munge.key" --socket="$R/run/munge/munge.socket" --pid-file="$R/run/munged.own.pid" --log-file="$R/munge/munged.log" --seed-file="$R/munge/munged.seed" --force
  wait_for 5 munged timeout 5 munge -S "$R/run/munge/munge.socket" -n; lap munged
  if [ "$DB" = 1 ]; then
    if [ ! -d "$DBDIR/mysql" ]; then
      mkdir -p "$DBDIR"
      mariadb-install-db --no-defaults --datadir="$DBDIR" --user="$ME" --auth-root-authentication-method=normal --skip-test-db --skip-name-resolve --innodb-log-file-size=4M >"$R/log/mariadb-install.log" 2>&1; lap mariadb-install-db
    fi
    spawn mariadbd mariadbd --no-defaults --datadir="$DBDIR" --user="$ME" --socket="$R/run/mysql.sock" --bind-address=127.0.0.1 --port=$((P + 6)) --pid-file="$R/run/mariadbd.own.pid" --log-error="$R/log/mariadbd.log" --skip-name-resolve --innodb-buffer-pool-size=64M --innodb-log-file-size=4M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 --performance-schema=off --init-file="$R/etc/init.sql"
    wait_for 20 mariadbd timeout 5 mariadb --no-defaults -h127.0.0.1 -P$((P + 6)) -uslurm -pslurm -e 'select 1' slurm_acct_db; lap mariadbd
    spawn slurmdbd slurmdbd -D
    wait_for 20 slurmdbd timeout 5 sacctmgr -n show cluster; lap slurmdbd
  fi
  start_ctld
  wait_for 20 slurmctld timeout 5 scontrol ping; lap slurmctld     # before any slurmd: one started without a controller hangs at exit
  local i; for ((i = 1; i <= N; i++)); do start_node "n$i"; done
  wait_for 30 "nodes" nodes_idle; lap "$N nodes idle"
  say "up: export SLURM_CONF=$SLURM_CONF"
}
stop() {
  T0=$(date +%s%N)
  local i p
  if alive "$R/run/slurmctld.pid"; then timeout 5 scancel -Q -u "$ME" 2>/dev/null || true; timeout 5 scancel -Q --signal=KILL -u "$ME" 2>/dev/null || true; fi
  for ((i = 1; i <= N; i++)); do stop_node "n$i" & done; wait
  halt slurmctld TERM 100; halt slurmdbd TERM 50; halt mariadbd TERM 100; halt munged TERM 30
  lap stop
  [ "${1:-}" = --purge ] && { rm -rf "$R"; [ "$DBDIR" = "$R/mysql" ] || rm -rf "$DBDIR"; } || true
}
case "${1:-}" in
  install)
    SUDO=$([ "$(id -u)" = 0 ] || echo sudo)
    $SUDO apt-get update -q && $SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
      slurmctld slurmd slurm-client munge $([ "$DB" = 1 ] && echo slurmdbd mariadb-server-core mariadb-client-core) ;;
  start) start ;;
  stop) stop "${2:-}" ;;
  status) for f in "$R"/run/*.pid; do case $f in *.own.pid) ;; *) alive "$f" && echo "$(basename "$f" .pid) $(cat "$f") up" || echo "$(basename "$f" .pid) down" ;; esac; done; timeout 10 sinfo -N || true ;;
  env) echo "export SLURM_CONF=$SLURM_CONF SLURM_DEV_ROOT=$R" ;;
  kill-node) kill_node "$2" ;;
  start-node) start_node "$2" ;;
  stop-node) stop_node "$2" ;;
  freeze-node) kill -STOP "$(slurmd_pid "$2")" ;;   # node silent but its tasks go on: split brain after the requeue
  thaw-node) kill -CONT "$(slurmd_pid "$2")" ;;
  kill-ctld) halt slurmctld KILL ;;
  start-ctld) start_ctld; wait_for 20 slurmctld timeout 5 scontrol ping ;;   # recovers jobs from $R/state
  logs) tail -n "${2:-40}" "$R"/log/*.log "$R"/log/*.out ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
