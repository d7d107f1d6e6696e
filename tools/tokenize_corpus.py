#!/usr/bin/env python3
"""Turns text into a token dataset for `deltapipe train`, with a Hugging Face tokenizer.

    tools/tokenize_corpus.py --tokenizer DIR --out train.h5 corpus/*.jsonl notes.txt more.parquet

Inputs, told apart by their suffix:
  *.jsonl    one JSON object a line, the text under --field
  *.parquet  one row a document, the text in column --field (needs pyarrow)
  others     text: the whole file is one document, or one a paragraph with --split-blank-lines

Every document is encoded by itself without the tokenizer's own special tokens, then ends with eos (and begins with bos
with --prepend-bos). Documents without any token are left out. Order is that of the inputs, whatever --workers is.

The output is HDF5: `tokens` uint32 [N] and `document_offsets` uint64 [D+1], both contiguous, and the attributes format,
version, tokenizer, tokenizer_hash (XXH3-64 of tokenizer.json), vocabulary, bos, eos (-1: none). It is written under a
temporary name and renamed at the end: it exists whole or not at all.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH_CHARACTERS = 1 << 20  # what a worker gets at once: about 0.1 s of work
BATCH_DOCUMENTS = 4096
COPY_BLOCK = 1 << 20  # elements copied at once into the final file
COMPRESSED = {".gz", ".zst", ".xz", ".bz2", ".zip"}


class Failure(Exception):
    """One line for the user."""


# ---------------------------------------------------------------------------------------------------- reading documents


def decode(raw, place, replace_invalid):
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        if replace_invalid:
            return raw.decode("utf-8", errors="replace")
        raise Failure(f"{place}: invalid UTF-8 at byte {e.start} (--replace-invalid-utf8 would accept it)") from None


def check_text(value, field, place, replace_invalid):
    if not isinstance(value, str):
        found = "null" if value is None else type(value).__name__
        raise Failure(f"{place}: '{field}' is {found}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        if not replace_invalid:
            hint = "--replace-invalid-utf8 would accept it"
            raise Failure(f"{place}: '{field}' holds a lone surrogate ({hint})") from None
        value = value.encode("utf-8", errors="replace").decode("utf-8")
    return value


def read_text(path, options):
    raw = path.read_bytes()
    yield decode(raw, path, options.replace_invalid_utf8), len(raw)


def read_paragraphs(path, options):
    lines, size = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            size += len(line)
            if line.strip():
                lines.append(decode(line, f"{path}:{number}", options.replace_invalid_utf8))
            elif lines:
                yield "".join(lines), size
                lines, size = [], 0
    if lines:
        yield "".join(lines), size


def read_jsonl(path, options):
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(decode(line, place, options.replace_invalid_utf8))
            except (ValueError, RecursionError) as e:
                raise Failure(f"{place}: not JSON: {e}") from None
            if not isinstance(record, dict) or options.field not in record:
                raise Failure(f"{place}: expected a JSON object with the key '{options.field}'")
            yield check_text(record[options.field], options.field, place, options.replace_invalid_utf8), len(line)


def read_parquet(path, options):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise Failure(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if options.field not in file.schema_arrow.names:
                raise Failure(f"{path}: no column '{options.field}', only {', '.join(file.schema_arrow.names)}")
            rows = max(file.metadata.num_rows, 1)
            share = path.stat().st_size / rows
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[options.field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield check_text(value, options.field, f"{path}: row {row}", options.replace_invalid_utf8), share
    except pyarrow.ArrowException as e:
        raise Failure(f"{path}: not readable as Parquet: {str(e).splitlines()[0]}") from None


def reader_of(path, options):
    if path.suffix == ".jsonl":
        return read_jsonl
    if path.suffix == ".parquet":
        return read_parquet
    if path.suffix in COMPRESSED:
        raise Failure(f"{path}: compressed inputs are not read, decompress it first")
    return read_paragraphs if options.split_blank_lines else read_text


def batches_of(options):
    """([text, ...], input bytes consumed) in input order, each batch small unless one document is large."""
    texts, characters, consumed = [], 0, 0
    for path in options.files:
        for text, size in reader_of(path, options)(path, options):
            texts.append(text)
            characters += len(text)
            consumed += size
            if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield texts, consumed
                texts, characters, consumed = [], 0, 0
    if texts:
        yield texts, consumed


# ------------------------------------------------------------------------------------------------------------- encoding


def load_tokenizer(path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()  # tokenizer.json may carry both from its last use
    tokenizer.no_padding()
    return tokenizer


class Encoder:
    """One a worker process: loads the tokenizer once, then maps batches of text to arrays."""

    instance = None

    def __init__(self, path, bos, eos):
        self.tokenizer = load_tokenizer(path)
        self.head = [] if bos is None else [bos]
        self.tail = [] if eos is None else [eos]

    def encode(self, texts):
        """tokens uint32 of all documents in a row, their lengths uint64; documents without a token are dropped."""
        parts, lengths = [], []
        for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False):
            if not encoding.ids:
                continue
            ids = self.head + encoding.ids + self.tail
            parts.append(np.array(ids, dtype="<u4"))
            lengths.append(len(ids))
        tokens = np.concatenate(parts) if parts else np.empty(0, "<u4")
        return tokens, np.array(lengths, dtype="<u8")


def start_worker(path, bos, eos):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallel over processes already
    Encoder.instance = Encoder(path, bos, eos)


def encode_in_worker(texts):
    return Encoder.instance.encode(texts)


def encoded_batches(options, path, bos, eos):
    """(tokens, lengths, documents given, input bytes) in input order, with a bounded number of batches in flight."""
    if options.workers == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encoder = Encoder(path, bos, eos)
        for texts, consumed in batches_of(options):
            yield *encoder.encode(texts), len(texts), consumed
        return
    # Spawned, not forked: the tokenizer library may hold threads and locks that a fork would copy in an unknown state.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(options.workers, context, start_worker, (str(path), bos, eos))
    waiting = collections.deque()
    try:
        for texts, consumed in batches_of(options):
            waiting.append((pool.submit(encode_in_worker, texts), len(texts), consumed))
            if len(waiting) > 2 * options.workers:
                future, documents, size = waiting.popleft()
                yield *future.result(), documents, size
        while waiting:
            future, documents, size = waiting.popleft()
            yield *future.result(), documents, size
    except concurrent.futures.process.BrokenProcessPool:
        raise Failure("a worker process died, most likely out of memory: try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


# -------------------------------------------------------------------------------------------------------------- writing


class DatasetWriter:
    """Tokens and offsets go to unnamed files beside the output; finish() copies them into contiguous HDF5 datasets,
    whose size has to be known in advance."""

    def __init__(self, out):
        self.out = out
        self.tokens, self.documents = 0, 0
        self.token_spool = tempfile.TemporaryFile(dir=out.parent)
        self.offset_spool = tempfile.TemporaryFile(dir=out.parent)
        self.offset_spool.write(np.zeros(1, "<u8").tobytes())

    def append(self, tokens, lengths):
        self.token_spool.write(tokens.tobytes())
        self.offset_spool.write((self.tokens + np.cumsum(lengths, dtype="<u8")).astype("<u8").tobytes())
        self.tokens += len(tokens)
        self.documents += len(lengths)

    def finish(self, attributes):
        import h5py

        temporary = self.out.with_name(f".{self.out.name}.tmp.{os.getpid()}")
        try:
            # A format that HDF5 1.10 reads and that checksums its metadata, which the oldest does not.
            with h5py.File(temporary, "w", libver=("v110", "v110")) as file:
                for name, value in attributes.items():
                    file.attrs[name] = value
                self.copy(self.token_spool, file.create_dataset("tokens", (self.tokens,), "<u4"))
                self.copy(self.offset_spool, file.create_dataset("document_offsets", (self.documents + 1,), "<u8"))
            sync(temporary)
            os.replace(temporary, self.out)
            sync(self.out.parent)
        except RuntimeError as e:  # how h5py reports some failed writes
            raise Failure(f"cannot write {temporary}: {e}") from None
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def copy(spool, dataset):
        spool.seek(0)
        for begin in range(0, len(dataset), COPY_BLOCK):
            end = min(begin + COPY_BLOCK, len(dataset))
            dataset[begin:end] = np.frombuffer(spool.read((end - begin) * dataset.dtype.itemsize), dataset.dtype)


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Progress:
    """A line that redraws itself on a terminal; silent elsewhere."""

    def __init__(self, total_bytes):
        self.total, self.done = max(total_bytes, 1), 0
        self.begin = self.drawn = time.monotonic()
        self.shown = sys.stderr.isatty()

    def advance(self, size, tokens):
        self.done += size
        now = time.monotonic()
        if not self.shown or now - self.drawn < 0.2:
            return
        self.drawn = now
        share = min(self.done / self.total, 1.0)
        elapsed = now - self.begin
        left = elapsed * (1 - share) / share if share > 0 else 0
        bar = "#" * round(30 * share)
        sys.stderr.write(
            f"\r[{bar:30}] {100 * share:5.1f} %  {tokens / 1e6:.1f} M tokens  {tokens / elapsed / 1e6:.2f} M/s"
            f"  {int(left) // 60}:{int(left) % 60:02d} left \x1b[K"
        )
        sys.stderr.flush()

    def close(self):
        if self.shown:
            sys.stderr.write("\r\x1b[K")


# ----------------------------------------------------------------------------------------------------------------- main


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise Failure(f"{path}: not JSON: {e}") from None


def special_token(which, given, folder, tokenizer):
    """Id of `which` ("bos" or "eos"): the option, else the tokenizer's configuration, else the model's, else None."""
    if given is not None:
        return None if given < 0 else given
    token = read_json(folder / "tokenizer_config.json").get(f"{which}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token is not None:
        found = tokenizer.token_to_id(token)
        if found is None:
            raise Failure(f"{folder}/tokenizer_config.json: {which}_token '{token}' is not in the vocabulary")
        return found
    found = read_json(folder / "config.json").get(f"{which}_token_id")
    return found[0] if isinstance(found, list) and found else found


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0], epilog=__doc__.split("\n\n", 1)[1], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="DIR", help="folder with tokenizer.json")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.h5")
    parser.add_argument("--field", default="text", help="key or column of the text (default: text)")
    parser.add_argument("--split-blank-lines", action="store_true", help="text files: blank lines separate documents")
    parser.add_argument("--bos", type=int, metavar="ID", help="instead of the configured one; -1: none")
    parser.add_argument("--eos", type=int, metavar="ID", help="instead of the configured one; -1: none")
    parser.add_argument("--prepend-bos", action="store_true", help="begin every document with bos")
    parser.add_argument("--replace-invalid-utf8", action="store_true", help="U+FFFD instead of an error")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error("--workers must be at least 1")
    return options


def tokenize(options):
    import xxhash

    description = options.tokenizer / "tokenizer.json"
    if not description.is_file():
        raise Failure(f"{description}: no such file; --tokenizer takes a folder that holds tokenizer.json")
    for path in options.files:  # before hours of work
        reader_of(path, options)
        if not path.is_file():
            raise Failure(f"{path}: no such file")
        if options.out.exists() and path.samefile(options.out):
            raise Failure(f"{path} is both an input and the output")
    if not options.out.parent.is_dir():
        raise Failure(f"{options.out.parent}: no such folder for --out")
    try:
        tokenizer = load_tokenizer(description)
    except Exception as e:  # the library raises bare Exception
        raise Failure(f"{description}: not a tokenizer: {e}") from None
    vocabulary = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    bos = special_token("bos", options.bos, options.tokenizer, tokenizer)
    eos = special_token("eos", options.eos, options.tokenizer, tokenizer)
    for which, token in (("bos", bos), ("eos", eos)):
        if token is not None and not 0 <= token < vocabulary:
            raise Failure(f"{which} {token} is not in the vocabulary of {vocabulary} ids")
    if eos is None and options.eos is None:
        raise Failure(f"{options.tokenizer} names no eos token: give --eos ID, or --eos -1 for none")
    if options.prepend_bos and bos is None:
        raise Failure(f"--prepend-bos, but {options.tokenizer} names no bos token: give --bos ID")

    begin = time.monotonic()
    size = sum(path.stat().st_size for path in options.files)
    progress = Progress(size)
    writer = DatasetWriter(options.out)
    given = 0
    try:
        for tokens, lengths, documents, consumed in encoded_batches(
            options, description, bos if options.prepend_bos else None, eos
        ):
            writer.append(tokens, lengths)
            given += documents
            progress.advance(consumed, writer.tokens)
    finally:
        progress.close()
    if writer.documents == 0:
        raise Failure("the inputs hold no document with any text")
    writer.finish({
        "format": "deltapipe-tokens",
        "version": np.uint64(1),
        "tokenizer": options.tokenizer.resolve().name,
        "tokenizer_hash": xxhash.xxh3_64_hexdigest(description.read_bytes()),
        "vocabulary": np.uint64(vocabulary),
        "bos": np.int64(-1 if bos is None else bos),
        "eos": np.int64(-1 if eos is None else eos),
    })
    empty = f", {given - writer.documents} empty ones left out" if given > writer.documents else ""
    print(f"{options.out}: {writer.documents} documents{empty}, {writer.tokens} tokens from {size} bytes"
          f" in {time.monotonic() - begin:.1f} s")


def main(arguments=None):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing half-written stays
    try:
        tokenize(parse_arguments(arguments))
    except (Failure, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except ImportError as e:
        print(f"error: {e}; pip install tokenizers h5py numpy xxhash", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
