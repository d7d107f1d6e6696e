#!/usr/bin/env python3
"""The results of tools/bench/several_gpus.sh in one file and as tables: several_gpus.py FOLDER RANKS.

Writes FOLDER/results.json: "rows" with the steps' rows (kind "step") and those of the sequence benchmark (kind
"sequence", with the efficiency against one rank), and "runs": every program's exit status, seconds and last word.
"""
import csv
import json
import sys
from pathlib import Path


def rows_of(folder, pattern, kind):
    reports = [json.loads(p.read_text()) for p in sorted(folder.glob(pattern))]
    return reports, [{"kind": kind, "command": r["command"], **row} for r in reports for row in r["rows"]]


def add_efficiency(rows):
    """Of n ranks: time on one rank over n times theirs."""
    alone = {(r["layer"], r["tokens"]): r["ms"] for r in rows if r["ranks"] == 1 and "ms" in r}
    for row in rows:
        one = alone.get((row["layer"], row["tokens"]))
        if one and "ms" in row:
            row["efficiency"] = one / (row["ranks"] * row["ms"])


def percent(value):
    return "-" if value is None else f"{100 * value:.1f} %"


def print_table(head, lines):
    table = [head, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        print("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths))))
    print()


def main():
    folder, ranks = Path(sys.argv[1]), int(sys.argv[2])
    step_reports, steps = rows_of(folder, "step-*.json", "step")
    sequence_reports, sequences = rows_of(folder, "sequence-*.json", "sequence")
    add_efficiency(sequences)
    with open(folder / "runs.tsv", newline="") as file:
        runs = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    first = (step_reports + sequence_reports + [{}])[0]
    result = {"benchmark": "several_gpus", **{k: first.get(k, "") for k in ("gpu", "driver", "commit")},
              "command": f"tools/bench/several_gpus.sh {ranks} OUT", "runs": runs, "rows": steps + sequences}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")

    if steps:
        one = next((r["tokens_per_second"] for r in steps if r["ranks"] == 1), None)
        lines = []
        for r in sorted(steps, key=lambda r: r["ranks"]):
            rate = r["tokens_per_second"] / r["ranks"]
            each = r["each_rank"]
            worst = max(each, key=lambda x: x["peak_bytes"])
            lines.append([r["config"], str(r["ranks"]), f"{r['step_seconds']:.3f} s", f"{rate:.0f}", percent(r["mfu"]),
                          percent(rate / one if one else None), percent(r.get("bubble_measured")),
                          percent(r.get("bubble_simulated")), percent(r.get("bubble_planned")),
                          f"{1e3 * r.get('unhidden_communication_seconds', 0):.0f} ms",
                          f"{worst['peak_bytes'] / 2**30:.1f}", f"{worst['planned_bytes'] / 2**30:.1f}"])
        print_table(["step", "ranks", "time", "tokens/s a GPU", "MFU", "of one GPU", "bubble", "simulated", "planned",
                     "not hidden", "GiB", "plan"], lines)
    if sequences:
        lines = [[r["layer"], str(r["tokens"]), str(r["ranks"]), r["layout"] if r["ranks"] > 1 else "",
                  f"{r['ms']:.3f}" if "ms" in r else "skipped", percent(r.get("efficiency"))]
                 for r in sorted(sequences, key=lambda r: (r["layer"], r["tokens"], r["ranks"], r["layout"]))]
        print_table(["layer", "tokens", "ranks", "layout", "ms", "efficiency"], lines)
    for run in runs:
        if run["exit"] != "0":
            print(f"{run['name']}: {'skipped' if run['exit'] == 'skipped' else 'exit ' + run['exit']}: {run['note']}")


if __name__ == "__main__":
    main()
