"""The resume contract: what may change between a checkpoint and the run that goes on from it.

Every setting is compared with the checkpoint's config.yaml, and each difference has a kind:

    forbidden      stops always: the weights or moments do not fit
    tokenizer      \\
    data            } stop unless --accept-changes names the kind
    optimization   /
    scheduler      learning rate and weight decay: accepted like optimization, or by --override-opt_param-scheduler
    free           changes no token and no update; printed

Settings of kind "effect" say something together with others: the difference is printed, and what they do to the
phase, the learning rate, the tokenizer or the blend is judged instead. Phases that have not begun are free.
"""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data.config import are_named, parse_windows
from data.tokenizers.identity import same_tokenizer
from model.rope import ROPE_SETTINGS
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import CheckpointConfig, Config
from pretrain.schedule.batch_schedule import BatchStretch, batch_at
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase, phase_at
from pretrain.schedule.resolve import resolve_phases

Kind = Literal["forbidden", "tokenizer", "data", "optimization", "scheduler", "free", "effect"]

SECTIONS: dict[str, Kind] = {
    "model": "forbidden",
    "memory": "free",
    "layout": "free",
    "data": "data",
    "optimizer": "optimization",
    "checkpoint": "free",
    "logging": "free",
}
"""Kind of a section's settings, new ones included. `schedule` has none: each of its settings stands
in FIELDS."""

FIELDS: dict[str, Kind] = {
    # model: what does not shape the weights
    "model": "free",
    "group_query_attention": "free",
    "max_position_embeddings": "free",
    "init_method_std": "free",
    "make_vocab_size_divisible_by": "free",
    "attention_backend": "free",
    "attention_crossover_tokens": "free",
    "attention_dropout": "free",
    "hidden_dropout": "free",
    **dict.fromkeys(ROPE_SETTINGS, "effect"),
    # data: what the tokenizer's description, the blend, the phase or the skipped windows say
    "tokenizer_type": "effect",
    "tokenizer_model": "effect",
    "tokenizer_ids_from": "effect",
    "vocab_size": "effect",
    "data_path": "effect",
    "train_data_path": "effect",
    "data_args_path": "effect",
    "document_masking": "effect",
    "packing": "effect",
    "data_exhausted": "effect",
    "skip_data": "effect",
    "reset_position_ids": "effect",
    "reset_attention_mask": "effect",
    "valid_data_path": "free",
    "data_cache_path": "free",
    # schedule: what the phase says
    "seq_length": "effect",
    "micro_batch_size": "free",
    "global_batch_size": "effect",
    "global_batch_tokens": "effect",
    "rampup_batch_size": "effect",
    "step_batch_size_schedule": "effect",
    "train_iters": "effect",
    "train_samples": "effect",
    "train_tokens": "effect",
    "phases": "effect",
    "manual_gc": "free",
    # optimizer: settings named lr... and min_lr are judged by the learning rate (see kind_of)
    "weight_decay": "scheduler",
    "fp64": "forbidden",
    "seed": "data",
    "max_skipped_steps": "free",
    "optimizer_cpu_offload": "free",
    "accumulate_allreduce_grads_in_fp32": "free",
    "calculate_per_token_loss": "free",
}
"""Settings whose kind is not their section's."""

PHASE: dict[str, Kind] = {
    "name": "free",
    "index": "free",
    "start": "free",
    "end": "free",
    "tokens": "free",
    "seq_length": "data",
    "global_batch_tokens": "effect",
    "stretches": "effect",
    "micro_batch_size": "free",
    "layout": "free",
    "memory": "free",
    "rope": "optimization",
    "document_masking": "data",
    "packing": "data",
    "data_path": "effect",
    "data_exhausted": "data",
    "lr": "effect",
    "min_lr": "effect",
    "lr_schedule": "effect",
    "lr_warmup_tokens": "effect",
    "auto": "free",
    "predicted_bytes": "free",
}
"""What a difference of the phase that goes on means (pretrain/schedule/phases.py: Phase), every field of
it."""

