"""The resume contract: what may change between a checkpoint and the run that goes on from it.

Every setting is compared with the checkpoint's config.yaml, and each difference has a kind:

    forbidden      stops always: the weights or moments do not fit
    tokenizer      \\
    data            } stop unless --accept-changes names the kind
    optimization   /
    scheduler      learning rate and weight decay: accepted like optimization,
                   or by --override-opt_param-scheduler
    free           changes no token and no update; printed

setting_changes.py, phase_changes.py and learning_rate_changes.py find the differences; this file
puts them together and says what follows.
"""

from data.config import parse_windows
from data.tokenizers.identity import same_tokenizer
from pretrain.checkpointing.learning_rate_changes import learning_rate_changes
from pretrain.checkpointing.phase_changes import phase_changes
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.setting_changes import Change, setting_changes, vocabulary_changes
from pretrain.config.config import CheckpointConfig, Config
from pretrain.config.facts import Resume
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase

MEANING: dict[Resume, tuple[str, str]] = {
    "forbidden": (
        "the checkpoint's tensors are of another model or precision",
        "the checkpoint's value (--use-checkpoint-args takes what is not given); or a new run "
        "in another --save",
    ),
    "tokenizer": (
        "the ids mean other text",
        "the checkpoint's tokenizer (--use-checkpoint-args takes it where no --tokenizer-... is "
        "given), or --accept-changes tokenizer",
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
        "--use-checkpoint-opt_param-scheduler for the checkpoint's value; "
        "--override-opt_param-scheduler or --accept-changes optimization for this run's",
    ),
}
"""Kind of a difference -> what it means, and what to do about it."""


def continuation_changes(
    stored: Config,
    config: Config,
    progress: Progress,
    phases: list[Phase],
    learning_rate: LearningRate,
    tokenizer: dict | None,
) -> list[Change]:
    """List the differences of a run that continues the clock, as far as settings show them.

    Those of the data are found once it is open (pretrain/plan.py).

    Args:
        stored, progress: what the checkpoint says of its settings and of how far it had come.
        phases, learning_rate, tokenizer: of the run.
    """
    # What the settings say by themselves.
    found = setting_changes(stored, config) + vocabulary_changes(stored, config)
    if not same_tokenizer(progress.tokenizer, tokenizer):
        found.append(Change("tokenizer", progress.tokenizer, tokenizer, "tokenizer"))
    # What of the data was passed over already is past.
    theirs = _windows_to_come(stored.data.skip_data, progress)
    ours = _windows_to_come(config.data.skip_data, progress)
    if theirs != ours:
        found.append(Change("skip_data, windows to come", theirs, ours, "data"))
    # What they come to in the phase that goes on.
    found += phase_changes(stored, progress, phases)
    return found + learning_rate_changes(stored, config, progress, phases, learning_rate)


def weights_changes(
    stored: Config, config: Config, progress: Progress, phases: list[Phase], tokenizer: dict | None
) -> list[Change]:
    """List the differences that matter to a new run on the checkpoint's weights.

    They are those of the model, its tokenizer, rope and length.
    """
    found = [
        change
        for change in setting_changes(stored, config)
        if change.name in vars(config.model) and change.kind == "forbidden"
    ]
    found += vocabulary_changes(stored, config)
    theirs = progress.tokenizer
    if not same_tokenizer(theirs, tokenizer):
        is_known = theirs is not None and tokenizer is not None
        found.append(Change("tokenizer", theirs, tokenizer, "tokenizer" if is_known else "free"))
    # A longer context is what weights are mostly taken for: reported, not refused.
    rope = phases[0].rope
    if progress.rope != rope:
        found.append(Change("rope", progress.rope.describe(), rope.describe(), "free"))
    longest = max(phase.seq_length for phase in phases)
    if progress.longest_seq_length != longest:
        found.append(Change("longest seq_length", progress.longest_seq_length, longest, "free"))
    return found


def _windows_to_come(words: list[str], progress: Progress) -> list[tuple[int, int]]:
    """Return the windows of --skip-data that the checkpoint's run had not passed over."""
    assert progress.data is not None, "a run that continues has a ledger"
    segments = progress.data["segments"]
    passed = {each.get("skipped_until") for each in segments if "rewind" not in each}
    return [window for window in parse_windows(words) if window[1] not in passed]


def missing_parts(progress: Progress, settings: CheckpointConfig, folder: str) -> list[str]:
    """List what the checkpoint lacks to continue its clock, with the fix."""
    if progress.data is None:
        return [
            f"checkpoint {folder}: holds weights only, no clock to go on from. "
            "Fix: start a new run from it with --pretrained-checkpoint, or --load and --finetune."
        ]
    if not progress.has_optimizer and not settings.no_load_optim:
        return [
            f"checkpoint {folder}: was saved with --no-save-optim and holds no optimizer state. "
            "Fix: --no-load-optim to go on with a fresh optimizer, or --finetune for a new run "
            "from its weights."
        ]
    return []


def refusals(changes: list[Change], settings: CheckpointConfig) -> list[str]:
    """List the differences not accepted: `name: checkpoint a, run b: meaning. Fix: ...`."""
    accepted = {"free", *settings.accept_changes}
    if "optimization" in accepted or settings.override_opt_param_scheduler:
        accepted.add("scheduler")
    found = []
    for change in changes:
        if change.kind not in accepted:
            # A change of its own words has no need of those of its kind.
            meaning, fix = MEANING.get(change.kind, ("", ""))
            found.append(f"{change}: {change.meaning or meaning}. Fix: {change.fix or fix}.")
    return found


def needless_acceptance(changes: list[Change], settings: CheckpointConfig) -> list[str]:
    """List accepted kinds of which nothing changed, as warnings."""
    kinds = {change.kind for change in changes}
    if "scheduler" in kinds:
        kinds.add("optimization")  # its word accepts both
    found = [
        f"accept_changes = {name}: nothing of that kind differs from a checkpoint that this run "
        "starts from"
        for name in settings.accept_changes
        if name not in kinds
    ]
    if settings.override_opt_param_scheduler and "scheduler" not in kinds:
        found.append(
            "override_opt_param_scheduler = True: has no effect, since no checkpoint's "
            "learning rate or weight decay differs from this run's"
        )
    return found


def describe_changes(changes: list[Change]) -> str:
    """Return a line for each difference."""
    lines = []
    for change in changes:
        kind = "optimization" if change.kind == "scheduler" else change.kind
        lines.append(f"changed since the checkpoint ({kind}): {change}")
    return "\n".join(lines)
