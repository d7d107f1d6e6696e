#!/usr/bin/env python3
"""Makes tokens.h5: a dataset of five words written by tools/tokenize_corpus.py through h5py, for the test of the C++
reader. Needs tokenizers, h5py, numpy, xxhash."""

import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

here = Path(__file__).resolve().parent
words = ["<s>", "</s>", "red", "green", "blue"]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
with tempfile.TemporaryDirectory() as folder:
    colours = Path(folder) / "colours"
    colours.mkdir()
    tokenizer.save(str(colours / "tokenizer.json"))
    text = colours / "text.txt"
    text.write_text("red green\n\nblue\n\ngreen green red\n")
    subprocess.run(
        [sys.executable, here.parents[1] / "tools" / "tokenize_corpus.py", "--tokenizer", colours, "--bos", "0",
         "--eos", "1", "--prepend-bos", "--split-blank-lines", "--out", here / "tokens.h5", text], check=True,
    )
