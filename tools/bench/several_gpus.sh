#!/usr/bin/env bash
# Everything that wants several GPUs of one machine, in one go of less than ten minutes: tests on meshes, whole jobs,
# steps of AFM-4.5B on every kind of mesh with their traces, sequence parallelism by itself.
#
#   tools/bench/several_gpus.sh N OUT [DATASET]     N: 2, 4 or 8; results, logs and traces go to the folder OUT
#
# DATASET: token dataset for the steps (default data/bench.h5, see tools/bench/README.md). Paths are absolute, or begin at
# the root of this tree. At the end OUT/results.json holds all rows and OUT/summary.txt their tables, what failed, and
# what was skipped and why: settings that do not fit the GPUs, and what the time did not suffice for. Environment:
#
#   DELTAPIPE_BUILD  nothing is built: the programs are this folder's, laid out as build/cuda is
#   PARTS            of "tests steps sequence" those to run; with 8 GPUs two goes leave time for all
#   LIMIT            seconds for everything after the build (default 540)
#   CONFIG, MICROBATCHES, TOKENS, GPU_GIB, WRAP   for trying this script: another configuration, microbatches of a
#                    pipeline, lengths for the sequence benchmark, memory of a GPU, and words before every program
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
ranks=${1:?number of GPUs} out=${2:?folder for results} data=${3:-data/bench.h5}
mkdir -p "$out"
out=$(realpath "$out")
build=${DELTAPIPE_BUILD:-build/cuda} parts=" ${PARTS:-tests steps sequence} " limit=${LIMIT:-540}
config=${CONFIG:-tools/bench/step/afm-32k.toml}
microbatches=${MICROBATCHES:-$((ranks < 8 ? 2 * ranks : ranks))}
read -ra tokens <<<"${TOKENS:-32768 131072 524288}"
read -ra wrap <<<"${WRAP:-}"
export NCCL_NVLS_ENABLE=0 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
warm_up=1 steps=2

if [ -z "${DELTAPIPE_BUILD:-}" ]; then
  tools/bootstrap.sh --cuda && tools/build.sh cuda || exit 1
fi
SECONDS=0
: >"$out/summary.txt"
printf 'name\texit\tseconds\tnote\n' >"$out/runs.tsv"
say() { echo "[$SECONDS s] $*" | tee -a "$out/summary.txt"; }
note() { printf '%s\t%s\t%s\t%s\n' "$@" >>"$out/runs.tsv"; }
skip() {  # NAME WHY
  say "$1: skipped: $2"
  note "$1" skipped 0 "$2"
}
try() {  # NAME SECONDS COMMAND...
  local name=$1 most=$2 code=0 begin=$SECONDS last
  shift 2
  if [ "$((limit - SECONDS))" -lt 15 ]; then
    skip "$name" "the time is up"
    return 1
  fi
  timeout -k 5 "$((most < limit - SECONDS ? most : limit - SECONDS))" "$@" >"$out/$name.log" 2>&1 || code=$?
  last=$(grep -aE 'tokens/s, MFU|PASSED|FAILED|^error|a job of|^bubble' "$out/$name.log" | tail -n 1 | cut -c1-200)
  say "$name: exit $code; $last"
  note "$name" "$code" "$((SECONDS - begin))" "${last//$'\t'/ }"
  return "$code"
}
on_ranks() {  # RANKS COMMAND...: what try runs
  local n=$1
  shift
  echo mpirun --oversubscribe --bind-to none -n "$n" "${wrap[@]}" "$@"
}

gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
# Less what the driver, libraries and NCCL take of it.
gib=${GPU_GIB:-$(awk -F', ' '{ print $3 / 1024 - 2.5 }' <<<"$gpus")}
say "$ranks ranks; GPU: ${gpus:-none}; settings that need up to $gib GiB of it are run"
nvidia-smi topo -m >"$out/topology.txt" 2>&1 || true

if [[ $parts == *" tests "* ]]; then
  for test in test_nccl test_training_cuda; do
    # shellcheck disable=SC2046
    try "$test" 90 $(on_ranks "$ranks" "$build/tests/gpu/$test")
  done
  try test_job_cuda 120 tests/gpu/test_job_cuda.sh "$build/bin/deltapipe" "$ranks"
fi

