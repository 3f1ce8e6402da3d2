"""The learning rate as a pure function of the clock (tokens consumed before the step).

The run is a row of arcs: one from its start, and one from each phase that warms up again. Each arc
warms up and then follows the style until it ends. Shapes follow Megatron-LM's
OptimizerParamScheduler (megatron/core/optimizer_param_scheduler.py), WSD's stable-then-decay from
MiniCPM (arXiv 2404.06395).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pretrain.config.config import OptimizerConfig
from pretrain.schedule.phases import Phase, phase_end

UNITS = ("iters", "samples", "tokens", "fraction")
"""Last words of the names of the settings that give a length of the schedule."""


WSD_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
    "exponential": lambda share: 2 * math.pow(0.5, share) - 1,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}
"""Shapes of WSD's final decay: share of it that is over -> factor on the rate's range."""


@dataclass(frozen=True)
class Arc:
    """Warms up over [start, start + warmup) from `warmup_init`, then follows `style` until `end`.

    All places and lengths are in tokens.
    """

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
        """Return the rate of the step that starts at `clock`."""
        done = clock - self.start
        if done < self.warmup:
            return self.warmup_init + (lr - self.warmup_init) * done / self.warmup
        if self.style == "constant":
            return lr
        # At the end itself this style still holds, while the others have come to min_lr there.
        if self.style == "inverse-square-root" and clock <= self.end:
            full_rate_until = max(self.warmup, self.first_step)
            factor = math.sqrt(full_rate_until / max(done, self.first_step))
            return max(min_lr, lr * factor)
        if clock >= self.end:
            return min_lr
        if self.style == "WSD":
            return min_lr + (lr - min_lr) * self._wsd(clock)
        # Linear or cosine, from the end of the warmup to the end of the arc.
        share = (done - self.warmup) / (self.end - self.start - self.warmup)
        factor = 1 - share if self.style == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return min_lr + (lr - min_lr) * factor

    def _wsd(self, clock: int) -> float:
        """Return the factor on the rate's range: 1 until the final decay, then its shape."""
        start = self.end - self.wsd_decay
        if clock < start or not self.wsd_decay:
            return 1.0
        return WSD_SHAPES[self.wsd_style]((clock - start) / self.wsd_decay)


@dataclass(frozen=True)
class LearningRate:
    """Holds the arcs of a run, in order."""

    arcs: tuple[Arc, ...]

    @property
    def corners(self) -> list[int]:
        """Places of the clock between which the rate has one shape, and one inside each shape."""
        # A third of the way in tells shapes apart that begin and end alike.
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
        """Make the schedule that the settings mean for these phases.

        Iterations, samples and fractions become tokens by the first phase's (largest) batch and
        length.

        Raises:
            ValueError: the pieces are longer than the whole, or WSD's decay is given twice or not
                at all.
        """
        end = _end(config, phases)
        _check_end(config, end, phases)
        # One arc from the start, and one from each phase that warms up again.
        begins = [0, *(phase.start for phase in phases[1:] if phase.lr_schedule == "rewarm")]
        arcs: list[Arc] = []
        for start, stop in pairwise([*begins, end]):
            phase = next(phase for phase in phases if phase.start >= start)
            is_last = len(arcs) == len(begins) - 1
            if start == 0:
                initial = config.lr_warmup_init
                warmup = _first_warmup(config, phase, stop)
            else:
                # Warming up again begins at the rate that the arc before has come to.
                before = phases[phase.index - 1]
                initial = arcs[-1].at(start, before.lr, before.min_lr)
                warmup = phase.lr_warmup_tokens
            decay = _wsd_decay(config, phases, stop) if is_last else 0
            # Both must have room in the arc; the rest of it is the style's.
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
        """Return the rate of the step that starts at `clock`.

        Args:
            lr: the current phase's largest rate.
            min_lr: its smallest.
        """
        arc = next(arc for arc in reversed(self.arcs) if arc.start <= clock)
        return arc.at(clock, lr, min_lr)


