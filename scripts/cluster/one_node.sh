#!/usr/bin/env bash
# A SLURM of one node from Debian's packages, without cgroups and without accounting: to test with, on any machine where
# you are root. It says that the node has 8 CPUs, whatever it has.
#
#   scripts/cluster/one_node.sh start DIR    configuration, state and logs go to DIR
#   scripts/cluster/one_node.sh stop DIR
set -euo pipefail
action=${1:?start or stop} dir=$(realpath -m -- "${2:?a folder}")
export SLURM_CONF=$dir/slurm.conf

stop() {
  # Jobs outlive the daemons.
  if [ -s "$dir/slurmctld.pid" ]; then timeout 20 scancel --full --state=RUNNING --user="$(id -un)" 2>/dev/null && sleep 1 || true; fi
  for daemon in slurmd slurmctld munged; do
    if [ -s "$dir/$daemon.pid" ]; then kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true; fi
  done
  for _ in $(seq 20); do
    if ! ls "$dir"/*.pid >/dev/null 2>&1; then return; fi
    sleep 0.25
  done
}

# The engine runs srun within its jobs, and what it hands on to them does not include SLURM_CONF.
place=/etc/slurm/slurm.conf
if [ "$action" = stop ]; then
  stop
  if [ "$(readlink "$place" 2>/dev/null)" = "$SLURM_CONF" ]; then rm -f "$place"; fi
  exit 0
fi
if [ -L "$place" ] && [ ! -e "$place" ]; then rm -f "$place"; fi # of a run whose folder is gone
if [ -e "$place" ] && [ "$(readlink "$place")" != "$SLURM_CONF" ]; then
  echo "one_node.sh: $place exists; this machine has a SLURM of its own" >&2
  exit 1
fi
mkdir -p "$(dirname "$place")"
ln -sfn "$SLURM_CONF" "$place"

mkdir -p "$dir"/{state,spool,munge}
chmod 755 "$dir"
[ -s "$dir/munge.key" ] || head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 700 "$dir/munge"
chmod 600 "$dir/munge.key"
chmod 711 "$dir/munge"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" \
  --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
host=$(hostname -s)
cat > "$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
SlurmUser=root
SlurmdUser=root
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=600
KillWait=5
SchedulerParameters=sched_interval=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=100000 State=UNKNOWN
PartitionName=batch Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld -c
slurmd -c
for _ in $(seq 60); do
  if [ "$(sinfo -h -o %T 2>/dev/null)" = idle ]; then exit 0; fi
  sleep 0.5
done
echo "one_node.sh: the node does not come up; see $dir/*.log" >&2
sinfo >&2 || true
tail -n 5 "$dir"/*.log >&2
exit 1
