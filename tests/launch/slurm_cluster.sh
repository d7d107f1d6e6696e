# Sourced after common.sh. A Slurm cluster of this one machine, of this user, with its own munge: everything lies in
# folders and on ports of its own, so nothing of a Slurm that is already here is touched.
# shellcheck shell=bash disable=SC2154

# A TCP port of this machine that nobody listens on.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# start_cluster CPUS: returns when the node is idle; sets SLURM_CONF. The node has as many CPUs as it is told.
start_cluster() {
  local host
  host=$(hostname -s)
  cluster=$(mktemp -d)
  chmod 755 "$cluster" # munge refuses a socket that not everybody can reach
  mkdir "$cluster/spool" "$shop/slurm-state"
  (umask 077 && head -c 128 /dev/urandom >"$cluster/munge.key")
  : >"$cluster/plugstack.conf"
  cat >"$cluster/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A job that is queued again starts after credentials of its former start have expired.
AuthInfo=socket=$cluster/munge.socket,cred_expire=5
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
StateSaveLocation=$shop/slurm-state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
PlugStackConfig=$cluster/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Queued jobs are looked at every two seconds, not every minute.
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$1 CoresPerSocket=$1
PartitionName=main Nodes=ALL Default=YES MaxTime=60
CONF
  export SLURM_CONF=$cluster/slurm.conf
  munged --key-file="$cluster/munge.key" --socket="$cluster/munge.socket" --pid-file="$cluster/munged.pid" \
    --log-file="$cluster/munged.log" --seed-file="$cluster/munged.seed" ||
    problem "munged did not start" "$cluster/munged.log"
  slurmctld || problem "slurmctld did not start" "$cluster/slurmctld.log"
  slurmd || problem "slurmd did not start" "$cluster/slurmd.log"
  wait_for 30 node_is_idle || problem "the node is not ready" "$cluster/slurmctld.log" "$cluster/slurmd.log"
}
node_is_idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }
has_no_jobs() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }

stop_cluster() {
  [ -n "${cluster:-}" ] || return 0
  if [ -s "$cluster/slurmd.pid" ]; then
    scancel --user "$(id -un)" || true
    wait_for 40 has_no_jobs || true
  fi
  local daemon
  for daemon in slurmd slurmctld munged; do
    kill "$(cat "$cluster/$daemon.pid" 2>/dev/null)" 2>/dev/null || true
    wait_for 10 has_no_pid_file "$daemon" || true
  done
  rm -rf "$cluster"
}
has_no_pid_file() { [ ! -s "$cluster/$1.pid" ]; }
