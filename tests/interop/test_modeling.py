"""The Python modelling files that an export carries, by themselves: no trainer binary is needed."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ArceeConfig, ArceeForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.dynamic_module_utils import get_imports

import support
from support import greedy, kda_config, load, write_kda_folder

MODELS = {
    "hybrid": kda_config(["kda", "kda", "kda", "nope"]),
    "kda_only": kda_config(["kda"] * 3),
    "bounded": kda_config(["kda", "nope"], kda_gate_lower_bound=-5.0),
    "llama_mlp": kda_config(["kda", "nope"], hidden_act="silu", tie_word_embeddings=True),
    "rope": kda_config(["rope", "kda", "nope"], rope_parameters=support.YARN, kda_conv_size=3),
}


@pytest.fixture(scope="module")
def modeling():
    return support.modeling()


@pytest.fixture(scope="module")
def golden_script():
    path = support.ROOT / "tests" / "golden" / "make_kda_golden.py"
    spec = importlib.util.spec_from_file_location("make_kda_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=list(MODELS))
def folder(request, tmp_path_factory):
    return write_kda_folder(tmp_path_factory.mktemp("models") / request.param, MODELS[request.param])


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def exact(folder):
    """The model in float64, where two ways to the same sums differ by rounding too small to hide an error."""
    return load(folder).double()


def relative_error(x, reference):
    return ((x - reference).abs().max() / reference.abs().max()).item()


# ---------------------------------------------------------------- the recurrence


def random_kda(tokens, decay, dtype, batch=2, heads=3, channels=16):
    """Arguments of the recurrence; decay scales g, whose spread over channels and tokens is wide."""
    rng = torch.Generator().manual_seed(tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, tokens, heads, channels), dim=-1) for _ in "qk")
    v = normal(batch, tokens, heads, channels)
    g = -decay * normal(batch, tokens, heads, channels).exp()
    beta = normal(batch, tokens, heads).sigmoid()
    state = normal(batch, heads, channels, channels)
    return [x.to(dtype) for x in (q, k, v, g, beta)] + [channels**-0.5, state.to(dtype)]


@pytest.mark.parametrize("decay", [1e-3, 0.3, 20.0])  # a state that stays, one that fades, one gone in a token
@pytest.mark.parametrize("tokens", [1, 15, 16, 64, 65, 200])
def test_chunked_recurrent_and_naive_agree(modeling, golden_script, tokens, decay):
    q, k, v, g, beta, scale, state = arguments = random_kda(tokens, decay, torch.float32)
    o, s = golden_script.load_recurrence()(q, k, v, g, beta, scale, state, output_final_state=True)  # in float64
    for form in (modeling.kda_chunked, modeling.kda_recurrent):
        got_o, got_s = form(*arguments)
        assert got_o.dtype == got_s.dtype == torch.float32
        # float32 against float64: 1e-7 a product, and a triangular solve and sums over 64 tokens on top
        assert relative_error(got_o, o) < 1e-5 and relative_error(got_s, s) < 1e-5


def test_chunked_gradients(modeling):
    arguments = random_kda(100, 0.5, torch.float64, batch=1, heads=2, channels=4)
    gradients = []
    for form in (modeling.kda_chunked, modeling.kda_recurrent):
        inputs = [x.clone().requires_grad_() if torch.is_tensor(x) else x for x in arguments]
        o, state = form(*inputs)
        gradients.append(torch.autograd.grad(o.square().sum() + state.sin().sum(), [x for x in inputs if torch.is_tensor(x)]))
    for chunked, recurrent in zip(*gradients):
        assert relative_error(chunked, recurrent) < 1e-10  # float64: rounding alone


def test_golden_file(modeling):
    """The gate, the norm and both forms against the file that the C++ tests read."""
    with safe_open(support.ROOT / "tests" / "golden" / "kda.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert int(metadata["cases"]) == 5
    for n in range(5):
        case = {name.split(".")[1]: x for name, x in tensors.items() if name.startswith(f"case{n}.")}
        bound = metadata[f"case{n}.lower_bound"]
        q, k = (modeling.l2_normalize(case[x], float(metadata["l2norm_eps"])) for x in "qk")
        g = modeling.kda_gate(
            case["f"].view(q.shape), case["a_log"], case["dt_bias"], None if bound == "none" else float(bound)
        )
        assert g.max() <= 0 and (bound == "none" or g.min() >= float(bound))
        inputs = [x[None] for x in (q, k, case["v"], g, case["b"].sigmoid())]
        for form in (modeling.kda_chunked, modeling.kda_recurrent):
            o, state = form(*inputs, float(metadata[f"case{n}.scale"]), case["state_in"][None])
            assert relative_error(o[0], case["o"]) < 1e-5  # as above
            assert relative_error(state[0], case["state_out"]) < 1e-5


# ---------------------------------------------------------------- the layers


@pytest.mark.parametrize("bound", [None, -3.0])
def test_kda_layer_against_its_formulas(tmp_path, bound):
    """One layer, written down again token by token in float64 NumPy."""
    config = kda_config(["kda"], kda_gate_lower_bound=bound)
    layer = load(write_kda_folder(tmp_path / "m", config)).model.layers[0].self_attn
    w = {n.removeprefix("model.layers.0.self_attn."): x.double().numpy()
         for n, x in support.kda_tensors(config).items() if ".self_attn." in n}  # fmt: skip
    T, H, K = 70, config["kda_num_heads"], config["kda_head_dim"]
    x = torch.randn(1, T, config["hidden_size"], generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = layer(x)[0].numpy()
    x = x[0].double().numpy()

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    def convolved(name):
        y, taps = x @ w[f"{name}_proj.weight"].T, w[f"{name}_conv1d.weight"][:, 0]
        z = np.stack([sum(y[t - 3 + j] * taps[:, j] for j in range(4) if t - 3 + j >= 0) for t in range(T)])
        return (z * sigmoid(z)).reshape(T, H, K)

    q, k, v = (convolved(name) for name in "qkv")
    q, k = (a / np.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
    f = (x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).reshape(T, H, K)
    rate = np.exp(w["A_log"])[:, None]
    g = -rate * np.logaddexp(0, f) if bound is None else bound * sigmoid(rate * f)
    beta = sigmoid(x @ w["b_proj.weight"].T)
    o = np.zeros((T, H, K))
    for h in range(H):
        S = np.zeros((K, K))
        for t in range(T):
            S = np.exp(g[t, h])[:, None] * S
            S = S + beta[t, h] * np.outer(k[t, h], v[t, h] - k[t, h] @ S)
            o[t, h] = K**-0.5 * (q[t, h] @ S)
    o = o / np.sqrt((o * o).mean(-1, keepdims=True) + 1e-5) * w["o_norm.weight"]
    gate = sigmoid(x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"])
    expected = (o.reshape(T, -1) * gate) @ w["o_proj.weight"].T
    assert np.abs(expected).max() > 0.5
    # float32 against float64; o_norm divides by small outputs and so enlarges their rounding
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def as_arcee_kda(model, mixers, folder):
    """A softmax-attention model as an arcee_kda folder: same tensors, other config."""
    c = model.config.to_dict()
    config = kda_config(mixers, **{n: c[n] for n in c if n in kda_config([])} | dict(
        model_type="arcee_kda", architectures=["ArceeKdaForCausalLM"], rope_parameters=c["rope_parameters"]))  # fmt: skip
    del config["dtype"], config["torch_dtype"]
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    for name in support.CODE_FILES:
        shutil.copy(support.CODE / name, folder)
    return load(folder)


def test_rope_layers_are_arcee(tmp_path):
    """Against transformers' own Arcee: squared ReLU, GQA, and YaRN past its original 4096 positions."""
    theirs = support.scale_weights(ArceeForCausalLM(ArceeConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=65536, rope_parameters=dict(support.YARN),
    )))  # fmt: skip
    assert math.isclose(theirs.model.rotary_emb.attention_scaling, 0.1 * math.log(20) + 1, rel_tol=1e-6)
    ours = as_arcee_kda(theirs, ["rope"] * 2, tmp_path / "m")
    assert math.isclose(ours.model.rotary.attention_factor, 1.2995732, rel_tol=1e-6)
    ramp = [min(max((i - 20) / 26, 0), 1) for i in range(64)]
    wanted = [10000 ** (-2 * i / 128) * (1 - r + r / 20) for i, r in enumerate(ramp)]
    np.testing.assert_allclose(ours.model.rotary.frequencies, wanted, rtol=1e-12)
    tokens = support.random_tokens(theirs, 4200)
    # Both take an angle of 4200 radians in float32, of which a rounding of the frequency makes 1e-4.
    np.testing.assert_allclose(
        support.logits_of(ours, tokens), support.logits_of(theirs, tokens), rtol=0, atol=1e-4
    )


