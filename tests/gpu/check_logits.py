#!/usr/bin/env python3
"""check_logits.py EXPORT LOGITS.npy TOKENS: an exported student, loaded by transformers on the CPU in float32, against
logits that the trainer computed on a GPU in bfloat16 for the same tokens (1,2,3).

About thirty roundings to bfloat16, relative error 2^-9 at most and 0.0011 in the mean square each, lie between the
tokens and a logit of a model of a few layers, and the embedding and logits themselves are rounded: 30^0.5 x 0.0011 =
0.006 of a logit's size is expected, 0.03 is an error.
"""
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, file, text = sys.argv[1:4]
tokens = torch.tensor([[int(t) for t in text.split(",")]])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
with torch.no_grad():
    expected = model(tokens).logits[0].numpy()
got = np.load(file)
error = float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))
agree = float(np.mean(got.argmax(-1) == expected.argmax(-1)))
print(f"logits of {got.shape[0]} tokens: error {error:.4f} of their size, {100 * agree:.1f} % the same first choice")
if got.shape != expected.shape or not error < 0.03:
    sys.exit("error: the export and the trainer disagree")
