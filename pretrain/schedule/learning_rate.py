"""The learning rate as a pure function of the clock (tokens consumed before the step).

The run is a row of arcs: one from its start, and one from each phase that warms up again. Each arc
warms up and then follows the style until it ends. Shapes follow Megatron-LM's
OptimizerParamScheduler (megatron/core/optimizer_param_scheduler.py), WSD's stable-then-decay from
MiniCPM (arXiv 2404.06395).
"""

import math
from dataclasses import dataclass

from pretrain.config.config import OptimizerConfig
from pretrain.schedule.phases import Phase, phase_end

UNITS = ("iters", "samples", "tokens", "fraction")
"""Ends of the names of the settings that give a length of the schedule."""


@dataclass(frozen=True)
class Arc:
    """Warmup over [start, start + warmup) from `warmup_init`, then `style` until `end`; all in
    tokens."""

    style: str
    start: int
    warmup: int
    end: int
    warmup_init: float
    wsd_decay: int
    wsd_style: str
    first_step: int
    """Tokens of the run's first step: where an inverse square root without a warmup begins."""

    def at(self, clock: int, lr: float, min_lr: float) -> float:
        done = clock - self.start
        if done < self.warmup:
            return self.warmup_init + (lr - self.warmup_init) * done / self.warmup
        if self.style == "constant":
            return lr
        if self.style == "inverse-square-root" and clock <= self.end:
            return max(
                min_lr,
                lr * math.sqrt(max(self.warmup, self.first_step) / max(done, self.first_step)),
            )
        if clock >= self.end:
            return min_lr
        if self.style == "WSD":
            return min_lr + (lr - min_lr) * self._wsd(clock)
        share = (done - self.warmup) / (self.end - self.start - self.warmup)
        factor = 1 - share if self.style == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return min_lr + (lr - min_lr) * factor

    def _wsd(self, clock: int) -> float:
        start = self.end - self.wsd_decay
        if clock < start or not self.wsd_decay:
            return 1.0
        share = (clock - start) / self.wsd_decay
        return {
            "linear": 1 - share,
            "cosine": 0.5 * (1 + math.cos(math.pi * share)),
            "exponential": 2 * math.pow(0.5, share) - 1,
            "minus_sqrt": 1 - math.sqrt(share),
        }[self.wsd_style]


@dataclass(frozen=True)
class LearningRate:
    """The arcs of a run, in order."""

    arcs: tuple[Arc, ...]

    @property
    def corners(self) -> list[int]:
        """Places of the clock between which the rate has one shape, and one inside each short
        shape."""
        return [
            at
            for arc in self.arcs
            for at in (
                arc.start,
                arc.start + arc.warmup // 3,
                arc.start + arc.warmup,
                arc.end - arc.wsd_decay,
                arc.end - arc.wsd_decay // 3,
                arc.end,
            )
        ]

    @staticmethod
    def make(config: OptimizerConfig, phases: list[Phase]) -> "LearningRate":
        """Convert iterations, samples and fractions to tokens by the first phase's (largest) batch
        and length.

        Raises:
            ValueError: the pieces are longer than the whole, or WSD's decay is given twice or not
            at all.
        """
        end = (
            None if config.lr_decay_style == "constant" else _tokens(config, "lr_decay", phases[0])
        )
        # A phase's end is meant in whole steps, so that the decay ends exactly with the last of
        # them.
        end = phases[-1].end if end is None else (phase_end(phases, end) or end)
        begins = [0, *(phase.start for phase in phases[1:] if phase.lr_schedule == "rewarm")]
        arcs: list[Arc] = []
        _check_end(config, end, phases)
        for number, start in enumerate(begins):
            phase = next(phase for phase in phases if phase.start >= start)
            is_last = number == len(begins) - 1
            stop = end if is_last else begins[number + 1]
            warmup = phase.lr_warmup_tokens
            initial = 0.0
            if start == 0:
                warmup = _tokens(config, "lr_warmup", phase) or warmup
                initial = config.lr_warmup_init
                if config.lr_warmup_fraction is not None:
                    warmup = round(config.lr_warmup_fraction * stop)
            else:
                before = phases[phase.index - 1]
                initial = arcs[-1].at(start, before.lr, before.min_lr)
            decay = _wsd_decay(config, phases, stop) if is_last else 0
            if warmup + decay > stop - start:
                of_phase = f"phase {phase.name!r}: lr_warmup_tokens"
                place = of_phase if start else _given(config, "lr_warmup")
                lengths = {place: warmup, _given(config, "lr_wsd_decay"): decay}
                raise ValueError(_too_long(lengths, stop - start))
            arcs.append(
                Arc(
                    config.lr_decay_style,
                    start,
                    warmup,
                    stop,
                    initial,
                    decay,
                    config.lr_wsd_decay_style,
                    phases[0].stretches[0].batch,
                )
            )
        return LearningRate(tuple(arcs))

    def at(self, clock: int, lr: float, min_lr: float) -> float:
        """Learning rate of the step that starts at `clock`, between `min_lr` and `lr` of the
        current phase."""
        arc = next(arc for arc in reversed(self.arcs) if arc.start <= clock)
        return arc.at(clock, lr, min_lr)


