"""What a run's settings say by themselves, checked all at once.

Phases, learning rate, tokenizer, and whether the layouts can run on this number of processes.
"""

import dataclasses
import importlib.util
from pathlib import Path

from data.config import DataConfig
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from pretrain.evaluation.lengths import check_passkeys
from pretrain.planner.check_phases import check_phases
from pretrain.planner.machine import Machine
from pretrain.planner.memory_check import memory_filter
from pretrain.problems import attempt
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases

PACKAGES = {
    "tensorboard_dir": ("tensorboard", "install it (requirements.txt has the version)"),
    "wandb_project": ("wandb", "install it (requirements.txt has the version)"),
    "trackio_project": ("trackio", "pip install trackio"),
    "otlp_endpoint": (
        "opentelemetry.exporter.otlp.proto.http",
        "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
    ),
}
"""Setting -> the package that it needs, and how to get it."""


@dataclasses.dataclass(frozen=True)
class SettledSettings:
    """What the configuration says, checked and resolved."""

    config: Config
    phases: list[Phase]
    """Layouts and loss chunks that are left to us are still open."""
    learning_rate: LearningRate
    tokenizer: Tokenizer | None
    vocab_size: int

    @property
    def tokenizer_description(self) -> dict | None:
        return self.tokenizer.describe() if self.tokenizer else None


def check_settings(
    config: Config, world_size: int, machine: Machine, *, with_tokenizer: bool = True
) -> SettledSettings:
    """Check what the configuration says by itself and for this number of processes.

    Each check is made as soon as what it reads is sound, so that one answer names all problems.

    Args:
        with_tokenizer: False = vocab_size stands for it.

    Raises:
        ValueError: every problem found, a line each.
    """
    # Each section, what the sections say together, and what follows for phases and learning rate.
    problems = config.validate()
    is_sound = not problems
    phases = attempt(problems, lambda: resolve_phases(config)) or []
    problems += handover_problems([phase for phase in phases if not phase.auto], config)
    learning_rate = None
    if phases and is_sound:
        learning_rate = attempt(problems, lambda: LearningRate.make(config.optimizer, phases))

    # The tokenizer, and with its number of ids the layouts and the memory.
    tokenizer = None
    vocab_size = None
    if not problems_of(config.data):
        opened = attempt(problems, lambda: _open_tokenizer(config.data, is_here=with_tokenizer))
        tokenizer, vocab_size = opened or (None, None)
    sections = (config.model, config.memory, config.layout)
    if phases and not any(problems_of(section) for section in sections):
        fits = memory_filter(config, world_size, vocab_size, machine)
        problems += check_phases(phases, config, world_size, vocab_size, fits)

    # What takes the tokenizer's texts, and packages that may be missing.
    if not problems and with_tokenizer:
        problems += check_passkeys(config.logging, tokenizer)
    problems += missing_packages(config)
    problems += ranks_that_are_none(config, world_size)
    refuse_all(problems)
    assert learning_rate is not None and vocab_size is not None
    data = dataclasses.replace(config.data, vocab_size=vocab_size)
    config = dataclasses.replace(config, data=data)
    return SettledSettings(config, phases, learning_rate, tokenizer, vocab_size)


def ranks_that_are_none(config: Config, world_size: int) -> list[str]:
    """List ranks that are to be profiled and that the run does not have."""
    beyond = [rank for rank in config.logging.profile_ranks if rank >= world_size]
    if not beyond or not (config.logging.profile or config.logging.record_memory_history):
        return []
    return [
        f"profile_ranks = {' '.join(map(str, beyond))}: must be ranks of the run, 0 to "
        f"{world_size - 1}. Fix: --profile-ranks 0."
    ]


def missing_packages(config: Config) -> list[str]:
    """List the places for a run's numbers that were asked for and whose package is not here."""
    problems = []
    for name, (package, fix) in PACKAGES.items():
        value = getattr(config.logging, name)
        if value is not None and not _is_installed(package):
            problems.append(
                f"{name} = {value}: needs the package {package}. Fix: {fix}, or leave the flag out."
            )
    return problems


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that it is part of
        return False


def refuse_all(problems: list[str]) -> None:
    """Raise ValueError with all problems, a line each, if there are any."""
    if problems:
        raise ValueError("\n".join(problems))


def handover_problems(phases: list[Phase], config: Config) -> list[str]:
    """Check that phases of different layouts can hand over, by a checkpoint that is whole."""
    if len({phase.layout_key for phase in phases}) <= 1:
        return []
    problems = []
    if not config.checkpoint.save:
        problems.append(
            "save: phases with different layouts hand over through a checkpoint. Fix: give --save."
        )
    if config.checkpoint.no_save_optim:
        problems.append(
            "no_save_optim = True: phases with different layouts hand the optimizer over through a "
            "checkpoint. Fix: remove it."
        )
    return problems


def _open_tokenizer(data: DataConfig, *, is_here: bool) -> tuple[Tokenizer | None, int | None]:
    """Open the tokenizer, None for mock data -> with the model's vocabulary size."""
    if not is_here:
        if data.vocab_size is None:
            raise ValueError(
                f"vocab_size = None: must be given where tokenizer_model = {data.tokenizer_model} "
                "is not looked at. Fix: give --vocab-size, the number of its ids."
            )
        return None, data.vocab_size
    # Mock data are random ids; a text's ids must all be rows of the embedding.
    if data.mock_data:
        return None, data.vocab_size
    tokenizer = build_tokenizer(
        data.tokenizer_type, data.tokenizer_model, data.vocab_size, ids_from=data.tokenizer_ids_from
    )
    if data.vocab_size is not None and data.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size = {data.vocab_size}: the tokenizer has {tokenizer.vocab_size} ids. "
            "Fix: leave it out, or give at least that many."
        )
    return tokenizer, data.vocab_size or tokenizer.vocab_size


def with_data_args(config: Config) -> Config:
    """Put the words of the file --data-args-path into data_path."""
    path = config.data.data_args_path
    if path is None:
        return config
    if config.data.data_path:
        raise ValueError(
            f"data_args_path = {path}: cannot be combined with data_path. Fix: remove one of them."
        )
    # White space parts the words, so that a long blend may be written in lines.
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data_args_path = {path}: cannot be read ({error}). Fix: a text file with the words "
            "of --data-path."
        ) from None
    data = dataclasses.replace(config.data, data_path=words, data_args_path=None)
    given = config.given.renamed("data_args_path", "data_path")
    return dataclasses.replace(config, data=data, given=given)
