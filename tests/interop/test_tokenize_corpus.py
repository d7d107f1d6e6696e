"""tools/tokenize_corpus.py against direct use of the tokenizer, read back with h5py."""

import json
import random
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOOL = Path(__file__).resolve().parents[2] / "tools" / "tokenize_corpus.py"
WORDS = "the quick brown fox jumps over a lazy dog; señor Łukasz naïvely 東京 emoji 🦊 x=1 {}".split()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE that by itself truncates, pads and adds special tokens: none of it may reach the data."""
    folder = tmp_path_factory.mktemp("tiny-bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(random_documents(1, 200), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=1)
    tokenizer.save(str(folder / "tokenizer.json"))
    configuration = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    return folder


def random_documents(seed, count):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(1, 60))) for _ in range(count)]


def expected_documents(folder, texts, head=(), tail=(1,)):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [[*head, *ids, *tail] for ids in encoded if ids]


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def run_ok(*arguments):
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_error(folder, *arguments):
    """One line on standard error and nothing new in the folder of the output."""
    before = sorted(folder.iterdir())
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert sorted(folder.iterdir()) == before
    return done.stderr


def read(path):
    with h5py.File(path, "r") as file:
        tokens, offsets = file["tokens"], file["document_offsets"]
        assert tokens.dtype == np.dtype("<u4") and offsets.dtype == np.dtype("<u8")
        assert tokens.chunks is None and offsets.chunks is None  # contiguous
        assert tokens.id.get_offset() is not None
        bounds = offsets[:].tolist()
        assert bounds[0] == 0 and bounds[-1] == len(tokens)
        values = tokens[:].tolist()
        return [values[a:b] for a, b in zip(bounds, bounds[1:])], dict(file.attrs)


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def test_jsonl_equals_direct_encoding(tokenizer_folder, tmp_path):
    texts = random_documents(2, 300)
    texts[17] = ""
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    out = tmp_path / "out.h5"
    report = run_ok("--tokenizer", tokenizer_folder, "--out", out, source)
    documents, attributes = read(out)
    assert documents == expected_documents(tokenizer_folder, texts)
    assert len(documents) == 299 and "1 empty" in report
    assert attributes["format"] == "deltapipe-tokens"
    assert attributes["version"] == 1
    assert attributes["vocabulary"] == 320
    assert (attributes["bos"], attributes["eos"]) == (0, 1)
    assert attributes["tokenizer"] == tokenizer_folder.name
    content = (tokenizer_folder / "tokenizer.json").read_bytes()
    assert attributes["tokenizer_hash"] == xxhash.xxh3_64_hexdigest(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out.h5"]


def test_text_files_are_documents(tokenizer_folder, tmp_path):
    texts = ["one\n\ntwo\r\nthree", "\ufefffour \u2028 five\n", "six"]
    files = []
    for i, text in enumerate(texts):
        files.append(tmp_path / f"{i}.txt")
        files[-1].write_bytes(text.encode())
    out = tmp_path / "out.h5"
    run_ok("--tokenizer", tokenizer_folder, "--out", out, "--prepend-bos", *files)
    assert read(out)[0] == expected_documents(tokenizer_folder, texts, head=(0,))


def test_blank_lines_separate_documents(tokenizer_folder, tmp_path):
    source = tmp_path / "a.txt"
    source.write_text("\n\none\ntwo\n\n \t \nthree\n\nfour")
    out = tmp_path / "out.h5"
    run_ok("--tokenizer", tokenizer_folder, "--out", out, "--split-blank-lines", source)
    assert read(out)[0] == expected_documents(tokenizer_folder, ["one\ntwo\n", "three\n", "four"])


def test_parquet_column(tokenizer_folder, tmp_path):
    source, out = tmp_path / "a.parquet", tmp_path / "out.h5"
    common = ("--tokenizer", tokenizer_folder, "--out", out, "--field", "body", source)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        source.write_bytes(b"PAR1")
        assert "pip install pyarrow" in run_error(tmp_path, *common)
        return
    texts = random_documents(3, 50)
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(50)), "body": texts}), source, row_group_size=7)
    run_ok(*common)
    assert read(out)[0] == expected_documents(tokenizer_folder, texts)
    assert "no column 'other'" in run_error(tmp_path, *common, "--field", "other")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["fox", None]}), source)
    assert "row 2: 'body' is null" in run_error(tmp_path, *common)
    source.write_text("no Parquet")
    assert "not readable as Parquet" in run_error(tmp_path, *common)


def test_order_and_content_do_not_depend_on_workers(tokenizer_folder, tmp_path):
    # Several batches, some slow and some fast, so that workers finish out of order.
    texts = random_documents(4, 3000)
    texts[100] = "lazy dog " * 200_000
    texts[200] = "fox " * 300_000
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    contents = []
    for workers in (1, 3):
        out = tmp_path / f"out{workers}.h5"
        run_ok("--tokenizer", tokenizer_folder, "--out", out, "--workers", workers, source, source)
        contents.append(read(out))
    assert contents[0] == contents[1]
    expected = expected_documents(tokenizer_folder, texts)
    assert contents[0][0] == expected + expected


def test_special_tokens_from_options_and_model_config(tokenizer_folder, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    source = write_jsonl(tmp_path / "a.jsonl", ["fox"])
    out = tmp_path / "out.h5"
    common = ("--tokenizer", folder, "--out", out, source)
    assert "no eos" in run_error(tmp_path, *common)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [7, 8]}))
    run_ok(*common)
    documents, attributes = read(out)
    assert documents == expected_documents(folder, ["fox"], tail=(7,))
    assert (attributes["bos"], attributes["eos"]) == (5, 7)
    run_ok(*common, "--eos", 9, "--bos", 11, "--prepend-bos")
    assert read(out)[0] == expected_documents(folder, ["fox"], head=(11,), tail=(9,))
    run_ok(*common, "--eos", -1, "--bos", -1)
    documents, attributes = read(out)
    assert documents == expected_documents(folder, ["fox"], tail=())
    assert (attributes["bos"], attributes["eos"]) == (-1, -1)
    assert "not in the vocabulary" in run_error(tmp_path, *common, "--eos", 320)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "half', ":3: not JSON"),
        (b'["text"]', ":3: expected a JSON object"),
        (b'{"body": "x"}', ":3: expected a JSON object with the key 'text'"),
        (b'{"text": null}', ":3: 'text' is null"),
        (b'{"text": 7}', ":3: 'text' is int"),
        (b'{"text": "\xff"}', ":3: invalid UTF-8 at byte 10"),
        (b'{"text": "\\ud800"}', ":3: 'text' holds a lone surrogate"),
        (b"[" * 100_000, ":3: not JSON"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named(tokenizer_folder, tmp_path, line, complaint, workers):
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"text": "fox"}\n\n' + line + b"\n")
    out = tmp_path / "out.h5"
    out.write_text("older")
    message = run_error(tmp_path, "--tokenizer", tokenizer_folder, "--out", out, "--workers", workers, source)
    assert f"{source}{complaint}" in message
    assert out.read_text() == "older"


def test_replaced_utf8(tokenizer_folder, tmp_path):
    source = tmp_path / "a.txt"
    source.write_bytes(b"fox \xff dog")
    out = tmp_path / "out.h5"
    common = ("--tokenizer", tokenizer_folder, "--out", out, source)
    assert "invalid UTF-8 at byte 4" in run_error(tmp_path, *common)
    run_ok(*common, "--replace-invalid-utf8")
    assert read(out)[0] == expected_documents(tokenizer_folder, ["fox \ufffd dog"])


def test_wrong_calls_leave_nothing(tokenizer_folder, tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", ["fox"])
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(b"")
    out = tmp_path / "out.h5"
    tool = ("--tokenizer", tokenizer_folder, "--out", out)
    assert "no such file" in run_error(tmp_path, *tool, tmp_path / "missing.txt")
    assert "no such file" in run_error(tmp_path, "--tokenizer", tmp_path, "--out", out, source)
    assert "no such folder" in run_error(tmp_path, *tool, "--out", tmp_path / "x/o.h5", source)
    assert "no document" in run_error(tmp_path, *tool, empty)
    assert "decompress" in run_error(tmp_path, *tool, zipped)
    assert "both" in run_error(tmp_path, "--tokenizer", tokenizer_folder, "--out", source, source)


def test_full_disk_leaves_nothing(tokenizer_folder, tmp_path):
    """A file-size limit stands in for a full disk: writes fail with EFBIG instead of ENOSPC."""
    source = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 4000))
    before = sorted(tmp_path.iterdir())
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, TOOL, "--tokenizer", tokenizer_folder, "--out", tmp_path / "out.h5",
         "--workers", "1", source], capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    assert sorted(tmp_path.iterdir()) == before
