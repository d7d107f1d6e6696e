#!/usr/bin/env bash
# Everything that wants several GPUs of one machine, in one go of less than ten minutes: tests on meshes, whole jobs,
# steps of AFM-4.5B on every kind of mesh, sequence parallelism by itself.
#
#   tools/bench/several_gpus.sh N OUT [DATASET]     N: 2, 4 or 8; results and logs go to the folder OUT
#
# DATASET: token dataset for the steps (default data/bench.h5, see tools/bench/README.md). With DELTAPIPE_BUILD=FOLDER
# nothing is built: the programs are that folder's, laid out as build/cuda is.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
ranks=${1:?number of GPUs} out=${2:?folder for results} data=${3:-data/bench.h5}
mkdir -p "$out"
out=$(realpath "$out")
build=${DELTAPIPE_BUILD:-build/cuda}
export NCCL_NVLS_ENABLE=0 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
say() { echo "[$SECONDS s] $*" | tee -a "$out/summary.txt"; }
try() {  # NAME SECONDS COMMAND...
  local name=$1 limit=$2 code=0
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  say "$name: exit $code; $(grep -aE 'tokens/s, MFU|PASSED|FAILED|^error|a job of' "$out/$name.log" | tail -n 1 | cut -c1-160)"
}

if [ -z "${DELTAPIPE_BUILD:-}" ]; then
  tools/bootstrap.sh --cuda && tools/build.sh cuda || exit 1
fi
say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sort | uniq -c)"
nvidia-smi topo -m >"$out/topology.txt" 2>&1 || true

try nccl 60 mpirun --oversubscribe --bind-to none -n "$ranks" "$build/tests/gpu/test_nccl"
try training 90 mpirun --oversubscribe --bind-to none -n "$ranks" "$build/tests/gpu/test_training_cuda"
try job 90 tests/gpu/test_job_cuda.sh "$build/bin/deltapipe" "$ranks"

# Steps of a few: enough for a median, and a trace of one mesh each. A microbatch a pipeline rank, twice over.
step() {  # NAME SETTINGS...
  local name=$1 settings=()
  shift
  for s in "$@"; do settings+=(--set "$s"); done
  try "step-$name" 60 mpirun --oversubscribe --bind-to none -n "$ranks" "$build/tools/bench/step/step" \
    tools/bench/step/afm-32k.toml --set "data.train=$data" "${settings[@]}" --warm-up 1 --steps 3 --profiled 0 \
    --name "$name" --out "$out/step-$name.json"
}
try step-one 60 "$build/tools/bench/step/step" tools/bench/step/afm-32k.toml --set "data.train=$data" --warm-up 1 \
  --steps 3 --profiled 0 --name one --out "$out/step-one.json"
step sequence "mesh.sequence=$ranks"
step data "mesh.data=$ranks" "stage.0.batch_sequences=$ranks"
batch="stage.0.batch_sequences=$((2 * ranks))"
for schedule in 1f1b zero_bubble; do
  for teacher in inline ahead; do
    step "pipeline-$schedule-$teacher" "mesh.pipeline=$ranks" "$batch" "pipeline.schedule=$schedule" \
      "pipeline.teacher=$teacher"
  done
done
[ "$ranks" -gt 4 ] || step pipeline-interleaved-ahead "mesh.pipeline=$ranks" "$batch" pipeline.schedule=interleaved \
  pipeline.chunks=2 pipeline.teacher=ahead
[ "$ranks" -eq 2 ] || step "pipeline-2-sequence" mesh.pipeline=2 "mesh.sequence=$((ranks / 2))" \
  stage.0.batch_sequences=4 pipeline.teacher=ahead

for ((n = 1; n <= ranks; n *= 2)); do
  for layout in zigzag contiguous; do
    [ "$n" -gt 1 ] || [ "$layout" = zigzag ] || continue
    try "sequence-$n-$layout" 60 mpirun --oversubscribe --bind-to none -n "$n" "$build/tools/bench/sequence/sequence" \
      --layout "$layout" --out "$out/sequence-$n-$layout.json"
  done
done
python3 - "$out" <<'P'
import glob, json, sys
base = {}
print("layer tokens ranks layout ms efficiency")
for name in sorted(glob.glob(sys.argv[1] + "/sequence-*.json")):
    for r in json.load(open(name))["rows"]:
        key = r["layer"], r["tokens"]
        if r["ranks"] == 1:
            base[key] = r["ms"]
        e = base[key] / r["ms"] / r["ranks"] if key in base else float("nan")
        print(r["layer"], r["tokens"], r["ranks"], r["layout"], f"{r['ms']:.3f} {100 * e:.1f} %")
P
say "done"
