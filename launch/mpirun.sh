#!/usr/bin/env bash
# Trains under Open MPI's mpirun, on this machine or on those of a hostfile, and starts a failed job again.
#
#   launch/mpirun.sh [-n RANKS] [--hostfile FILE] [--restarts N] [--share-gpus] [--] CONFIG [options of deltapipe train]
#
#   -n RANKS         processes; default: the slots of the hostfile, one without
#   --hostfile FILE  Open MPI's format, "HOST slots=N" a line; program and run have the same path on every host
#   --restarts N     how often a failed job is started again; default 3
#   --share-gpus     several ranks may use one GPU, for tests: NCCL takes each rank for a host, and they talk over sockets
#
# Every start goes on from the newest whole checkpoint (--resume auto). A job is started again when a rank was killed or
# crashed, a host was lost, or ranks lost each other; not when the same error would come again (wrong usage,
# configuration or file, full disk, no memory, numbers that are not finite). Exit status: that of the last job.
#
# SIGTERM, SIGINT, SIGHUP or SIGUSR1 to this script: every rank finishes its step, a checkpoint is written, exit status
# 0. A second one ends the job at once.
#
# Environment: DELTAPIPE, the program (default: build/cuda/bin, build/cpu/bin, then PATH); MPIRUN, the launcher
# (default: mpirun); OMPI_MCA_hwloc_base_binding_policy, to place ranks on cores otherwise than below.
set -euo pipefail

say() { echo "launch: $*" >&2; }
usage_error() {
  say "$1; usage: launch/mpirun.sh [-n RANKS] [--hostfile FILE] [--restarts N] [--share-gpus] [--] CONFIG [options of train]"
  exit 2
}
whole_number() { [[ $2 =~ ^[0-9]{1,6}$ ]] || usage_error "$1 needs a whole number, not '$2'"; }

ranks='' hostfile='' restarts=3 share_gpus=false
while [ $# -gt 0 ]; do
  case "$1" in
    -n | --hostfile | --restarts)
      [ $# -ge 2 ] || usage_error "$1 needs a value"
      case "$1" in
        -n) whole_number -n "$2"; ranks=$((10#$2)); [ "$ranks" -gt 0 ] || usage_error "-n needs at least one rank" ;;
        --hostfile) hostfile=$2 ;;
        --restarts) whole_number --restarts "$2"; restarts=$((10#$2)) ;;
      esac
      shift ;;
    --share-gpus) share_gpus=true ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --) shift; break ;;
    -*) usage_error "unknown option '$1'" ;;
    *) break ;;
  esac
  shift
done
[ $# -gt 0 ] || usage_error "no configuration given"
for argument in "$@"; do
  case "$argument" in
    --resume | --resume=* | --restart)
      usage_error "$argument is for a single start; this script always goes on from the newest checkpoint of the run" ;;
  esac
done
[ -z "$hostfile" ] || [ -r "$hostfile" ] || usage_error "cannot read the hostfile '$hostfile'"

mpirun=${MPIRUN:-mpirun}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deltapipe=${DELTAPIPE:-}
if [ -z "$deltapipe" ]; then
  for candidate in "$here"/build/{cuda,cpu}/bin/deltapipe "$(command -v deltapipe || true)"; do
    if [ -x "$candidate" ]; then deltapipe=$candidate; break; fi
  done
fi
# mpirun reports a program that is not there as a crash, which would be started again.
if ! command -v "${deltapipe:-deltapipe}" >/dev/null; then
  say "no program '${deltapipe:-deltapipe}'; build it with tools/build.sh cpu, or set DELTAPIPE"
  exit 5
fi
if ! command -v "$mpirun" >/dev/null; then
  say "no '$mpirun'; tools/bootstrap.sh installs Open MPI"
  exit 5
fi

options=()
if [ -n "$hostfile" ]; then
  # Cores differ from host to host: the system places threads. ssh hands on no environment, so mpirun does.
  options+=(--hostfile "$hostfile" --bind-to none)
  for name in $(compgen -e); do
    case "$name" in OMP_* | OPENBLAS_* | HDF5_* | NCCL_* | CUDA_* | LD_LIBRARY_PATH) options+=(-x "$name") ;; esac
  done