def test_rope_layers_are_llama(tmp_path):
    """Against transformers' own Llama: gated SiLU, plain rotary positions, tied embeddings."""
    theirs = support.scale_weights(LlamaForCausalLM(LlamaConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=5000.0),
    )))  # fmt: skip
    ours = as_arcee_kda(theirs, ["rope"] * 2, tmp_path / "m")
    tokens = support.random_tokens(theirs, 100)
    np.testing.assert_allclose(support.logits_of(ours, tokens), support.logits_of(theirs, tokens), rtol=0, atol=1e-5)


def test_nope_layers_are_arcee_at_position_zero(tmp_path):
    theirs = support.scale_weights(ArceeForCausalLM(ArceeConfig(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )))  # fmt: skip
    ours = as_arcee_kda(theirs, ["nope"] * 2, tmp_path / "m")
    tokens = support.random_tokens(theirs, 100)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=torch.ones_like(tokens), position_ids=torch.zeros_like(tokens)).logits[0]
    np.testing.assert_allclose(support.logits_of(ours, tokens), expected.numpy(), rtol=0, atol=1e-5)


def test_eager_attention_is_sdpa(tmp_path):
    folder = write_kda_folder(tmp_path / "m", MODELS["hybrid"])
    sdpa, eager = load(folder), load(folder, attn_implementation="eager")
    tokens = support.random_tokens(sdpa, 80).view(2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    with torch.no_grad():
        a, b = sdpa(tokens, attention_mask=mask), eager(tokens, attention_mask=mask, output_attentions=True)
    assert [w is None for w in b.attentions] == [True, True, True, False]
    assert torch.allclose(a.logits[mask.bool()], b.logits[mask.bool()], atol=1e-5)


# ---------------------------------------------------------------- caches, padding, generation

CLOSE = dict(rtol=0, atol=1e-9)  # for models in float64: rounding of 1e-16, some hundred sums deep


@pytest.mark.parametrize("steps", [[100, 1, 1, 1], [1, 1, 65, 3], [17, 64, 2, 20]])
def test_cache_changes_nothing(exact, steps):
    model = exact
    tokens = support.random_tokens(model, 2 * sum(steps)).view(2, -1)
    cache, parts = None, []
    with torch.no_grad():
        whole = model(tokens, use_cache=False)
        assert whole.past_key_values is None
        for part in tokens.split(steps, dim=1):
            out = model(part, past_key_values=cache)
            cache = out.past_key_values
            parts.append(out.logits)
    assert cache.get_seq_length() == sum(steps)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits, **CLOSE)


