"""arcee_kda: decoder-only transformers whose token mixers are Kimi Delta Attention (KDA), softmax attention without
positions (NoPE), or softmax attention with rotary positions, in any order of layers.

KDA (Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025) keeps one matrix S [K, V] a head:

    S <- diag(exp g_t) S;   S <- S + beta_t k_t (v_t - S^T k_t)^T;   o_t = scale S^T q_t

This file runs everywhere PyTorch does. On a GPU with flash-linear-attention installed its kernels do the recurrence.

Letters: B batch, T tokens, D hidden, H heads, K = V channels a head, C tokens a chunk, W taps of the convolution.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_arcee_kda import ArceeKdaConfig


CHUNK = 64  # tokens that share one triangular solve
BLOCK = 16  # tokens whose mutual decays are computed pair by pair; divides CHUNK


def widen(x):
    """float32, or float64 if x is that already: the precision of norms, gates, states and everything summed over tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def take_rows(x, order):
    """x [B, T, D], order [B, T] -> x with the rows of every sequence in that order."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


# ---------------------------------------------------------------- Kimi Delta Attention as functions


def l2_normalize(x, eps=1e-6):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def kda_gate(f, a_log, dt_bias, lower_bound=None):
    """Log decay of every key channel, <= 0.  f [B, T, H, K], a_log [H], dt_bias [H * K]."""
    x = f + dt_bias.view(f.shape[-2:])
    rate = a_log.exp()[:, None]
    if lower_bound is None:
        return -rate * F.softplus(x)
    return lower_bound * torch.sigmoid(rate * x)


def kda_recurrent(q, k, v, g, beta, scale, state):
    """Token by token.  q, k, v, g [B, T, H, K]; beta [B, T, H]; state [B, H, K, V] -> o [B, T, H, V], new state."""
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None]
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t] * beta[:, t, :, None], error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outputs, dim=1), state


def kda_chunked(q, k, v, g, beta, scale, state):
    """The same function of the same arguments, chunk by chunk: work inside a chunk is matrix products."""
    tokens = q.shape[1]
    # A token with beta = 0 and g = 0 leaves the state as it is.
    q, k, v, g, beta = (
        F.pad(x.transpose(1, 2), (0, 0, 0, -tokens % BLOCK)) for x in (q * scale, k, v, g, beta[..., None])
    )
    outputs = []
    for start in range(0, q.shape[2], CHUNK):
        o, state = _kda_chunk(*(x[:, :, start : start + CHUNK] for x in (q, k, v, g, beta)), state)
        outputs.append(o)
    return torch.cat(outputs, dim=2)[:, :, :tokens].transpose(1, 2), state


def _kda_chunk(q, k, v, g, beta, state):
    """One chunk. q (already scaled), k, v, g [B, H, C, K]; beta [B, H, C, 1]; state [B, H, K, V]."""
    decay = g.cumsum(-2)  # G: log decay from before the chunk's first token to after token i
    scores = _decayed_scores(torch.stack((q, k)), k, decay)
    # v_new solves (I + L) v_new = beta (v - (k exp G) S), with L_ij = beta_i (k_i exp(G_i - G_j)) k_j for j < i.
    lower = scores[1].tril(-1) * beta
    right = torch.cat((v, k * decay.exp()), dim=-1) * beta
    u, w = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), dim=-1
    )
    v_new = u - w @ state
    o = (q * decay.exp()) @ state + scores[0] @ v_new
    last = decay[..., -1:, :]
    state = last.exp().transpose(-1, -2) * state + (k * (last - decay).exp()).transpose(-1, -2) @ v_new
    return o, state


def _decayed_scores(rows, k, decay):
    """sum_x rows_ix exp(G_ix - G_jx) k_jx for j <= i, else 0.  rows [2, B, H, C, K] -> [2, B, H, C, C].

    exp(G_i) and exp(-G_j) apart would overflow: the second grows without bound. Blocks below the diagonal put both
    exponents on either side of the first token of the block of rows, blocks on it take every difference, so that no
    exponent is ever positive.
    """
    tokens = k.shape[-2]
    above = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=k.device).triu(1)[..., None]
    result = []
    for start in range(0, tokens, BLOCK):
        block = slice(start, start + BLOCK)
        inside = decay[..., block, None, :] - decay[..., None, block, :]
        inside = inside.masked_fill(above, -torch.inf).exp() * k[..., None, block, :]
        parts = [torch.einsum("zbhik,bhijk->zbhij", rows[..., block, :], inside)]
        if start > 0:
            anchor = decay[..., start : start + 1, :]
            before = k[..., :start, :] * (anchor - decay[..., :start, :]).exp()
            parts.insert(0, (rows[..., block, :] * (decay[..., block, :] - anchor).exp()) @ before.transpose(-1, -2))
        result.append(F.pad(torch.cat(parts, dim=-1), (0, tokens - start - BLOCK)))
    return torch.cat(result, dim=-2)


@functools.cache
def fla_kernels():
    """flash-linear-attention's (chunk_kda, fused_recurrent_kda), or None where it cannot be used."""
    try:
        from fla.ops.kda import chunk_kda, fused_recurrent_kda

        return chunk_kda, fused_recurrent_kda
    except Exception:  # besides ImportError, Triton fails in its own ways where it finds no compiler or driver
        return None


