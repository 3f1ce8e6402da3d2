"""Settings of the model."""

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from model.layer_ropes import LayerRope, layer_ropes, no_rope_problems
from model.rope import PARAMETERS, Rope, RopeType
from model.scoring import Scoring, ScoringNeeds
from model.width_scaling import FanIn, width_problems
from model.windows import Window, layer_windows, window_problems

_SIZE = dict(at_least=1, fix="give it, or name a preset with --model")
"""Facts about sizes that a preset gives."""
_BASE = dict(at_least=1, fix="give that of the base model, or leave it out")
"""Facts about the sizes of muP's base model."""
_OF_UPDATES = dict(resume="optimization")
"""Facts about sizes that change no number of the model: only its initial weights and updates."""
_ROPE = dict(per_phase=True, resume="effect")
"""Facts about every setting of the rotary embedding."""


@dataclass(kw_only=True)
class ModelConfig:
    """Holds the settings of the model; a setting of the run is a field, a YAML key and a flag."""

    # The parts of the model and their sizes.
    model: str | None = field(default=None, metadata=dict(resume="free"))
    """A preset (tiny, 125m, 1b, llama3-8b, llama3-70b, qwen3-8b); fields beside it override it."""
    num_layers: int = field(default=0, metadata=_SIZE)
    """Transformer layers."""
    hidden_size: int = field(default=0, metadata=_SIZE)
    """Width of the residual stream."""
    ffn_hidden_size: int = field(default=0, metadata=_SIZE)
    """Inner width of the MLP."""
    num_attention_heads: int = field(default=0, metadata=_SIZE)
    """Query heads."""
    group_query_attention: bool | None = field(
        default=None, metadata=dict(resume="free", of_weights=False)
    )
    """Megatron-LM's switch beside --num-query-groups; given, it must agree with it."""
    num_query_groups: int | None = None
    """Key/value heads; by default as many as query heads."""
    kv_channels: int | None = field(
        default=None, metadata=dict(at_least=1, fix="give the size of one head")
    )
    """Size of one head; by default hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = field(
        default=None, metadata=dict(resume="free", of_weights=False)
    )
    """Longest context that exports declare; by default the longest phase. Must cover all phases."""
    swiglu: bool = field(default=True, metadata=dict(only=True))
    """Gated MLP; the only one built."""
    activation_func: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the MLP's gate: silu (SwiGLU), or gelu by its tanh formula (Gemma)."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """The only normalization built."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Norms of a layer's attention and MLP: of what they read (pre), of what they add (post: OLMo 2
    and 3), or of both (Gemma 2 and 3)."""
    apply_layernorm_1p: bool = False
    """RMSNorm multiplies by 1 + weight (Gemma); initial weights are 0 then."""
    norm_epsilon: float = field(default=1e-5, metadata=dict(above=0))
    """Added to the mean square inside RMSNorm."""
    qk_layernorm: bool = False
    """RMSNorm of queries and keys (Qwen3, Gemma 3, OLMo 2 and 3)."""
    qk_layernorm_scope: Literal["head", "all_heads"] = "head"
    """What qk_layernorm norms at once: each head (Qwen3, Gemma 3), or the heads of a token side by
    side (OLMo 2 and 3)."""
    add_qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    disable_bias_linear: bool = field(default=True, metadata=dict(only=True))
    """No bias on other linear layers; the only way built."""
    untie_embeddings_and_output_weights: bool = False
    """Give the output projection its own weights instead of the embedding's."""
    make_vocab_size_divisible_by: int = field(default=128, metadata=_SIZE | dict(resume="free"))
    """The embedding's rows are padded to a multiple of this; padded tokens take no part in the
    softmax. May differ from a checkpoint's: rows of padding are cut or filled with zeros."""
    init_method_std: float = field(default=0.02, metadata=dict(resume="free", above=0))
    """Standard deviation of initial weights; residual projections: over sqrt(2 num_layers)."""
    embedding_multiplier: float = field(default=1.0, metadata=dict(above=0))
    """Factor on the embedding of each token (Granite; Gemma: the root of hidden_size)."""
    residual_multiplier: float = field(default=1.0, metadata=dict(above=0))
    """Factor on what each attention and MLP adds to the residual stream (Granite)."""
    logits_scaling: float = field(default=1.0, metadata=dict(above=0))
    """The logits are divided by it (Granite)."""
    # A model that is wider than the one whose learning rate was searched.
    use_mup: bool = False
    """muP: initial weights, learning rates, logits and attention's scores are scaled by the width,
    so that a learning rate found at mup_base_hidden_size is right at hidden_size."""
    mup_base_hidden_size: int | None = field(default=None, metadata=_BASE)
    """Width at which muP scales nothing; must divide hidden_size, which is the default."""
    mup_base_ffn_hidden_size: int | None = field(default=None, metadata=_BASE | _OF_UPDATES)
    """Inner width of the base model's MLP; by default in proportion to the width."""
    mup_base_num_attention_heads: int | None = field(default=None, metadata=_BASE | _OF_UPDATES)
    """Query heads of the base model; by default all its heads are in proportion to the width."""
    mup_base_head_dim: float | None = field(default=None, metadata=dict(above=0))
    """Size of a base model's head: muP's scores are multiplied by its root. With that of all widths
    they are as without muP."""
    mup_attn_scale_power: float = field(default=1.0, metadata=dict(above=0))
    """muP divides scores by this power of the head size; 0.5 is the usual root."""
    # Where a token is: the rotary embedding, which a phase may change.
    position_embedding_type: Literal["rope"] = "rope"
    """Rotary position embedding; the only one built."""
    rotary_base: float = field(default=10000.0, metadata=_ROPE | dict(above=0))
    """Base of the rotary angles (theta); a phase may change it."""
    use_rope_scaling: bool | None = field(default=None, metadata=_ROPE)
    """Megatron-LM's switch for rope_type llama3; given, it must agree. A phase may change it."""
    rope_type: RopeType | None = field(default=None, metadata=_ROPE)
    """Scaling of the rotary angles, as in transformers; by default none. A phase may change it."""
    rope_scaling_factor: float | None = field(default=None, metadata=_ROPE)
    """Factor by which linear, llama3 or yarn extends the original context; llama3: 8 by default."""
    original_max_position_embeddings: int | None = field(default=None, metadata=_ROPE)
    """Context in tokens before llama3's or yarn's extension; llama3's default is 8192."""
    rope_low_freq_factor: float | None = field(default=None, metadata=_ROPE)
    """llama3: waves longer than the original context / this get the whole factor; default 1."""
    rope_high_freq_factor: float | None = field(default=None, metadata=_ROPE)
    """llama3: waves shorter than the original context / this are kept; default 4."""
    yarn_beta_fast: float | None = field(default=None, metadata=_ROPE)
    """yarn: dims that turn more often than this in the original context are kept; default 32."""
    yarn_beta_slow: float | None = field(default=None, metadata=_ROPE)
    """yarn: dims that turn less often than this get the whole factor; default 1."""
    yarn_attention_factor: float | None = field(default=None, metadata=_ROPE)
    """yarn: factor on cosines and sines; by default 0.1 ln(rope_scaling_factor) + 1."""
    yarn_mscale: float | None = field(default=None, metadata=_ROPE)
    """yarn: the logarithm's weight in the attention factor; needs yarn_mscale_all_dim."""
    yarn_mscale_all_dim: float | None = field(default=None, metadata=_ROPE)
    """yarn: the same in its denominator."""
    yarn_correction_range_round_to_int: bool | None = field(default=None, metadata=_ROPE)
    """yarn: round the bounds of kept dims to whole dims (transformers' truncate); default true."""
    window_rotary_base: float | None = field(default=None, metadata=dict(above=0))
    """Base of a rotary embedding without scaling in layers with a window (Gemma 3, OLMo 3); by
    default they have that of the others. A phase changes that of the others only."""
    no_rope_freq: list[int] = field(default_factory=list)
    """Layers without rotary embedding (SmolLM3): a number N for every N-th, or for each layer 1
    (without) or 0 (with)."""
    rotary_percent: float = field(default=1.0, metadata=dict(only=1.0))
    """Share of each head that is rotated; only 1.0 is built."""
    # How attention is computed.
    attention_dropout: float = field(default=0.0, metadata=dict(resume="free", only=0.0))
    """Accepted at 0 only: there is no dropout."""
    hidden_dropout: float = field(default=0.0, metadata=dict(resume="free", only=0.0))
    """Accepted at 0 only: there is no dropout."""
    window_size: list[int] = field(default_factory=list)
    """Tokens of its document that a token sees before it, and 0: 1023 0 is a window of 1,024
    tokens, itself included. By default a token sees all of its document before it."""
    window_attn_skip_freq: list[int] = field(default_factory=list)
    """Which layers have no window: a number N for every N-th, or for each layer 1 (window) or 0
    (none); by default all have one."""
    softmax_type: Literal["vanilla", "learnable"] = "vanilla"
    """learnable: a query head has a sink, a learned logit in its softmax's sum that no value
    follows (gpt-oss)."""
    softmax_scale: float | None = field(default=None, metadata=dict(above=0))
    """Factor on attention's scores; by default 1 / sqrt(head size)."""
    attn_logit_softcapping: float | None = field(default=None, metadata=dict(above=0))
    """Bound on attention's scores: cap * tanh(score / cap) (Gemma 2); by default none."""
    final_logit_softcapping: float | None = field(default=None, metadata=dict(above=0))
    """The same bound on the output's logits (Gemma 2); by default none."""
    attention_backend: Literal["auto", "sdpa", "varlen", "mixed", "flash", "te", "cudnn"] = field(
        default="auto", metadata=dict(resume="free", of_weights=False)
    )
    """Attention kernel: torch's SDPA, torch's varlen, cuDNN for long documents and varlen for
    others (mixed), flash-attn, transformer-engine, or cuDNN's frontend (cudnn). auto picks and says
    why."""
    attention_crossover_tokens: int | None = field(
        default=None,
        metadata=dict(
            resume="free",
            of_weights=False,
            at_least=1,
            fix="the tokens of a document, or leave it out to have it measured",
        ),
    )
    """Tokens from which mixed gives a document to cuDNN; by default measured once per card."""

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def windows(self) -> tuple[Window, ...]:
        """Window of each layer in tokens, its own included; None = a token sees all before it."""
        return layer_windows(self.window_size, self.window_attn_skip_freq, self.num_layers)

    @property
    def scorings(self) -> tuple[Scoring, ...]:
        """How each layer's attention scores its pairs."""
        return tuple(
            Scoring(window, self.score_scale, self.attn_logit_softcapping)
            for window in self.windows
        )

    @property
    def score_scale(self) -> float | None:
        """Factor on attention's scores; None = 1 / sqrt(head size)."""
        if self.softmax_scale is not None or not self.use_mup:
            return self.softmax_scale
        scale = math.sqrt(self.mup_base_head_dim or 1) / self.head_size**self.mup_attn_scale_power
        return None if math.isclose(scale, self.head_size**-0.5, rel_tol=1e-12) else scale

    @property
    def logits_divisor(self) -> float:
        """What the logits are divided by: muP's divisor is part of it."""
        return self.logits_scaling * self.width_ratio

    @property
    def base_hidden_size(self) -> int:
        """Width of muP's base model; that of this one without muP."""
        return (self.mup_base_hidden_size if self.use_mup else None) or self.hidden_size

    @property
    def width_ratio(self) -> float:
        """The width over that of muP's base model; 1 without muP."""
        return self.hidden_size / self.base_hidden_size if self.hidden_size else 1.0

    def fan_in_ratio(self, fan_in: FanIn) -> float:
        """Return what a matrix sums over what the base model's sums; 1 without muP."""
        if fan_in == "ffn" and self.use_mup and self.mup_base_ffn_hidden_size:
            return self.ffn_hidden_size / self.mup_base_ffn_hidden_size
        if fan_in == "heads" and self.use_mup and self.mup_base_num_attention_heads:
            base_size = self.mup_base_head_dim or self.head_size
            base = self.mup_base_num_attention_heads * base_size
            return self.num_attention_heads * self.head_size / base
        return self.width_ratio

    def without_mup(self) -> Self:
        """Return settings of the same function, with muP's factors written out."""
        bases = [name for name in vars(self) if name.startswith("mup_base_")]
        return replace(
            self,
            use_mup=False,
            mup_attn_scale_power=1.0,
            softmax_scale=self.score_scale,
            logits_scaling=self.logits_divisor,
            **dict.fromkeys(bases),
        )

    @property
    def has_sinks(self) -> bool:
        """Has each query head a learned logit in its softmax's sum?"""
        return self.softmax_type == "learnable"

    @property
    def scoring_needs(self) -> ScoringNeeds:
        """What the attention backend must be able to compute."""
        return ScoringNeeds(
            windows=bool(self.window_size),
            softcap=self.attn_logit_softcapping is not None,
            sinks=self.has_sinks,
        )

    @property
    def has_norms_before(self) -> bool:
        """Do an attention and an MLP read what is normed?"""
        return self.norm_placement in ("pre", "both")

    @property
    def has_norms_after(self) -> bool:
        """Is what an attention and an MLP add normed?"""
        return self.norm_placement in ("post", "both")

    @property
    def norms_all_heads(self) -> bool:
        """Are queries and keys normed over all heads of a token at once?"""
        return self.qk_layernorm and self.qk_layernorm_scope == "all_heads"

    @property
    def layer_ropes(self) -> tuple[LayerRope, ...]:
        """Which rotary embedding each layer has."""
        has_own = self.window_rotary_base is not None
        return layer_ropes(self.windows, self.no_rope_freq, windows_have_own=has_own)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of a layer."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def rope(self) -> Rope:
        """The rotary embedding that these settings mean; what is left out is the type's default."""
        return Rope.make(
            self.rotary_base,
            self.rope_type or ("llama3" if self.use_rope_scaling else "default"),
            {name: getattr(self, setting) for setting, (name, _) in PARAMETERS.items()},
        )

    @property
    def window_rope(self) -> Rope | None:
        """The rotary embedding of layers with a window, where they have one of their own."""
        return None if self.window_rotary_base is None else Rope(self.window_rotary_base)

    def rope_problems(self) -> list[str]:
        """List why the rotary embedding cannot be trained or exported.

        Each phase asks with its own settings.
        """
        rope = self.rope
        # The switch may be left out; where it is given, it must mean the same as the type.
        meant = {True: "llama3", False: "default", None: rope.type}[self.use_rope_scaling]
        if rope.type != meant:
            return [
                f"use_rope_scaling = {self.use_rope_scaling}: means rope_type {meant}, but "
                f"rope_type = {rope.type}. Fix: remove one of them."
            ]
        return rope.problems()

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of the embedding: the vocabulary padded up, the same in every layout."""
        multiple = self.make_vocab_size_divisible_by
        return -(-vocab_size // multiple) * multiple

    def validate(self) -> list[str]:
        """List settings that do not go together, as `name = value: rule. Fix: ...`."""
        problems = []
        if self.attention_crossover_tokens and self.attention_backend not in ("auto", "mixed"):
            problems.append(
                f"attention_crossover_tokens = {self.attention_crossover_tokens}: is for the "
                f"backend mixed, but attention_backend = {self.attention_backend}. Fix: remove one "
                "of them."
            )
        problems += window_problems(self.window_size, self.window_attn_skip_freq, self.num_layers)
        problems += no_rope_problems(self.no_rope_freq, self.num_layers)
        problems += width_problems(self.hidden_size, self.mup_base_hidden_size)
        # Heads are compared where their numbers and sizes are legal by themselves.
        kv_channels = 1 if self.kv_channels is None else self.kv_channels
        if min(self.num_attention_heads, self.hidden_size, kv_channels) >= 1:
            problems += self._head_problems()
        return problems

    def _head_problems(self) -> list[str]:
        """List what is wrong between the numbers of heads and their size."""
        problems = []
        heads = self.num_attention_heads
        groups = self.num_query_groups
        if groups is not None and (groups < 1 or heads % groups):
            problems.append(
                f"num_query_groups = {groups}: must divide num_attention_heads = {heads}. "
                f"Fix: one of {[g for g in range(1, heads + 1) if heads % g == 0]}."
            )
        # Megatron-LM's switch does nothing by itself here; it may only agree.
        if self.group_query_attention is True and groups is None:
            problems.append("group_query_attention = True: needs --num-query-groups. Fix: give it.")
        if self.group_query_attention is False and groups not in (None, heads):
            problems.append(
                f"group_query_attention = False: but num_query_groups = {groups}. Fix: remove one "
                "of them."
            )
        # Without a size of its own, a head is an equal part of the width.
        if self.kv_channels is None and self.hidden_size % heads:
            problems.append(
                f"hidden_size = {self.hidden_size}: must be a multiple of num_attention_heads = "
                f"{heads} when kv_channels is not given. Fix: change one of them, or give "
                "--kv-channels."
            )
        elif self.head_size % 2:
            problems.append(
                f"kv_channels = {self.head_size}: rotary embedding turns pairs, so the head size "
                "must be even. Fix: an even head size."
            )
        return problems
