#!/usr/bin/env python3
"""Joins the quickstart's results: writes RUN/summary.json and prints a small table. Called by launch/quickstart.sh."""
import json
import pathlib
import sys


def runs(folder):
    """The closing lines of every training process that wrote into a run folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("end")]


def main():
    root = pathlib.Path(sys.argv[1])
    start, end, loaded = (json.loads((root / f"{name}.json").read_text()) for name in ("start", "end", "loaded"))
    teacher, student = runs(root / "teacher"), runs(root / "student")
    summary = {
        "teacher_perplexity": end["teacher_perplexity"],
        "student_perplexity_start": start["student_perplexity"],
        "student_perplexity_end": end["student_perplexity"],
        "kl_start": start["kl"],
        "kl_end": end["kl"],
        "top1_agreement_end": end["top1_agreement"],
        "tokens": teacher[-1]["tokens"] + student[-1]["tokens"],
        "seconds": sum(run["seconds"] for run in teacher + student),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in teacher + student),
        "export_dir": str(root / "export"),
    }
    (root / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    rows = [
        ("teacher perplexity", f"{summary['teacher_perplexity']:.3f}"),
        ("student perplexity, untrained", f"{summary['student_perplexity_start']:.3f}"),
        ("student perplexity, distilled", f"{summary['student_perplexity_end']:.3f}"),
        ("KL to the teacher, untrained", f"{summary['kl_start']:.4f}"),
        ("KL to the teacher, distilled", f"{summary['kl_end']:.4f}"),
        ("top-1 agreement, distilled", f"{100 * summary['top1_agreement_end']:.1f} %"),
        ("tokens trained on", f"{summary['tokens']:,}"),
        ("training time", f"{summary['seconds']:.0f} s"),
        ("largest process", f"{summary['peak_rss_bytes'] / 2**20:.0f} MiB"),
        ("export", summary["export_dir"]),
    ]
    for name, value in rows:
        print(f"{name:<32}{value:>18}")
    # The export is float32, so what was loaded back must measure as the checkpoint did.
    difference = abs(loaded["student_perplexity"] / end["student_perplexity"] - 1)
    if difference > 1e-6:
        sys.exit(f"the loaded export differs from the checkpoint: perplexity off by {difference:.1e}")


if __name__ == "__main__":
    main()
