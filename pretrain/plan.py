"""Everything that is decided and checked before processes meet.

In stages, each of which takes what the ones before it found: the settings by themselves
(plan_settings.py), where the run starts, layouts and memory, the data.
"""

import dataclasses
from pathlib import Path

from data.forecast import Forecast
from data.ledger import Ledger
from data.sources import Corpus, open_corpus
from data.tokenizers.tokenizer import Tokenizer
from pretrain.checkpointing.folders import is_complete
from pretrain.checkpointing.phase_changes import begun_phase
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.resume_contract import (
    continuation_changes,
    missing_parts,
    refusals,
    weights_changes,
)
from pretrain.checkpointing.save_folder import DiskReport, check_disk, require_writable
from pretrain.checkpointing.setting_changes import Change
from pretrain.checkpointing.spent_tokens import spent_tokens_problems
from pretrain.checkpointing.start import Start, find_start
from pretrain.config.config import Config
from pretrain.config.config_yaml import read_config_yaml
from pretrain.data_outlook import (
    blend_change,
    check_windows,
    forecast_phases,
    target_problems,
)
from pretrain.evaluation.lengths import check_lengths
from pretrain.guards.rewinds import Rewind, read_rewinds
from pretrain.plan_settings import (
    SettledSettings,
    check_settings,
    handover_problems,
    refuse_all,
    with_data_args,
)
from pretrain.planner.auto_layout import settle_layouts
from pretrain.planner.loss_chunks import choose_loss_chunks
from pretrain.planner.machine import Machine
from pretrain.planner.memory_check import MemoryReport, check_memory
from pretrain.problems import attempt
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import Phase


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before its processes meet."""

    config: Config
    phases: list[Phase]
    learning_rate: LearningRate
    vocab_size: int
    tokenizer: Tokenizer | None
    start: Start
    progress: Progress | None
    """How far the checkpoint that is started from had come; None = fresh weights."""
    world_size: int
    """Processes of the run."""
    machine: Machine
    """What each process computes on."""
    has_data: bool
    """Was the data looked at? Else corpus, ledger and forecast are empty."""
    corpus: Corpus
    ledger: Ledger
    forecast: list[Forecast]
    """What each phase will draw (data/forecast.py: forecast)."""
    tokenizer_description: dict | None
    layouts: dict
    """What a checkpoint keeps of the layouts that were chosen, by phase name
    (planner/auto_layout.py)."""
    layout_lines: list[str]
    """A line for each phase whose layout was chosen."""
    memory: MemoryReport
    """What each phase is estimated to need (planner/memory_check.py)."""
    disk: DiskReport
    """What the checkpoints are estimated to need (checkpointing/save_folder.py)."""
    changes: list[Change]
    """What differs from the checkpoint that is started from (checkpointing/resume_contract.py)."""
    rewinds: tuple[Rewind, ...]
    """What the run passes over, since data in it were followed by a spike."""

    @property
    def resumed(self) -> Progress | None:
        """How far the run had come whose clock goes on; None = the clock starts at 0."""
        return None if self.start.weights_only else self.progress

    @property
    def changes_optimizer(self) -> bool:
        """Were the checkpoint's moments another optimizer's?"""
        return any(change.name == "optimizer" for change in self.changes)

    @property
    def starts_fresh_optimizer(self) -> bool:
        """Do moments start at zero although the checkpoint's weights are taken?

        A restart continues them, whatever the flags of the first launch said, unless they were not
        saved. Those of another optimizer are no use.
        """
        if self.start.weights_only or self.changes_optimizer:
            return True
        was_saved = self.progress is not None and self.progress.has_optimizer
        is_forgotten = not self.start.is_restart or not was_saved
        return self.config.checkpoint.no_load_optim and is_forgotten


def make_plan(
    config: Config,
    world_size: int,
    *,
    only_print: bool = False,
    machine: Machine | None = None,
    with_data: bool = True,
) -> Plan:
    """Check the whole configuration against the world and the disk.

    Args:
        only_print: make no folder.
        machine: what the processes will compute on; by default this process's.
        with_data: False = tokenizer and data are on another machine, and are not opened.

    Raises:
        ValueError: every problem found, a line each.
    """
    # Each stage refuses all of its problems at once, and the next takes what it found.
    machine = machine or Machine.here(config)
    if with_data:
        config = with_data_args(config)
    settings = check_settings(config, world_size, machine, with_tokenizer=with_data)
    config = settings.config
    origin = _find_origin(config)
    refuse_all(spent_tokens_problems(origin.start, origin.resumed, settings.phases[-1].end))
    placed = _place_phases(settings, origin, world_size, machine)
    data = _open_data(settings, placed.phases, origin, with_data=with_data)
    # The only thing that is made on disk, when all else is well. Where a plan is only printed, the
    # disk is perhaps another machine's.
    disk = DiskReport()
    if config.checkpoint.save and not only_print:
        require_writable(Path(config.checkpoint.save))
        disk = check_disk(config, placed.phases, settings.vocab_size, origin.clock)
        refuse_all(disk.problems)
    return Plan(
        config=config,
        phases=placed.phases,
        learning_rate=settings.learning_rate,
        vocab_size=settings.vocab_size,
        tokenizer=settings.tokenizer,
        start=origin.start,
        progress=origin.progress,
        world_size=world_size,
        machine=machine,
        has_data=with_data,
        corpus=data.corpus,
        ledger=data.ledger,
        forecast=data.forecast,
        tokenizer_description=settings.tokenizer_description,
        layouts=placed.layouts,
        layout_lines=placed.layout_lines,
        memory=placed.memory,
        disk=disk,
        changes=data.changes,
        rewinds=read_rewinds(config.checkpoint.save),
    )


# ---------------------------------------------------------------- where the run starts


@dataclasses.dataclass(frozen=True)
class _Origin:
    """The checkpoint that the run starts from, if there is one."""

    start: Start
    progress: Progress | None
    stored: Config | None
    """The settings with which it was saved."""

    @property
    def resumed(self) -> Progress | None:
        """How far the run had come whose clock goes on; None = the clock starts at 0."""
        return None if self.start.weights_only else self.progress

    @property
    def clock(self) -> int:
        return self.resumed.clock if self.resumed else 0


def _find_origin(config: Config) -> _Origin:
    """Read what the checkpoint that the run starts from says of itself."""
    start = find_start(config.checkpoint)
    if start.folder is None:
        return _Origin(start, None, None)
    try:
        progress = Progress.read(start.folder)
        return _Origin(start, progress, read_config_yaml(str(start.folder / "config.yaml")))
    except (ValueError, OSError):
        # Plans are made before the folder is locked.
        if start.is_restart and not is_complete(start.folder):
            raise ValueError(
                f"save = {config.checkpoint.save}: {start.folder.name} was deleted while this run "
                "read it, so that another run trains into the folder. Fix: stop that run, or give "
                "another --save."
            ) from None
        raise


# ---------------------------------------------------------------- layouts and memory


@dataclasses.dataclass(frozen=True)
class _PlacedPhases:
    """The phases with everything chosen that the settings left open."""

    phases: list[Phase]
    layouts: dict
    layout_lines: list[str]
    memory: MemoryReport


def _place_phases(
    settings: SettledSettings, origin: _Origin, world_size: int, machine: Machine
) -> _PlacedPhases:
    """Choose the layouts that are left to us, and check that every phase fits into memory.

    Raises:
        ValueError: every problem found, a line each.
    """
    config = settings.config
    vocab_size = settings.vocab_size
    kept = origin.resumed.layouts if origin.resumed else {}
    # Layouts that an earlier start chose hold, as long as what they followed from does.
    phases, layouts, layout_lines = settle_layouts(
        settings.phases, config, world_size, vocab_size, kept, origin.clock, machine.device
    )
    # With a layout, what a phase needs is known: loss chunks take what is left.
    phases = choose_loss_chunks(phases, config, world_size, vocab_size, machine)
    memory = check_memory(phases, config, world_size, vocab_size, origin.clock, machine)

    problems = handover_problems(phases, config)
    # Layouts that a checkpoint kept have not been checked against this run's lengths.
    for phase in phases:
        for problem in check_lengths(config.logging, phase):
            problems.append(f"phase {phase.name!r}: {problem}")
    refuse_all(problems + memory.problems)
    return _PlacedPhases(phases, layouts, layout_lines, memory)


# ---------------------------------------------------------------- the data


@dataclasses.dataclass(frozen=True)
class _Data:
    """The data, opened where the run starts."""

    corpus: Corpus
    ledger: Ledger
    forecast: list[Forecast]
    changes: list[Change]


def _open_data(
    settings: SettledSettings, phases: list[Phase], origin: _Origin, *, with_data: bool
) -> _Data:
    """Open the data, and compare everything with the checkpoint that is started from.

    Args:
        with_data: False = compare the settings alone.

    Raises:
        ValueError: every difference that may not be or is not accepted, a line each; or phases
            that cannot draw what they should.
    """
    config = settings.config
    resumed = origin.resumed
    problems: list[str] = []
    # Without its clock or moments a checkpoint cannot go on at all.
    if resumed is not None:
        refuse_all(missing_parts(resumed, config.checkpoint, str(origin.start.folder)))

    # What differs from the checkpoint: settings first, then data, which must be open for that.
    changes = _changes_of_settings(settings, phases, origin)
    if not with_data:
        refuse_all(refusals(changes, config.checkpoint))
        return _Data(Corpus({}, {}), Ledger({}), [], changes)
    sources = [phase.data_path for phase in phases if phase.data_path]
    corpus = attempt(
        problems,
        lambda: open_corpus(
            config.data,
            config.optimizer.seed,
            settings.vocab_size,
            settings.tokenizer_description,
            sources,
        ),
    )
    ledger = None
    if corpus is not None:
        ledger = attempt(problems, lambda: _open_ledger(config, corpus, origin))
        if ledger is not None and resumed is not None:
            changes += _changes_of_data(ledger, corpus, phases, resumed)
    refuse_all(refusals(changes, config.checkpoint) + problems)
    assert corpus is not None and ledger is not None

    # Can the phases that are to come draw what they should?
    coming = [phase for phase in phases if phase.end > origin.clock]
    refuse_all(target_problems(corpus, coming))
    last_batch = resumed.last_batch_tokens if resumed else 0
    check_windows(config.data, ledger, origin.clock, last_batch, phases)
    forecast = forecast_phases(ledger, corpus, origin.clock, phases)
    return _Data(corpus, ledger, forecast, changes)


def _changes_of_settings(
    settings: SettledSettings, phases: list[Phase], origin: _Origin
) -> list[Change]:
    """List how the settings differ from the checkpoint's."""
    if origin.progress is None:
        return []
    assert origin.stored is not None
    config = settings.config
    description = settings.tokenizer_description
    # A new run on the weights may change all that the weights do not depend on.
    if origin.start.weights_only:
        return weights_changes(origin.stored, config, origin.progress, phases, description)
    return continuation_changes(
        origin.stored, config, origin.progress, phases, settings.learning_rate, description
    )


def _open_ledger(config: Config, corpus: Corpus, origin: _Origin) -> Ledger:
    """Continue the checkpoint's ledger, or begin one."""
    if origin.resumed is None:
        return Ledger(corpus.train)
    assert origin.stored is not None
    accepts = "data" in config.checkpoint.accept_changes
    has_other_seed = origin.stored.optimizer.seed != config.optimizer.seed
    return Ledger(
        corpus.train,
        origin.resumed.data,
        accept_changes=accepts,
        another_seed=accepts and has_other_seed,
    )


def _changes_of_data(
    ledger: Ledger, corpus: Corpus, phases: list[Phase], resumed: Progress
) -> list[Change]:
    """List how the data differ from what the checkpoint drew; keep the ledger's phase its name."""
    changes = [
        Change(f"data of {name}", "other tokens or another order", "begins again", "data")
        for name in ledger.begun_anew
    ]
    # The phase that goes on may have another name, and another blend of the same sources.
    current = begun_phase(phases, resumed)
    if current is not None:
        ledger.rename_phase(resumed.phase_name, current.name)
        blends = blend_change(ledger, corpus, current)
        if blends is not None:
            changes.append(Change(f"phase {current.name!r}: blend", *blends, "data"))
    return changes