def _end(config: OptimizerConfig, phases: list[Phase]) -> int:
    """Return where the decay ends: the run's end, unless a setting gives another place."""
    if config.lr_decay_style == "constant":
        return phases[-1].end
    end = _tokens(config, "lr_decay", phases[0])
    if end is None:
        return phases[-1].end
    # A phase's end is meant in whole steps, so that the decay ends exactly with the last of them.
    return phase_end(phases, end) or end


def _first_warmup(config: OptimizerConfig, first: Phase, stop: int) -> int:
    """Return the tokens of the run's warmup, by whichever setting gives it."""
    if config.lr_warmup_fraction is not None:
        return round(config.lr_warmup_fraction * stop)
    return _tokens(config, "lr_warmup", first) or first.lr_warmup_tokens


def _tokens(config: OptimizerConfig, prefix: str, first: Phase) -> int | None:
    """Return what `prefix`_iters, _samples or _tokens means in tokens; None if none is given."""
    # Tokens of one iteration and of one sample.
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
    """Say that pieces of the schedule, tokens by name, take more than `available`."""
    parts = [f"{name} ({tokens:,} tokens)" for name, tokens in lengths.items() if tokens]
    must = "together they must" if len(parts) > 1 else "must"
    return (
        f"{', '.join(parts)}: {must} not exceed the schedule's {available:,} tokens. "
        "Fix: a shorter one, or train longer."
    )


def _given(config: OptimizerConfig, prefix: str) -> str:
    """Write the setting that gives the length `prefix`, with its value."""
    names = [f"{prefix}_{unit}" for unit in UNITS]
    given = [f"{name} = {value}" for name in names if (value := getattr(config, name, None))]
    return given[0] if given else prefix


def _check_end(config: OptimizerConfig, end: int, phases: list[Phase]) -> None:
    """Raise ValueError where the decay is over before a phase warms up again or begins WSD's."""
    late = [phase for phase in phases if phase.lr_schedule != "continue" and phase.start >= end]
    if late and config.lr_decay_style != "constant":
        raise ValueError(
            f"phase {late[0].name!r}: lr_schedule = {late[0].lr_schedule}: begins at "
            f"{late[0].start:,} tokens, but lr_decay_tokens ends the decay at {end:,}. Fix: leave "
            "lr_decay_tokens out, which means the run's end."
        )


def _wsd_decay(config: OptimizerConfig, phases: list[Phase], end: int) -> int:
    """Return the tokens of WSD's final decay; 0 for another style.

    They are given, or go from the start of the phase with lr_schedule = decay to the end.
    """
    given = _tokens(config, "lr_wsd_decay", phases[0])
    marked = [phase for phase in phases if phase.lr_schedule == "decay"]
    if config.lr_decay_style != "WSD":
        if marked:
            raise ValueError(
                f"phase {marked[0].name!r}: lr_schedule = decay: is WSD's final decay, but "
                f"lr_decay_style = {config.lr_decay_style}. Fix: --lr-decay-style WSD, or leave it "
                "out."
            )
        return 0
    if not marked:
        if not given:
            raise ValueError(
                "lr_decay_style = WSD: needs the length of its final decay. Fix: give "
                "--lr-wsd-decay-tokens (or -samples, -iters), or lr_schedule: decay in the phase "
                "with which it begins."
            )
        return given
    first = marked[0]
    if given:
        raise ValueError(
            f"phase {first.name!r}: lr_schedule = decay: the decay's length is also given, {given} "
            "tokens by lr_wsd_decay. Fix: remove one of them."
        )
    # The decay goes on to the end: no phase after its first may say something else.
    for phase in phases[first.index :]:
        if phase.lr_schedule != "decay":
            raise ValueError(
                f"phase {phase.name!r}: lr_schedule = {phase.lr_schedule}: the decay that begins "
                f"with phase {first.name!r} goes on to the end. Fix: decay here, too."
            )
    return end - first.start