# What the plan says of settings: "fits SECONDS_A_STEP", or why not.
judge() {  # RANKS SETTINGS...
  local n=$1
  shift
  if ! "${wrap[@]}" "$build/bin/deltapipe" plan "$config" --ranks "$n" "$@" --json "$out/plan.json" \
    >"$out/plan.log" 2>&1; then
    echo "no plan: $(grep -a '^error' "$out/plan.log" | cut -c1-160)"
    return
  fi
  python3 - "$out/plan.json" "$gib" <<'P'
import json, sys
plan = json.load(open(sys.argv[1]))
most = max(m["total"] for m in plan["memory"]) / 2**30
print(f"fits {plan['stages'][0]['step_seconds']:.9f}" if most <= float(sys.argv[2]) else f"needs {most:.1f} GiB a rank")
P
}
# Steps of one mesh, traced, where they fit: as they are, or with the first of ALTERNATIVES (words KEY=VALUE) that does.
slowness=1.5  # seconds for one of the plan's, until one GPU has shown it
step() {  # NAME RANKS ALTERNATIVES SETTINGS...
  local name=$1 n=$2 alternatives=$3 settings=(--set "data.train=$data") chosen=() verdict='' why='' planned needed
  shift 3
  for s in "$@"; do settings+=(--set "$s"); done
  for alternative in none $alternatives; do
    chosen=("${settings[@]}")
    [ "$alternative" = none ] || chosen+=(--set "$alternative")
    verdict=$(judge "$n" "${chosen[@]}")
    [[ $verdict == fits* ]] && break
    why=${why:-$verdict}
  done
  if [[ $verdict != fits* ]]; then
    skip "step-$name" "$why"
    return
  fi
  [ -z "$why" ] || say "step-$name: with $alternative, since as it is it $why"
  planned=${verdict#fits }
  needed=$(awk "BEGIN { print int(10 + $slowness * $planned * ($warm_up + $steps)) }")
  if [ "$needed" -gt "$((limit - SECONDS))" ]; then
    skip "step-$name" "would take about $needed s, $((limit - SECONDS)) s are left"
    return
  fi
  # shellcheck disable=SC2046
  try "step-$name" "$((60 + 2 * needed))" $(on_ranks "$n" "$build/tools/bench/step/step" "$config") "${chosen[@]}" \
    --warm-up "$warm_up" --steps "$steps" --traced "$steps" --profiled 0 --name "$name" --out "$out/step-$name.json" \
    --trace "$out/trace-$name.json" || return
  gzip -f "$out/trace-$name.json"
  grep -a '^bubble' "$out/step-$name.log" >>"$out/summary.txt"
  [ "$n" -gt 1 ] || slowness=$(python3 -c "import json, sys
row, = json.load(open(sys.argv[1]))['rows']
print(1.2 * row['step_seconds'] / float(sys.argv[2]))" "$out/step-$name.json" "$planned")
}
if [[ $parts == *" steps "* ]]; then
  step one 1 "" stage.0.batch_sequences=1
  step "sequence" "$ranks" "" "mesh.sequence=$ranks" stage.0.batch_sequences=1
  step data "$ranks" "" "mesh.data=$ranks" "stage.0.batch_sequences=$ranks"
  [ "$ranks" -eq 2 ] || step pipeline-2-sequence "$ranks" "" mesh.pipeline=2 "mesh.sequence=$((ranks / 2))" \
    stage.0.batch_sequences=4 pipeline.teacher=ahead
  fewer=$(for k in 16 12 10 8 6 4 3 2 1; do echo "pipeline.put_off_layers=$k"; done)
  for teacher in ahead inline; do
    pipeline=("mesh.pipeline=$ranks" "stage.0.batch_sequences=$microbatches" "pipeline.teacher=$teacher")
    step "1f1b-$teacher" "$ranks" "" "${pipeline[@]}"
    step "zero_bubble-$teacher" "$ranks" "$fewer" "${pipeline[@]}" pipeline.schedule=zero_bubble
    step "interleaved-$teacher" "$ranks" "" "${pipeline[@]}" pipeline.schedule=interleaved pipeline.chunks=2
  done
fi

if [[ $parts == *" sequence "* ]]; then
  counts=("$ranks")
  for n in 1 2 4; do [ "$n" -ge "$ranks" ] || counts+=("$n"); done
  for n in "${counts[@]}"; do
    # shellcheck disable=SC2046
    try "sequence-$n" 120 $(on_ranks "$n" "$build/tools/bench/sequence/sequence") --layout zigzag contiguous \
      --tokens "${tokens[@]}" --out "$out/sequence-$n.json"
  done
fi
rm -f "$out/plan.json" "$out/plan.log"
tools/bench/several_gpus.py "$out" "$ranks" | tee -a "$out/summary.txt"
say "done"
