#!/usr/bin/env python3
"""A token dataset of real text for the step benchmark: trains a byte-level BPE tokenizer on a folder of text and
tokenizes the folder with it.

    tools/fetch_text.sh data/text
    tools/bench/step/make_data.py data/text --out data/bench.h5 --tokens 32769    # pip install tokenizers h5py

With one window of tokens every step sees the same ones, and its loss must fall.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from tokenizers import ByteLevelBPETokenizer


def keep_first(path: Path, count: int) -> None:
    shorter = path.with_suffix(".part")  # HDF5 does not give back what is deleted
    with h5py.File(path) as old, h5py.File(shorter, "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value
        tokens = old["tokens"][:count]
        offsets = old["document_offsets"][:]
        new["tokens"] = tokens
        new["document_offsets"] = np.append(offsets[offsets < len(tokens)], np.uint64(len(tokens)))
    shorter.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="text files (*.txt), searched for below it")
    parser.add_argument("--out", required=True, type=Path, help="the dataset to write (.h5)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens that the tokenizer learns")
    parser.add_argument("--tokens", type=int, help="keep that many, from the first")
    args = parser.parse_args()
    files = sorted(str(p) for p in args.folder.rglob("*.txt"))
    if not files:
        sys.exit(f"error: no *.txt below {args.folder}")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(files, vocab_size=args.vocabulary, special_tokens=["<s>", "</s>"], show_progress=False)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
        convert = Path(__file__).resolve().parents[2] / "tokenize_corpus.py"
        done = subprocess.run([sys.executable, convert, "--tokenizer", folder, "--out", args.out, *files], check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)
    if args.tokens:
        keep_first(args.out, args.tokens)


if __name__ == "__main__":
    main()
