"""tools/report.py on metrics as the trainer writes them, and on what it must refuse."""
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