def kda(q, k, v, g, beta, scale, state, dtype):
    """The fastest of the implementations at hand; dtype is the model's, for kernels that want 16-bit operands."""
    single = q.shape[1] == 1
    if q.is_cuda and dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= 256 and fla_kernels() is not None:
        chunk_kda, fused_recurrent_kda = fla_kernels()
        kernel = fused_recurrent_kda if single and not torch.is_grad_enabled() else chunk_kda  # the first: no backward
        q, k, v, g, beta, state = (
            x.contiguous() for x in (q.to(dtype), k.to(dtype), v.to(dtype), g, beta, state.float())
        )
        o, state = kernel(q, k, v, g, beta, scale=scale, initial_state=state, output_final_state=True)
        return o.float(), state
    return (kda_recurrent if single else kda_chunked)(q, k, v, g, beta, scale, state)


# ---------------------------------------------------------------- cache


class KdaCacheLayer(CacheLayerMixin):
    """What a KDA layer remembers: its state and the last W - 1 inputs of the convolution. Its size does not grow."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__()
        self.tokens = 0  # positions seen, padding included, as attention layers count them
        self.state = None  # [B, H, K, V], float32
        self.conv_tail = None  # [B, W - 1, 3 H K], the model's dtype

    def store(self, state, conv_tail, tokens):
        self.state, self.conv_tail, self.tokens = state, conv_tail, self.tokens + tokens
        self.is_initialized = True

    def update(self, *args, **kwargs):
        raise NotImplementedError("a KDA layer keeps no keys and values")

    lazy_initialization = update

    def get_seq_length(self, *args):
        return self.tokens

    def get_mask_sizes(self, query):
        """query: the number of new tokens, or their positions (transformers 4)."""
        return self.tokens + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self):
        return -1

    get_max_cache_shape = get_max_length

    def reset(self):
        self.tokens, self.state, self.conv_tail, self.is_initialized = 0, None, None, False

    def crop(self, *args):
        raise NotImplementedError("a KDA state cannot be taken back to an earlier token")

    def _apply(self, function):
        if self.is_initialized:
            self.state, self.conv_tail = function(self.state), function(self.conv_tail)

    def reorder_cache(self, beam_idx):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices):
        self._apply(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self):
        """Nothing: the layer is small, and its size does not depend on the number of tokens."""

    prefetch = offload


def add_kda_layers(cache, mixers):
    """Puts a KdaCacheLayer wherever the mixer is KDA, so that any cache that generate() makes will do."""
    for i, mixer in enumerate(mixers):
        if len(cache.layers) <= i:
            cache.layers.append(DynamicLayer())
        if mixer == "kda" and not isinstance(cache.layers[i], KdaCacheLayer):
            if cache.layers[i].is_initialized and cache.layers[i].get_seq_length() > 0:
                raise ValueError(f"past_key_values holds keys and values for layer {i}, which is a KDA layer")
            cache.layers[i] = KdaCacheLayer()
    return cache


# ---------------------------------------------------------------- layers


class ArceeKdaRMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def normalize(self, x):
        x = widen(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.weight * self.normalize(x).to(x.dtype)


class ArceeKdaConvolution(nn.Module):
    """Weight of a causal depthwise convolution; weight[:, 0, -1] meets the newest token."""

    def __init__(self, width, taps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, taps))


class ArceeKdaDeltaAttention(nn.Module):
    """Kimi Delta Attention."""

    def __init__(self, config, layer_idx):
        super().__init__()
        hidden, rank = config.hidden_size, config.kda_gate_rank
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.kda_num_heads, config.kda_head_dim
        self.width = self.heads * self.head_dim
        self.taps = config.kda_conv_size
        self.lower_bound = config.kda_gate_lower_bound
        self.q_proj = nn.Linear(hidden, self.width, bias=False)
        self.k_proj = nn.Linear(hidden, self.width, bias=False)
        self.v_proj = nn.Linear(hidden, self.width, bias=False)
        self.q_conv1d = ArceeKdaConvolution(self.width, self.taps)
        self.k_conv1d = ArceeKdaConvolution(self.width, self.taps)
        self.v_conv1d = ArceeKdaConvolution(self.width, self.taps)
        self.f_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, self.width, bias=False))
        self.g_proj = nn.Sequential(nn.Linear(hidden, rank, bias=False), nn.Linear(rank, self.width, bias=True))
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.zeros(self.width, dtype=torch.float32))
        self.o_norm = ArceeKdaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(self.width, hidden, bias=False)

    def _apply(self, fn, recurse=True):
        # The decay is exp of exp of these two: they stay float32 when the rest of the model is cast.
        fixed = [x for p in (self.A_log, self.dt_bias) for x in (p, p.grad)]

        def keep_float32(x):
            y = fn(x)
            narrowed = torch.finfo(y.dtype).bits < 32
            return x.to(y.device) if narrowed and any(x is f for f in fixed) else y

        return super()._apply(keep_float32, recurse)

    def convolve(self, x, tail, real):
        """SiLU of the convolution of tail [B, W - 1, 3 H K] followed by x [B, T, 3 H K], and the tail of what comes next.

        real [B, T] is None or 0 where x is padding; padding comes first and must not stand between tail and tokens.
        """
        x, tokens = torch.cat((tail, x), dim=1), x.shape[1]
        if real is not None:
            x = take_rows(x, F.pad(real, (self.taps - 1, 0), value=1).argsort(dim=1, stable=True))
        weight = torch.cat([c.weight for c in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        y = sum(widen(x[:, j : j + tokens]) * widen(weight[:, 0, j]) for j in range(self.taps))
        return F.silu(y), x[:, tokens:]

    def forward(self, x, padding=None, cache=None):
        """x [B, T, D]; padding None or [B, T], 0 where x is padding; cache None or this layer's KdaCacheLayer."""
        batch, tokens, _ = x.shape
        real = None
        if padding is not None:  # padding first, then the tokens in their order
            order = padding.argsort(dim=1, stable=True)
            x, real = take_rows(x, order), padding.gather(1, order)
        fresh = cache is None or not cache.is_initialized
        tail = x.new_zeros(batch, self.taps - 1, 3 * self.width) if fresh else cache.conv_tail
        qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)
        qkv, tail = self.convolve(qkv, tail.to(qkv.dtype), real)
        q, k, v = qkv.view(batch, tokens, 3, self.heads, self.head_dim).unbind(2)
        f = widen(self.f_proj(x)).view(q.shape)
        g = kda_gate(f, widen(self.A_log), widen(self.dt_bias), self.lower_bound)
        beta = torch.sigmoid(widen(self.b_proj(x)))
        if real is not None:  # with no decay and nothing written, padding leaves the state as it is
            g, beta = g * real[..., None, None], beta * real[..., None]
        state = g.new_zeros(batch, self.heads, self.head_dim, self.head_dim) if fresh else cache.state
        o, state = kda(l2_normalize(q), l2_normalize(k), v, g, beta, self.head_dim**-0.5, state, x.dtype)
        if cache is not None:
            cache.store(state, tail, tokens)
        gate = torch.sigmoid(widen(self.g_proj(x))).view(o.shape)
        o = self.o_norm.normalize(o) * widen(self.o_norm.weight) * gate
        o = self.o_proj(o.to(x.dtype).flatten(2))
        if real is not None:
            o = take_rows(o * real[..., None].to(o.dtype), order.argsort(dim=1))
        return o


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention as a product of matrices, for attn_implementation="eager".  query [B, H, T, K]; key, value with KV heads."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = widen(scores).softmax(-1).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class ArceeKdaRotary(nn.Module):
    """cos and sin of rotary positions, [B, T, head_dim] each. Half-split kind: channel i turns with i + head_dim / 2.

    YaRN: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023. Its factor is the one in
    the configuration, whatever max_position_embeddings is.
    """

    def __init__(self, config):
        super().__init__()
        rope, dim = config.rope_parameters, config.head_dim
        theta = rope["rope_theta"]
        self.frequencies = [theta ** (-2 * i / dim) for i in range(dim // 2)]
        self.attention_factor = 1.0
        if rope["rope_type"] == "yarn":
            self._stretch(rope, dim, theta)

    def _stretch(self, rope, dim, theta):
        factor, length = rope["factor"], rope["original_max_position_embeddings"]

        def channel(turns):  # the (fractional) channel that makes so many turns over the original length
            return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(channel(rope.get("beta_fast") or 32)), 0)
        high = min(math.ceil(channel(rope.get("beta_slow") or 1)), dim - 1)
        high = max(high, low + 0.001)  # no division by zero where both ends meet

        def slowed(i, frequency):
            ramp = min(max((i - low) / (high - low), 0.0), 1.0)
            return frequency * ((1 - ramp) + ramp / factor)

        def magnitude(mscale):
            return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

        self.frequencies = [slowed(i, f) for i, f in enumerate(self.frequencies)]
        self.attention_factor = rope.get("attention_factor")
        if self.attention_factor is None:
            mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
            both = mscale and all_dim
            self.attention_factor = magnitude(mscale) / magnitude(all_dim) if both else magnitude(1)

    @torch.no_grad()
    def forward(self, position_ids, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        frequencies = torch.tensor(self.frequencies, device=position_ids.device, dtype=wide)
        angle = position_ids[..., None].to(wide) * frequencies
        angle = torch.cat((angle, angle), dim=-1)
        return tuple((x * self.attention_factor).to(dtype) for x in (angle.cos(), angle.sin()))


def rotate(x, cos, sin):
    """x [B, H, T, K]; cos, sin [B, T, K]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


class ArceeKdaAttention(nn.Module):
    """Softmax attention with grouped key/value heads; rotary positions only where the caller hands them over."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, attention_mask=None, rotary=None, past_key_values=None, **kwargs):
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = self.config._attn_implementation
        attend = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        o, weights = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs)
        return self.o_proj(o.flatten(2)), weights


class ArceeKdaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = None
        if config.hidden_act == "silu":
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(F.relu(up).square() if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)


class ArceeKdaDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.mixer = layer_idx, config.mixers[layer_idx]
        kind = ArceeKdaDeltaAttention if self.mixer == "kda" else ArceeKdaAttention
        self.self_attn = kind(config, layer_idx)
        self.mlp = ArceeKdaMLP(config)
        self.input_layernorm = ArceeKdaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = ArceeKdaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, attention_mask=None, padding=None, rotary=None, past_key_values=None, **kwargs):
        h, weights = self.input_layernorm(x), None
        if self.mixer == "kda":
            h = self.self_attn(h, padding, None if past_key_values is None else past_key_values.layers[self.layer_idx])
        else:
            rotary = rotary if self.mixer == "rope" else None
            h, weights = self.self_attn(h, attention_mask, rotary, past_key_values, **kwargs)
        x = x + h
        return x + self.mlp(self.post_attention_layernorm(x)), weights


