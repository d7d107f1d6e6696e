#!/usr/bin/env bash
# launch/mpirun.sh on its own, with a stand-in for mpirun: which options it gives, which failures it starts again, what
# it refuses.
DELTAPIPE=/bin/true  # the stand-in never starts it
# shellcheck source=tests/launch/common.sh
. "$(dirname "$0")/common.sh"
trap 'rm -rf "$shop" "$programs"' EXIT

# Writes its arguments to calls, one call a line, and ends with the next exit status of the file codes (0 when none is
# left); a status of "wait" stands for a job that ends well when it is signalled.
cat >"$programs/mpirun" <<'SCRIPT'
#!/usr/bin/env bash
cd "$SHOP"
echo "$*" >>calls
code=$(head -n 1 codes 2>/dev/null)
sed -i 1d codes 2>/dev/null
if [ "$code" = wait ]; then
  trap 'echo USR1 >>signals; exit 0' USR1
  trap 'echo TERM >>signals; exit 1' TERM
  trap 'echo INT >>signals; exit 1' INT
  echo ready >signals
  for i in $(seq 600); do sleep 0.05; done
fi
if [ "$code" = remote ]; then exec sleep 40; fi
if [ "$code" = hang ]; then
  true &  # dead, and never noticed
  exec sleep 600
