#!/usr/bin/env bash
# The whole job, small, on one CPU: installs and builds what is missing, trains a byte-level teacher on the text of the
# Python manual, turns it into a student of three KDA layers to one full layer without positions, distills it on four
# ranks, measures, exports and loads the export back. About five minutes of training on two cores. Results:
# runs/quickstart/.
#
#   launch/quickstart.sh [--keep-teacher]      --keep-teacher reuses the teacher of an earlier quickstart
set -euo pipefail
cd "$(dirname "$0")/.."

keep_teacher=false
for argument in "$@"; do
  case "$argument" in
    --keep-teacher) keep_teacher=true ;;
    *) echo "quickstart: unknown option '$argument'; accepted: --keep-teacher" >&2; exit 2 ;;
  esac
done

# mpirun asks for these before it starts as root, as in a container.
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi

say() { printf '\n== %s\n' "$*"; }
root=runs/quickstart
deltapipe=build/cpu/bin/deltapipe

say "Installing what is missing and building"
tools/bootstrap.sh --plots
tools/build.sh cpu deltapipe
mkdir -p "$root/data"

say "Text: the reStructuredText sources of the Python manual, from the distribution's documentation package"
if [ ! -f "$root/data/train.h5" ] || [ ! -f "$root/data/validation.h5" ]; then
  tools/fetch_text.sh "$root/text"
  "$deltapipe" data "$root/text" --suffix .txt --out "$root/data/train.h5" \
    --validation "$root/data/validation.h5" --validation-fraction 0.05
else
  echo "using $root/data of an earlier run"
fi

if ! $keep_teacher || [ ! -f "$root/teacher-hf/config.json" ]; then
  say "A teacher: a small Arcee model (squared ReLU, grouped-query attention, YaRN) learns the text"
  "$deltapipe" train configs/quickstart-teacher.toml --restart
  "$deltapipe" export "$root/teacher/checkpoints/latest" --out "$root/teacher-hf" --name quickstart-teacher --overwrite
fi

say "A student: embeddings, MLPs, norms and projections from the teacher; KDA's own weights fresh"
"$deltapipe" init configs/quickstart.toml --overwrite
"$deltapipe" eval "$root/student/student-init" --config configs/quickstart.toml --json "$root/start.json"

say "The plan: which rank holds what, and a step as it should run"
"$deltapipe" plan configs/quickstart.toml --ranks 4 --timeline "$root/timeline.svg"

say "Distillation on 4 ranks, pipeline 2 x sequence 2, stopped by a signal on the way as a cluster would"
rm -rf "$root/student/metrics.jsonl" "$root/student/checkpoints"
launch/mpirun.sh -n 4 configs/quickstart.toml &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT
while kill -0 "$job" 2>/dev/null; do
  steps=$(grep -c learning_rate "$root/student/metrics.jsonl" 2>/dev/null || true)
  if [ "${steps:-0}" -ge 60 ]; then
    kill -TERM "$job"
    break
  fi
  sleep 0.2
done
wait "$job"
trap - EXIT

say "Resumed from the checkpoint that the signal left"
launch/mpirun.sh -n 4 configs/quickstart.toml

say "Losses, and the timeline of two steps as they ran"
/usr/bin/python3 tools/report.py "$root/student" --out "$root/report.png"

say "Measured on text that neither has seen"
"$deltapipe" eval "$root/student/checkpoints/latest" --json "$root/end.json"

say "Exported to the Hugging Face format, and loaded back"
"$deltapipe" export "$root/student/checkpoints/latest" --out "$root/export" --eval "$root/end.json" \
  --name quickstart-kda-nope --overwrite
"$deltapipe" eval "$root/export" --config configs/quickstart.toml --json "$root/loaded.json" >/dev/null
printf 'prompt:    %s\ncontinued: ' 'Return a list of '
"$deltapipe" generate "$root/export" --text 'Return a list of ' --count 60

say "Summary"
python3 tools/quickstart_summary.py "$root"