EFFECTIVE = {"kv_channels": "head_size", "num_query_groups": "num_kv_heads"}
"""Model settings with a default -> what they come to."""

PATHS = {
    "data_path",
    "train_data_path",
    "valid_data_path",
    "data_args_path",
    "data_cache_path",
    "tokenizer_model",
    "save",
    "load",
    "pretrained_checkpoint",
    "tensorboard_dir",
    "wandb_save_dir",
}
"""Settings that name files: another spelling of the same place is no difference."""

MEANING = {
    "forbidden": (
        "the checkpoint's tensors are of another model or precision",
        "the checkpoint's value (--use-checkpoint-args takes what is not given); or a new run in another "
        "--save",
    ),
    "tokenizer": (
        "the ids mean other text",
        "the checkpoint's tokenizer, or --accept-changes tokenizer",
    ),
    "data": (
        "other tokens come next, or in another order",
        "the checkpoint's value, or --accept-changes data",
    ),
    "optimization": (
        "the updates are others from here on",
        "the checkpoint's value, or --accept-changes optimization",
    ),
    "scheduler": (
        "the updates are others from here on",
        "--use-checkpoint-opt_param-scheduler for the checkpoint's value; --override-opt_param-scheduler or "
        "--accept-changes optimization for this run's",
    ),
}
POINTS = 300
"""At so many places the learning rates are compared."""


@dataclass(frozen=True)
class Change:
    """A difference between checkpoint and run."""

    name: str
    theirs: Any
    ours: Any
    kind: Kind
    meaning: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.name}: checkpoint {_short(self.theirs)}, run {_short(self.ours)}"


def _short(value: Any, limit: int = 160) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def kind_of(section: str, name: str) -> Kind:
    """The kind of a setting. KeyError: it has none."""
    if name in FIELDS:
        return FIELDS[name]
    return "effect" if is_learning_rate(name) and section == "optimizer" else SECTIONS[section]


def is_learning_rate(name: str) -> bool:
    return name == "min_lr" or name == "lr" or name.startswith("lr_")


def is_same(name: str, theirs: Any, ours: Any) -> bool:
    """Do two values of a setting mean the same? Relative paths begin where the run starts."""
    if theirs == ours or name not in PATHS or theirs is None or ours is None:
        return theirs == ours
    if isinstance(theirs, str):
        return os.path.abspath(theirs) == os.path.abspath(ours)
    return [_plain_word(word) for word in theirs] == [_plain_word(word) for word in ours]


def _plain_word(word: str) -> float | str:
    """A word of a blend: a weight as a number, a path in full, also that of NAME=PATH."""
    try:
        return float(word)
    except ValueError:
        if not are_named([word]):
            return os.path.abspath(word)
    name, _, path = word.partition("=")
    return f"{name}={os.path.abspath(path)}"


def stored_scheduler(stored: Config) -> dict[str, Any]:
    """The settings of the optimizer that give the checkpoint's learning rate and weight decay to
    any other run."""
    values = {
        name: value
        for name, value in vars(stored.optimizer).items()
        if is_learning_rate(name) or FIELDS.get(name) == "scheduler"
    }
    if stored.schedule.phases:
        return values
    (arc,) = LearningRate.make(stored.optimizer, resolve_phases(stored)).arcs
    # In tokens: iterations, samples and "the end of the run" would mean something else there.
    for prefix, tokens in (
        ("lr_warmup", arc.warmup),
        ("lr_decay", arc.end if arc.style != "constant" else None),
        ("lr_wsd_decay", arc.wsd_decay or None),
    ):
        units = [f"{prefix}_{unit}" for unit in ("iters", "samples", "fraction")]
        values |= {name: None for name in units if name in values} | {f"{prefix}_tokens": tokens}
    return values


