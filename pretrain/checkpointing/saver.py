"""When a run has something to save, and what it then writes.

Training goes on beside a save: the state is copied while the next step's forward and backward run
(state_copy.py), and the copy is written and published in a thread (background.py), whose
collectives have a group of their own. Only the next update waits for the copy. Everything else that
a checkpoint says is taken at the moment of the save. Without --async-save the same thread writes
the live tensors while training waits.
"""

import copy
import dataclasses
import gc
import time
from functools import partial
from pathlib import Path

import torch

from parallel.layout import Axis, Layout, add_host_axis, drop_axis
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.background import Background
from pretrain.checkpointing.exports import Exporter, open_exporter
from pretrain.checkpointing.folders import clear_unfinished
from pretrain.checkpointing.model_files import contents_of, read_carried
from pretrain.checkpointing.progress import Progress, ValidationScore
from pretrain.checkpointing.replicas import check_copies, tied_differences
from pretrain.checkpointing.retention import Retention, choose_run_id
from pretrain.checkpointing.shared_errors import SaveFailed
from pretrain.checkpointing.state_copy import StateCopy
from pretrain.config.config_yaml import dump_yaml
from pretrain.guards.weight_check import WeightCheck, check_saved
from pretrain.logs.metrics import Reporter
from pretrain.logs.tally import StepTally
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState, checkpoint_tensors

SHOWN_WAIT_SECONDS = 0.1
"""Waits for an earlier save that are not worth a line."""

WAIT_AFTER_FAILURE_SECONDS = 60.0
"""What a rank whose training has failed waits for a save that is under way."""


@dataclasses.dataclass(frozen=True)
class Captured:
    """What is saved besides tensors, as it was at the moment of the save."""

    progress: Progress
    problems: list[str]
    """Tied copies that differ on this rank."""
    began: float
    """By time.perf_counter."""
    left: dict[str, int] | None = None
    """Name -> fingerprint of what the last update left, where weights are checked at this step."""


