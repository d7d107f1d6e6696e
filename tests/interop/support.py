"""What the interop tests share: model folders made from nothing, and calls of the trainer binary."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

ROOT = Path(__file__).resolve().parents[2]
CODE = ROOT / "checkpoints" / "huggingface"
CODE_FILES = ("configuration_arcee_kda.py", "modeling_arcee_kda.py")

# AFM-4.5B's positions. A factor that is not 65536 / 4096 = 16 shows whether the one in the file is used.
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=20.0, original_max_position_embeddings=4096,
            beta_fast=32.0, beta_slow=1.0, mscale=1.0)  # fmt: skip


def modeling():
    """The modelling file as a module, loaded the way transformers loads it."""
    import sys

    return sys.modules[get_class_from_dynamic_module("modeling_arcee_kda.ArceeKdaModel", str(CODE)).__module__]


def kda_config(mixers, **changes):
    """config.json of a small arcee_kda model. Sizes all differ, so that no two can be mixed up unseen."""
    config = dict(
        model_type="arcee_kda", architectures=["ArceeKdaForCausalLM"], dtype="float32", torch_dtype="float32",
        auto_map={"AutoConfig": "configuration_arcee_kda.ArceeKdaConfig",
                  "AutoModelForCausalLM": "modeling_arcee_kda.ArceeKdaForCausalLM"},
        vocab_size=131, hidden_size=56, intermediate_size=72, num_hidden_layers=len(mixers), mixers=list(mixers),
        num_attention_heads=4, num_key_value_heads=2, head_dim=20, hidden_act="relu2", kda_num_heads=3, kda_head_dim=24,
        kda_conv_size=4, kda_gate_rank=10, kda_gate_lower_bound=None, max_position_embeddings=65536, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return {**config, **changes}


def kda_tensors(config, seed=0):
    """Random weights of an arcee_kda model under the names and shapes that the format lays down."""
    rng = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=rng) / math.sqrt(columns)

    def near_one(size):
        return 1 + 0.1 * torch.randn(size, generator=rng)

    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, rank = config["kda_num_heads"], config["kda_gate_rank"]
    width = heads * config["kda_head_dim"]
    wide, narrow = (config[n] * config["head_dim"] for n in ("num_attention_heads", "num_key_value_heads"))
    tied = config["tie_word_embeddings"]
    size = 0.2 if tied else 1.0  # of embeddings; large tied ones would make every token predict itself
    tensors = {"model.embed_tokens.weight": size * torch.randn(config["vocab_size"], hidden, generator=rng)}
    for i, mixer in enumerate(config["mixers"]):
        layer = {"input_layernorm.weight": near_one(hidden), "post_attention_layernorm.weight": near_one(hidden)}
        layer["mlp.up_proj.weight"] = matrix(inner, hidden)
        layer["mlp.down_proj.weight"] = matrix(hidden, inner)
        if config["hidden_act"] == "silu":
            layer["mlp.gate_proj.weight"] = matrix(inner, hidden)
        if mixer == "kda":
            attention = {f"{p}_proj.weight": matrix(width, hidden) for p in "qkv"}
            attention |= {f"{p}_conv1d.weight": torch.randn(width, 1, config["kda_conv_size"], generator=rng) / 2
                          for p in "qkv"}  # fmt: skip
            attention |= {
                "f_proj.0.weight": matrix(rank, hidden), "f_proj.1.weight": 2 * matrix(width, rank),
                "g_proj.0.weight": matrix(rank, hidden), "g_proj.1.weight": matrix(width, rank),
                "g_proj.1.bias": torch.randn(width, generator=rng), "b_proj.weight": matrix(heads, hidden),
                "A_log": torch.log(1 + 15 * torch.rand(heads, generator=rng)),
                "dt_bias": -7 + 5 * torch.rand(width, generator=rng),
                "o_norm.weight": near_one(config["kda_head_dim"]), "o_proj.weight": matrix(hidden, width),
            }  # fmt: skip
        else:
            attention = {"q_proj.weight": matrix(wide, hidden), "k_proj.weight": matrix(narrow, hidden),
                         "v_proj.weight": matrix(narrow, hidden), "o_proj.weight": matrix(hidden, wide)}  # fmt: skip
        layer |= {f"self_attn.{name}": x for name, x in attention.items()}
        tensors |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    # The head is scaled for logits of about N(0, 0.5), so that float32 noise stays far below a tolerance of 1e-4.
    tensors["model.norm.weight"] = near_one(hidden)
    if tied:
        tensors["model.norm.weight"] *= 0.5 / (size * math.sqrt(hidden))
    else:
        tensors["lm_head.weight"] = 0.5 * matrix(config["vocab_size"], hidden)
    return tensors


def write_kda_folder(folder, config, seed=0, dtype=torch.float32):
    """A complete model folder, written without the modelling code that it carries."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {name: x if name.endswith((".A_log", ".dt_bias")) else x.to(dtype)
               for name, x in kda_tensors(config, seed).items()}  # fmt: skip
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in CODE_FILES:
        shutil.copy(CODE / name, folder)
    return folder


def load(folder, dtype=torch.float32, **arguments):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=dtype, output_loading_info=True, **arguments
    )
    assert not any(info.values()), info  # missing, unexpected or mismatched tensors
    return model.eval()


def scale_weights(model, seed=0):
    """Gives a freshly made model weights that matter: N(0, 0.02) would leave every layer next to idle."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1 + 0.1 * noise)
        model.get_input_embeddings().weight.mul_(math.sqrt(model.config.hidden_size))
        if model.config.tie_word_embeddings:  # the head is the embedding: a small norm keeps the logits near 1
            model.model.norm.weight.div_(math.sqrt(model.config.hidden_size))
    return model.eval()


def random_tokens(model, count, seed=1):
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[0].float().numpy()


def greedy(model, tokens, count=64, **arguments):
    """The ids that follow tokens [B, T], without the prompt."""
    arguments = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0) | arguments
    arguments.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, **arguments)[:, tokens.shape[1] :]


def run_deltapipe(*arguments):
    command = [os.environ["DELTAPIPE_BIN"], *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, f"{' '.join(command)[:500]}\nexit {result.returncode}\n{result.stderr[-2000:]}"
    return result.stdout


def ids(tokens):
    return ",".join(str(int(t)) for t in tokens.flatten())


def trainer_logits(folder, tokens, work):
    """float32 [T, N] from `deltapipe logits`; long prompts go through a file."""
    out = work / "logits.npy"
    out.unlink(missing_ok=True)
    if tokens.numel() > 1000:
        (work / "tokens.txt").write_text("\n".join(str(int(t)) for t in tokens.flatten()) + "\n")
        run_deltapipe("logits", folder, "--tokens-file", work / "tokens.txt", "--out", out)
    else:
        run_deltapipe("logits", folder, "--tokens", ids(tokens), "--out", out)
    result = np.load(out)
    assert result.dtype == np.float32
    return result


def assert_same_logits(folder, model, tokens, work):
    expected, got = logits_of(model, tokens), trainer_logits(folder, tokens, work)
    assert got.shape == expected.shape
    assert np.abs(expected).max() > 0.5  # a tolerance of 1e-4 means something
    # float32 on both sides, sums in different orders: differences of some 1e-6 through a few layers.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
