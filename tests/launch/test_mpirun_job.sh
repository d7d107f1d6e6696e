#!/usr/bin/env bash
# A training job under launch/mpirun.sh that loses a rank, its mpirun, a host or its launcher, or is told to stop, ends
# after all with the weights of an undisturbed one.
#   test_mpirun_job.sh RANKS [--set mesh.KEY=N ...]
ranks=$1
mesh=("${@:2}")
# shellcheck source=tests/launch/common.sh
. "$(dirname "$0")/common.sh"
started='' # processes of this test
clean_up() {
  for process in $started; do
    pkill -KILL -s "$process" || true # mpirun and its ranks are a session
    kill -KILL "$process" 2>/dev/null || true
  done
  rm -rf "$shop" "$programs"
}
trap clean_up EXIT
make_job 60 60

# Starts the job in folder $1 with further options of the launcher, in the background; sets pid.
start() {
  mkdir -p "$shop/$1"
  (cd "$shop/$1" && exec "$launch/mpirun.sh" -n "$ranks" "${@:2}" "$shop/job.toml" "${mesh[@]}") >>"$shop/$1/log" 2>&1 &
  pid=$!
  started="$started $pid"
}
finish() { # FOLDER EXIT_STATUS: waits for the job of `start`
  wait_for 300 has_ended "$pid" || problem "the job did not end" "$shop/$1/log"
  code=0
  wait "$pid" 2>/dev/null || code=$? # without the shell's own line about a killed process
  [ "$code" = "$2" ] || problem "exit status $code, expected $2" "$shop/$1/log"
}
progress() { # FOLDER STEPS: waits until the job has made them, then sets mpirun to its process
  wait_for 200 has_steps "$shop/$1" "$2" || problem "the job made no $2 steps" "$shop/$1/log"
  mpirun=$(pgrep -P "$pid" -f 'mpirun .* train ') || problem "the job was over too soon" "$shop/$1/log"
  started="$started $mpirun"
}
ranks_of() { pgrep -s "$1" -f "^$DELTAPIPE train "; } # pids of the ranks of an mpirun
expect_line() { has_line "$1" "$2" || problem "no line matches '$2'" "$1"; }
expect_finished() {
  [ "$(status_of "$shop/$1")" = finished ] || problem "the run is not finished" "$shop/$1/log"
  expect_same_weights "$shop/whole" "$shop/$1"
}

echo "$SECONDS s: a job that nothing disturbs"
start whole
finish whole 0
! grep -q '^launch: .*restart' "$shop/whole/log" || problem "an undisturbed run was restarted" "$shop/whole/log"
[ "$(status_of "$shop/whole")" = finished ] || problem "the run is not finished" "$shop/whole/log"

echo "$SECONDS s: a rank is killed before the first checkpoint, and another one later"
start killed
progress killed 3
kill -KILL "$(ranks_of "$mpirun" | tail -n 1)"
progress_after() { has_line "$shop/killed/log" 'restart 1 of 3' && has_steps "$shop/killed" 45; }
wait_for 200 progress_after || problem "no restart" "$shop/killed/log"
progress killed 45
kill -KILL "$(ranks_of "$mpirun" | head -n 1)"
finish killed 0
expect_line "$shop/killed/log" '^launch: a rank or a host was lost \(exit status 137\); restart 2 of 3'
expect_finished killed

echo "$SECONDS s: mpirun itself is killed: its ranks are gone before the next start"
start orphaned
progress orphaned 15
kill -KILL "$mpirun"
first=$mpirun
wait_for 200 has_line "$shop/orphaned/log" 'restart 1 of 3' || problem "no restart" "$shop/orphaned/log"
! ranks_of "$first" >/dev/null || problem "ranks of the first job still run" "$shop/orphaned/log"
finish orphaned 0
expect_finished orphaned

echo "$SECONDS s: told to stop: a checkpoint, exit status 0, no restart; the same command goes on"
start stopped
progress stopped 15
kill -TERM "$pid"
finish stopped 0
[ "$(status_of "$shop/stopped")" = unfinished ] || problem "the run was not stopped" "$shop/stopped/log"
! grep -q 'restart 1' "$shop/stopped/log" || problem "a stopped job was restarted" "$shop/stopped/log"
start stopped
finish stopped 0
expect_finished stopped

echo "$SECONDS s: the launcher is killed: the job stops by itself, with a checkpoint"
start abandoned
progress abandoned 15
kill -KILL "$pid"
finish abandoned 137
wait_for 200 has_ended "$mpirun" || problem "the job of a killed launcher goes on" "$shop/abandoned/log"
[ "$(status_of "$shop/abandoned")" = unfinished ] || problem "the run was not stopped" "$shop/abandoned/log"
start abandoned
finish abandoned 0
expect_finished abandoned

echo "$SECONDS s: two hosts: told to stop, then one is lost"
# Two hosts, reached by a stand-in for ssh. Both are this machine: without folders of their own and with
# shared memory their daemons and ranks would overwrite each other's files.
cat >"$programs/reach" <<'SCRIPT'
#!/usr/bin/env bash
export TMPDIR=$0.$1
mkdir -p "$TMPDIR"
exec bash -c "${*:2}"
SCRIPT
chmod +x "$programs/reach"
export OMPI_MCA_plm_rsh_agent=$programs/reach OMPI_MCA_btl=self,tcp
printf 'one slots=%d\ntwo slots=%d\n' $(((ranks + 1) / 2)) $((ranks / 2)) >"$shop/hosts"
start lost --hostfile "$shop/hosts"
progress lost 15
kill -TERM "$pid"
finish lost 0
[ "$(status_of "$shop/lost")" = unfinished ] || problem "the run was not stopped" "$shop/lost/log"
stopped_at=$(steps_of "$shop/lost")
start lost --hostfile "$shop/hosts"
progress lost $((stopped_at + 10))
daemon=$(pgrep -n -f "orted .*$programs/reach") || problem "no second host" "$shop/lost/log"
kill -KILL "$daemon"
finish lost 0
expect_line "$shop/lost/log" '^launch: a rank or a host was lost .*; restart 1 of 3'
expect_finished lost
unset OMPI_MCA_plm_rsh_agent OMPI_MCA_btl

echo "$SECONDS s: an error that would come again, and one too many of the others"
mkdir "$shop/wrong"
code=0
(cd "$shop/wrong" && "$launch/mpirun.sh" -n "$ranks" "$shop/job.toml" --set run.nonsense=1) \
  >"$shop/wrong/log" 2>&1 || code=$?
[ "$code" = 3 ] || problem "a wrong key: exit status $code, expected 3" "$shop/wrong/log"
expect_line "$shop/wrong/log" '^error: .*run.nonsense'
! grep -q 'restart' "$shop/wrong/log" || problem "a wrong key: restarted" "$shop/wrong/log"
start exhausted --restarts 0
progress exhausted 3
kill -KILL "$(ranks_of "$mpirun" | head -n 1)"
finish exhausted 137
expect_line "$shop/exhausted/log" '^launch: .*; given up after 0 restarts$'
