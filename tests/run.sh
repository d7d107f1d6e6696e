#!/usr/bin/env bash
# Installs what is missing, builds, runs the tests, says how many ran.
#
#   tests/run.sh                 everything but the tests labelled `long`
#   tests/run.sh -L unit         one label (unit, distributed, fault, slurm, interop, long)
#   tests/run.sh --asan          the same under the address and undefined-behaviour sanitizers
#   tests/run.sh -R PATTERN      tests whose name matches; any other option goes to ctest too
set -euo pipefail
cd "$(dirname "$0")/.."

preset=cpu
label_given=false
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --asan) preset=asan ;;
    -L) label_given=true; arguments+=(-L "^${2:?tests/run.sh: -L needs a label}\$"); shift ;;
    -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
$label_given || arguments+=(-LE '^long$')

tools/bootstrap.sh
tools/build.sh "$preset"
# Leaks are errors; OpenMP's worker threads, which live until exit, are not leaks.
export ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1:abort_on_error=0}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
ctest --test-dir "build/$preset" --output-on-failure --no-tests=error -j "$(nproc)" "${arguments[@]}"
