"""tools/report.py on metrics and traces as the trainer writes them, and on what it must refuse."""
import json
import pathlib
import subprocess
import sys

import pytest

REPORT = pathlib.Path(__file__).resolve().parents[2] / "tools" / "report.py"


def run(*arguments):
    return subprocess.run([sys.executable, str(REPORT), *map(str, arguments)], capture_output=True, text=True)


def step(i, stage, **more):
    return {"step": i, "stage": stage, "stage_step": i, "tokens": 512 * i, "loss": 3.0 / i, "ce": 2.5 / i,
            "learning_rate": 1e-3 / i, "gradient_norm": 1.0, "tokens_per_second": 1e4, "seconds": 0.05, "skipped": 0,
            **more}


@pytest.fixture
def folder(tmp_path):
    lines = [{"eval": True, "step": 0, "stage": "align", "student_perplexity": 40.0, "tokens": 100}]
    lines += [step(i, "align" if i <= 10 else "distill", kl=1.0 / i) for i in range(1, 31)]
    lines[5]["loss"] = None  # a skipped step: JSON has no NaN
    lines += [{"eval": True, "step": 30, "stage": "distill", "student_perplexity": 5.0, "teacher_perplexity": 4.8,
               "kl": 0.06, "top1_agreement": 0.87, "tokens": 100},
              {"end": True, "step": 30, "tokens": 15360, "seconds": 2.0, "peak_rss_bytes": 1, "stopped_by_signal": 0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return tmp_path


def test_draws_png_and_svg(folder):
    assert run(folder).returncode == 0
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    out = folder / "curves.svg"
    assert run(folder, "--out", out).returncode == 0
    text = out.read_text()
    assert "<svg" in text
    assert "peak rss" not in text, "a process's closing line is no step"


def test_an_unfinished_last_line_is_left_out(folder):
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 31, "lo')
    result = run(folder)
    assert result.returncode == 0
    assert "incomplete" in result.stderr


@pytest.mark.parametrize("content, word", [(None, "does not exist"), ("", "no metrics"), ("not json\n{}\n", "not JSON")])
def test_bad_input_is_one_line(tmp_path, content, word):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = run(tmp_path)
    assert result.returncode == 1
    assert word in result.stderr and result.stderr.count("\n") == 1


def span(rank, begin, end, category, **arguments):
    return {"ph": "X", "pid": rank, "tid": 2 if category == "communication" else 1, "ts": begin, "dur": end - begin,
            "cat": category, "name": category, "args": {"step": 5, **arguments}}


def task(rank, begin, end, kind, microbatch, step_offset=0):
    return span(rank, begin, end, "task", kind=kind, microbatch=microbatch, chunk=0, step_offset=step_offset)


@pytest.fixture
def trace(folder):
    """Two ranks, a step of 1,000 microseconds: rank 0 works half of it, rank 1 three fifths."""
    events = [{"ph": "M", "pid": r, "name": "process_name", "args": {"name": f"rank {r}: data 0, pipeline {r}, sequence 0"}}
              for r in (0, 1)]
    for rank in (0, 1):
        events += [span(rank, 0, 1000, "step"), span(rank, 900, 1000, "optimizer"), span(rank, 1000, 5000, "evaluation")]
    events += [task(0, 0, 300, "forward", 0), task(0, 600, 700, "teacher_forward", 1, step_offset=1),
               task(1, 0, 600, "backward", 0),
               # Waiting for the stage before is idle time, within a sequence it is work, and so are sends.
               span(1, 100, 200, "communication", axis="pipeline", purpose="hidden_state", bytes=0, messages=0),
               span(1, 300, 350, "communication", axis="sequence", purpose="kda_state", bytes=8, messages=1)]
    file = folder / "trace.json"
    file.write_text(json.dumps({"traceEvents": events}))
    return file


def test_draws_the_timeline_of_a_trace(folder, trace):
    out = folder / "report.svg"
    assert run(folder, "--out", out).returncode == 0
    text = out.read_text()
    for words in ("idle 50.0 %", "idle 40.0 %", "rank 1: data 0, pipeline 1, sequence 0", "step 5",
                  "teacher forward, next step", "forward", "backward", "gradients and optimizer"):
        assert f"<!-- {words} -->" in text, words
    assert "mixer alignment" not in text, "no task of that kind"


def test_a_trace_elsewhere(folder, trace):
    elsewhere = folder / "other.json"
    trace.rename(elsewhere)
    out = folder / "report.svg"
    assert run(folder, "--out", out).returncode == 0
    assert "Timeline" not in out.read_text()
    assert run(folder, "--out", out, "--trace", elsewhere).returncode == 0
    assert "Timeline" in out.read_text()


@pytest.mark.parametrize("content, word", [
    (None, "cannot read"), ("{", "not JSON"), ("[]", "not a trace"), ('{"traceEvents": []}', "no steps"),
    ('{"traceEvents": [{"ph": "X", "pid": 0, "ts": 0, "dur": 1, "cat": "task", "args": {}}]}', "not a trace")])
def test_bad_traces_are_one_line(folder, content, word):
    if content is not None:
        (folder / "trace.json").write_text(content)
    result = run(folder, "--trace", folder / "trace.json")
    assert result.returncode == 1
    assert word in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "report.png").exists()