# ---------------------------------------------------------------- what changed


def continuation_changes(
    stored: Config,
    config: Config,
    progress: Progress,
    phases: list[Phase],
    learning_rate: LearningRate,
    tokenizer: dict | None,
) -> list[Change]:
    """All differences of a run that continues the clock, except those that only the opened data
    shows.

    Args:
        stored, progress: what the checkpoint says of its settings and of how far it had come.
        phases, learning_rate, tokenizer: of the run.
    """
    found = setting_changes(stored, config) + _vocabulary_changes(stored, config)
    if not same_tokenizer(progress.tokenizer, tokenizer):
        found.append(Change("tokenizer", progress.tokenizer, tokenizer, "tokenizer"))
    theirs, ours = (_windows_to_come(c.data.skip_data, progress) for c in (stored, config))
    if theirs != ours:
        found.append(Change("skip_data, windows to come", theirs, ours, "data"))
    current = begun_phase(phases, progress)
    if current is not None:
        now = json.loads(json.dumps(dataclasses.asdict(current)))  # as progress.json writes it
        before = progress.phase
        found += [
            Change(f"phase {current.name!r}: {name}", before[name], now[name], kind)
            for name, kind in PHASE.items()
            if kind not in ("free", "effect") and name in before and before[name] != now[name]
        ]
        found += _batch_changes(progress, current)
    found += _past_changes(stored, progress, phases, current)
    return found + _learning_rate_changes(stored, config, progress, phases, learning_rate)


def _past_changes(
    stored: Config, progress: Progress, phases: list[Phase], current: Phase | None
) -> list[Change]:
    """Phases that are over and are others now: one of them would come again, or one never."""

    def over(of: list[Phase]) -> list[Phase]:
        begun = [phase for phase in of if phase.start <= progress.last_step_clock]
        return (
            begun[:-1] if current is not None else begun
        )  # the one that goes on is compared by itself

    theirs = over(resolve_phases(stored))
    ours = over(phases)
    if [(phase.start, phase.seq_length) for phase in theirs] == [
        (phase.start, phase.seq_length) for phase in ours
    ]:
        return []
    before, now = (
        ", ".join(f"{phase.name} of {phase.seq_length:,} from {phase.start:,}" for phase in of)
        or "none"
        for of in (theirs, ours)
    )
    return [Change(f"phases before token {progress.clock:,}", before, now, "data")]


def weights_changes(
    stored: Config, config: Config, progress: Progress, phases: list[Phase], tokenizer: dict | None
) -> list[Change]:
    """Differences that matter to a new run on the checkpoint's weights: the model, its tokenizer,
    rope and length."""
    found = [
        change
        for change in setting_changes(stored, config)
        if change.name in vars(config.model) and change.kind == "forbidden"
    ] + _vocabulary_changes(stored, config)
    theirs = progress.tokenizer
    if not same_tokenizer(theirs, tokenizer):
        is_known = theirs is not None and tokenizer is not None
        found.append(Change("tokenizer", theirs, tokenizer, "tokenizer" if is_known else "free"))
    first = phases[0]
    rope = progress.rope
    if rope != first.rope:
        found.append(Change("rope", rope.describe(), first.rope.describe(), "free"))
    longest = max(phase.seq_length for phase in phases)
    if progress.longest_seq_length != longest:
        found.append(Change("longest seq_length", progress.longest_seq_length, longest, "free"))
    return found


def setting_changes(stored: Config, config: Config) -> list[Change]:
    """Settings that are not the same, section by section, by their kind; "effect" becomes
    "free"."""
    found = []
    for section in (field.name for field in dataclasses.fields(Config) if field.name != "given"):
        theirs = getattr(stored, section)
        ours = getattr(config, section)
        for name in (field.name for field in dataclasses.fields(ours)):
            kind = kind_of(section, name)
            before, now = (getattr(part, EFFECTIVE.get(name, name)) for part in (theirs, ours))
            if name == "phases":
                found += _entry_changes(before, now)
            elif not is_same(name, before, now):
                found.append(Change(name, before, now, "free" if kind == "effect" else kind))
    return found


