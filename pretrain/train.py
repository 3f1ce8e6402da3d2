"""Pretrain a GPT: `torchrun ... -m pretrain.train --config FILE [--flags]`.

Reads top to bottom: check everything, join the processes, build or load the state, run phase by
phase. The process ends with an outcome that the launcher reads: done, again (the next phase needs
another layout), stopped (signal or --exit-...), unstarted (signal before the first step), refused
(bad input).
"""

import dataclasses
import gc
import sys
import time
from contextlib import AbstractContextManager

import torch

from model import compiled
from model.build import build_stages
from model.init import initialize
from parallel.layout import (
    World,
    build_layout,
    end_world,
    has_bf16_units,
    launched_local_rank,
    launched_on_one_machine,
    launched_rank,
    launched_world_size,
    start_world,
)
from parallel.shard import reshard
from pretrain.attention_backend import attention_of_run
from pretrain.batches import SHOWN_SOURCES, Feed, describe_forecast
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folder_lock import FolderLock, same_start_on_all_ranks
from pretrain.checkpointing.model_files import read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.resume_contract import describe_changes
from pretrain.config.load import dump_yaml, load_config, spell, warn
from pretrain.evaluation.evaluate import Evaluator
from pretrain.logs.measured import measure
from pretrain.logs.metrics import Reporter
from pretrain.logs.tally import StepTally
from pretrain.plan import Plan, make_plan, warnings_about
from pretrain.planner.hardware import peak_flops
from pretrain.planner.model_size import ModelSize
from pretrain.processes.agreement import (
    Refused,
    describe_code,
    known_to_all,
    require_agreement,
    shared_by_all,
)
from pretrain.processes.out_of_memory import out_of_memory_explained
from pretrain.processes.outcome import (
    UNSTARTED,
    refuse,
    refuse_with_others,
    say_stopped_at_start,
    write_outcome,
)
from pretrain.processes.shared_folder import require_shared_folder
from pretrain.processes.stop import (
    Interrupted,
    StopRequest,
    StopSignals,
    defer_together,
    let_signals_through,
)
from pretrain.schedule.phase_table import describe
from pretrain.schedule.phases import Phase, phase_at
from pretrain.state import (
    TrainState,
    build_optimizer,
    check_replicas,
    checkpoint_tensors,
    fill_tied_copy,
)
from pretrain.step import Stepper, train_step