else
  : "${ranks:=1}"
  # nproc would count OMP_NUM_THREADS as the number of cores.
  allowed=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) online=$(getconf _NPROCESSORS_ONLN)
  cores=$(lscpu -p=CORE,SOCKET | grep -v '^#' | sort -u | wc -l)
  [ "$allowed" -ge "$cores" ] || cores=$allowed
  options+=(--oversubscribe)  # mpirun's own count of what is free is no better than ours
  if [ "$ranks" -gt "$cores" ]; then
    # A rank that waits gives its core away, or the one that it waits for would not get on.
    say "$ranks ranks share $cores cores"
    options+=(--mca mpi_yield_when_idle 1)
  fi
  if [ "$ranks" -gt "$cores" ] || [ "$allowed" -ne "$online" ]; then
    binding=(--bind-to none)
  else
    # Neighbouring ranks on neighbouring cores, all of them used: a rank's threads stay in one socket if they fit.
    binding=(--map-by "slot:PE=$((cores / ranks))" --bind-to core)
  fi
  [ -n "${OMPI_MCA_hwloc_base_binding_policy:-}" ] || options+=("${binding[@]}")
fi
[ -z "$ranks" ] || options+=(-n "$ranks")
program=("$deltapipe")
if $share_gpus; then
  # shellcheck disable=SC2016  # expanded on the rank
  program=(bash -c 'NCCL_HOSTID=rank-$OMPI_COMM_WORLD_RANK exec "$0" "$@"' "$deltapipe")
fi

# A job of its own session gets no signal from the terminal: mpirun would kill the ranks on SIGINT and SIGTERM. A rank
# that gets SIGUSR1 tells the others. When this script is killed, the job is told to stop as well.
start=(setsid)
if setpriv --help 2>/dev/null | grep -q pdeathsig; then start+=(setpriv --pdeathsig USR1); fi

rank_command="^$(printf '%s' "$deltapipe" | sed 's/[][\\.*^$+?(){}|]/\\&/g') train "
job='' stopping=false told=false interrupted=false
tell() {
  [ -n "$job" ] || return 0
  told=true
  kill "-$1" "$job" 2>/dev/null || true
}
# Once, and not by mpirun where a rank runs here: a second SIGUSR1 would end a rank at once, and some builds of Open MPI
# (Ubuntu 24.04's 4.1.6) hand on none.
tell_ranks() {
  local rank
  [ -n "$job" ] || return 0
  rank=$(pgrep -s "$job" -f "$rank_command" | head -n 1) || true
  if [ -n "$rank" ] && kill -USR1 "$rank" 2>/dev/null; then
    told=true
  else
    tell USR1
  fi
}
stop() {
  interrupted=true
  if $stopping; then
    say "second signal: the job ends at once"
    tell TERM
  else
    stopping=true
    say "SIG$1: the job finishes its step, writes a checkpoint and ends"
    tell_ranks
  fi
}
# Open MPI has been seen to wait for ever after a rank had died while MPI started: a dead child that mpirun has not
# noticed, and no rank. After half a minute of that it is killed; what follows is what follows a lost rank.
watch() {
  local stuck=0
  while sleep 5 && kill -0 "$1"; do
    stuck=$((stuck + 5))
    if pgrep -s "$1" -f "$rank_command" || ! pgrep -P "$1" --runstates Z; then stuck=0; fi
    [ "$stuck" -lt 30 ] || kill -KILL "$1"
  done
}
for signal in TERM INT HUP USR1; do
  # shellcheck disable=SC2064  # the name of now
  trap "stop $signal" "$signal"
done

attempt=0
while ! $stopping; do
  "${start[@]}" "$mpirun" "${options[@]}" "${program[@]}" train "$@" --resume auto </dev/null &
  job=$!
  if $stopping && ! $told; then tell_ranks; fi  # the signal came while the job was being started
  watch "$job" </dev/null >/dev/null 2>&1 &
  watcher=$!
  while interrupted=false; do
    code=0
    wait "$job" || code=$?
    $interrupted || break  # a signal to this script ends `wait` before the job's end
  done
  kill "$watcher" 2>/dev/null || true
  # After a killed mpirun ranks may live on for a while; two jobs must not write into one folder.
  pkill -KILL -s "$job" 2>/dev/null || true
  job=''
  # 8: ranks lost each other (src/core/error.h). Above 128: a rank, mpirun or its daemon on a host ended by a signal.
  if $stopping || { [ "$code" -ne 8 ] && [ "$code" -le 128 ]; }; then exit "$code"; fi
  what="ranks lost each other (exit status 8)"
  [ "$code" -eq 8 ] || what="a rank or a host was lost (exit status $code)"
  if [ "$attempt" -ge "$restarts" ]; then
    say "$what; given up after $restarts restarts"
    exit "$code"
  fi
  attempt=$((attempt + 1))
  say "$what; restart $attempt of $restarts, from the newest whole checkpoint"
done
