#!/usr/bin/env bash
# test_job_cuda.sh DELTAPIPE [RANKS]: a whole job on GPUs (several ranks share one where there are too few): an
# undisturbed run; the same with a rank killed, restarted by the launcher; the same stopped by a signal and resumed. All
# end with the same weights, bit by bit. Then evaluation and logits on the GPU, and the export against transformers on
# the CPU where python3 has it.
set -euo pipefail
deltapipe=$(realpath "$1") ranks=${2:-2}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export DELTAPIPE=$deltapipe OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1
die() {
  tail -n 4 ./*.log >&2
  grep -aE '^launch|^mpirun|warning|error' ./*.log | tail -n 20 >&2 || true
  echo "FAILED: $*" >&2
  exit 1
}

mkdir text
for i in $(seq 1 40); do
  for j in $(seq 1 60); do echo "$i.$j: the gate decays the state of head $((j % 7)) by $((i * j % 11))."; done >"text/$i.txt"
done
"$deltapipe" data text --out train.h5 --validation validation.h5 --validation-fraction 0.2 >data.log
cat >teacher.toml <<'T'
[run]
name = "teacher"
[student]
init = "random"
[student.model]
vocabulary = 258
hidden = 256
layers = 4
intermediate = 512
heads = 4
kv_heads = 2
head_dim = 64
max_positions = 1024
rope_factor = 4.0
rope_original_max_positions = 64
T
"$deltapipe" init teacher.toml --out teacher >init.log
# Ranks that share a GPU take turns on it: every message waits for a turn.
align=40 distill=300 every=25 early=60
if [ "$ranks" -gt "$(nvidia-smi -L 2>/dev/null | wc -l)" ]; then align=10 distill=50 every=5 early=15; fi
cat >job.toml <<T
[run]
name = "job"
device = "cuda"
[mesh]
timeout_s = 30
[teacher]
path = "teacher"
[student]
mixers = ["kda", "nope"]
[memory]
recompute = true
[optimizer]
state = "bfloat16"
[data]
train = "train.h5"
validation = "validation.h5"
[[stage]]
name = "align"
steps = $align
sequence_length = 192
batch_sequences = 4
learning_rate = 1e-3
[stage.loss]
mixer_mse = 1.0
[[stage]]
name = "distill"
steps = $distill
sequence_length = 256
batch_sequences = 4
learning_rate = 1e-3
[stage.loss]
ce = 0.2
kl = 0.5
hidden_cosine = 0.3
[checkpoint]
every_steps = $every
[eval]
tokens = 4096
T
mesh=()
[ "$ranks" -eq 1 ] || mesh=(--set mesh.sequence=2 --set mesh.pipeline=$((ranks / 2)))
share=()
[ "$ranks" -le "$(nvidia-smi -L 2>/dev/null | wc -l)" ] || share=(--share-gpus)
# Signals that whoever started this ignores would stay ignored.
launcher=(env --default-signal "$root/launch/mpirun.sh" -n "$ranks" "${share[@]}" job.toml "${mesh[@]}")
launch() { "${launcher[@]}" --set "run.dir=$work/$1" >>"$1.log" 2>&1; }
begin() {  # in the background; $job is the launcher
  "${launcher[@]}" --set "run.dir=$work/$1" >>"$1.log" 2>&1 &
  job=$!
}
steps_of() { cat "$1/metrics.jsonl" 2>/dev/null | grep -c '"stage_step"' || true; }
wait_for_steps() {
  for _ in $(seq 1 600); do
    [ "$(steps_of "$1")" -ge "$2" ] && return
    sleep 0.1
  done
  die "$1 does not get to step $2"
}
weights_of() { "$deltapipe" export "$1/checkpoints/latest" --out "$1-hf" >"$1-export.log" && cat "$1"-hf/*.safetensors | sha256sum; }

launch whole || die "the undisturbed run"
wanted=$(weights_of whole)

begin killed
wait_for_steps killed $early
pkill -KILL -n -f "^$deltapipe train job.toml .*run.dir=$work/killed" || die "no rank to kill"
wait $job || die "the run with a killed rank"
grep -q 'restart 1 of' killed.log || die "the job was not started again"
[ "$(weights_of killed)" = "$wanted" ] || die "a killed rank changes the weights"

begin stopped
wait_for_steps stopped $early
kill -TERM $job
wait $job || die "the stopped run"
[ "$(steps_of stopped)" -lt $((align + distill)) ] || die "the run was not stopped"
launch stopped || die "the resumed run"
[ "$(weights_of stopped)" = "$wanted" ] || die "a stop changes the weights"

"$deltapipe" eval whole/checkpoints/latest --device cuda --json gpu.json >eval-gpu.log
"$deltapipe" eval whole/checkpoints/latest --device cpu --json cpu.json >eval-cpu.log
tokens=$(seq -s, 32 120)
"$deltapipe" logits whole/checkpoints/latest --device cuda --tokens "$tokens" --out gpu.npy >logits.log
grep -h perplexity eval-gpu.log eval-cpu.log
if python3 -c 'import torch, transformers' 2>/dev/null; then
  python3 "$root/tests/gpu/check_logits.py" whole-hf gpu.npy "$tokens" || die "the export"
else
  echo "python3 has no transformers: the export was not loaded"
fi
grep -h "distill $distill/$distill" whole.log | tail -n 1
echo "a job of $ranks rank(s): killed, stopped and undisturbed runs end with the same weights"
