"""What `deltapipe init` writes is a model folder that transformers loads, that says the same, and that generates."""

import json

import pytest
import torch
from transformers import ArceeConfig, ArceeForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import support
from support import assert_same_logits, greedy, ids, load, scale_weights

COUNT = 64
# Bytes 0 .. 255, then bos and eos: the vocabulary of data that was never tokenized.
SIZES = dict(vocab_size=258, hidden_size=48, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
             rms_norm_eps=1e-5, max_position_embeddings=4096, bos_token_id=256, eos_token_id=257)  # fmt: skip
TEXT = "Grüße, 世界! \t 1 + 1 = 2;\r\n\n  naïve 🦋 \x00\x7f"

CASES = {
    "arcee_hybrid": (ArceeForCausalLM, ArceeConfig, dict(num_hidden_layers=4, head_dim=16),
                     'mixers = ["kda", "kda", "kda", "nope"]'),
    "arcee_kda_only": (ArceeForCausalLM, ArceeConfig, dict(num_hidden_layers=2),
                       'mixers = ["kda"]\n[student.kda]\nheads = 3\nhead_dim = 20\ngate_rank = 8\nconv_init = "normal"'),
    "llama_bounded": (LlamaForCausalLM, LlamaConfig, dict(num_hidden_layers=4, tie_word_embeddings=True),
                      'mixers = ["rope", "kda", "nope"]\n[student.kda]\ngate_lower_bound = -5.0\n'
                      '[student.attention]\nkv_heads = 4'),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(CASES))
def student(request, deltapipe, tmp_path_factory):
    """-> (folder that `deltapipe init` wrote, the model in it, the teacher)."""
    work = tmp_path_factory.mktemp(request.param)
    kind, config, changes, keys = CASES[request.param]
    rope = dict(rope_type="default", rope_theta=10000.0)
    teacher = scale_weights(kind(config(**SIZES, rope_parameters=rope, **changes)))
    teacher.save_pretrained(work / "teacher")
    (work / "init.toml").write_text(f'[teacher]\npath = "{work / "teacher"}"\n\n[student]\n{keys}\n')
    deltapipe("init", work / "init.toml", "--out", work / "student", "--tokenizer", "bytes")
    return work / "student", load(work / "student"), teacher


def test_folder(student):
    folder, model, teacher = student
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "arcee_kda" and config["architectures"] == ["ArceeKdaForCausalLM"]
    for name in support.CODE_FILES:
        assert (folder / name).read_bytes() == (support.CODE / name).read_bytes()
    assert not list(folder.parent.glob("*.partial"))
    assert len(model.config.mixers) == teacher.config.num_hidden_layers
    assert model.config.tie_word_embeddings == teacher.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id) == (256, 257)


def test_weights_come_from_the_teacher(student):
    """Embeddings, head, norms, MLPs and the projections of softmax attention, key/value heads repeated where asked."""
    _, model, teacher = student
    theirs, checked = dict(teacher.named_parameters()), 0
    for name, x in model.named_parameters():
        mixer = model.config.mixers[int(name.split(".")[2])] if ".layers." in name else None
        if ".self_attn." in name and mixer == "kda":
            continue
        wanted = theirs[name]
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            repeats = model.config.num_key_value_heads // teacher.config.num_key_value_heads
            heads = wanted.unflatten(0, (teacher.config.num_key_value_heads, -1))
            wanted = heads.repeat_interleave(repeats, dim=0).flatten(0, 1)
        assert torch.equal(x, wanted), name
        checked += 1
    assert checked >= 4 * teacher.config.num_hidden_layers + 2


def test_logits(student, tmp_path):
    folder, model, _ = student
    assert_same_logits(folder, model, support.random_tokens(model, 300), tmp_path)


def test_greedy_tokens(student, deltapipe):
    """64 tokens by generate() with and without its cache and by `deltapipe generate`."""
    folder, model, _ = student
    for seed in range(20):  # a prompt after which eos does not come, so that nobody stops early
        prompt = support.random_tokens(model, 20, seed=seed)
        cached = greedy(model, prompt, COUNT)
        if model.config.eos_token_id not in cached:
            break
    else:
        pytest.fail("eos after every prompt")
    assert cached.shape == (1, COUNT)
    assert torch.equal(cached, greedy(model, prompt, COUNT, use_cache=False))
    assert deltapipe("generate", folder, "--tokens", ids(prompt), "--count", COUNT).strip() == ids(cached)


def test_byte_tokenizer(student):
    folder, _, _ = student
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 258
    got = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert got == list(TEXT.encode())  # the id of a byte is its value
    assert tokenizer.decode(got, clean_up_tokenization_spaces=False) == TEXT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert tokenizer.decode([*got, 257], skip_special_tokens=True, clean_up_tokenization_spaces=False) == TEXT
