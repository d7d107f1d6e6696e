#!/usr/bin/env bash
# tiny_job.sh DELTAPIPE: in the present folder, data (train.h5), a teacher's config (teacher/) and a job for
# tools/bench/step (job.toml): four layers, four sequences of 256 tokens a step.
set -euo pipefail
deltapipe=$1
mkdir text
for i in $(seq 1 40); do
  for j in $(seq 1 60); do
    echo "$i.$j: the gate decays the state of head $((j % 7)) by $((i * j % 11))."
  done >"text/$i.txt"
done
"$deltapipe" data text --out train.h5 >data.log
cat >teacher.toml <<'T'
[run]
name = "teacher"
[student]
init = "random"
[student.model]
vocabulary = 258
hidden = 128
layers = 4
intermediate = 192
heads = 2
kv_heads = 1
head_dim = 64
max_positions = 1024
rope_factor = 4.0
rope_original_max_positions = 64
T
"$deltapipe" init teacher.toml --out teacher >init.log 2>&1
cat >job.toml <<T
[run]
name = "tiny"
[teacher]
path = "$PWD/teacher"
[student]
mixers = ["kda", "nope"]
[data]
train = "$PWD/train.h5"
[memory]
recompute = true
[[stage]]
name = "long"
steps = 1000
sequence_length = 256
batch_sequences = 4
learning_rate = 1e-3
schedule = "constant"
[stage.loss]
ce = 0.2
kl = 0.2
hidden_cosine = 0.6
T
