#!/usr/bin/env bash
# Installs what is missing, builds, runs the tests, says how many ran.
#
#   tests/run.sh                 everything but the tests labelled `long`
#   tests/run.sh -L unit         one label (unit, distributed, fault, slurm, interop, long)
#   tests/run.sh --asan          the same under the address and undefined-behaviour sanitizers
#   tests/run.sh --gpu           the CUDA build's tests, on one GPU, which ranks share
#   tests/run.sh --gpu --ranks N the tests of N ranks (2, 4, 8): meshes, faults, whole jobs; a GPU each if there are as many
#   tests/run.sh --standin       the CUDA build's host side, without a GPU (tests/gpu/stand_in)
#   tests/run.sh -R PATTERN      tests whose name matches; any other option goes to ctest too
set -euo pipefail
cd "$(dirname "$0")/.."

preset=cpu
label='' ranks=''
label_given=false
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --asan) preset=asan ;;
    --gpu) preset=cuda; label=gpu ;;
    --standin) preset=cuda; label=standin ;;
    --ranks)
      ranks=${2:?tests/run.sh: --ranks needs a number}
      [[ $ranks =~ ^[248]$ ]] || { echo "tests/run.sh: --ranks is 2, 4 or 8" >&2; exit 2; }
      shift ;;
    -L) label_given=true; arguments+=(-L "^${2:?tests/run.sh: -L needs a label}\$"); shift ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
jobs=$(nproc)
bootstrap=()
if [ "$preset" = cuda ]; then
  bootstrap=(--cuda)
  if [ -n "$ranks" ]; then
    arguments+=(-R "\.n$ranks\$" -L '^gpus?$')
  else
    $label_given || arguments+=(-L "^$label\$")
  fi
  [ "$label" != gpu ] || jobs=1  # tests measure nothing, but each wants its memory and its part of the time
elif [ -n "$ranks" ]; then
  echo "tests/run.sh: --ranks goes with --gpu" >&2
  exit 2
else
  $label_given || arguments+=(-LE '^long$')
fi

tools/bootstrap.sh "${bootstrap[@]}"
tools/build.sh "$preset"
# Leaks are errors; OpenMP's worker threads, which live until exit, are not leaks.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$jobs" "${arguments[@]}"
