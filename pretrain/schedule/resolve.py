"""From the configuration to phases on the clock; iterations and samples become tokens here."""

from functools import partial
from itertools import accumulate
from typing import Any

from pretrain.config.config import Config
from pretrain.config.phase_config import PhaseConfig
from pretrain.problems import attempt
from pretrain.schedule.batch_schedule import BatchStep, cut_into_stretches
from pretrain.schedule.batch_words import BatchWords, count_of, largest_part
from pretrain.schedule.phase_batches import phase_batches
from pretrain.schedule.phases import Phase, phase_end


def resolve_phases(config: Config) -> list[Phase]:
    """Return the run's phases in order.

    Raises:
        ValueError: a phase misses its length, tokens or batch, or they do not divide; all at once.
    """
    # Names identify phases in checkpoints and records.
    entries = config.schedule.entries
    names = [entry.name for entry in entries]
    problems = [
        f"phases: the name {name!r} is given twice. Fix: give each phase its own name."
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    # Each phase begins where the one before ended, in whole steps.
    phases: list[Phase] = []
    clock = 0
    for index, entry in enumerate(entries):
        found: list[str] = []
        phase = attempt(found, partial(_resolve, config, entry, index, clock))
        problems += [f"phase {entry.name!r}: {problem}" for problem in found]
        if phase is not None:
            phases.append(phase)
            clock = phase.end
    # Sums over phases mean something only where every phase has its own figures.
    problems = problems or [*_sum_problems(config, phases), *_decay_problems(config, phases)]
    if problems:
        raise ValueError("\n".join(problems))
    return phases


def _resolve(config: Config, entry: PhaseConfig, index: int, start: int) -> Phase:
    """Return the phase of `entry`, which begins at `start`.

    Raises:
        ValueError: what is wrong with it, a line each.
    """
    # Without a length no batch can be counted, so that these two are said alone.
    schedule = config.schedule
    seq_length = entry.seq_length if entry.seq_length is not None else schedule.seq_length
    if seq_length is None or seq_length < 1:
        raise ValueError(
            f"seq_length = {seq_length}: must be given and above 0. Fix: --seq-length or the "
            "phase's key."
        )
    batches = phase_batches(config, entry, seq_length, start)
    # From here on everything that is wrong is said together.
    problems = []
    tokens = entry.train_tokens
    if tokens is None:
        tokens = _train_tokens(config, batches, seq_length)
    if tokens is None or tokens < 1:
        problems.append(
            f"train_tokens = {tokens}: must be given and above 0. Fix: --train-tokens, "
            "--train-samples, --train-iters (not with a batch that changes) or the phase's key."
        )
    micro = entry.micro_batch_size
    if micro is None:
        micro = schedule.micro_batch_size
    problems += _micro_batch_problems(
        BatchWords.make(config, entry, seq_length), batches, micro, seq_length
    )
    problems += _packing_problems(config, entry)
    if problems:
        raise ValueError("\n".join(problems))
    assert tokens is not None
    return _make_phase(config, entry, index, start, tokens, seq_length, batches, micro)


def _make_phase(
    config: Config,
    entry: PhaseConfig,
    index: int,
    start: int,
    tokens: int,
    seq_length: int,
    batches: list[BatchStep],
    micro_batch_size: int,
) -> Phase:
    """Put a phase together from its own settings and, where it leaves them out, the run's."""

    def pick(name: str, section: Any) -> Any:
        value = getattr(entry, name)
        return value if value is not None else getattr(section, name)

    stretches = cut_into_stretches(start, tokens, batches)
    balance = pick("balance", config.data)
    packing = pick("packing", config.data)
    document_masking = pick("document_masking", config.data)
    # Without masking a sample is one sequence, and all cost the same.
    balance_window = balance == "window" and packing == "best_fit" and document_masking
    return Phase(
        name=entry.name,
        index=index,
        start=start,
        end=stretches[-1].end,
        tokens=tokens,
        seq_length=seq_length,
        global_batch_tokens=max(stretch.batch for stretch in stretches),
        stretches=stretches,
        micro_batch_size=micro_batch_size,
        layout=entry.over(config.layout),
        memory=entry.with_memory(config.memory),
        rope=entry.with_rope(config.model).rope,
        document_masking=document_masking,
        packing=packing,
        max_documents_per_sample=pick("max_documents_per_sample", config.data),
        data_exhausted=pick("data_exhausted", config.data),
        balance=balance,
        balance_window=balance_window,
        data_path=tuple(entry.data_path or config.data.data_path or config.data.train_data_path),
        lr=pick("lr", config.optimizer),
        min_lr=pick("min_lr", config.optimizer),
        lr_schedule=entry.lr_schedule or "continue",
        lr_warmup_tokens=entry.lr_warmup_tokens or 0,
        auto=config.open_settings(entry),
    )


def _packing_problems(config: Config, entry: PhaseConfig) -> list[str]:
    """List what samples are asked for that the phase's packing cannot make."""
    packing = entry.packing or config.data.packing
    most = entry.max_documents_per_sample or config.data.max_documents_per_sample
    if most is None or packing != "concat":
        return []
    return [
        f"max_documents_per_sample = {most}: packing = concat takes the documents as they come. "
        "Fix: --packing best_fit, or leave it out (phases may give their own)."
    ]


def _micro_batch_problems(
    words: BatchWords, batches: list[BatchStep], micro: int, seq_length: int
) -> list[str]:
    """List why microbatches of `micro` samples do not fill the batches."""
    if micro < 1:
        return [f"micro_batch_size = {micro}: must be at least 1. Fix: give a positive number."]
    return [
        _micro_batch_problem(words, batch, micro)
        for _, batch in batches
        if batch % (seq_length * micro)
    ]


def _micro_batch_problem(words: BatchWords, batch: int, micro: int) -> str:
    """Say that microbatches of `micro` samples do not fill a batch, and which would."""
    unit = words.seq_length * micro
    samples = batch // words.seq_length
    # Otherwise the microbatch is larger than the step, and a smaller one is the nearest fix.
    if samples == 0 or samples >= micro:
        return words.not_a_multiple(batch, unit, "micro_batch_size")
    return (
        f"micro_batch_size = {micro}: is more than a step has, {count_of(samples, 'sample')} "
        f"({words.name(batch)}). Fix: micro_batch_size {largest_part(samples, micro)}, or "
        f"{words.setting} {words.count(unit)}."
    )


def _train_tokens(config: Config, batches: list[BatchStep], seq_length: int) -> int | None:
    """Return the length of a run without phases in tokens; None where no setting gives it."""
    schedule = config.schedule
    if schedule.phases:
        return None
    if schedule.train_iters is not None:
        # With a batch that changes, a number of steps is no number of tokens.
        return schedule.train_iters * batches[0].batch if len(batches) == 1 else None
    if schedule.train_samples is not None:
        return schedule.train_samples * seq_length
    return schedule.train_tokens


def _sum_problems(config: Config, phases: list[Phase]) -> list[str]:
    """Compare a length of the run that is given beside the phases with their sum."""
    schedule = config.schedule
    # Without phases it is the length itself, and not compared with anything.
    if not schedule.phases:
        return []
    problems = []
    for name, parts in (
        ("train_tokens", [phase.tokens for phase in phases]),
        ("train_iters", [phase.steps for phase in phases]),
        ("train_samples", [phase.tokens // phase.seq_length for phase in phases]),
    ):
        given = getattr(schedule, name)
        total = sum(parts)
        if given is not None and given != total:
            problems.append(
                f"{name} = {given:,}: the phases make "
                f"{' + '.join(f'{part:,}' for part in parts)} = {total:,}, which is "
                f"{abs(given - total):,} {'less' if given > total else 'more'}. Fix: remove "
                f"{name}, or change the phases."
            )
    return problems


def _decay_problems(config: Config, phases: list[Phase]) -> list[str]:
    """Check that the learning rate's decay, where it is given, ends with a phase."""
    optimizer = config.optimizer
    if not config.schedule.phases or optimizer.lr_decay_style == "constant":
        return []
    problems = []
    decay_end = optimizer.lr_decay_tokens
    if decay_end is not None and phase_end(phases, decay_end) is None:
        asked_ends = accumulate(phase.tokens for phase in phases)
        ends = ", ".join(
            f"{phase.name} at {asked:,}"
            + ("" if asked == phase.end else f" (whole steps: {phase.end:,})")
            for phase, asked in zip(phases, asked_ends, strict=True)
        )
        problems.append(
            f"lr_decay_tokens = {decay_end:,}: must be where a phase ends: {ends}. Fix: remove it, "
            "which means the run's end, or one of these."
        )
    # Counted in steps or samples an end would depend on which phase's are meant.
    for name in ("lr_decay_iters", "lr_decay_samples"):
        value = getattr(optimizer, name)
        if value is not None:
            problems.append(
                f"{name} = {value:,}: phases have steps and samples of several sizes. "
                "Fix: remove it, which means the run's end, or give --lr-decay-tokens."
            )
    return problems
