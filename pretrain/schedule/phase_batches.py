"""The batch of each of a phase's steps, from what the phase and the run give."""

from pretrain.config.config import Config
from pretrain.config.phase_config import PhaseConfig
from pretrain.schedule.batch_schedule import BatchStep, parse_ramp, parse_steps


def phase_batches(
    config: Config, entry: PhaseConfig, seq_length: int, start: int
) -> list[BatchStep]:
    """Return the phase's batches by the clock: its own, or the run's.

    Numbers of samples mean samples of the phase's own length. A phase counts its own schedule from
    its start; the run's is counted from the run's start, with samples of the first phase's length.

    Raises:
        ValueError: no batch is given, or a schedule that makes no sense.
    """
    # A phase that gives anything of its batch has left the run's schedule.
    own = entry.has_own_batch
    section = entry if own else config.schedule
    begin = start if own else 0
    full = _full_batch(config, entry, seq_length)
    if section.rampup_batch_size and section.step_batch_size_schedule:
        raise ValueError(
            f"rampup_batch_size = {' '.join(map(str, section.rampup_batch_size))}: cannot be "
            "combined with step_batch_size_schedule. Fix: one of them."
        )
    if section.step_batch_size_schedule:
        text = section.step_batch_size_schedule
        steps = parse_steps(text, begin, seq_length)
        # A phase may replace the batch that the run gives by a schedule.
        if not (own and entry.global_batch_tokens is None):
            _check_largest(text, steps, full)
        return _steps_from(steps, start)
    if full is None or full < 1:
        raise ValueError(
            f"global_batch_tokens = {full}: must be given and above 0. Fix: "
            "--global-batch-tokens, --global-batch-size or the phase's key."
        )
    if section.rampup_batch_size:
        words = section.rampup_batch_size
        first = config.schedule.entries[0]
        first_length = first.seq_length or config.schedule.seq_length or seq_length
        length = seq_length if own else first_length
        # A ramp of the run that is over by now: its samples need not fit this phase's length.
        if not own and 0 < start >= length * words[-1] and len(words) == 3:
            return [BatchStep(start, full)]
        return _steps_from(parse_ramp(words, full, begin, seq_length, length), start)
    return [BatchStep(start, full)]


def _full_batch(config: Config, entry: PhaseConfig, seq_length: int) -> int | None:
    """Return the tokens of a step outside of schedules; None where no setting gives them."""
    schedule = config.schedule
    if entry.global_batch_tokens is not None:
        return entry.global_batch_tokens
    if schedule.global_batch_tokens is None and schedule.global_batch_size:
        return schedule.global_batch_size * seq_length
    return schedule.global_batch_tokens


def _check_largest(text: str, steps: list[BatchStep], full: int | None) -> None:
    """Raise ValueError where a schedule's largest batch is not the full batch that is given too."""
    largest = max(step.batch for step in steps)
    if full is not None and full != largest:
        raise ValueError(
            f"step_batch_size_schedule = {text}: its largest batch is {largest} tokens, but "
            f"global_batch_size or global_batch_tokens mean {full}. Fix: leave those out, or make "
            "them agree."
        )


def _steps_from(steps: list[BatchStep], start: int) -> list[BatchStep]:
    """Return the steps of a schedule that still matter at `start`."""
    begun = [step for step in steps if step.threshold <= start]
    return begun[-1:] + steps[len(begun) :]
