# Sourced by the tests of this folder. Needs DELTAPIPE (the program) and SAME_CHECKPOINT (same_checkpoint.cpp).
# shellcheck shell=bash
set -euo pipefail
: "${DELTAPIPE:?the program under test}"

# shellcheck disable=SC2034  # used by those who source this
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../launch" && pwd)
# Everything that a test makes, gone at its end: files in memory where there is some, since on a busy disk each
# checkpoint takes seconds; programs on disk, since that memory often holds none.
shop=$(mktemp -d -p /dev/shm 2>/dev/null || mktemp -d)
# shellcheck disable=SC2034  # used by those who source this
programs=$(mktemp -d)
export OMPI_MCA_btl_vader_backing_directory=$shop # of ranks' shared memory, which a killed job leaves behind
# Waiting threads would take the cores from ranks that have work.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# Ends the test with a reason and the output of what it looked at.
problem() {
  echo "FAILED: $1"
  for file in "${@:2}"; do
    echo "--- ${file#"$shop"/}"
    cat "$file" || true
  done
  exit 1
}

# A token dataset, a teacher and job.toml, a run of $1 + $2 steps in runs/NAME below the working directory. $3: more.
# `threads = 1`: ranks of these tests share few cores.
make_job() {
  mkdir "$shop/text"
  local words=(the gate decays state of a head and keeps it) i j
  RANDOM=1
  for ((i = 0; i < 16; ++i)); do
    for ((j = 0; j < 120; ++j)); do printf '%s ' "${words[RANDOM % 10]}"; done >"$shop/text/$i.txt"
  done
  "$DELTAPIPE" data "$shop/text" --out "$shop/train.h5" --validation "$shop/validation.h5" --validation-fraction 0.2 \
    >"$shop/make.log" 2>&1 || problem "no dataset" "$shop/make.log"
  cat >"$shop/teacher.toml" <<TOML
[student]
init = 'random'
[student.model]
vocabulary = 258
hidden = 16
layers = 4
intermediate = 32
heads = 2
kv_heads = 1
head_dim = 8
max_positions = 256
init_std = 0.2
[data]
train = '$shop/train.h5'
[[stage]]
name = 'unused'
steps = 1
sequence_length = 32
batch_sequences = 2
learning_rate = 1e-2
[stage.loss]
ce = 1.0
TOML
  "$DELTAPIPE" init "$shop/teacher.toml" --out "$shop/teacher" >"$shop/make.log" 2>&1 ||
    problem "no teacher" "$shop/make.log"
  cat >"$shop/job.toml" <<TOML
[run]
name = 'job'
seed = 3
threads = 1
[teacher]
path = '$shop/teacher'
[student]
mixers = ['kda', 'nope']
[data]
train = '$shop/train.h5'
validation = '$shop/validation.h5'
[eval]
every_steps = 50
tokens = 96
[checkpoint]
every_steps = 40
[[stage]]
name = 'align'
steps = $1
sequence_length = 32
batch_sequences = 4
microbatch_sequences = 2
learning_rate = 1e-2
warmup = 0.2
[stage.loss]
mixer_mse = 1.0
[[stage]]
name = 'distill'
steps = $2
sequence_length = 48
batch_sequences = 4
microbatch_sequences = 2
learning_rate = 5e-3
warmup = 0.2
[stage.loss]
kl = 1.0
${3:-}
TOML
}

# Steps that the run in folder $1 has reported.
steps_of() { { grep '"stage_step"' "$1/runs/job/metrics.jsonl" 2>/dev/null || true; } | wc -l; }

# Waits until `$2...` succeeds, for at most $1 seconds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.05
  done
}
has_steps() { [ "$(steps_of "$1")" -ge "$2" ]; }
has_line() { grep -qE "$2" "$1" 2>/dev/null; }
has_ended() { ! kill -0 "$1" 2>/dev/null; }

# "finished" or "unfinished": the run of job.toml in folder $1.
status_of() { (cd "$1" && "$DELTAPIPE" status "$shop/job.toml") | cut -d' ' -f1; }
newest_of() { (cd "$1" && realpath "$("$DELTAPIPE" status "$shop/job.toml" | cut -d' ' -f3)"); }
expect_same_weights() {
  "$SAME_CHECKPOINT" "$(newest_of "$1")" "$(newest_of "$2")" >"$shop/same.log" 2>&1 ||
    problem "the runs in ${1#"$shop"/} and ${2#"$shop"/} ended differently" "$shop/same.log"
}
