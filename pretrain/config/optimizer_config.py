"""Settings of the optimizer, the learning rate and the precision."""

from dataclasses import dataclass
from typing import Literal

from pretrain.config.facts import at_most_one, setting
from pretrain.config.token_count import Tokens


@dataclass(kw_only=True)
class OptimizerConfig:
    """How weights are updated, at which rate and in which precision."""

    optimizer: Literal["adam", "muon"] = "adam"
    """adam = AdamW (decoupled weight decay, arXiv 1711.05101); muon = Muon (arXiv 2502.16982) for
    the layers' matrices, AdamW for embedding, output, norms and biases."""
    lr: float = setting(3e-4, per_phase=True, resume="effect", above=0)
    """Highest learning rate; a phase may change it."""
    min_lr: float = setting(0.0, per_phase=True, resume="effect", at_least=0)
    """Learning rate where a decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = setting(
        "cosine", resume="effect"
    )
    """Shape between warmup and end; WSD = warmup, stable, decay."""
    lr_warmup_iters: int | None = setting(None, resume="effect", at_least=0)
    """Warmup in steps of the first phase's global batch (or samples, tokens, fraction)."""
    lr_warmup_samples: int | None = setting(None, resume="effect", at_least=0)
    """Warmup in samples of the first phase's length."""
    lr_warmup_tokens: Tokens | None = setting(None, per_phase=True, resume="effect", at_least=0)
    """Warmup in tokens."""
    lr_warmup_fraction: float | None = setting(None, resume="effect", at_least=0)
    """Warmup as a share of the decay's length."""
    lr_warmup_init: float = setting(0.0, resume="effect", at_least=0)
    """Learning rate at the first step of the warmup."""
    lr_decay_iters: int | None = setting(None, resume="effect", above=0)
    """Where the decay ends, in steps of the first phase's global batch; by default the end of the
    run."""
    lr_decay_samples: int | None = setting(None, resume="effect", above=0)
    """Where the decay ends, in samples of the first phase's length."""
    lr_decay_tokens: Tokens | None = setting(None, resume="effect", above=0)
    """Where the decay ends, in tokens."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = setting(
        "exponential", resume="effect"
    )
    """Shape of WSD's final decay."""
    lr_wsd_decay_iters: int | None = setting(None, resume="effect", above=0)
    """Length of WSD's final decay in steps of the first phase's global batch."""
    lr_wsd_decay_samples: int | None = setting(None, resume="effect", above=0)
    """Length of WSD's final decay in samples of the first phase's length."""
    lr_wsd_decay_tokens: Tokens | None = setting(None, resume="effect", above=0)
    """Length of WSD's final decay in tokens."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = setting(1e-8, above=0)
    """Added to the root of the second moment."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    muon_nesterov: bool = True
    """Look a step ahead of the momentum (Nesterov)."""
    muon_num_ns_steps: int = setting(5, at_least=1)
    """Steps of Newton-Schulz, which makes Muon's updates nearly orthogonal."""
    muon_coefficient_type: Literal["simple", "quintic"] = "simple"
    """Coefficients of Newton-Schulz: simple = the same in every step (arXiv 2502.16982), quintic =
    each step has its own, closer to orthogonal."""
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    """Scale of an orthogonal [rows, columns] update: spectral = root of the larger side,
    shape_scaling = root of rows / columns, at least 1, unit_rms_norm = root of rows / columns."""
    muon_extra_scale_factor: float = setting(0.2, above=0)
    """Multiplies that scale; spectral and 0.2 give the size of AdamW's updates, so that its
    learning rate and weight decay carry over."""
    muon_fp32_matmul_prec: Literal["medium", "highest"] = "medium"
    """Precision of Newton-Schulz: medium = bf16 where the device has units for it, highest =
    fp32."""
    muon_per_head: bool = False
    """Orthogonalize q, k and v head by head, and not each as a whole."""
    weight_decay: float = setting(0.1, resume="scheduler", at_least=0)
    """Decoupled weight decay on matrices; norms, biases and sinks have none."""
    clip_grad: float = setting(1.0, at_least=0)
    """Largest global gradient norm; 0 switches clipping off."""
    qk_clip: bool = False
    """After each update, scale the query and key weights of heads whose largest attention logit of
    the step is above --qk-clip-threshold (MuonClip, arXiv 2507.20534); query heads that share a key
    head go together."""
    qk_clip_alpha: float = setting(0.5, at_least=0)
    """The query's part of QK-clip's factor, as an exponent; the key gets the rest."""
    qk_clip_threshold: float = setting(100.0, above=0)
    """Attention logit above which QK-clip acts."""
    bf16: bool = False
    """Compute in bf16 over fp32 master weights and optimizer state."""
    fp64: bool = setting(False, resume="forbidden")
    """Everything in double precision, to compare layouts exactly."""
    accumulate_allreduce_grads_in_fp32: bool = setting(True, resume="free")
    """Gradients are always accumulated and reduced over dp x cp in fp32; an error when turned
    off."""
    calculate_per_token_loss: bool = setting(True, resume="free")
    """Loss = sum / global target count, our only way; a warning when turned off."""
    optimizer_cpu_offload: bool = setting(False, resume="free")
    """Master weights, their gradients and moments live in the host's memory, and AdamW runs there;
    on a GPU."""
    max_skipped_steps: int = setting(10, resume="free", at_least=0)
    """Steps in a row that may be skipped, for a loss or gradient norm that is not finite or
    (--spike-policy skip) a spike; one more ends the run."""
    seed: int = setting(1234, resume="data", at_least=0)
    """Seed of initial weights, document order and data split."""

    def validate(self) -> list[str]:
        """List the problems of these settings, as `name = value: rule. Fix: ...`."""
        problems = [
            f"{name} = {value}: must be in [0, 1). Fix: 0.9 or 0.95 is common."
            for name in ("adam_beta1", "adam_beta2", "muon_momentum")
            for value in [getattr(self, name)]
            if not 0 <= value < 1
        ]
        if self.bf16 and self.fp64:
            problems.append("bf16 = True: cannot be combined with fp64. Fix: remove one of them.")
        if self.qk_clip_alpha > 1:
            problems.append(
                f"qk_clip_alpha = {self.qk_clip_alpha}: must be at most 1. Fix: 0.5 shares the "
                "factor equally."
            )
        # A flag of Megatron-LM that we cannot turn off.
        if not self.accumulate_allreduce_grads_in_fp32:
            problems.append(
                "accumulate_allreduce_grads_in_fp32 = False: gradients are always reduced in fp32. "
                "Fix: remove it."
            )
        if self.min_lr > self.lr:
            problems.append(
                f"min_lr = {self.min_lr}: must not exceed lr = {self.lr}. Fix: lower it."
            )
        if self.seed >= 2**63:  # torch's generators take no more
            problems.append(f"seed = {self.seed}: must be below 2^63. Fix: a smaller number.")
        # Each of these lengths may be given in one unit.
        warmup = [f"lr_warmup_{unit}" for unit in ("iters", "samples", "tokens", "fraction")]
        problems += at_most_one(self, *warmup)
        # A decay has no length as a fraction.
        for length in ("lr_decay", "lr_wsd_decay"):
            units = [f"{length}_{unit}" for unit in ("iters", "samples", "tokens")]
            problems += at_most_one(self, *units)
        return problems