fi
if [ "$code" = rank ]; then  # has one, and hands on nothing
  trap 'echo USR1 >>signals' USR1
  (exec -a "$DELTAPIPE train job.toml" bash -c 'trap "echo rank >>signals; exit 0" USR1
    echo ready >signals
    for i in $(seq 600); do sleep 0.05; done; exit 1') &
  wait $!
  exit
fi
[ "$code" = crash ] && kill -SEGV $$
exit "${code:-0}"
SCRIPT
chmod +x "$programs/mpirun"
export MPIRUN=$programs/mpirun SHOP=$shop DELTAPIPE

# run "EXIT STATUSES OF THE JOBS" ARGUMENTS...: sets `code`, leaves output in $shop/out
run() {
  rm -f "$shop/calls" "$shop/signals"
  # shellcheck disable=SC2086  # one status a line
  printf '%s\n' $1 >"$shop/codes"
  code=0
  "$launch/mpirun.sh" "${@:2}" >"$shop/out" 2>&1 || code=$?
}
expect() { # CODE CALLS
  local calls=0
  [ ! -f "$shop/calls" ] || calls=$(wc -l <"$shop/calls")
  [ "$code" = "$1" ] || problem "exit status $code, expected $1" "$shop/out"
  [ "$calls" = "$2" ] || problem "$calls jobs were started, expected $2" "$shop/out"
}
expect_line() { grep -qE -- "$2" "$1" || problem "no line of ${1#"$shop"/} matches '$2'" "$1"; }

# Options.
run 0 job.toml --set run.seed=4
expect 0 1
expect_line "$shop/calls" ' -n 1 /bin/true train job.toml --set run.seed=4 --resume auto$'
[ ! -s "$shop/out" ] || problem "something was said about a job that ended well" "$shop/out"
run 0 -n 100000 -- job.toml
expect 0 1
expect_line "$shop/calls" '^--oversubscribe --mca mpi_yield_when_idle 1 --bind-to none -n 100000 /bin/true train '
OMPI_MCA_hwloc_base_binding_policy=socket run 0 job.toml
expect 0 1
expect_line "$shop/calls" '^--oversubscribe -n 1 '
printf 'one slots=2\ntwo slots=2\n' >"$shop/hosts"
NCCL_DEBUG=WARN run 0 --hostfile "$shop/hosts" job.toml
expect 0 1
expect_line "$shop/calls" "^--hostfile $shop/hosts --bind-to none .*-x NCCL_DEBUG.* /bin/true train job.toml"
! grep -q -- ' -n ' "$shop/calls" || problem "the hostfile's slots are the number of ranks" "$shop/calls"
run 0 --hostfile "$shop/hosts" -n 3 job.toml
expect_line "$shop/calls" ' -n 3 /bin/true train'

# Failures that would come again are final; the others are not.
for final in 1 2 3 4 5 6 7 70; do
  run "$final" job.toml
  expect "$final" 1
done
for curable in 8 134 137 139 205; do
  run "$curable $curable 0" job.toml
  expect 0 3
  [ "$(sort -u "$shop/calls" | wc -l)" = 1 ] || problem "a restart is another command" "$shop/calls"
  expect_line "$shop/out" '^launch: .*; restart 2 of 3, from the newest whole checkpoint$'
done
run "crash 3" job.toml # mpirun itself crashes, and then the error is final
expect 3 2
run "137 8 137" --restarts 2 job.toml
expect 137 3
expect_line "$shop/out" '^launch: a rank or a host was lost \(exit status 137\); given up after 2 restarts$'
run 8 --restarts 0 job.toml
expect 8 1

# Refusals: one line, no job.
refuse() { # PATTERN ARGUMENTS...
  run 0 "${@:2}"
  expect 2 0
  expect_line "$shop/out" "^launch: $1; usage: "
  [ "$(wc -l <"$shop/out")" = 1 ] || problem "more than one line" "$shop/out"
}
refuse 'no configuration given'
refuse 'no configuration given' -n 2 --
refuse "unknown option '--nodes'" --nodes 2 job.toml
refuse '-n needs a value' -n
refuse "-n needs a whole number, not 'two'" -n two job.toml
refuse '-n needs at least one rank' -n 0 job.toml
refuse "--restarts needs a whole number, not '-1'" --restarts -1 job.toml
refuse "cannot read the hostfile '$shop/nowhere'" --hostfile "$shop/nowhere" job.toml
refuse '--restart is for a single start.*' job.toml --restart
refuse '--resume is for a single start.*' job.toml --resume none
refuse '--resume=none is for a single start.*' job.toml --resume=none
DELTAPIPE=$shop/nowhere run 0 job.toml
expect 5 0
expect_line "$shop/out" "^launch: no program '$shop/nowhere'"
MPIRUN=$shop/nowhere run 0 job.toml
expect 5 0
expect_line "$shop/out" "^launch: no '$shop/nowhere'"

# Signals: each reaches the job as SIGUSR1, and there is no restart; the second one ends the job.
for signal in TERM INT HUP USR1; do
  rm -f "$shop/calls" "$shop/signals"
  echo wait >"$shop/codes"
  # A shell makes background jobs ignore SIGINT; `env` undoes that, as a terminal would have it.
  env --default-signal=INT "$launch/mpirun.sh" job.toml >"$shop/out" 2>&1 &
  pid=$!
  wait_for 100 has_line "$shop/signals" ready || problem "the job did not start" "$shop/out"
  kill -"$signal" "$pid"
  code=0
  wait "$pid" || code=$?
  expect 0 1
  expect_line "$shop/signals" '^USR1$'
  expect_line "$shop/out" "^launch: SIG$signal: the job finishes its step"
done
# Starts a job, by default one that waits, and signals its launcher, `pid`.
told() {
  rm -f "$shop/calls" "$shop/signals"
  echo "${1:-wait}" >"$shop/codes"
  "$launch/mpirun.sh" job.toml >"$shop/out" 2>&1 &
  pid=$!
  wait_for 100 has_line "$shop/signals" ready || problem "the job did not start" "$shop/out"
  kill -TERM "$pid"
}
# A rank on this machine gets the signal, and mpirun none: a second one would end ranks at once.
told rank
code=0
wait "$pid" || code=$?
expect 0 1
[ "$(cat "$shop/signals")" = $'ready\nrank' ] || problem "the rank alone should be told" "$shop/signals"
# An mpirun that does not notice that its last rank is dead is ended, and the job started again. One whose ranks are on
# other hosts alone goes on.
run "remote" job.toml
expect 0 1
run "hang 0" job.toml
expect 0 2
expect_line "$shop/out" '^launch: a rank or a host was lost .exit status 137.; restart 1 of 3'
# A job that the signal kills, since its ranks were not ready for it, is not started again either.
sed -i "s/exit 0' USR1/exit 138' USR1/" "$programs/mpirun"
told
code=0
wait "$pid" || code=$?
expect 138 1
! grep -q restart "$shop/out" || problem "a stopped job was restarted" "$shop/out"
sed -i "s/exit 138' USR1/' USR1/" "$programs/mpirun"
told
wait_for 100 has_line "$shop/signals" USR1 || problem "the first signal did not reach the job" "$shop/out"
kill -TERM "$pid"
code=0
wait "$pid" || code=$?
expect 1 1
expect_line "$shop/signals" '^TERM$'
# Ranks that share a GPU are hosts of their own to NCCL.
run 0 -n 2 --share-gpus job.toml
expect 0 1
expect_line "$shop/calls" '.* bash -c NCCL_HOSTID=rank-.OMPI_COMM_WORLD_RANK exec .* /bin/true train job.toml --resume auto$'

echo "options, restarts, refusals and signals are as documented"