class Trainer:
    """One process's part of a run on one layout."""

    def __init__(self, plan: Plan, world: World, signals: StopSignals | None = None):
        self.plan = plan
        self.config = plan.config
        self.model_size = ModelSize(plan.config.model, plan.vocab_size)
        self.world = world
        self.signals = signals or StopSignals()
        self.started = time.monotonic()
        self.evaluation_due: str | None = None
        """The phase of an evaluation that a stop cut short or left out; the next start makes up for
        it."""
        self.in_steps = False
        """From now on an error may be this rank's alone."""

    def run(self) -> str:
        """Train until done, or until the layout must change or someone stops us -> the outcome."""
        require_agreement(shared_by_all(self.plan), self.world.axis)
        start = self.plan.start
        progress = self.plan.progress
        clock = 0 if progress is None or start.weights_only else progress.clock
        phase = self._phase_of_start(clock)
        # Not recomputed from the phases: with another batch size the same clock is another number
        # of steps.
        step = 0 if progress is None or clock == 0 else progress.step
        if self.world.rank == 0:
            print(
                "\n".join(
                    [
                        describe(self.plan.phases, self.world.size),
                        *self.plan.layout_lines,
                        *self.plan.memory.lines,
                    ]
                ),
                flush=True,
            )
            if self.plan.changes:
                print(describe_changes(self.plan.changes), flush=True)
            if phase is not None:
                print(describe_forecast(self.plan.forecast), flush=True)
            for text in warnings_about(self.plan):
                warn(text)
            print(f"code: {describe_code()}", flush=True)
        if phase is None:
            if self.world.rank == 0:
                print(
                    f"done: all {step:,} steps are trained; raise the tokens to go on", flush=True
                )
            return "done"
        self.layout = build_layout(phase.layout, self.world)
        lock = None
        if self.config.checkpoint.save:
            with known_to_all():
                lock = FolderLock(self.config.checkpoint.save, self.layout.world)
                require_shared_folder(self.config.checkpoint.save, self.layout.world)
            planned = start.folder if start.is_restart else None
            if not same_start_on_all_ranks(self.config.checkpoint.save, planned, self.layout.world):
                raise RuntimeError(
                    f"{self.config.checkpoint.save} got another checkpoint while this run was starting; "
                    "starting again picks it up"
                )
        # Only rank 0 writes them. Read now: the folder that the run starts from may go away later.
        self.carried = read_carried(start.folder) if self.world.rank == 0 else {}
        with self._out_of_memory_explained(phase):
            self.state = self._build_state(phase, progress)
        self.feed = Feed(
            self.config.data,
            self.plan.corpus,
            self.plan.ledger,
            self.layout,
            eod=self.plan.tokenizer.eod if self.plan.tokenizer else None,
            vocab_size=self.plan.vocab_size,
        )
        self.evaluator = Evaluator(self.config, self.feed, self.plan.tokenizer)
        self.tally = StepTally(self.state.steps_with_targets)
        self.stop = StopRequest(self.signals, self.layout.world, self.layout.device)
        self.saved_evaluation_due = self.evaluation_due
        reporter = Reporter(self.config, self.world.rank == 0, step, self.state.wandb_run_id)
        self.state.wandb_run_id = reporter.wandb_run_id
        reporter.say(
            f"start: {start.reason}, step {step:,}, phase {phase.name}, {self.layout.describe()}, "
            f"{self.model_size.num_parameters:,} parameters; {self.attention_note}; "
            f"{compiled.describe(self.layout.device)}"
        )
        reporter.event(
            "restart" if start.is_restart else "start",
            step,
            self.state.clock,
            f"{start.reason}; {self.layout.describe()}",
        )
        try:
            if self.config.checkpoint.exit_signal_handler:
                if not defer_together(self.signals, self.layout.world):
                    text = "stopped before the first step"
                    self._end("stopped", text, step, reporter)
                    return UNSTARTED
            self.in_steps = True
            return self._run_phases(phase, step, reporter)
        finally:
            reporter.close()
            if lock is not None:
                lock.release()

    def _phase_of_start(self, clock: int) -> Phase | None:
        """Choose the phase that runs first, None = all is done.

        It is the one at the clock, or one that is over but for an evaluation that a stop cut short.
        """
        due = None
        if clock > 0:  # the checkpoint's clock goes on
            due = self.plan.progress.evaluation_due
        by_name = {phase.name: phase for phase in self.plan.phases if phase.start < clock}
        if due is not None and due not in by_name and self.world.rank == 0:
            warn(
                "the evaluation that a stop cut short is left out: no phase that has begun is "
                f"called {due} any more"
            )
        if due in by_name:
            self.evaluation_due = due
            return by_name[due]
        return phase_at(self.plan.phases, clock)

    def _build_state(self, phase: Phase, progress: Progress | None) -> TrainState:
        optimizer_config = self.config.optimizer
        self.master_dtype = torch.float64 if optimizer_config.fp64 else torch.float32
        self.compute_dtype = torch.bfloat16 if optimizer_config.bf16 else self.master_dtype
        attend, self.attention_note = attention_of_run(
            self.config, self.plan.phases, phase, self.layout, self.compute_dtype
        )
        if (
            optimizer_config.bf16
            and self.world.rank == 0
            and not has_bf16_units(self.layout.device)
        ):
            warn(
                "bf16 = True: this CPU has no bf16 units and emulates them many times slower. Fix: --no-bf16"
            )
        stages = build_stages(
            self.config.model,
            self.plan.vocab_size,
            self.layout,
            attend,
            strategy=phase.layout.sharding_strategy,
            master_dtype=self.master_dtype,
            compute_dtype=self.compute_dtype,
            optimizer_on_host=optimizer_config.optimizer_cpu_offload,
        )
        state = TrainState(stages, build_optimizer(stages, optimizer_config))
        if progress is None:
            initialize(stages, self.config.model, self.layout, optimizer_config.seed)
            return state
        tensors = checkpoint_tensors(state, not self.plan.starts_optimizer_anew)
        checkpoint.load(
            self.plan.start.folder, tensors, self.layout.world, vocab_size=self.plan.vocab_size
        )
        fill_tied_copy(state)
        if not self.plan.start.weights_only:
            state.clock = progress.clock
            state.last_batch = progress.last_batch_tokens
            state.real_tokens = progress.real_tokens
            state.steps_with_targets = progress.steps_with_targets
            state.skipped_in_a_row = progress.skipped_in_a_row
            state.wandb_run_id = progress.wandb_run_id
        return state

    def _run_phases(self, phase: Phase, step: int, reporter: Reporter) -> str:
        state = self.state
        if self.config.schedule.manual_gc:
            gc.disable()
        while True:
            with self._out_of_memory_explained(phase):
                is_stopped, step = self._run_phase(phase, step, reporter)
            following = phase_at(self.plan.phases, state.clock)
            is_over = not is_stopped or following is None
            if is_over:
                self._require_success(step, reporter)
            self._save(phase, step, reporter, ends_phase=is_over)
            if following is None and self.evaluation_due is None:
                text = f"done: {step:,} steps, {state.clock:,} tokens{self.tally.describe()}"
                return self._end("done", text, step, reporter)
            if is_stopped or self.stop.agreed():
                return self._end("stopped", f"stopped as asked after step {step:,}", step, reporter)
            if following.layout_key != phase.layout_key:
                return self._end(
                    "again",
                    f"phase {phase.name} is done; phase {following.name} needs another layout: "
                    "starting again",
                    step,
                    reporter,
                )
            phase = following

    def _require_success(self, step: int, reporter: Reporter) -> None:
        """Raises Refused where a phase ends and nothing was trained since the start: it must not
        look like success.
        """
        failure = self.tally.failure()
        if failure:
            reporter.event("refused", step, self.state.clock, failure)
            raise Refused(f"step {step:,}: {failure}")

    def _out_of_memory_explained(self, phase: Phase) -> AbstractContextManager[None]:
        return out_of_memory_explained(phase, self.plan, self.world.rank, self.world.size)

    def _end(self, outcome: str, text: str, step: int, reporter: Reporter) -> str:
        reporter.say(text)
        reporter.event(outcome, step, self.state.clock, text)
        return outcome

    def _run_phase(self, phase: Phase, step: int, reporter: Reporter) -> tuple[bool, int]:
        """The remaining steps of one phase, or those until someone asks to stop -> (asked, last
        step's number)."""
        state = self.state
        settings = self.config.checkpoint
        stepper = self._make_stepper(phase)
        if self.evaluation_due == phase.name and not self._evaluate(stepper, phase, step, reporter):
            return True, step
        if state.clock >= phase.end:
            return False, step
        with known_to_all():
            begins = self.feed.enter(phase, state.clock)
        for text in self.evaluator.unmeasured(phase) + self.evaluator.taken_whole(phase):
            reporter.say(text)
        if begins:
            reporter.event(
                "phase",
                step,
                state.clock,
                f"{phase.name} begins, {phase.seq_length:,} tokens per sample",
            )
            # Cut short, it needs no note: nothing is saved since, and the phase begins again.
            if not self._evaluate(stepper, phase, step, reporter):
                return True, step
        while state.clock < phase.end:
            try:
                record = self._step(stepper, phase, step)
            except Interrupted:
                self._give_up_step(stepper)
                return True, step
            is_stopped = record.pop("stop")
            step = record["step"]
            reporter.step(record, self.plan.phases[-1].end - state.clock)
            if record["skipped"]:
                reporter.event("skipped", step, state.clock, f"gradient norm {record['grad_norm']}")
            if record["num_targets"] == 0:
                self._say_no_target(step, reporter)
            if self._should_evaluate(phase, step):
                self.evaluation_due = phase.name
                # Who asks to stop is in a hurry, --exit-interval is not.
                hurries = is_stopped and not _is_multiple(step, settings.exit_interval)
                if hurries or not self._evaluate(stepper, phase, step, reporter):
                    return True, step
            if is_stopped:
                return True, step
            if state.clock < phase.end and _is_multiple(step, settings.save_interval):
                self._save(phase, step, reporter, ends_phase=False)
                if self.stop.agreed():
                    return True, step
        return False, step

    def _say_no_target(self, step: int, reporter: Reporter) -> None:
        """Such a step's loss of 0 means nothing: say so for the 1st, 2nd, 4th, 8th, ... of them."""
        count = self.tally.without_target
        text = (
            f"step {step:,}: no document of its batch gives a target; {count:,} such steps "
            "since the start"
        )
        reporter.event("no target", step, self.state.clock, text)
        if self.world.rank == 0 and count & (count - 1) == 0:
            warn(text)

    def _make_stepper(self, phase: Phase) -> Stepper:
        """Set the model to the phase, and look for signals in the pace of its microbatches."""
        for stage in self.state.stages:
            stage.rope = phase.rope
            stage.memory = phase.memory
        self.stop.restart()
        return Stepper(
            self.state.stages,
            self.layout,
            self.config.model.hidden_size,
            self.compute_dtype,
            phase.layout.sharding_strategy,
            self.stop,
        )

    def _should_evaluate(self, phase: Phase, step: int) -> bool:
        logging = self.config.logging
        if not logging.eval_iters or not self.plan.corpus.validation:
            return False  # else a stop would leave one to be made up for
        return self.state.clock >= phase.end or _is_multiple(step, logging.eval_interval)

    def _give_up_step(self, stepper: Stepper) -> None:
        """Leave a step that was cut short as if it had not begun: its data come again."""
        self.state.optimizer.zero_grad(set_to_none=True)
        reshard(stepper.stages)

    def _step(self, stepper: Stepper, phase: Phase, step: int) -> dict:
        """Train one step -> its line of metrics.jsonl, plus "stop": someone asks to save and
        end."""
        state = self.state
        config = self.config
        began = time.perf_counter()
        microbatches = [batch.to(self.layout.device) for batch in self.feed.read(state.clock)]
        data_seconds = time.perf_counter() - began
        lr = self.plan.learning_rate.at(state.clock, phase.lr, phase.min_lr)
        result = train_step(stepper, state.optimizer, microbatches, lr, config.optimizer.clip_grad)
        batch = phase.batch_at(state.clock)
        state.clock = state.clock + batch
        state.last_batch = batch
        self.tally.note(result)
        state.steps_with_targets = self.tally.with_targets
        sources = self.feed.tokens_by_source(state.clock) if self.world.rank == 0 else {}
        state.real_tokens = sum(sources.values())
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if result.skipped else 0
        if state.skipped_in_a_row > config.optimizer.max_skipped_steps:
            raise RuntimeError(
                f"{state.skipped_in_a_row} steps in a row had a gradient that is not finite; the last "
                f"loss was {result.loss}. Lower the learning rate or look at the data of these steps."
            )
        seconds = time.perf_counter() - began
        measured = measure(
            microbatches,
            self.layout,
            wants_stop=self._wants_stop(step + 1),
            data_seconds=data_seconds,
        )
        flops = self.model_size.step_flops(batch, measured.causal_pairs)
        rate = (
            peak_flops(torch.cuda.get_device_name(self.layout.device))
            if self.layout.device.type == "cuda"
            else None
        )
        return {
            "step": step + 1,
            "tokens": state.clock,
            "real_tokens": state.real_tokens,
            "phase": phase.name,
            "seq_length": phase.seq_length,
            "global_batch_tokens": batch,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "num_targets": result.num_targets,
            "tokens_per_second": batch / seconds,
            "mfu": flops / (seconds * rate * self.world.size) if rate else None,
            "peak_memory_bytes": measured.peak_memory_bytes,
            "step_seconds": seconds,
            "data_seconds": measured.data_seconds,
            "skipped": result.skipped,
            "data_digest": measured.data_digest,
            "sources": sources if len(sources) <= SHOWN_SOURCES else None,
            "stop": measured.is_stopped,
        }

    def _wants_stop(self, step: int) -> bool:
        """Does this rank want to stop after `step`?"""
        settings = self.config.checkpoint
        minutes = (time.monotonic() - self.started) / 60
        limit = settings.exit_duration_in_mins
        is_late = limit is not None and minutes >= limit
        return self.signals.asked or is_late or _is_multiple(step, settings.exit_interval)

    def _evaluate(self, stepper: Stepper, phase: Phase, step: int, reporter: Reporter) -> bool:
        """Measure all that there is -> False where a stop cut it short; the rest is made up for."""
        gc.collect()
        place = {"step": step, "tokens": self.state.clock, "phase": phase.name}
        try:
            for record in self.evaluator.run(stepper, phase):
                reporter.evaluation(place | record)
        except Interrupted:
            reporter.say(
                f"evaluation at step {step:,} cut short by a stop; the next start makes up for it"
            )
            return False
        self.evaluation_due = None
        self.stop.restart()  # training has another pace
        if self.layout.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(
                self.layout.device
            )  # metrics.jsonl has that of training
        return True

    def _has_something_to_save(self, step: int, reporter: Reporter, *, ends_phase: bool) -> bool:
        """Does the state differ from that of the last checkpoint, or of the start?

        Skipped steps change nothing but the clock, which only the next phase needs.
        """
        if self.tally.nothing_to_save and not ends_phase:
            text = (
                f"step {step:,}: not saved, since all steps since the last checkpoint were skipped"
            )
            reporter.say(text)
            reporter.event("unsaved", step, self.state.clock, text)
            return False
        return self.tally.unsaved_steps > 0 or self.evaluation_due != self.saved_evaluation_due

    def _save(self, phase: Phase, step: int, reporter: Reporter, *, ends_phase: bool) -> None:
        """Write a checkpoint, unless the last one (or the start) says the same already."""
        state = self.state
        root = self.config.checkpoint.save
        if root is None or not self._has_something_to_save(step, reporter, ends_phase=ends_phase):
            return
        began = time.perf_counter()
        gc.collect()
        check_replicas(state.stages, self.layout)
        longest = max(p.seq_length for p in self.plan.phases[: phase.index + 1])
        drawn = self.plan.ledger.to_json(state.clock)
        has_optimizer = not self.config.checkpoint.no_save_optim
        reporter.account(step, state.clock, drawn["account"])
        progress = Progress(
            step=step,
            clock=state.clock,
            phase=dataclasses.asdict(phase),
            longest_seq_length=longest,
            data=drawn,
            tokenizer=self.plan.tokenizer_description,
            last_batch_tokens=state.last_batch,
            real_tokens=state.real_tokens,
            skipped_in_a_row=state.skipped_in_a_row,
            steps_with_targets=state.steps_with_targets,
            has_optimizer=has_optimizer,
            evaluation_due=self.evaluation_due,
            wandb_run_id=state.wandb_run_id,
            seed=self.config.optimizer.seed,
            layouts=self.plan.layouts,
            world_size=self.world.size,
            threads=torch.get_num_threads(),
        )
        files = self.plan.tokenizer.files if self.plan.tokenizer else []
        folder = checkpoint.save(
            root,
            step,
            checkpoint_tensors(state, has_optimizer),
            progress,
            dump_yaml(self.config),
            files,
            self.layout.world,
            self.carried,
        )
        self.tally.note_save()
        self.saved_evaluation_due = self.evaluation_due
        text = f"saved {folder} in {time.perf_counter() - began:.1f} s"
        reporter.say(text)
        reporter.event("save", step, state.clock, text)