class Saver:
    """Writes the checkpoints of a run; does nothing without --save. Collective at every call.

    Args:
        evaluation_due: the phase of a due evaluation, as the checkpoint of the start has it.
        weights: knows what is to be saved, at the steps at which it looks.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        state: TrainState,
        reporter: Reporter,
        evaluation_due: str | None,
        weights: WeightCheck | None = None,
    ):
        self.plan = plan
        self.layout = layout
        self.state = state
        self.reporter = reporter
        self.saved_evaluation_due = evaluation_due
        self.weights = weights
        self.root = plan.config.checkpoint.save
        self.score: tuple[int, ValidationScore | None] = (0, None)
        """Step and loss of the last evaluation."""
        start = plan.start
        self.run_id = choose_run_id(is_restart=start.is_restart, stored=plan.progress)
        self.retention: Retention | None = None
        self.exporter: Exporter | None = None
        self._published: Path | None = None
        """The newest checkpoint that this process has published."""
        self._background = Background("save")
        self._copy: StateCopy | None = None
        self._axis: Axis | None = None
        if self.root is None:
            return
        self._axis = add_host_axis("saves")
        # Only rank 0 writes them. Read now: the folder that the run starts from may go away later.
        is_first = layout.world.is_first
        self._carried = read_carried(start.folder) if is_first else {}
        tokenizer = plan.tokenizer if is_first else None
        self._tokenizer_files = contents_of(tokenizer.files) if tokenizer is not None else {}
        self._config_yaml = dump_yaml(plan.config)
        settings = plan.config.checkpoint
        if is_first:
            clear_unfinished(self.root)
            self.exporter = open_exporter(settings, reporter.event, self._look_through)
            self.retention = Retention(
                Path(self.root),
                settings,
                self.run_id,
                start.folder,
                reporter.event,
                in_use=self.exporter.in_use if self.exporter else tuple,
            )
        if settings.async_save:
            self._copy = StateCopy(self._live_tensors(), layout.device)

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        with_optimizer = not self.plan.config.checkpoint.no_save_optim
        return checkpoint_tensors(self.state, with_optimizer=with_optimizer)

    # ------------------------------------------------------------ during training

    @property
    def is_at_work(self) -> bool:
        """Is a checkpoint being written in the background?"""
        return self._background.is_at_work

    @property
    def has_failed(self) -> bool:
        """Has the last background write failed on this rank?"""
        return self._background.has_failed

    def note_evaluation(self, step: int, score: ValidationScore | None) -> None:
        """Remember the validation loss of a step, for the checkpoint of that step."""
        self.score = (step, score)

    def wait_copied(self) -> None:
        """Wait until the state may change again; whoever writes parameters calls this first."""
        if self._copy is not None:
            self._copy.wait()

    def save(
        self,
        phase: Phase,
        tally: StepTally,
        evaluation_due: str | None,
        *,
        ends_phase: bool,
        is_last: bool,
    ) -> None:
        """Save, unless the last checkpoint (or the start) says the same already.

        Args:
            phase: of the last step.
            evaluation_due: name of the phase of an evaluation that the next start makes up for.
            is_last: the process or its phase ends here.
        """
        if self.root is None:
            return
        if tally.nothing_to_save and not is_last:
            # Skipped steps change nothing but the clock, which only what comes next needs: another
            # phase, or a start that would else skip them again.
            self._report_unsaved()
            return
        if tally.unsaved.steps == 0 and evaluation_due == self.saved_evaluation_due:
            return

        self._wait_for_last()
        began = time.perf_counter()
        if not gc.isenabled():
            # With --manual-gc, garbage is collected here and at evaluations only.
            gc.collect()
        state = self.state
        progress = self._progress(phase, tally, evaluation_due, ends_phase=ends_phase)
        assert progress.data is not None
        self.reporter.account(state.step, state.clock, progress.data["account"])
        # Counts go on while the thread writes: it gets them as they are now.
        progress = copy.deepcopy(progress)
        problems = tied_differences(state.stages, self.layout)
        left = self.weights.left_by_update() if self.weights else None
        captured = Captured(progress, problems, began, left)
        # From here on this is what the last checkpoint says; if it fails, so does the run.
        tally.note_save()
        self.saved_evaluation_due = evaluation_due
        live = self._live_tensors()
        if self._copy is None:
            self._background.start(partial(self._write, captured, live))
            self._background.wait()
            return
        self._copy.begin(live)
        self._background.start(partial(self._write_copy, captured, self._copy))

    def _wait_for_last(self) -> None:
        seconds = self._background.wait()
        self.wait_copied()
        if seconds >= SHOWN_WAIT_SECONDS:
            self.reporter.say(f"waited {seconds:.1f} s for the checkpoint before this one")

    def raise_failure(self) -> None:
        """Raise what ended a background write somewhere; all ranks call it at the same step."""
        self._background.wait()
        raise SaveFailed("a checkpoint could not be written; another rank says why")

    def wait_published(self) -> None:
        """Wait until everything that was saved is published.

        Raises:
            Refused, SaveFailed: it could not be written; on all ranks.
        """
        self._background.wait()

    def close(self, *, finish: bool) -> None:
        """End what goes on in the background.

        After a failure of training, a save that is under way may still be published.

        Args:
            finish: export what is due and delete old checkpoints first, as at an orderly end that
                nobody waits for.
        """
        try:
            self._background.wait(WAIT_AFTER_FAILURE_SECONDS)
        except Exception as error:
            # Training has ended already, with an error of its own or in order.
            self.reporter.say(f"warning: {error}")
        if self.exporter is not None:
            self.exporter.close(finish=finish)
        if self.retention is not None:
            self.retention.close(finish=finish)
        if self._axis is None or self._background.is_at_work:
            return
        drop_axis(self._axis)
        self._axis = None
        if self._copy is not None:
            self._copy.close()

    # ------------------------------------------------------------ in the background

    def _write_copy(self, captured: Captured, copied: StateCopy) -> None:
        copied.wait_until_readable()
        self._write(captured, copied.tensors)

    def _write(self, captured: Captured, tensors: dict[str, torch.Tensor]) -> None:
        """Check, write and publish a checkpoint, and say so."""
        assert self.root is not None and self._axis is not None
        progress = captured.progress
        # Copies that are no longer the same must not be published.
        check_copies(tensors, self.layout, captured.problems, self._axis)
        if captured.left is not None:
            check_saved(tensors, captured.left, self._axis)
        folder = checkpoint.save(
            self.root,
            progress.step,
            tensors,
            progress,
            self._config_yaml,
            self._tokenizer_files,
            self._axis,
            self._carried,
        )
        text = f"saved {folder} in {time.perf_counter() - captured.began:.1f} s"
        self.reporter.say(text)
        self.reporter.event("save", progress.step, progress.clock, text)
        self._published = folder
        # First the one that holds on to checkpoints, then the one that deletes them.
        if self.exporter is not None:
            ends_phase = progress.ends_phase
            self.exporter.after_publish(folder, progress.clock, ends_phase=ends_phase)
        self._look_through()

    def _look_through(self) -> None:
        """Delete the checkpoints that are no longer needed, now that this may have changed."""
        if self.retention is not None and self._published is not None:
            self.retention.after_publish(self._published)

    # ------------------------------------------------------------ what is captured

    def _report_unsaved(self) -> None:
        state = self.state
        text = (
            f"step {state.step:,}: not saved, since all steps since the last checkpoint were "
            "skipped"
        )
        self.reporter.say(text)
        self.reporter.event("unsaved", state.step, state.clock, text)

    def _progress(
        self, phase: Phase, tally: StepTally, evaluation_due: str | None, *, ends_phase: bool
    ) -> Progress:
        """Describe how far the run is."""
        plan = self.plan
        state = self.state
        scored_step, score = self.score
        begun = plan.phases[: phase.index + 1]
        return Progress(
            step=state.step,
            clock=state.clock,
            phase=dataclasses.asdict(phase),
            longest_seq_length=max(each.seq_length for each in begun),
            data=plan.ledger.to_json(state.clock),
            tokenizer=plan.tokenizer_description,
            last_batch_tokens=state.last_batch,
            real_tokens=state.real_tokens,
            skipped_in_a_row=state.skipped_in_a_row,
            steps_of_run=dataclasses.replace(tally.of_run),
            steps_of_phase=dataclasses.replace(tally.of_phase),
            spikes=state.spikes.to_json(),
            has_optimizer=not plan.config.checkpoint.no_save_optim,
            evaluation_due=evaluation_due,
            wandb_run_id=state.wandb_run_id,
            run_id=self.run_id,
            ends_phase=ends_phase,
            validation=score if scored_step == state.step else None,
            seed=plan.config.optimizer.seed,
            layouts=plan.layouts,
            world_size=self.layout.world.size,
            threads=torch.get_num_threads(),
        )
