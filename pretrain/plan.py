"""Everything that is decided and checked before processes meet: configuration, phases, data,
start."""

import dataclasses
import importlib.util
import os
from pathlib import Path

from data.config import DataConfig
from data.forecast import Forecast
from data.ledger import Ledger
from data.sources import Corpus, open_corpus
from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from parallel.layout import device_here
from pretrain.batches import (
    blend_change,
    check_windows,
    forecast_phases,
    forecast_warnings,
    target_problems,
    target_warnings,
)
from pretrain.checkpointing.phase_changes import begun_phase
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.resume_contract import (
    continuation_changes,
    missing_parts,
    needless_acceptance,
    refusals,
    weights_changes,
)
from pretrain.checkpointing.setting_changes import Change, is_same
from pretrain.checkpointing.start import Start, find_start
from pretrain.config.config import Config
from pretrain.config.effects import effect_warnings
from pretrain.config.facts import problems_of
from pretrain.config.load import read_config_yaml
from pretrain.evaluation.evaluate import check as check_evaluations
from pretrain.evaluation.evaluate import check_lengths
from pretrain.evaluation.evaluate import warnings as evaluation_warnings
from pretrain.planner.auto_layout import settle_layouts
from pretrain.planner.check_phases import check_phases, length_warnings, rope_warnings
from pretrain.planner.loss_chunks import choose_loss_chunks
from pretrain.planner.memory_check import MemoryReport, check_memory, memory_filter
from pretrain.problems import attempt
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases


@dataclasses.dataclass(frozen=True)
class Plan:
    config: Config
    phases: list[Phase]
    learning_rate: LearningRate
    vocab_size: int
    tokenizer: Tokenizer | None
    start: Start
    progress: Progress | None
    """How far the checkpoint that is started from had come."""
    corpus: Corpus
    ledger: Ledger
    forecast: list[Forecast]
    """What each phase will draw (data/forecast.py: forecast)."""
    tokenizer_description: dict | None
    layouts: dict
    """What a checkpoint keeps of the layouts that were chosen, by phase name
    (pretrain/planner/auto_layout.py)."""
    layout_lines: list[str]
    """A line for each phase whose layout was chosen."""
    memory: MemoryReport
    """What each phase is estimated to need (pretrain/planner/memory_check.py)."""
    changes: list[Change]
    """What differs from the checkpoint that is started from (checkpointing/resume_contract.py)."""

    @property
    def starts_optimizer_anew(self) -> bool:
        """Do moments start at zero although the checkpoint's weights are taken?

        A restart continues them, whatever the flags of the first launch said, unless they were not
        saved.
        """
        is_forgotten = not self.start.is_restart or not (
            self.progress and self.progress.has_optimizer
        )
        return self.start.weights_only or self.config.checkpoint.no_load_optim and is_forgotten