def _is_multiple(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0


def main(argv: list[str] | None = None) -> int:
    """Run; 0 for an end that the launcher reads from the outcome file, 2 for bad input without a
    launcher."""
    signals = StopSignals()
    try:
        return _main(spell(sys.argv[1:] if argv is None else argv), signals)
    finally:
        signals.close()


def _main(argv: list[str], signals: StopSignals) -> int:
    only_print = "--print-config" in argv
    try:
        config = load_config([arg for arg in argv if arg != "--print-config"])
        if config.checkpoint.exit_signal_handler and not only_print:
            signals.listen(before_end=say_stopped_at_start)
        else:
            let_signals_through()
        plan = make_plan(config, launched_world_size(), only_print=only_print)
        if only_print:
            if launched_rank() == 0:
                for text in warnings_about(plan):
                    warn(text)
                print(dump_yaml(plan.config), end="")
            return 0
    except (ValueError, OSError) as error:
        if only_print or launched_on_one_machine():
            return refuse(error)
        return refuse_with_others(error)
    try:
        world = start_world(config.layout)
    except (ValueError, OSError) as error:
        return refuse(error)
    trainer = Trainer(plan, world, signals)
    try:
        outcome = trainer.run()
    except Refused as error:
        return refuse(error, "all ranks")
    except ValueError as error:
        return refuse(error, "this rank" if trainer.in_steps else "this machine")
    finally:
        end_world()
    if launched_local_rank() == 0:
        write_outcome(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
