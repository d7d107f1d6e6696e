#!/usr/bin/env python3
"""Draws a run's metrics: losses, KL, evaluation, learning rate, gradient norm, throughput, with stage boundaries.

    tools/report.py RUN_DIR                  -> RUN_DIR/report.png
    tools/report.py RUN_DIR --out loss.svg   (png, svg or pdf by suffix)
    tools/report.py RUN_DIR --trace FILE     (default: RUN_DIR/trace.json, when there is one)

Reads RUN_DIR/metrics.jsonl: one JSON object a line. A line with "eval": true is an evaluation, one with
"end": true closes a process and is passed over, every other line is a training step. Known keys go to their panels, any
other numeric key gets a panel of its own. A resumed run may repeat steps: lines written later replace what they repeat.
top1_agreement is a fraction.

A trace (what a run with trace.steps writes) is drawn below as the pipeline's timeline, a row a rank. A rank idles where
it is in no task and no phase of the optimizer, and where it waits for a message between stages or for all ranks; its
share of the traced steps stands beside its row. Messages within a sequence and of gradients count as work.

Needs matplotlib (3.6 or newer), no display. Errors are one line, exit status 1.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

# Okabe & Ito's palette: distinguishable under the common colour-vision deficiencies. Lines differ in style too.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BLACK, GREY = "#000000", "#777777"

LOSS_TERMS = {  # key: label, colour, line style
    "loss": ("weighted total", BLACK, "-"),
    "ce": ("cross-entropy", BLUE, "-"),
    "kl": ("forward KL", VERMILION, "-"),
    "reverse_kl": ("reverse KL", ORANGE, "--"),
    "jsd": ("Jensen-Shannon", SKY, "--"),
    "tvd": ("total variation", PURPLE, "--"),
    "hidden_cosine": ("hidden cosine", GREEN, "-"),
    "hidden_mse": ("hidden MSE", GREEN, ":"),
    "mixer_mse": ("mixer MSE", PURPLE, ":"),
}
PLACE = {"step", "stage", "stage_step", "tokens", "seconds"}  # where a line stands, not what it measured
OTHER_TRAIN = PLACE | {"loss_tokens", "learning_rate", "gradient_norm", "tokens_per_second", "skipped"}
KNOWN_EVAL = PLACE | {"eval", "student_perplexity", "teacher_perplexity", "kl", "top1_agreement"}


TASKS = {  # kind: label, colour, ink of its number; "optimizer" and "idle" are drawn like kinds
    "teacher_forward": ("teacher forward", "#f0b04a", "#3a2600"),
    "teacher_ahead": ("teacher forward, next step", "#fbe3b5", "#6b4700"),
    "forward": ("forward", "#4a86c8", "#ffffff"),
    "backward": ("backward", "#3f9a63", "#ffffff"),
    "backward_input": ("backward, input part", "#3f9a63", "#ffffff"),
    "backward_weight": ("backward, weight part", "#a9d6b5", "#123d22"),
    "align": ("mixer alignment", "#8b6bb8", "#ffffff"),
    "optimizer": ("gradients and optimizer", "#9a9a9a", "#000000"),
    "idle": ("idle", "#eeeeee", "#000000"),
}
DRAWN_STEPS = 3  # of a trace, at most: the last ones


class ReportError(Exception):
    """What is wrong with the input, in one line."""


def number(value):
    """The value as a float; NaN for null and for everything that is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def parse(path):
    """-> (training records, evaluation records), each with ascending steps."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist; give the folder of a run that has trained a step") from None
    except UnicodeDecodeError:
        raise ReportError(f"{path} is not UTF-8 text") from None
    except OSError as e:
        raise ReportError(f"cannot read {path}: {e.strerror}") from None
    train, evaluations = [], []
    lines = text.split("\n")
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if i == len(lines):  # no newline yet: the run is writing it, or was killed while it did
                print(f"note: {path} line {i} is incomplete and left out", file=sys.stderr)
                continue
            raise ReportError(f"{path} line {i} is not JSON: {line.strip()[:60]}") from None
        if not isinstance(record, dict):
            raise ReportError(f"{path} line {i} is not a JSON object: {line.strip()[:60]}")
        step = record.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ReportError(f'{path} line {i} has no whole number "step"')
        if record.get("end"):
            continue
        if record.get("eval"):
            evaluations = [e for e in evaluations if e["step"] < step] + [record]
        else:
            if train and train[-1]["step"] >= step:  # resumed from an earlier checkpoint
                train = [t for t in train if t["step"] < step]
                evaluations = [e for e in evaluations if e["step"] <= step]
            train.append(record)
    if not train and not evaluations:
        raise ReportError(f"{path} holds no metrics yet")
    return train, evaluations


def column(records, key):
    return [number(r.get(key)) for r in records]


def has(records, key):
    return any(math.isfinite(v) for v in column(records, key))


def stage_spans(train):
    """[(name, first index, end index)] of consecutive records of one stage."""
    spans = []
    for i, record in enumerate(train):
        name = record.get("stage")
        if not spans or spans[-1][0] != name:
            spans.append([name, i, i + 1])
        spans[-1][2] = i + 1
    return spans


def smoothed(values, spans, window):
    """Centred running mean over finite values; it never crosses a stage boundary."""
    out = [math.nan] * len(values)
    for _, begin, end in spans:
        total, count = [0.0], [0]
        for v in values[begin:end]:
            finite = math.isfinite(v)
            total.append(total[-1] + (v if finite else 0.0))
            count.append(count[-1] + finite)
        for i in range(end - begin):
            low, high = max(0, i - window // 2), min(end - begin, i + window // 2 + 1)
            if count[high] > count[low]:
                out[begin + i] = (total[high] - total[low]) / (count[high] - count[low])
    return out


def skipped_steps(train):
    """Steps that were skipped: "skipped" is true there, or, as a count, rises there."""
    steps, before = [], 0
    for record in train:
        value = record.get("skipped")
        if value is True or (number(value) > before):
            steps.append(record["step"])
        if math.isfinite(number(value)):
            before = number(value)
    return steps


def duration(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def merged(intervals):
    """The same stretches of time as disjoint ones, in order."""
    out = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([begin, end])
    return out


def without(intervals, holes):
    """Disjoint stretches less other disjoint stretches."""
    out, first = [], 0
    for begin, end in intervals:
        while first < len(holes) and holes[first][1] <= begin:
            first += 1
        at, i = begin, first
        while i < len(holes) and holes[i][0] < end:
            if holes[i][0] > at:
                out.append([at, holes[i][0]])
            at = max(at, holes[i][1])
            i += 1
        if at < end:
            out.append([at, end])
    return out


def total(intervals):
    return sum(end - begin for begin, end in intervals)


class Rank:
    """What one rank of a trace did, in microseconds."""

    def __init__(self):
        self.name = ""
        self.steps = {}    # step: (begin, end)
        self.tasks = []    # (begin, end, kind, microbatch, chunk)
        self.phases = []   # (begin, end) of the optimizer
        self.waits = []    # (begin, end) for another stage or for all ranks

    def finish(self):
        self.waits = merged(self.waits)
        busy = without(merged([t[:2] for t in self.tasks] + self.phases), self.waits)
        steps = merged(self.steps.values())
        inside = without(busy, without([[-math.inf, math.inf]], steps))
        self.idle = 1 - total(inside) / total(steps) if total(steps) > 0 else math.nan


def read_trace(path):
    """-> {rank: Rank} of a trace.json, or a ReportError."""
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ReportError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, RecursionError):
        raise ReportError(f"{path} is not JSON") from None
    ranks = {}
    try:
        for event in trace["traceEvents"]:
            rank = ranks.setdefault(event["pid"], Rank())
            if event["ph"] == "M":
                if event["name"] == "process_name":
                    rank.name = event["args"]["name"]
                continue
            begin, arguments, category = float(event["ts"]), event["args"], event["cat"]
            span = (begin, begin + float(event["dur"]))
            if category == "step":
                rank.steps[arguments["step"]] = span
            elif category == "task":
                ahead = arguments["kind"] == "teacher_forward" and arguments["step_offset"] > 0
                kind = "teacher_ahead" if ahead else arguments["kind"]
                rank.tasks.append((*span, kind, arguments["microbatch"], arguments["chunk"]))
            elif category == "optimizer":
                rank.phases.append(span)
            elif category == "communication" and arguments["axis"] in ("pipeline", "world"):
                rank.waits.append(span)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ReportError(f"{path} is not a trace of this trainer: its events lack what a timeline needs") from None
    ranks = {number: ranks[number] for number in sorted(ranks) if ranks[number].steps}
    if not ranks:
        raise ReportError(f"{path} holds no steps")
    for rank in ranks.values():
        rank.finish()
    return ranks


def draw_timeline(axes, ranks):
    """One row a rank over the last traced steps."""
    steps = sorted(set.intersection(*(set(r.steps) for r in ranks.values())))[-DRAWN_STEPS:]
    if not steps:
        raise ReportError("the ranks of the trace have no step in common")
    begin = min(r.steps[steps[0]][0] for r in ranks.values())
    end = max(r.steps[steps[-1]][1] for r in ranks.values())
    unit, unit_name = (1e6, "s") if end - begin >= 1e6 else (1e3, "ms")

    def place(span):
        return ((span[0] - begin) / unit, (span[1] - span[0]) / unit)

    seen = set()
    for row, rank in enumerate(ranks.values()):
        bars = {"idle": [place((begin, end))]}
        numbers = []
        # What is drawn of a wait within a task is idle time: bars are the task less its waits.
        for *span, kind, microbatch, chunk in rank.tasks:
            if span[0] < end and span[1] > begin:
                work = without([span], [w for w in rank.waits if w[0] < span[1] and w[1] > span[0]])
                bars.setdefault(kind, []).extend(place(w) for w in work)
                if work:
                    numbers.append((max(work, key=lambda w: w[1] - w[0]), kind, microbatch, chunk))
        phases = [p for p in rank.phases if p[0] < end and p[1] > begin]
        bars["optimizer"] = [place(p) for p in without(merged(phases), rank.waits)]
        for kind, spans in bars.items():
            if spans:
                seen.add(kind)
                axes.broken_barh(spans, (row - 0.4, 0.8), facecolors=TASKS[kind][1], edgecolor="white",
                                 linewidth=0 if kind == "idle" else 0.3, zorder=1 if kind == "idle" else 2)
        for span, kind, microbatch, chunk in numbers if len(ranks) <= 16 else ():
            text = f"{microbatch}{chr(ord('a') + chunk)}" if rank_has_chunks(rank) else f"{microbatch}"
            if (span[1] - span[0]) / (end - begin) > 0.006 * len(text):
                x, width = place(span)
                axes.text(x + width / 2, row, text, ha="center", va="center", fontsize=6, color=TASKS[kind][2],
                          zorder=3, clip_on=True)
        axes.text(1.005, row, f"idle {100 * rank.idle:.1f} %", va="center", fontsize=8,
                  transform=axes.get_yaxis_transform())
    for step in steps:
        at = min(r.steps[step][0] for r in ranks.values())
        axes.axvline((at - begin) / unit, color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=4)
        axes.annotate(f"step {step}", ((at - begin) / unit, 1.01), xycoords=("data", "axes fraction"), va="bottom",
                      color=GREY, fontsize=8)
    axes.set_xlim(0, (end - begin) / unit)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(ranks)), [r.name or f"rank {n}" for n, r in ranks.items()])
    axes.set_xlabel(f"time, {unit_name}")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    traced = sorted(set().union(*(r.steps for r in ranks.values())))
    axes.set_title(f"Timeline of the ranks (traced: steps {traced[0]} to {traced[-1]}; numbers: microbatches)",
                   loc="left", fontweight="bold", pad=16)
    from matplotlib.patches import Patch
    entries = {TASKS[k][0]: Patch(facecolor=TASKS[k][1], label=TASKS[k][0]) for k in TASKS if k in seen}
    axes.legend(handles=list(entries.values()), loc="upper left", bbox_to_anchor=(0, -0.6 / (0.35 * len(ranks) + 0.3)),
                ncols=len(entries), frameon=False)


def rank_has_chunks(rank):
    return any(task[4] > 0 for task in rank.tasks)


class Report:
    """The panels of one figure over a common axis of steps."""

    def __init__(self, train, evaluations, ranks=None):
        self.train, self.evaluations = train, evaluations
        self.ranks = ranks  # of a trace: {number: Rank}
        self.steps = [r["step"] for r in train]
        self.spans = stage_spans(train)
        self.window = max(1, len(train) // 60)
        self.panels = []  # (title, axis label, draw)

    def add(self, title, label, draw):
        self.panels.append((title, label, draw))

    def line(self, axes, key, label=None, color=BLUE, style="-"):
        """A training series: as recorded in a light line, its running mean on top where there are many points."""
        values = column(self.train, key)
        # A single recorded point shows as a dot.
        marker = "o" if sum(math.isfinite(v) for v in values) <= 1 else None
        if self.window < 3:
            axes.plot(self.steps, values, style, color=color, label=label, linewidth=1.4, marker=marker)
            return
        axes.plot(self.steps, values, "-", color=color, alpha=0.22, linewidth=0.7)
        axes.plot(self.steps, smoothed(values, self.spans, self.window), style, color=color, label=label, linewidth=1.6)

    def points(self, axes, key, label, color, marker, scale=1.0):
        values = [v * scale for v in column(self.evaluations, key)]
        axes.plot([e["step"] for e in self.evaluations], values, "-", marker=marker, color=color, label=label,
                  linewidth=1.0, markersize=5, markeredgecolor="white", markeredgewidth=0.5)

    @staticmethod
    def scale(axes, *series):
        """Logarithmic where positive values span more than a factor of 8."""
        values = [v for s in series for v in s if math.isfinite(v)]
        if values and min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")

    @staticmethod
    def legend(axes, columns=1):
        """At the top right, with room made for it above the curves."""
        low, high = axes.get_ylim()
        share = 0.3 if columns > 1 else 0.2
        axes.set_ylim(low, high * (high / low) ** share if axes.get_yscale() == "log" else high + share * (high - low))
        axes.legend(loc="upper right", ncols=columns)

    def collect(self):
        train, evaluations = self.train, self.evaluations
        terms = [k for k in LOSS_TERMS if has(train, k)]
        if terms:
            def losses(axes):
                for key in terms:
                    self.line(axes, key, *LOSS_TERMS[key])
                self.scale(axes, *(column(train, k) for k in terms))
                self.legend(axes, 3)
            self.add("Training loss and its terms", "nats a token (cosine, MSE: no unit)", losses)
        if has(train, "kl") or has(evaluations, "kl"):
            def kl(axes):
                if has(train, "kl"):
                    self.line(axes, "kl", "training", VERMILION)
                if has(evaluations, "kl"):
                    self.points(axes, "kl", "evaluation", BLACK, "D")
                self.scale(axes, column(train, "kl"), column(evaluations, "kl"))
                self.legend(axes)
            self.add("KL divergence from the teacher", "KL (nats a token)", kl)
        perplexities = [k for k in ("student_perplexity", "teacher_perplexity") if has(evaluations, k)]
        if perplexities:
            def perplexity(axes):
                for key in perplexities:
                    name = key.split("_")[0]
                    self.points(axes, key, name, *((BLUE, "o") if name == "student" else (ORANGE, "s")))
                self.scale(axes, *(column(evaluations, k) for k in perplexities))
                self.legend(axes)
            self.add("Evaluation: perplexity", "perplexity a token", perplexity)
        if has(evaluations, "top1_agreement"):
            self.add("Evaluation: top-1 agreement with the teacher", "agreement (% of tokens)",
                     lambda axes: self.points(axes, "top1_agreement", None, GREEN, "o", 100.0))
        if has(train, "learning_rate"):
            def rate(axes):
                axes.plot(self.steps, column(train, "learning_rate"), color=BLUE, linewidth=1.4,
                          marker="o" if len(train) == 1 else None)
                rates = column(train, "learning_rate")
                self.scale(axes, rates)
                if axes.get_yscale() == "log":
                    # the last steps of a decay to 0 would take the whole panel
                    axes.set_ylim(bottom=max(axes.get_ylim()[0], max(v for v in rates if math.isfinite(v)) * 1e-5))
            self.add("Learning rate", "learning rate", rate)
        if has(train, "gradient_norm"):
            def norm(axes):
                self.line(axes, "gradient_norm", "gradient norm", PURPLE)
                self.scale(axes, column(train, "gradient_norm"))
                skipped = skipped_steps(train)
                if skipped:
                    # at the panel's foot: a skipped step's norm is often not finite
                    axes.plot(skipped, [0.03] * len(skipped), "x", color=BLACK, transform=axes.get_xaxis_transform(),
                              label=f"skipped steps ({len(skipped)})", markersize=6, clip_on=False)
                    self.legend(axes)
            self.add("Gradient norm", "global L2 norm", norm)
        if has(train, "tokens_per_second"):
            def throughput(axes):
                self.line(axes, "tokens_per_second", color=GREEN)
                axes.set_ylim(bottom=0)
            self.add("Throughput", "tokens/s", throughput)
        keys = dict.fromkeys(k for r in train for k in r)
        for key in keys:
            if key not in LOSS_TERMS and key not in OTHER_TRAIN and has(train, key):
                self.add(key.replace("_", " "), key, lambda axes, key=key: self.line(axes, key))
        keys = dict.fromkeys(k for r in evaluations for k in r)
        for key in keys:
            if key not in KNOWN_EVAL and has(evaluations, key):
                self.add("Evaluation: " + key.replace("_", " "), key,
                         lambda axes, key=key: self.points(axes, key, None, BLUE, "o"))
        if not self.panels:
            raise ReportError("the metrics hold no finite number to draw")

    def summary(self):
        parts = []
        if self.train:
            last = self.train[-1]
            parts.append(f"{len(self.train):,} steps to step {last['step']:,}")
            skipped = len(skipped_steps(self.train))
            if skipped:
                parts.append(f"{skipped:,} skipped")
            tokens = number(last.get("tokens"))
            if math.isfinite(tokens):
                parts.append(f"{tokens:,.0f} tokens")
            seconds = sum(v for v in column(self.train, "seconds") if math.isfinite(v))
            if seconds:
                parts.append(duration(seconds))
            for key, name in (("loss", "last loss"), ("kl", "last KL")):
                if math.isfinite(number(last.get(key))):
                    parts.append(f"{name} {number(last[key]):.4g}")
        if self.evaluations:
            parts.append(f"{len(self.evaluations)} evaluations")
        return ", ".join(parts)

    def draw(self, plt, title):
        self.collect()
        columns = 1 if len(self.panels) == 1 else 2
        rows = -(-len(self.panels) // columns)
        timeline = 0.35 * len(self.ranks) + 1.4 if self.ranks else 0
        figure = plt.figure(figsize=(6.6 * max(columns, 2 if self.ranks else 1), 2.9 * rows + 0.7 + timeline),
                            layout="constrained")
        curves, below = figure, None
        if self.ranks:
            curves, below = figure.subfigures(2, 1, height_ratios=[2.9 * rows + 0.7, timeline])
        cells = list(curves.subplots(rows, columns, squeeze=False, sharex=True).flat)
        for axes, (name, label, draw) in zip(cells, self.panels):
            draw(axes)
            axes.set_title(name, loc="left", fontweight="bold", pad=16 if len(self.spans) > 1 else 6)
            axes.set_ylabel(label)
            axes.grid(True, color="#dddddd", linewidth=0.6)
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
            axes.spines[["top", "right"]].set_visible(False)
            for before, here in zip(self.spans, self.spans[1:]):
                axes.axvline((self.steps[before[2] - 1] + self.steps[here[1]]) / 2, color=GREY, linestyle=(0, (4, 3)),
                             linewidth=0.9)
            if len(self.spans) > 1:
                for stage, begin, _ in self.spans:
                    name = stage if isinstance(stage, str) else f"stage {stage}"
                    axes.annotate(name, (self.steps[begin], 1.01), xycoords=("data", "axes fraction"), va="bottom",
                                  color=GREY, fontsize=8)
        for axes in cells[len(self.panels):]:
            axes.set_visible(False)
        if below:
            draw_timeline(below.subplots(), self.ranks)
        curves.suptitle(f"{title}\n{self.summary()}", fontsize=11)
        return figure


def main():
    parser = argparse.ArgumentParser(description="Draw the metrics of a run.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR",
                        help="folder that holds metrics.jsonl, and perhaps trace.json")
    parser.add_argument("--out", type=Path, help="picture to write: .png, .svg or .pdf (default: RUN_DIR/report.png)")
    parser.add_argument("--trace", type=Path, help="timeline to draw (default: RUN_DIR/trace.json, when there is one)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "report.png"
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ReportError(f"--out {out}: the suffix must be .png, .svg or .pdf")
    if not arguments.run.is_dir():
        raise ReportError(f"{arguments.run} is not a folder; give the folder of a run, which holds metrics.jsonl")
    train, evaluations = parse(arguments.run / "metrics.jsonl")
    trace = arguments.trace or arguments.run / "trace.json"
    ranks = read_trace(trace) if arguments.trace or trace.exists() else None
    try:
        import matplotlib
    except ImportError:
        raise ReportError("matplotlib is missing: tools/bootstrap.sh --plots installs it") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "legend.framealpha": 0.85})
    figure = Report(train, evaluations, ranks).draw(plt, arguments.run.resolve().name)
    # Under another name first: a reader never sees half a picture.
    partial = out.with_name(f".{out.name}.partial")
    try:
        figure.savefig(partial, format=out.suffix[1:].lower(), dpi=130)
        os.replace(partial, out)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise ReportError(f"cannot write {out}: {e.strerror}") from None
    print(out)


if __name__ == "__main__":
    try:
        main()
    except ReportError as e:
        sys.exit(f"error: {e}")
