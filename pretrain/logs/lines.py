"""Steps and evaluations as lines for people, and their numbers by the names of their curves."""

import statistics
from collections import deque
from typing import Any

from pretrain.logs.step_record import StepRecord

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


RECENT_STEPS = 9
"""Steps whose median rate is shown: one that waited for a network says nothing of the next ones."""


SHOWN_SHARE = 0.05
"""Part of a step that waits for other ranks or for data must take to be shown."""


class RecentRate:
    """Keeps the tokens per second of a phase's last steps."""

    def __init__(self) -> None:
        self._phase = ""
        self._rates: deque[float] = deque(maxlen=RECENT_STEPS)

    def after(self, record: StepRecord) -> float:
        """Return the median of the last steps, this one included."""
        if record.phase != self._phase:
            self._phase = record.phase
            self._rates.clear()
        self._rates.append(record.tokens_per_second)
        # Of two, the faster one: a phase's first step compiles.
        return statistics.median_high(self._rates)


def console_line(record: StepRecord, rate: float, phase_seconds: float, run_seconds: float) -> str:
    """Describe a step in one readable line.

    Args:
        rate: tokens per second, of this step or of several.
        phase_seconds, run_seconds: to the end of the phase and of the run.
    """
    # What a person looks at, from left to right: where, how well, how fast, how full.
    parts = [
        f"step {record.step:>6,}",
        f"{record.phase} {record.seq_length:,}",
        f"tokens {_short(record.tokens)}",
        f"loss {record.loss:.4f}",
        f"grad {record.grad_norm:.3f}",
        f"lr {record.lr:.2e}",
        f"{_short(rate)} tok/s",
        f"{record.peak_memory_bytes / 2**30:.2f} GiB",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {100 * record.mfu:.1f} %")
    if record.max_attention_logit is not None:
        parts.append(f"logit {record.max_attention_logit:.1f}")
    if record.qk_clipped_heads:
        parts.append(f"QK-clip {record.qk_clipped_heads} heads")
    # Where the time goes besides computing, if that is much.
    for share, what in ((record.communication_share, "waiting"), (record.data_share, "data")):
        if share is not None and share >= SHOWN_SHARE:
            parts.append(f"{what} {100 * share:.0f} %")
    if record.imbalance is not None and record.imbalance_in_order is not None:
        if record.imbalance_in_order >= 1 + SHOWN_SHARE:
            undealt = record.imbalance_in_order
            parts.append(f"slowest rank {record.imbalance:.2f}x mean ({undealt:.2f}x undealt)")
    if record.skipped:
        parts.append("SKIPPED: spike" if record.spike else "SKIPPED: gradient not finite")
    parts.append(f"ETA {describe_duration(run_seconds)}")
    # The last phase ends with the run.
    of_phase = f" (phase {describe_duration(phase_seconds)})" if phase_seconds < run_seconds else ""
    return " | ".join(parts) + of_phase


def evaluation_line(record: dict[str, Any]) -> str:
    """Describe a line of validation.jsonl in one readable line."""
    # The set is named where it is not the only one.
    of_set = "" if record.get("set", "valid") == "valid" else f" of {record['set']}"
    place = f"{record['phase']}, {record['seq_length']:,} tokens"
    where = f"{of_set} at step {record['step']} ({place}): "
    if record["kind"] == "loss":
        targets = f"{record['num_targets']:,} targets"
        return f"evaluation{where}loss {record['valid_loss']:.4f} over {targets}"
    if record["kind"] == "context_gain":
        return f"context gain{where}{_describe_gain(record)}"
    found = f"{100 * record['accuracy']:.0f} % of {record['trials']} found"
    return (
        f"passkey{where}depth {record['depth']:g}, {found}, loss {record['answer_loss']:.4f} per "
        "answer token"
    )


def _describe_gain(record: dict[str, Any]) -> str:
    interval = "no interval from 1 document"
    if record["gain_low"] is not None:
        bounds = f"{record['gain_low']:.4f} to {record['gain_high']:.4f}"
        interval = f"95 % {bounds}, {record['documents']} documents"
    return (
        f"{record['gain']:.4f} nats ({interval}): loss {record['loss_full']:.4f} with the whole "
        f"context, {record['loss_cut']:.4f} with {record['cut']:,} tokens"
    )


def evaluation_values(record: dict[str, Any], *, has_lengths: bool) -> dict[str, float]:
    """Map the numbers of a line of validation.jsonl to the names of their curves.

    Args:
        has_lengths: the loss is measured at several lengths, so that its curves need their names.
    """
    of_set = "" if record.get("set", "valid") == "valid" else f"/{record['set']}"
    if record["kind"] == "loss":
        of_length = f"/{record['seq_length']}" if has_lengths else ""
        return {f"valid_loss{of_set}{of_length}": record["valid_loss"]}
    # One document gives no interval, so that its ends are left out.
    if record["kind"] == "context_gain":
        names = ("gain", "gain_low", "gain_high", "loss_full", "loss_cut")
        known = [name for name in names if record[name] is not None]
        return {f"context_gain{of_set}/{name}": record[name] for name in known}
    where = f"passkey/{record['seq_length']}/{record['depth']:g}"
    return {f"{where}/{name}": record[name] for name in ("accuracy", "answer_loss")}


def _short(number: float) -> str:
    for limit, unit in UNITS:
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def describe_duration(seconds: float) -> str:
    """Write a time as hours and minutes, or as minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