# ---------------------------------------------------------------- models


class ArceeKdaPreTrainedModel(PreTrainedModel):
    config_class = ArceeKdaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ArceeKdaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True  # a state cannot be rewound, so no decoding that drafts tokens and takes them back

    def __init__(self, config):
        super().__init__(config)
        if "kda" in config.mixers:  # transformers 4 refuses names that no parameter has
            self._keep_in_fp32_modules_strict = ["A_log", "dt_bias"]

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding, ArceeKdaConvolution)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ArceeKdaRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ArceeKdaDeltaAttention):
            # As flash-linear-attention does it: decay rates uniform in [1, 16], step sizes log-uniform in [0.001, 0.1].
            if not getattr(module.A_log, "_is_hf_initialized", False):
                module.A_log.uniform_(1, 16).log_()
            if not getattr(module.dt_bias, "_is_hf_initialized", False):
                dt = module.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp_min(1e-4)
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


class ArceeKdaModel(ArceeKdaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ArceeKdaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ArceeKdaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = ArceeKdaRotary(config) if "rope" in config.mixers else None
        self.gradient_checkpointing = False
        self.post_init()

    def _padding(self, attention_mask, tokens):
        """The mask of the new tokens for KDA layers: [B, T] of 0 and 1, or None where there is no padding."""
        if attention_mask is None or "kda" not in self.config.mixers:
            return None
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
            raise ValueError("KDA layers need attention_mask as [batch, tokens], 0 where a token is padding")
        padding = attention_mask[:, -tokens:].long()
        return None if padding.all() else padding

    def _causal_mask(self, attention_mask, x, past_key_values, positions):
        if set(self.config.mixers) == {"kda"}:
            return None
        accepted = inspect.signature(create_causal_mask).parameters  # the names differ between versions
        arguments = {
            "config": self.config,
            "inputs_embeds": x,
            "input_embeds": x,
            "attention_mask": attention_mask,
            "cache_position": positions,
            "past_key_values": past_key_values,
        }
        return create_causal_mask(**{name: value for name, value in arguments.items() if name in accepted})

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        """
        attention_mask [B, tokens seen and new], 0 where a token is padding (on any side). past_key_values: any
        transformers Cache; the one in the output is to be passed on. position_ids matter to "rope" layers alone.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.gradient_checkpointing and self.training:
            use_cache, past_key_values = False, None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        if use_cache and past_key_values is None:
            past_key_values = Cache(layers=[DynamicLayer() for _ in self.layers])
        if past_key_values is not None:
            add_kda_layers(past_key_values, self.config.mixers)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        positions = torch.arange(x.shape[1], device=x.device) + seen
        rotary = None
        if self.rotary is not None:
            rotary = self.rotary(positions[None] if position_ids is None else position_ids, x.dtype)
        padding = self._padding(attention_mask, x.shape[1])
        mask = self._causal_mask(attention_mask, x, past_key_values, positions)

        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states.append(x)
            x, weights = layer(
                x, attention_mask=mask, padding=padding, rotary=rotary, past_key_values=past_key_values, **kwargs
            )
            attentions.append(weights)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class ArceeKdaForCausalLM(ArceeKdaPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = ArceeKdaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, logits_to_keep=0, **kwargs,
    ):  # fmt: skip
        """
        labels [B, T]: input_ids (shifted in here), -100 where a token does not count. logits_to_keep: logits of the last
        so many tokens only (0: all), or the positions wanted.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds,
            use_cache, output_attentions, output_hidden_states, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["ArceeKdaPreTrainedModel", "ArceeKdaModel", "ArceeKdaForCausalLM"]
