"""`deltapipe logits FOLDER` against transformers, on random models of every kind the trainer imports."""

import json

import numpy as np
import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

import support
from support import assert_same_logits, kda_config, load, scale_weights, write_kda_folder

T = 300
SIZES = dict(vocab_size=131, hidden_size=56, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, attn_implementation="sdpa")  # fmt: skip


def arcee(tied, **changes):
    """A small AFM: its positions, and with head_dim 128 the very frequencies of the large one."""
    config = ArceeConfig(**{**SIZES, "num_hidden_layers": 2, "head_dim": 128, "max_position_embeddings": 65536,
                            "tie_word_embeddings": tied, "rope_parameters": dict(support.YARN), **changes})  # fmt: skip
    model = scale_weights(ArceeForCausalLM(config))
    # Some versions of transformers put max_position_embeddings / original_max_position_embeddings = 16 for the factor 20.
    rotary = model.model.rotary_emb
    if config.rope_parameters["rope_type"] == "yarn":
        assert abs(rotary.attention_scaling - 1.2995732) < 1e-6
        assert abs(rotary.inv_freq[-1].item() * 10000 ** (126 / 128) - 1 / 20) < 1e-6
    return model


def llama(tied, **changes):
    rope = dict(rope_type="default", rope_theta=5000.0)
    config = {**SIZES, "tie_word_embeddings": tied, "rope_parameters": rope, "max_position_embeddings": 2048, **changes}
    return scale_weights(LlamaForCausalLM(LlamaConfig(**config)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", [arcee, llama])
def test_teachers(deltapipe, tmp_path, make, tied):
    model = make(tied)
    model.save_pretrained(tmp_path / "m")
    assert_same_logits(tmp_path / "m", model, support.random_tokens(model, T), tmp_path)


def test_yarn_past_its_original_length(deltapipe, tmp_path):
    model = arcee(False)
    model.save_pretrained(tmp_path / "m")
    assert_same_logits(tmp_path / "m", model, support.random_tokens(model, 4200), tmp_path)


def test_plain_rope_arcee_without_head_dim(deltapipe, tmp_path):
    model = arcee(False, head_dim=14, rope_parameters=dict(rope_type="default", rope_theta=10000.0))
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("head_dim") == config["hidden_size"] // config["num_attention_heads"]
    path.write_text(json.dumps(config))
    assert_same_logits(tmp_path / "m", model, support.random_tokens(model, T), tmp_path)


def test_old_rope_keys(deltapipe, tmp_path):
    """config.json as transformers wrote it before version 5: rope_theta beside rope_scaling."""
    model = arcee(False)
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope | {"type": "yarn"}
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    assert_same_logits(tmp_path / "m", model, support.random_tokens(model, T), tmp_path)


def test_shards_and_bfloat16_files(deltapipe, tmp_path):
    """Weights stored as bfloat16 in several files; both sides compute in float32 with the stored values."""
    llama(False).to(torch.bfloat16).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    model = load(tmp_path / "m")  # read back: casting a model to bfloat16 rounds its rotary frequencies too
    assert_same_logits(tmp_path / "m", model, support.random_tokens(model, T), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        kda_config(["kda", "kda", "kda", "nope"]),
        kda_config(["kda"] * 3),
        kda_config(["kda", "nope"], kda_gate_lower_bound=-5.0),
        kda_config(["kda", "nope"], hidden_act="silu", tie_word_embeddings=True),
        kda_config(["rope", "kda", "nope"], rope_parameters=support.YARN, kda_conv_size=3, num_key_value_heads=4),
    ],
    ids=["hybrid", "kda_only", "bounded_gate", "llama_mlp_tied", "rope_first"],
)
def test_students(deltapipe, tmp_path, config):
    folder = write_kda_folder(tmp_path / "m", config)
    model = load(folder)
    assert_same_logits(folder, model, support.random_tokens(model, T), tmp_path)


def test_bfloat16_student(deltapipe, tmp_path):
    folder = write_kda_folder(tmp_path / "m", kda_config(["kda", "nope"]), dtype=torch.bfloat16)
    model = load(folder)
    assert_same_logits(folder, model, support.random_tokens(model, T), tmp_path)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65])
def test_short_prompts(deltapipe, tmp_path, count):
    """Fewer tokens than convolution taps, and around a whole chunk."""
    folder = write_kda_folder(tmp_path / "m", kda_config(["kda", "nope"]))
    model = load(folder)
    assert_same_logits(folder, model, support.random_tokens(model, count), tmp_path)


def test_tokens_file_is_tokens(deltapipe, tmp_path):
    folder = write_kda_folder(tmp_path / "m", kda_config(["kda", "nope"]))
    (tmp_path / "ids.txt").write_text("5 3\n\n 130\t0\n")
    deltapipe("logits", folder, "--tokens-file", tmp_path / "ids.txt", "--out", tmp_path / "a.npy")
    deltapipe("logits", folder, "--tokens", "5,3,130,0", "--out", tmp_path / "b.npy")
    a, b = np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    assert a.shape == (4, 131) and np.array_equal(a, b)