def test_greedy_tokens_with_and_without_cache(model):
    prompt = support.random_tokens(model, 60).view(2, 30)
    cached = greedy(model, prompt)
    assert cached.shape == (2, 64)
    assert torch.equal(cached, greedy(model, prompt, use_cache=False))
    assert torch.equal(cached, greedy(model, prompt, past_key_values=DynamicCache()))
    assert len(set(cached.flatten().tolist())) > 10  # no model that says one thing for ever


def test_beam_search_reorders_every_cache(model):
    prompt = support.random_tokens(model, 24).view(2, 12)
    beams = greedy(model, prompt, 24, num_beams=3)
    assert torch.equal(beams, greedy(model, prompt, 24, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(model, prompt, 24))


def test_left_padded_batch_is_single_sequences(exact):
    lengths, longest = (37, 70, 3), 70
    rows = [support.random_tokens(exact, n, seed=n) for n in lengths]
    batch = torch.cat([F.pad(r, (longest - r.shape[1], 0), value=7) for r in rows])
    mask = torch.cat([F.pad(torch.ones_like(r), (longest - r.shape[1], 0)) for r in rows])
    with torch.no_grad():
        logits = exact(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for n, row, got in zip(lengths, rows, logits):
            torch.testing.assert_close(got[longest - n :], exact(row).logits[0], **CLOSE)
    together = greedy(exact, batch, 32, attention_mask=mask)
    for row, got in zip(rows, together):
        assert torch.equal(greedy(exact, row, 32)[0], got)


def test_padding_between_turns(exact):
    """A batch goes on after rows of different lengths were padded on the right: the cache must not see the padding."""
    first = [support.random_tokens(exact, n, seed=n) for n in (9, 2)]
    second = [support.random_tokens(exact, n, seed=n + 100) for n in (5, 70)]

    def padded(rows):
        longest = max(r.shape[1] for r in rows)
        tokens = torch.cat([F.pad(r, (0, longest - r.shape[1])) for r in rows])
        return tokens, torch.cat([F.pad(torch.ones_like(r), (0, longest - r.shape[1])) for r in rows])

    (tokens_1, mask_1), (tokens_2, mask_2) = padded(first), padded(second)
    mask = torch.cat((mask_1, mask_2), dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = exact(tokens_1, attention_mask=mask_1, position_ids=positions[:, :9]).past_key_values
        got = exact(tokens_2, attention_mask=mask, position_ids=positions[:, 9:], past_key_values=cache).logits
        for row, (a, b) in enumerate(zip(first, second)):
            alone = exact(torch.cat((a, b), dim=1)).logits[0, a.shape[1] :]
            torch.testing.assert_close(got[row, : b.shape[1]], alone, **CLOSE)


def test_padding_mask_must_be_two_dimensional(tmp_path):
    model = load(write_kda_folder(tmp_path / "m", MODELS["kda_only"]))
    with pytest.raises(ValueError, match="attention_mask as .batch, tokens."):
        model(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))


def test_cache_of_another_model_is_refused(tmp_path):
    model = load(write_kda_folder(tmp_path / "m", MODELS["kda_only"]))
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    with pytest.raises(ValueError, match="layer 0, which is a KDA layer"):
        model(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)


# ---------------------------------------------------------------- folders, dtypes, training


def test_round_trip(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "again")
    for name in support.CODE_FILES:
        assert (tmp_path / "again" / name).read_bytes() == (support.CODE / name).read_bytes()
    before, after = (load_file(x / "model.safetensors") for x in (folder, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert torch.equal(x, after[name]), name
    tokens = support.random_tokens(model, 50)
    assert np.array_equal(support.logits_of(model, tokens), support.logits_of(load(tmp_path / "again"), tokens))


def test_bfloat16(folder, model, tmp_path):
    """The whole model in bfloat16 but for A_log and dt_bias, which stay as they are in the file."""
    narrow = load(folder, dtype=torch.bfloat16)
    cast = load(folder).to(torch.bfloat16)
    for half in (narrow, cast):
        for name, parameter in half.named_parameters():
            if name.endswith((".A_log", ".dt_bias")):
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, model.get_parameter(name))
            else:
                assert parameter.dtype == torch.bfloat16
    tokens = support.random_tokens(model, 100)
    wide, half = support.logits_of(model, tokens), support.logits_of(narrow, tokens)
    # 8 bits of mantissa through every weight and activation: a few per cent of the logits' size
    assert np.sqrt(np.mean((wide - half) ** 2) / np.mean(wide**2)) < 0.1
    assert greedy(narrow, tokens, 8).shape == (1, 8)
    narrow.save_pretrained(tmp_path / "half")
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert {x.dtype for n, x in saved.items() if n.endswith((".A_log", ".dt_bias"))} <= {torch.float32}
    assert {x.dtype for n, x in saved.items() if not n.endswith((".A_log", ".dt_bias"))} == {torch.bfloat16}


def test_loss_and_gradient_checkpointing(model):
    tokens = support.random_tokens(model, 80).view(2, 40)
    labels = tokens.clone()
    labels[0, :10] = -100
    results = []
    for recompute in (False, True):
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(tokens, labels=labels)
        out.loss.backward()
        results.append((out, {n: p.grad.clone() for n, p in model.named_parameters()}))
    model.gradient_checkpointing_disable()
    model.zero_grad()
    model.eval()
    (plain, gradients), (recomputed, again) = results
    expected = F.cross_entropy(plain.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(plain.loss, expected)
    torch.testing.assert_close(recomputed.loss, plain.loss)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(again[name], gradient)


def test_outputs(exact):
    model = exact
    tokens = support.random_tokens(model, 20)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
        assert len(out.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
        torch.testing.assert_close(model(tokens, logits_to_keep=3).logits, out.logits[:, -3:], **CLOSE)
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
        torch.testing.assert_close(embedded, out.logits, **CLOSE)
        assert isinstance(model(tokens, return_dict=False), tuple)


def test_fresh_weights_follow_fla(tmp_path):
    """A model made from a config: rates exp(A_log) in [1, 16], softplus(dt_bias) in [0.001, 0.1], the rest N(0, 0.02)."""
    kind = type(load(write_kda_folder(tmp_path / "m", MODELS["hybrid"])))
    for name, x in kind(kind.config_class(**MODELS["hybrid"])).named_parameters():
        if name.endswith("A_log"):
            assert 1 <= x.exp().min() and x.exp().max() <= 16 and x.std() > 0
        elif name.endswith("dt_bias"):
            dt = F.softplus(x)
            assert 0.000999 < dt.min() < 0.005 and 0.02 < dt.max() < 0.1001
        elif name.endswith("bias"):
            assert not x.any()
        elif x.dim() == 1:
            assert (x == 1).all()
        else:
            assert abs(x.std().item() - 0.02) < 0.004, name


def test_fla_is_optional():
    for name in support.CODE_FILES:
        assert not {"fla", "einops", "triton"} & set(get_imports(support.CODE / name))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mixers=["kda"]), "mixers has 1 entries for 2 layers"),
        (dict(mixers=["kda", "mamba"]), "mixers holds 'mamba'"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (dict(kda_gate_lower_bound=-6), "kda_gate_lower_bound is -6"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads"),
        (dict(mixers=["rope", "kda"], rope_parameters=dict(rope_type="longrope")), "rope_type is 'longrope'"),
    ],
)
def test_bad_configs(tmp_path, change, message):
    folder = write_kda_folder(tmp_path / "m", kda_config(["kda", "nope"]))
    (folder / "config.json").write_text(json.dumps(kda_config(["kda", "nope"]) | change))
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_old_rope_keys(tmp_path):
    """rope_theta and rope_scaling, as files from before transformers 5 have them."""
    old = {n: x for n, x in support.YARN.items() if n not in ("rope_type", "rope_theta")} | {"type": "yarn"}
    config = {n: x for n, x in MODELS["rope"].items() if n != "rope_parameters"}
    model = load(write_kda_folder(tmp_path / "old", config | dict(rope_theta=10000.0, rope_scaling=old)))
    new = load(write_kda_folder(tmp_path / "new", MODELS["rope"]))
    assert model.model.rotary.frequencies == new.model.rotary.frequencies
    assert model.model.rotary.attention_factor == new.model.rotary.attention_factor != 1