def _entry_changes(theirs: list, ours: list) -> list[Change]:
    """Differences of the entries of `phases`, by their names."""
    before, now = ({entry.name: entry for entry in entries} for entries in (theirs, ours))
    found = []
    for name in dict.fromkeys([*before, *now]):
        if name in before and name in now:
            found += [
                Change(f"phases, {name}: {key}", value, getattr(now[name], key), "free")
                for key, value in vars(before[name]).items()
                if not is_same(key, value, getattr(now[name], key))
            ]
        else:
            found.append(
                Change(
                    f"phases, {name}",
                    *("there" if name in part else "absent" for part in (before, now)),
                    "free",
                )
            )
    return found


def _vocabulary_changes(stored: Config, config: Config) -> list[Change]:
    theirs = stored.data.vocab_size
    ours = config.data.vocab_size
    rows = [part.model.padded_vocab_size(part.data.vocab_size) for part in (stored, config)]
    if rows[0] != rows[1] and theirs == ours:
        return [Change("rows of the embedding, padding included", *rows, "free")]
    if rows[0] != rows[1]:
        return [
            Change(
                "vocab_size",
                theirs,
                ours,
                "forbidden",
                f"the checkpoint's embedding has {rows[0]:,} rows, this run's {rows[1]:,}",
                f"--vocab-size {theirs}, where the tokenizer has no more ids; or a new run in another --save",
            )
        ]
    if theirs != ours:
        return [
            Change(
                "vocab_size",
                theirs,
                ours,
                "tokenizer",
                fix=f"--vocab-size {theirs}, or --accept-changes tokenizer",
            )
        ]
    return []


def _windows_to_come(words: list[str], progress: Progress) -> list[tuple[int, int]]:
    passed = {segment.get("skipped_until") for segment in progress.data["segments"]}
    return [window for window in parse_windows(words) if window[1] not in passed]


def begun_phase(phases: list[Phase], progress: Progress) -> Phase | None:
    """The phase at the checkpoint's clock, if the checkpoint's last step was in it too; None at a
    beginning or end."""
    phase = phase_at(phases, progress.clock)
    # The last step may have reached beyond the end of its phase, where the batch was changed within
    # that.
    last_step = progress.last_step_clock
    return phase if phase is not None and phase.start <= last_step else None


def _batch_changes(progress: Progress, current: Phase) -> list[Change]:
    """Where the batch of the phase that goes on first differs from what it would have been; at most
    one."""
    clock = progress.clock
    theirs = [BatchStretch(*stretch) for stretch in progress.phase["stretches"]]
    end = min(theirs[-1].end, current.end)
    for at in sorted(
        {
            clock,
            *(
                stretch.start
                for stretch in (*theirs, *current.stretches)
                if clock < stretch.start < end
            ),
        }
    ):
        before = batch_at(theirs, at)
        now = current.batch_at(at)
        if before != now:
            return [
                Change(
                    f"phase {current.name!r}: global_batch_tokens from token {at:,} on",
                    before,
                    now,
                    "optimization",
                )
            ]
    return []