def make_plan(config: Config, world_size: int, only_print: bool = False) -> Plan:
    """Check the whole configuration against the world and the disk.

    Args:
        only_print: make no folder.

    Raises:
        ValueError: every problem found, a line each.
    """
    config = _with_data_args(config)
    problems = config.validate()
    section_problems = bool(problems)
    phases = attempt(problems, lambda: resolve_phases(config)) or []
    problems += _handover_problems([phase for phase in phases if not phase.auto], config)
    if phases and not section_problems:
        learning_rate = attempt(problems, lambda: LearningRate.make(config.optimizer, phases))
    tokenizer = None
    vocab_size = None
    if not problems_of(config.data):
        tokenizer, vocab_size = attempt(problems, lambda: _tokenizer(config.data)) or (None, None)
    sections = (config.model, config.memory, config.layout)
    if phases and not any(problems_of(section) for section in sections):
        fits = memory_filter(config, world_size, vocab_size)
        problems += check_phases(phases, config, world_size, vocab_size, fits)
    if not problems:
        problems += check_evaluations(config.logging, tokenizer)
    if config.logging.tensorboard_dir and importlib.util.find_spec("tensorboard") is None:
        problems.append(
            f"tensorboard_dir = {config.logging.tensorboard_dir}: needs the package tensorboard. Fix: "
            "install it (requirements.txt has the version), or leave the flag out."
        )
    if problems:
        raise ValueError("\n".join(problems))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, vocab_size=vocab_size)
    )
    start = find_start(config.checkpoint)
    progress = Progress.read(start.folder) if start.folder else None
    description = tokenizer.describe() if tokenizer else None
    goes_on = progress is not None and not start.weights_only
    clock = progress.clock if goes_on else 0
    phases, layouts, layout_lines = settle_layouts(
        phases,
        config,
        world_size,
        vocab_size,
        progress.layouts if goes_on else {},
        clock,
    )
    phases = choose_loss_chunks(phases, config, world_size, vocab_size)
    fit = check_memory(phases, config, world_size, vocab_size, clock)
    # Layouts that a checkpoint kept have not been checked against this run's lengths.
    problems = [
        f"phase {phase.name!r}: {problem}"
        for phase in phases
        for problem in check_lengths(config.logging, phase)
    ]
    if problems := _handover_problems(phases, config) + problems + fit.problems:
        raise ValueError("\n".join(problems))
    corpus, ledger, changes = _open_data(
        config, phases, learning_rate, description, start, progress
    )
    if problems := target_problems(corpus, [phase for phase in phases if phase.end > clock]):
        raise ValueError("\n".join(problems))
    check_windows(config.data, ledger, clock, progress.last_batch_tokens if goes_on else 0, phases)
    rows = forecast_phases(ledger, corpus, clock, phases)
    if config.checkpoint.save and not only_print:
        _check_writable(Path(config.checkpoint.save))
    return Plan(
        config,
        phases,
        learning_rate,
        vocab_size,
        tokenizer,
        start,
        progress,
        corpus,
        ledger,
        rows,
        description,
        layouts,
        layout_lines,
        fit,
        changes,
    )


def _handover_problems(phases: list[Phase], config: Config) -> list[str]:
    """Phases of different layouts hand over through a checkpoint, which must be there and whole."""
    problems = []
    if len({phase.layout_key for phase in phases}) > 1:
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


def _open_data(
    config: Config,
    phases: list[Phase],
    learning_rate: LearningRate,
    tokenizer: dict | None,
    start: Start,
    progress: Progress | None,
) -> tuple[Corpus, Ledger, list[Change]]:
    """The data, and what differs from the checkpoint that is started from.

    Raises:
        ValueError: every difference that may not be or is not accepted, a line each.
    """
    settings = config.checkpoint
    problems = []
    changes = []
    goes_on = progress is not None and not start.weights_only
    if goes_on and (problems := missing_parts(progress, settings, str(start.folder))):
        raise ValueError("\n".join(problems))
    if progress is not None:
        stored = read_config_yaml(str(start.folder / "config.yaml"))
        changes = (
            weights_changes(stored, config, progress, phases, tokenizer)
            if start.weights_only
            else continuation_changes(stored, config, progress, phases, learning_rate, tokenizer)
        )
    corpus = attempt(
        problems,
        lambda: open_corpus(
            config.data,
            config.optimizer.seed,
            config.data.vocab_size,
            tokenizer,
            [phase.data_path for phase in phases if phase.data_path],
        ),
    )
    accepted = "data" in settings.accept_changes
    another_seed = goes_on and accepted and stored.optimizer.seed != config.optimizer.seed
    ledger = corpus and attempt(
        problems,
        lambda: Ledger(
            corpus.train,
            progress.data if goes_on else None,
            accept_changes=accepted,
            another_seed=another_seed,
        ),
    )
    if ledger and goes_on:
        changes += [
            Change(f"data of {name}", "other tokens or another order", "begins anew", "data")
            for name in ledger.begun_anew
        ]
        current = begun_phase(phases, progress)
        if current:
            ledger.rename_phase(progress.phase_name, current.name)
        blends = blend_change(ledger, corpus, current) if current else None
        if blends:
            changes.append(Change(f"phase {current.name!r}: blend", *blends, "data"))
    if problems := refusals(changes, settings) + problems:
        raise ValueError("\n".join(problems))
    return corpus, ledger, changes


