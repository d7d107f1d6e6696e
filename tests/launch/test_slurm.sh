#!/usr/bin/env bash
# launch/slurm.sbatch under a real Slurm on this machine: a job that is stopped before its time limit ends, in a later
# start, with the weights of one that was not. Installs Slurm where it is missing; exit status 77: it cannot.
#   test_slurm.sh RANKS [--set mesh.KEY=N ...]
ranks=$1
mesh=("${@:2}")
# shellcheck source=tests/launch/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=tests/launch/slurm_cluster.sh
. "$(dirname "$0")/slurm_cluster.sh"
trap 'stop_cluster; rm -rf "$shop" "$programs"' EXIT
"$launch/../tools/bootstrap.sh" --slurm || { echo "SKIPPED: Slurm cannot be installed here"; exit 77; }

start_cluster "$ranks"
make_job 60 60

# submit FOLDER [sbatch options] -- [train options]: sets job to its number. It logs to FOLDER/log.
submit() {
  local folder=$shop/$1 options=()
  mkdir -p "$folder"
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  job=$(cd "$folder" && sbatch --parsable --ntasks-per-node="$ranks" --output="$folder/log" "${options[@]}" \
    "$launch/slurm.sbatch" "$shop/job.toml" "${mesh[@]}" "${@:2}") || problem "sbatch failed"
}
# Value of a field of scontrol's description of the job.
field() { scontrol --oneliner show job "$job" 2>/dev/null | grep -oE "(^| )$1=[^ ]*" | head -n 1 | cut -d= -f2; }
is() { [ "$(field "$1")" = "$2" ]; }
expect_state() { # FOLDER STATE SECONDS
  wait_for "$3" is JobState "$2" ||
    problem "job $job is $(field JobState) ($(field Reason)), not $2" "$shop/$1/log" "$cluster/slurmctld.log"
}
expect_status() { [ "$(status_of "$shop/$1")" = "$2" ] || problem "the run is not $2" "$shop/$1/log"; }
expect_line() { has_line "$shop/$1/log" "$2" || problem "no line matches '$2'" "$shop/$1/log"; }
expect_steps() { wait_for 200 has_steps "$shop/$1" "$2" || problem "no $2 steps" "$shop/$1/log"; }
signal_ranks() { # each of them, from outside
  local pids
  pids=$(scontrol listpids "$job" | awk '$4 ~ /^[0-9]+$/ && $3 != "batch" { print $1 }')
  [ "$(wc -w <<<"$pids")" = "$ranks" ] || problem "processes $pids are not $ranks ranks"
  # shellcheck disable=SC2086  # a list
  kill -"$1" $pids
}

echo "$SECONDS s: a job that nothing disturbs"
submit whole --
expect_state whole COMPLETED 300
expect_status whole finished
expect_line whole "^launch: job $job, start 1, $ranks ranks on .*: unfinished 0/120 -\$"

echo "$SECONDS s: a time limit: the signal before it, a checkpoint, another start in the same log"
# Slurm looks at time limits twice a minute and signals up to a minute early. So that the tiny job does not end before,
# its ranks stand still until the signal is on its way.
submit limited --time=2 --signal=B:USR1@70 --
expect_steps limited 15
signal_ranks STOP
wait_for 100 has_line "$shop/limited/log" '^launch: SIGUSR1, the time limit is near' ||
  problem "no signal before the time limit" "$shop/limited/log" "$cluster/slurmctld.log"
signal_ranks CONT
expect_state limited COMPLETED 300
expect_status limited finished
is Restarts 0 && problem "the job was not queued again" "$shop/limited/log"
expect_line limited '^launch: the job is queued again: unfinished [1-9][0-9]*/120 '
expect_line limited "^launch: job $job, start 2, .*: unfinished [1-9][0-9]*/120 "
expect_same_weights "$shop/whole" "$shop/limited"

echo "$SECONDS s: scancel: a checkpoint, no other start; the next job goes on"
submit cancelled --
expect_steps cancelled 15
scancel "$job"
expect_state cancelled CANCELLED 100
wait_for 60 node_is_idle || problem "the ranks go on" "$shop/cancelled/log"
expect_status cancelled unfinished
has_steps "$shop/cancelled" 15 || problem "the steps of a cancelled job are lost" "$shop/cancelled/log"
submit cancelled --
expect_state cancelled COMPLETED 300
expect_same_weights "$shop/whole" "$shop/cancelled"

echo "$SECONDS s: a limit too short for one step: held, not started again and again"
cat >"$programs/slow" <<SCRIPT
#!/usr/bin/env bash
if [ "\$1" = train ] && [ "\${SLURM_RESTART_COUNT:-0}" = 0 ]; then
  touch "$shop/held/started"
  exec sleep 60
fi
exec "$DELTAPIPE" "\$@"
SCRIPT
chmod +x "$programs/slow"
DELTAPIPE=$programs/slow submit held --
wait_for 100 test -f "$shop/held/started" || problem "the job did not start" "$shop/held/log"
scancel --batch --signal=USR1 "$job"
expect_state held PENDING 100
expect_line held '^launch: not one step was made within this time limit, the job is held'
is Priority 0 || problem "the job is not held" "$shop/held/log"
scontrol release "$job"
expect_state held COMPLETED 300
expect_same_weights "$shop/whole" "$shop/held"

echo "$SECONDS s: a wrong configuration: one line, no other start"
submit wrong -- --set run.nonsense=1
expect_state wrong FAILED 100
is ExitCode 3:0 || problem "exit status $(field ExitCode), expected 3:0" "$shop/wrong/log"
[ "$(grep -c '^error: .*run.nonsense' "$shop/wrong/log")" = 1 ] || problem "not one line" "$shop/wrong/log"
submit refused -- --restart
expect_state refused FAILED 100
is ExitCode 2:0 || problem "exit status $(field ExitCode), expected 2:0" "$shop/refused/log"
expect_line refused '^launch: --restart is for a single start'
