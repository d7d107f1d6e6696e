#!/usr/bin/env bash
# test_several_gpus.sh BUILD STAND_IN: tools/bench/several_gpus.sh on two ranks and a tiny job without a GPU: every mesh
# and schedule leaves its row and trace, and where there is no memory, a line that says so.
set -euo pipefail
build=$(realpath "$1") stand_in=$(realpath "$2")
root=$(cd "$(dirname "$0")/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
bash "$root/tests/bench/tiny_job.sh" "$build/bin/deltapipe"
sed -i 's/^name = "tiny"/&\ndevice = "cuda"/' job.toml
export DELTAPIPE_BUILD=$build CONFIG=$work/job.toml TOKENS=1024 WRAP="env LD_PRELOAD=$stand_in"
export DELTAPIPE_STAND_IN_LARGEST_COPY=65536
script() { "$root/tools/bench/several_gpus.sh" 2 "$work/out" "$work/train.h5" >all.log 2>&1; }
die() { echo "FAILED: $*" >&2; cat out/summary.txt out/*.log >&2; exit 1; }

PARTS="steps sequence" GPU_GIB=70 script || die "the script"
python3 - <<'P' || die "its results"
import glob, gzip, json

result = json.load(open("out/results.json"))
steps = {r["config"]: r for r in result["rows"] if r["kind"] == "step"}
schedules = [f"{s}-{t}" for s in ("1f1b", "zero_bubble", "interleaved") for t in ("ahead", "inline")]
assert set(steps) == {"one", "sequence", "data", *schedules}, sorted(steps)
for name, row in steps.items():
    assert len(row["each_rank"]) == row["ranks"] == (1 if name == "one" else 2), row
    assert row["traced_steps"] == 2 and row["tokens_per_second"] > 0, row
    assert row["peak_bytes"] > 0 and 0 <= row["bubble_measured"] < 1 and 0 <= row["bubble_simulated"] < 1, row
    with gzip.open(f"out/trace-{name}.json.gz") as trace:
        assert json.load(trace)["otherData"]["dropped_events"] == 0
assert "teacher ahead" in steps["zero_bubble-ahead"]["schedule"]
sequences = {(r["layer"], r["ranks"], r["layout"]) for r in result["rows"] if r["kind"] == "sequence"}
assert len(sequences) == 6 and all(r["efficiency"] > 0 for r in result["rows"] if r["kind"] == "sequence"), sequences
assert [r["exit"] for r in result["runs"]] == ["0"] * 11, result["runs"]
P

rm -r out
PARTS=steps GPU_GIB=0.001 script || die "the script, without memory"
[ "$(grep -c 'skipped: needs 0.0 GiB a rank' out/summary.txt)" -ge 9 ] || die "what does not fit was run"
rm -r out
PARTS=sequence LIMIT=10 script || die "the script, without time"
[ "$(grep -c 'sequence-.: skipped: the time is up' out/summary.txt)" -ge 2 ] || die "went on without time"
echo "several_gpus.sh runs what fits and says what it skips"
