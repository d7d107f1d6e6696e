#!/usr/bin/env bash
# A faulty rank ends the whole job, soon, with an exit code that is not 0 and a line that says why.
#   test_faults.sh MPIEXEC PROBE FAULT EXIT_CODE PATTERN      EXIT_CODE `any`: any but 0; PATTERN: of one line of output
set -u
mpiexec=$1 probe=$2 fault=$3 expected=$4 pattern=$5
output=$(mktemp)
trap 'rm -f "$output"' EXIT
problem() {
  echo "$fault: $1; its output:"
  cat "$output"
  exit 1
}

timeout 150 "$mpiexec" --allow-run-as-root --oversubscribe -n 3 "$probe" "$fault" >"$output" 2>&1
code=$?
[ "$code" -ne 124 ] || problem "the job had not ended after 150 s"
[ "$code" -ne 0 ] || problem "the job ended with exit code 0"
[ "$expected" = any ] || [ "$code" -eq "$expected" ] || problem "exit code $code, expected $expected"
grep -qE "$pattern" "$output" || problem "no line matches '$pattern'"
for _ in $(seq 50); do  # what the launcher has told to end may take a moment
  pgrep -f "^$probe $fault\$" >/dev/null || exit 0
  sleep 0.2
done
problem "a rank is still running"