def _learning_rate_changes(
    stored: Config,
    config: Config,
    progress: Progress,
    phases: list[Phase],
    learning_rate: LearningRate,
) -> list[Change]:
    """Where the learning rate first differs from what the checkpoint's run would have had; at most
    one.

    Compared over the rest of the phase that has begun; over the rest of the run where settings of
    the learning rate were edited outside of `phases`. A run that was over has no rate to compare,
    only its lr and min_lr.
    """
    clock = progress.clock
    current = begun_phase(phases, progress)
    their_phases = resolve_phases(stored)
    their_rate = LearningRate.make(stored.optimizer, their_phases)
    edited = any(
        getattr(stored.optimizer, name) != value
        for name, value in vars(config.optimizer).items()
        if is_learning_rate(name)
    )
    theirs = phase_at(their_phases, clock)
    end = clock
    if theirs is not None and edited:
        end = min(their_phases[-1].end, phases[-1].end)
    elif theirs is not None and current is not None:
        end = min(theirs.end, current.end)
    corners = [
        *(phase.start for phase in (*phases, *their_phases)),
        *their_rate.corners,
        *learning_rate.corners,
    ]
    for at in _points(clock, end, corners):
        before, now = (
            rate.at(at, phase.lr, phase.min_lr)
            for rate, phase in (
                (their_rate, phase_at(their_phases, at)),
                (learning_rate, phase_at(phases, at)),
            )
        )
        if not math.isclose(before, now, rel_tol=1e-9):
            return [Change(f"learning rate at token {at:,}", before, now, "scheduler")]
    if end <= clock and current is not None and theirs is None:
        names = ["lr"] if config.optimizer.lr_decay_style == "constant" else ["lr", "min_lr"]
        return [
            Change(
                f"{name} of the phase that goes on",
                progress.phase[name],
                getattr(current, name),
                "scheduler",
            )
            for name in names
            if progress.phase[name] != getattr(current, name)
        ]
    return []


def _points(clock: int, end: int, corners: list[int]) -> list[int]:
    """Places of the clock in [clock, end) to compare at, the corners among them."""
    if end <= clock:
        return []
    return sorted(
        {
            *(at for at in corners if clock <= at < end),
            *np.linspace(clock, end - 1, POINTS).astype(np.int64).tolist(),
        }
    )


# ---------------------------------------------------------------- what follows from it


def missing_parts(progress: Progress, settings: CheckpointConfig, folder: str) -> list[str]:
    """What the checkpoint lacks to continue its clock."""
    if progress.data is None:
        return [
            f"checkpoint {folder}: holds weights only, no clock to go on from. Fix: start a new run from it with "
            "--pretrained-checkpoint, or --load and --finetune."
        ]
    if not progress.has_optimizer and not settings.no_load_optim:
        return [
            f"checkpoint {folder}: was saved with --no-save-optim and holds no optimizer state. Fix: "
            "--no-load-optim to go on with a fresh optimizer, or --finetune for a new run from its weights."
        ]
    return []


def refusals(changes: list[Change], settings: CheckpointConfig) -> list[str]:
    """A line for each difference that is not accepted: `name: checkpoint a, run b: meaning. Fix:
    ...`."""
    accepted = {"free", *settings.accept_changes}
    if "optimization" in accepted or settings.override_opt_param_scheduler:
        accepted.add("scheduler")
    return [
        f"{change}: {change.meaning or MEANING[change.kind][0]}. Fix: {change.fix or MEANING[change.kind][1]}."
        for change in changes
        if change.kind not in accepted
    ]


def needless_acceptance(changes: list[Change], settings: CheckpointConfig) -> list[str]:
    """Accepted kinds of which nothing changed, as warnings."""
    kinds = {change.kind for change in changes}
    if "scheduler" in kinds:
        kinds.add("optimization")
    found = [
        f"accept_changes = {name}: nothing of that kind differs from a checkpoint that this run starts from"
        for name in settings.accept_changes
        if name not in kinds
    ]
    if settings.override_opt_param_scheduler and "scheduler" not in kinds:
        found.append(
            "override_opt_param_scheduler = True: has no effect, since no checkpoint's learning rate or "
            "weight decay differs from this run's"
        )
    return found


def describe_changes(changes: list[Change]) -> str:
    """A line for each difference."""
    return "\n".join(
        f"changed since the checkpoint ({'optimization' if c.kind == 'scheduler' else c.kind}): {c}"
        for c in changes
    )
