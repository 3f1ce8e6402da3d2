"""When a run has something to save, and what it then writes."""

import dataclasses
import gc
import time
from pathlib import Path

import torch

from parallel.layout import Layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.model_files import read_carried
from pretrain.checkpointing.progress import Progress, ValidationScore
from pretrain.checkpointing.replicas import check_replicas
from pretrain.checkpointing.retention import Retention, choose_run_id
from pretrain.config.config_yaml import dump_yaml
from pretrain.logs.metrics import Reporter
from pretrain.logs.tally import StepTally
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState, checkpoint_tensors


class Saver:
    """Writes the checkpoints of a run; does nothing without --save.

    Args:
        evaluation_due: the phase of a due evaluation, as the checkpoint of the start has it.
    """

    def __init__(self, plan: Plan, layout: Layout, reporter: Reporter, evaluation_due: str | None):
        self.plan = plan
        self.layout = layout
        self.score: tuple[int, ValidationScore | None] = (0, None)
        """Step and loss of the last evaluation."""
        start = plan.start
        self.run_id = choose_run_id(is_restart=start.is_restart, stored=plan.progress)
        self.retention: Retention | None = None
        settings = plan.config.checkpoint
        if layout.world.is_first and settings.save is not None:
            self.retention = Retention(
                Path(settings.save), settings, self.run_id, start.folder, reporter.event
            )
        self.saved_evaluation_due = evaluation_due
        # Only rank 0 writes them. Read now: the folder that the run starts from may go away later.
        self.carried = read_carried(plan.start.folder) if layout.world.is_first else {}

    def save(
        self,
        state: TrainState,
        phase: Phase,
        tally: StepTally,
        reporter: Reporter,
        evaluation_due: str | None,
        *,
        ends_phase: bool,
    ) -> None:
        """Write a checkpoint, unless the last one (or the start) says the same already; collective.

        Args:
            phase: of the last step.
            evaluation_due: name of the phase of an evaluation that the next start makes up for.
        """
        root = self.plan.config.checkpoint.save
        if root is None:
            return
        if tally.nothing_to_save and not ends_phase:
            # Skipped steps change nothing but the clock, which only the next phase needs.
            self._report_unsaved(state, reporter)
            return
        if tally.unsaved_steps == 0 and evaluation_due == self.saved_evaluation_due:
            return

        # With --manual-gc, garbage is collected here and at evaluations only.
        began = time.perf_counter()
        gc.collect()
        # Copies that are no longer the same must not be published.
        check_replicas(state.stages, self.layout)
        progress = self._progress(state, phase, evaluation_due, ends_phase=ends_phase)
        assert progress.data is not None
        reporter.account(state.step, state.clock, progress.data["account"])
        folder = checkpoint.save(
            root,
            state.step,
            checkpoint_tensors(state, with_optimizer=progress.has_optimizer),
            progress,
            dump_yaml(self.plan.config),
            self.plan.tokenizer.files if self.plan.tokenizer else [],
            self.layout.world,
            self.carried,
        )
        # From here on this is what the last checkpoint says.
        tally.note_save()
        self.saved_evaluation_due = evaluation_due
        text = f"saved {folder} in {time.perf_counter() - began:.1f} s"
        reporter.say(text)
        reporter.event("save", state.step, state.clock, text)
        if self.retention is not None:
            self.retention.after_publish(folder)

    def _report_unsaved(self, state: TrainState, reporter: Reporter) -> None:
        text = (
            f"step {state.step:,}: not saved, since all steps since the last checkpoint were "
            "skipped"
        )
        reporter.say(text)
        reporter.event("unsaved", state.step, state.clock, text)

    def note_evaluation(self, step: int, score: ValidationScore | None) -> None:
        """Remember the validation loss of a step, for the checkpoint of that step."""
        self.score = (step, score)

    def close(self, *, finish: bool) -> None:
        """End what goes on in the background.

        Args:
            finish: do what is due first, as at an orderly end that nobody waits for.
        """
        if self.retention is not None:
            self.retention.close(finish=finish)

    def _progress(
        self, state: TrainState, phase: Phase, evaluation_due: str | None, *, ends_phase: bool
    ) -> Progress:
        """Describe how far the run is."""
        plan = self.plan
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
            steps_with_targets=state.steps_with_targets,
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
