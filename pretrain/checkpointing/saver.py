"""When a run has something to save, and what it then writes."""

import dataclasses
import gc
import time

import torch

from parallel.layout import Layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.model_files import read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.replicas import check_replicas
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

    def __init__(self, plan: Plan, layout: Layout, evaluation_due: str | None):
        self.plan = plan
        self.layout = layout
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
        progress = self._progress(state, phase, evaluation_due)
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

    def _report_unsaved(self, state: TrainState, reporter: Reporter) -> None:
        text = (
            f"step {state.step:,}: not saved, since all steps since the last checkpoint were "
            "skipped"
        )
        reporter.say(text)
        reporter.event("unsaved", state.step, state.clock, text)

    def _progress(self, state: TrainState, phase: Phase, evaluation_due: str | None) -> Progress:
        """Describe how far the run is."""
        plan = self.plan
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
            seed=plan.config.optimizer.seed,
            layouts=plan.layouts,
            world_size=self.layout.world.size,
            threads=torch.get_num_threads(),
        )