def _tokens(config: OptimizerConfig, prefix: str, first: Phase) -> int | None:
    """What `prefix`_iters, _samples or _tokens means in tokens; None if none is given."""
    for unit, factor in (
        ("iters", first.global_batch_tokens),
        ("samples", first.seq_length),
        ("tokens", 1),
    ):
        count = getattr(config, f"{prefix}_{unit}")
        if count is not None:
            return count * factor
    return None


def _too_long(lengths: dict[str, int], available: int) -> str:
    """What to say of pieces of the schedule, tokens by name, that take more than `available`."""
    parts = [f"{name} ({tokens:,} tokens)" for name, tokens in lengths.items() if tokens]
    must = "together they must" if len(parts) > 1 else "must"
    return (
        f"{', '.join(parts)}: {must} not exceed the schedule's {available:,} tokens. "
        "Fix: a shorter one, or train longer."
    )


def _given(config: OptimizerConfig, prefix: str) -> str:
    """The setting that gives the length `prefix`, with its value."""
    names = [f"{prefix}_{unit}" for unit in UNITS]
    given = [f"{name} = {value}" for name in names if (value := getattr(config, name, None))]
    return given[0] if given else prefix


def _check_end(config: OptimizerConfig, end: int, phases: list[Phase]) -> None:
    """Raises ValueError where the decay would be over before a phase warms up again or begins WSD's
    decay."""
    late = [phase for phase in phases if phase.lr_schedule != "continue" and phase.start >= end]
    if late and config.lr_decay_style != "constant":
        raise ValueError(
            f"phase {late[0].name!r}: lr_schedule = {late[0].lr_schedule}: begins at {late[0].start:,} "
            f"tokens, but lr_decay_tokens ends the decay at {end:,}. Fix: leave lr_decay_tokens out, "
            "which means the run's end."
        )


def _wsd_decay(config: OptimizerConfig, phases: list[Phase], end: int) -> int:
    """Tokens of WSD's final decay: given, or from the start of the phase with lr_schedule = decay
    to the end."""
    given = _tokens(config, "lr_wsd_decay", phases[0])
    marked = [p for p in phases if p.lr_schedule == "decay"]
    if config.lr_decay_style != "WSD":
        if marked:
            raise ValueError(
                f"phase {marked[0].name!r}: lr_schedule = decay: is WSD's final decay, but lr_decay_style "
                f"= {config.lr_decay_style}. Fix: --lr-decay-style WSD, or leave it out."
            )
        return 0
    if marked and given:
        raise ValueError(
            f"phase {marked[0].name!r}: lr_schedule = decay: the decay's length is also given, {given} "
            "tokens by lr_wsd_decay. Fix: remove one of them."
        )
    if not marked and not given:
        raise ValueError(
            "lr_decay_style = WSD: needs the length of its final decay. Fix: give --lr-wsd-decay-tokens "
            "(or -samples, -iters), or lr_schedule: decay in the phase with which it begins."
        )
    if marked and any(phase.lr_schedule != "decay" for phase in phases[marked[0].index :]):
        after = next(phase for phase in phases[marked[0].index :] if phase.lr_schedule != "decay")
        raise ValueError(
            f"phase {after.name!r}: lr_schedule = {after.lr_schedule}: the decay that begins with phase "
            f"{marked[0].name!r} goes on to the end. Fix: decay here, too."
        )
    return end - marked[0].start if marked else given