def _with_data_args(config: Config) -> Config:
    """The configuration with the words of --data-args-path in data_path."""
    path = config.data.data_args_path
    if path is None:
        return config
    if config.data.data_path:
        raise ValueError(
            f"data_args_path = {path}: cannot be combined with data_path. Fix: remove one of them."
        )
    try:
        words = Path(path).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"data_args_path = {path}: cannot be read ({error}). Fix: a text file with the words of "
            "--data-path."
        ) from None
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, data_path=words, data_args_path=None)
    )


def _check_writable(folder: Path) -> None:
    """Raises ValueError unless the folder exists or can be made, and can be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise ValueError(
            f"save = {folder}: cannot be written ({error.strerror}). Fix: give another --save."
        ) from None


def warnings_about(plan: Plan) -> list[str]:
    """What runs, but perhaps not as meant."""
    config = plan.config
    found = (
        effect_warnings(config)
        + rope_warnings(plan.phases)
        + length_warnings(plan.phases)
        + plan.memory.warnings
    )
    found += _warnings_on_cpu(plan)
    if plan.start.is_restart:
        settings = config.checkpoint
        first = read_config_yaml(str(plan.start.folder / "config.yaml")).checkpoint
        same = settings.load and os.path.abspath(settings.load) == os.path.abspath(settings.save)
        found += [
            f"{name}: has no effect, since --save already holds a checkpoint of this run, which goes on"
            for name in ("load", "ckpt_step", "no_load_optim", "finetune", "pretrained_checkpoint")
            if getattr(settings, name) not in (None, False)
            # The same command goes on.
            and not is_same(name, getattr(first, name), getattr(settings, name))
            and not (name == "load" and same)
            and not (name == "no_load_optim" and plan.starts_optimizer_anew)
        ]
    found += _warnings_about_start(plan)
    found += [
        f"{prefix}: {count:,} documents have no token and are never drawn"
        for prefix, count in plan.corpus.empty.items()
    ]
    found += forecast_warnings(plan.ledger, plan.forecast)
    found += target_warnings(plan.corpus, plan.phases)
    found += evaluation_warnings(config.logging, plan.phases)
    decay_end = plan.learning_rate.arcs[-1].end
    end = plan.phases[-1].end
    if decay_end != end and config.optimizer.lr_decay_style != "constant":
        found.append(
            f"the learning rate's decay ends at {decay_end:,} tokens, the run at {end:,}: "
            f"{'the rest is trained at min_lr' if decay_end < end else 'min_lr is not reached'}"
        )
    if config.logging.eval_iters and not plan.corpus.validation:
        found.append(
            "there are no validation documents (--split, --valid-data-path): nothing is evaluated"
        )
    return found


def _warnings_on_cpu(plan: Plan) -> list[str]:
    if device_here()[0] != "cpu":
        return []
    found = ["optimizer_cpu_offload = True"] if plan.config.optimizer.optimizer_cpu_offload else []
    found += [
        f"phase {phase.name!r}: cpu_offloading_num_layers = {phase.memory.cpu_offloading_num_layers}"
        for phase in plan.phases
        if phase.memory.cpu_offloading_num_layers
    ]
    return [
        f"{text}: changes nothing on a CPU, where all tensors are in the host's memory"
        for text in found
    ]


def _warnings_about_start(plan: Plan) -> list[str]:
    settings = plan.config.checkpoint
    folder = plan.start.folder
    found = needless_acceptance(plan.changes, settings)
    if settings.no_load_optim and (folder is None or plan.start.weights_only):
        without = "no checkpoint" if folder is None else "weights alone"
        found.append(f"no_load_optim = True: has no effect, since the run starts from {without}")
    is_new = plan.start.weights_only or not plan.start.is_restart
    if folder is not None and is_new and "init_method_std" in plan.config.given.settings:
        found.append(
            f"init_method_std = {plan.config.model.init_method_std:g}: has no effect, since "
            f"the weights are those of {folder}"
        )
    if settings.use_checkpoint_args and folder is None:
        found.append(
            "use_checkpoint_args = True: has no effect, since the run starts from no checkpoint"
        )
    if settings.use_checkpoint_opt_param_scheduler and (folder is None or plan.start.weights_only):
        found.append(
            "use_checkpoint_opt_param_scheduler = True: has no effect, since no checkpoint's clock goes on"
        )
    return found


def _tokenizer(data: DataConfig):
    """The tokenizer (None for mock data) and the model's vocabulary size."""
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
