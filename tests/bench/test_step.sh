#!/usr/bin/env bash
# test_step.sh DELTAPIPE STEP MPIEXEC: tools/bench/step on two CPU ranks: its figures add up, and its traces hold the
# traced steps.
set -euo pipefail
deltapipe=$(realpath "$1") step=$(realpath "$2") mpiexec=$3
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
bash "$here/tiny_job.sh" "$deltapipe"
for mesh in pipeline sequence data; do
  "$mpiexec" --oversubscribe -n 2 "$step" job.toml --set "mesh.$mesh=2" --warm-up 1 --steps 3 --traced 2 \
    --profiled 0 --name "$mesh" --out "$mesh.json" --trace "$mesh.trace.json" >"$mesh.log" 2>&1 ||
    { cat "$mesh.log" >&2; exit 1; }
done
python3 - <<'P'
import json

for mesh in ("pipeline", "sequence", "data"):
    row, = json.load(open(f"{mesh}.json"))["rows"]
    assert row["traced_steps"] == 2 and len(row["all_step_seconds"]) == 3 and row["ranks"] == 2, row
    assert row["losses"][-1] < row["losses"][0], row["losses"]
    tasks = 4 // row["mesh"]["data"]  # of each kind, a step
    for rank in row["each_rank"]:
        assert set(rank["task_ms"]) == {"teacher_forward", "forward", "backward"}, rank
        # A moment of a step is a task's, the update's or idle.
        parts = sum(rank["task_ms"].values()) * tasks / 1000 + rank["update_seconds"] + rank["idle_seconds"]
        assert abs(parts - rank["step_seconds"]) < 1e-6, (parts, rank)
        assert 0 < rank["held_up_seconds"] == rank["message_seconds"] == rank["unhidden_seconds"], rank
        assert rank["unhidden_seconds"] <= rank["idle_seconds"] + 1e-9, rank
        assert 0 < rank["idle_share"] < 1 and rank["planned_bytes"] > 0, rank
    assert abs(row["bubble_measured"] - sum(r["idle_share"] for r in row["each_rank"]) / 2) < 1e-9, row
    # A pipeline of two stages and four microbatches idles at least a tenth of its time, others not at all.
    for which in ("bubble_simulated", "bubble_planned"):
        assert 0.05 < row[which] < 0.6 if mesh == "pipeline" else row[which] < 1e-9, (which, row)
    axes = set(row["each_rank"][0]["axes"]) - {"world"}
    assert axes == {"pipeline": {"pipeline"}, "sequence": {"sequence", "data_sequence"},
                    "data": {"data_sequence", "data"}}[mesh], axes
    steps = {e["args"]["step"] for e in json.load(open(f"{mesh}.trace.json"))["traceEvents"] if e["ph"] == "X"}
    assert steps == {3, 4}, steps
P
echo "bubbles, communication and traces of three meshes add up"
