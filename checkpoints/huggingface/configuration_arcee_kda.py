"""Configuration of the arcee_kda models: Arcee / Llama transformers some or all of whose attention layers are replaced
by Kimi Delta Attention (KDA) or lose their positions (NoPE)."""

from transformers import PretrainedConfig


MIXERS = ("kda", "nope", "rope")


class ArceeKdaConfig(PretrainedConfig):
    """
    Args:
        mixers: token mixer of every layer, one of "kda" (Kimi Delta Attention), "nope" (softmax attention without
            positions) and "rope" (softmax attention with rotary positions). Default: three KDA layers to one NoPE layer.
        hidden_act: "relu2" for down(relu(up x)^2), "silu" for down(silu(gate x) * up x).
        kda_num_heads, kda_head_dim: heads of a KDA layer and channels of each, for keys and values alike. Default: those
            of the softmax attention.
        kda_conv_size: taps of the causal convolution on q, k and v.
        kda_gate_rank: inner width of the low-rank projections of both gates. Default: kda_head_dim.
        kda_gate_lower_bound: None for the decay -exp(A_log) softplus(f + dt_bias); a number b in [-5, 0) for
            b sigmoid(exp(A_log) (f + dt_bias)).
        rope_parameters (or rope_theta with rope_scaling, as older files write it): only read where a "rope" mixer is
            present; rope_type "default" or "yarn".
    The other arguments mean what they mean in ArceeConfig and LlamaConfig.
    """

    model_type = "arcee_kda"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=128004,
        hidden_size=2560,
        intermediate_size=18432,
        num_hidden_layers=36,
        num_attention_heads=20,
        num_key_value_heads=4,
        head_dim=None,
        mixers=None,
        hidden_act="relu2",
        kda_num_heads=None,
        kda_head_dim=None,
        kda_conv_size=4,
        kda_gate_rank=None,
        kda_gate_lower_bound=None,
        max_position_embeddings=65536,
        initializer_range=0.02,
        rms_norm_eps=1e-5,
        use_cache=True,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.mixers = (
            ["nope" if i % 4 == 3 else "kda" for i in range(num_hidden_layers)] if mixers is None else list(mixers)
        )
        self.hidden_act = hidden_act
        self.kda_num_heads = num_attention_heads if kda_num_heads is None else kda_num_heads
        self.kda_head_dim = self.head_dim if kda_head_dim is None else kda_head_dim
        self.kda_conv_size = kda_conv_size
        self.kda_gate_rank = self.kda_head_dim if kda_gate_rank is None else kda_gate_rank
        self.kda_gate_lower_bound = kda_gate_lower_bound
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        if "rope" in self.mixers:
            rope = dict(rope_parameters or rope_scaling or {})
            rope.setdefault("rope_type", rope.pop("type", "default"))
            rope.setdefault("rope_theta", rope_theta)
            self.rope_parameters = rope
        self._check()
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        # Some versions of PretrainedConfig do not keep these among their own fields.
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def _check(self):
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers has {len(self.mixers)} entries for {self.num_hidden_layers} layers")
        for mixer in self.mixers:
            if mixer not in MIXERS:
                raise ValueError(f"mixers holds {mixer!r}; accepted: {', '.join(MIXERS)}")
        if self.hidden_act not in ("relu2", "silu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}; accepted: relu2, silu")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        bound = self.kda_gate_lower_bound
        if bound is not None and not -5 <= bound < 0:
            raise ValueError(f"kda_gate_lower_bound is {bound}; accepted: null or a number in [-5, 0)")
        if "rope" in self.mixers and self.rope_parameters["rope_type"] not in ("default", "yarn"):
            raise ValueError(f"rope_type is {self.rope_parameters['rope_type']!r}; accepted: default, yarn")


__all__ = ["ArceeKdaConfig"]
