"""The learning rate as a pure function of the clock (tokens consumed before the step).

Shapes follow Megatron-LM's OptimizerParamScheduler (megatron/core/optimizer_param_scheduler.py), WSD's
stable-then-decay from MiniCPM (arXiv 2404.06395).
"""

import math
from dataclasses import dataclass

from pretrain.config import OptimizerConfig
from pretrain.phases import Phase


@dataclass(frozen=True)
class LearningRate:
    """Warmup over [0, warmup), then `style` until `end`; all in tokens."""

    style: str
    warmup: int
    end: int
    wsd_decay: int
    wsd_style: str
    warmup_init: float

    @staticmethod
    def make(config: OptimizerConfig, phases: list[Phase]) -> "LearningRate":
        """Convert iterations, samples and fractions to tokens by the first phase's batch and length.

        Raises:
            ValueError: the pieces are longer than the whole.
        """
        first = phases[0]

        def tokens(prefix: str) -> int | None:
            for unit, factor in (("iters", first.global_batch_tokens), ("samples", first.seq_length), ("tokens", 1)):
                count = getattr(config, f"{prefix}_{unit}")
                if count is not None:
                    return count * factor
            return None

        end, warmup = tokens("lr_decay"), tokens("lr_warmup") or 0
        end = phases[-1].end if end is None else end
        if config.lr_warmup_fraction is not None:
            warmup = round(config.lr_warmup_fraction * end)
        wsd_decay = tokens("lr_wsd_decay") or 0
        if config.lr_decay_style == "WSD" and wsd_decay == 0:
            raise ValueError("lr_decay_style = WSD: needs the length of its final decay. "
                             "Fix: give --lr-wsd-decay-tokens (or -samples, -iters).")
        decay = wsd_decay if config.lr_decay_style == "WSD" else 0
        if warmup + decay > end or warmup < 0:
            raise ValueError(f"lr_warmup = {warmup} tokens, lr_wsd_decay = {decay} tokens: together they must not "
                             f"exceed the schedule's {end} tokens. Fix: shorten them.")
        return LearningRate(config.lr_decay_style, warmup, end, wsd_decay, config.lr_wsd_decay_style,
                            config.lr_warmup_init)

    def at(self, clock: int, lr: float, min_lr: float) -> float:
        """Learning rate of the step that starts at `clock`, between `min_lr` and `lr` of the current phase."""
        if clock < self.warmup:
            return self.warmup_init + (lr - self.warmup_init) * clock / self.warmup
        if self.style == "constant":
            return lr
        if clock >= self.end:
            return min_lr
        if self.style == "WSD":
            return min_lr + (lr - min_lr) * self._wsd(clock)
        share = (clock - self.warmup) / (self.end - self.warmup)
        factor = 1 - share if self.style == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return min_lr + (lr - min_lr) * factor

    def _wsd(self, clock: int) -> float:
        start = self.end - self.wsd_decay
        if clock < start:
            return 1.0
        share = (clock - start) / self.wsd_decay
        return {"linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share)),
                "exponential": 2 * math.pow(0.5, share) - 1, "minus_sqrt": 1 - math.sqrt(share)}[self.wsd_style]
