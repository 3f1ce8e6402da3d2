"""The training loop of one process on one layout: phase by phase, step by step."""

import gc
import time

import torch

from data.batch import Batch
from parallel.layout import Layout
from parallel.shard import reshard
from pretrain.batches import SHOWN_SOURCES, Feed
from pretrain.checkpointing.save_schedule import SaveSchedule
from pretrain.checkpointing.saver import Saver
from pretrain.evaluation.evaluate import Evaluator, score_of
from pretrain.guards.guards import Guards
from pretrain.guards.rewinds import RewindAsked
from pretrain.logs.measured import Measured, measure
from pretrain.logs.metrics import Reporter
from pretrain.logs.profiler import StepProfiler, print_line
from pretrain.logs.slow_ranks import SlowRanks
from pretrain.logs.step_record import StepRecord, record_step
from pretrain.logs.step_reports import StepReports
from pretrain.logs.tally import NOT_FINITE, StepTally, refuse_endless_skips
from pretrain.plan import Plan
from pretrain.planner.model_size import ModelSize
from pretrain.processes.agreement import Refused, known_to_all
from pretrain.processes.heartbeat import Heartbeat
from pretrain.processes.out_of_memory import out_of_memory_explained
from pretrain.processes.recovery import Recovery
from pretrain.processes.stop import Interrupted, StopRequest, StopSignals
from pretrain.qk_clip import LogitWatch
from pretrain.schedule.phases import Phase, phase_at
from pretrain.state import TrainState, compute_dtype, weights_are_finite
from pretrain.step import Stepper, train_step


class TrainingLoop:
    """Trains from where the state is, and evaluates, saves and reports on the way.

    Args:
        evaluation_due: the phase of an evaluation that a stop cut short before this start.
        signals: the stop signals of this process.
        started: when this process began, by time.monotonic.
        recovery: how it came to this start.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        state: TrainState,
        reporter: Reporter,
        signals: StopSignals,
        heartbeat: Heartbeat,
        *,
        evaluation_due: str | None,
        started: float,
        recovery: Recovery | None = None,
    ):
        self.plan = plan
        self.config = plan.config
        self.layout = layout
        self.state = state
        self.reporter = reporter
        self.signals = signals
        self.heartbeat = heartbeat
        self.started = started
        self.evaluation_due = evaluation_due
        """The phase of an evaluation that a stop cut short or left out; the next start makes up for
        it."""
        self.model_size = ModelSize(plan.config.model, plan.vocab_size)
        self.feed = Feed(
            plan.config.data,
            plan.corpus,
            plan.ledger,
            layout,
            eod=plan.tokenizer.eod if plan.tokenizer else None,
            vocab_size=plan.vocab_size,
            cost=self.model_size.document_cost,
            rewinds=plan.rewinds,
        )
        self.evaluator = Evaluator(plan.config, self.feed, plan.tokenizer)
        self.tally = StepTally.resume(plan.resumed)
        self.stop = StopRequest(signals, layout.world, layout.device)
        self.guards = Guards(plan, layout, state, reporter)
        self.saver = Saver(plan, layout, state, reporter, evaluation_due, self.guards.weights)
        self.save_schedule = SaveSchedule(plan.config.checkpoint)
        self.slow_ranks = SlowRanks(layout)
        self.profiler = StepProfiler(self.config, layout, heartbeat, say=print_line)
        self.step_reports = StepReports(reporter, self.tally, recovery or Recovery(), plan.phases)

    def run(self, phase: Phase) -> str:
        """Run the phases that share this layout, saving after each -> the outcome."""
        state = self.state
        world = self.layout.world
        if self.config.schedule.manual_gc:
            # What lives for the whole run is no garbage: collecting what came since takes no time.
            gc.collect()
            gc.freeze()
            gc.disable()
        while True:
            with out_of_memory_explained(phase, self.plan, world.rank, world.size):
                try:
                    is_stopped = self._run_phase(phase)
                except RewindAsked as asked:
                    return self.end("again", str(asked))
            following = phase_at(self.plan.phases, state.clock)
            is_over = state.clock >= phase.end
            self._require_success(phase, is_over=is_over)
            self._save(phase, ends_phase=is_over, is_last=True)

            if following is None and self.evaluation_due is None:
                text = f"done: {state.step:,} steps, {state.clock:,} tokens"
                return self.end("done", f"{text}{self.tally.describe()}")
            if is_stopped or self.stop.agreed():
                text = f"stopped as asked after step {state.step:,}{self.tally.describe()}"
                return self.end("stopped", text)
            assert following is not None, "a phase that was not stopped leaves no evaluation due"
            if following.layout_key != phase.layout_key:
                return self.end(
                    "again",
                    f"phase {phase.name} is done; phase {following.name} needs another layout: "
                    "starting again",
                )
            phase = following

    def _require_success(self, phase: Phase, *, is_over: bool) -> None:
        """Raise Refused where a phase, or a start, ends and came to nothing.

        It must not look like success.
        """
        state = self.state
        if is_over:
            failure = self.tally.failure_of_phase(phase.name, state.skipped_in_a_row)
            # Weights that are spoilt skip every step, however few were left.
            if failure is None and state.skipped_in_a_row:
                if not weights_are_finite(state, self.layout):
                    failure = NOT_FINITE
        else:
            failure = self.tally.failure_of_stop()
        if failure:
            self.report("refused", failure)
            raise Refused(f"step {state.step:,}: {failure}")

    def end(self, outcome: str, text: str) -> str:
        """Say how the run ends, when everything is published, and hand its outcome on."""
        self.heartbeat.enter_save("waiting for the last save")
        self.saver.wait_published()
        self.reporter.say(text)
        self.report(outcome, text)
        # Where the run goes on, what is due is done after the next save.
        self.saver.close(finish=outcome == "done")
        return outcome

    def report(self, kind: str, text: str) -> None:
        """Write an event of this point of the run."""
        self.reporter.event(kind, self.state.step, self.state.clock, text)

    def _run_phase(self, phase: Phase) -> bool:
        """Train the remaining steps of one phase -> True if someone asks to stop before its end."""
        state = self.state
        stepper = self._make_stepper(phase)
        # What a stop cut short comes first.
        if self.evaluation_due == phase.name and not self._evaluate(stepper, phase):
            return True
        if state.clock >= phase.end:
            return False
        if not self._begin_phase(stepper, phase):
            return True

        while state.clock < phase.end:
            self.profiler.begin_step(state.step + 1)
            try:
                record, measured = self._step(stepper, phase)
            except Interrupted:
                self._give_up_step(stepper)
                return True
            self.profiler.end_step(state.step)
            is_stopped = measured.is_stopped
            self.step_reports.report(record)
            self.guards.report(phase)
            if self._should_evaluate(phase):
                self.evaluation_due = phase.name
                # Who asks to stop is in a hurry, --exit-interval is not.
                exit_interval = self.config.checkpoint.exit_interval
                hurries = is_stopped and not _is_multiple(state.step, exit_interval)
                if hurries or not self._evaluate(stepper, phase):
                    return True
            if is_stopped:
                return True
            # The end of the phase is saved by the caller.
            is_due = self.save_schedule.is_due(state.step, some_rank_is_late=measured.is_save_due)
            if state.clock < phase.end and is_due:
                self._save(phase, ends_phase=False, is_last=False)
                if self.stop.agreed():
                    return True
        return False

    def _make_stepper(self, phase: Phase) -> Stepper:
        """Set the model to the phase, and look for signals in the pace of its microbatches."""
        self.heartbeat.begin_phase()
        for stage in self.state.stages:
            stage.rope = phase.rope
            stage.memory = phase.memory
        self.stop.restart()
        dtype = compute_dtype(self.config.optimizer)
        return Stepper(
            self.state.stages,
            self.layout,
            self.config.model.hidden_size,
            dtype,
            phase.layout.sharding_strategy,
            self.stop,
            self.heartbeat,
            LogitWatch.make(self.config, self.state.stages, self.layout, dtype),
        )

    def _begin_phase(self, stepper: Stepper, phase: Phase) -> bool:
        """Open the phase's data; evaluate where it begins -> False if a stop cut that short."""
        self.heartbeat.enter_slow("opening the phase's data")
        with known_to_all():
            begins = self.feed.enter(phase, self.state.clock)
        for text in self.evaluator.unmeasured(phase) + self.evaluator.taken_whole(phase):
            self.reporter.say(text)
        if not begins:
            return True
        self.tally.begin_phase()
        self.report("phase", f"{phase.name} begins, {phase.seq_length:,} tokens per sample")
        # Cut short, it needs no note: nothing is saved since, and the phase begins again.
        return self._evaluate(stepper, phase)

    # ------------------------------------------------------------ step by step

    def _step(self, stepper: Stepper, phase: Phase) -> tuple[StepRecord, Measured]:
        """Train one step -> its line of metrics.jsonl; what all ranks together know of it.

        Raises:
            Interrupted: a stop cut it short.
        """
        state = self.state
        began = time.perf_counter()

        # The data, the batch size and the learning rate follow from the clock alone.
        self.heartbeat.begin_step(state.step)
        self.heartbeat.enter("reading data")
        microbatches = [batch.to(self.layout.device) for batch in self.feed.read(state.clock)]
        data_seconds = time.perf_counter() - began
        lr = self.plan.learning_rate.at(state.clock, phase.lr, phase.min_lr)
        batch_tokens = phase.batch_at(state.clock)
        clip_grad = self.config.optimizer.clip_grad
        limits = self.guards.before_step(phase, batch_tokens, stepper, microbatches)
        shown_sources = self.feed.shown_sources
        source_losses = self._source_losses(len(shown_sources))
        result = train_step(
            stepper,
            state.optimizer,
            microbatches,
            lr,
            clip_grad,
            limits,
            self._before_update,
            source_losses,
        )
        self.guards.after_step(result)

        # The clock moves on, whether anything was updated or not.
        self.heartbeat.enter("reporting the step")
        state.advance(batch_tokens, skipped=result.skipped)
        self.tally.note(result)
        sources = self.feed.tokens_by_source(state.clock) if self.layout.world.is_first else {}
        state.real_tokens = sum(sources.values())
        limit = self.config.optimizer.max_skipped_steps
        refuse_endless_skips(state.skipped_in_a_row, limit, result.loss)

        # What only all ranks together know.
        waited = self.heartbeat.end_step()
        seconds = time.perf_counter() - began
        measured = self._ask_all(
            microbatches, data_seconds, source_losses, busy_seconds=seconds - waited
        )
        record = record_step(
            state,
            phase,
            result,
            measured,
            self.layout,
            seconds=seconds,
            flops=self.model_size.step_flops(batch_tokens, measured.causal_pairs),
            lr=lr,
            dealt=self.feed.dealt,
            sources=sources if len(sources) <= SHOWN_SOURCES else None,
            source_names=shown_sources,
            spike=self.guards.spike is not None,
        )
        return record, measured

    def _source_losses(self, count: int) -> torch.Tensor | None:
        """Make what a step adds the losses of each source to; None where none are asked for."""
        return torch.zeros(count, dtype=torch.float64, device=self.layout.device) if count else None

    def _ask_all(
        self,
        microbatches: list[Batch],
        data_seconds: float,
        source_losses: torch.Tensor | None,
        *,
        busy_seconds: float,
    ) -> Measured:
        """Exchange what this rank knows of the step; a save that failed anywhere ends the run."""
        measured = measure(
            microbatches,
            self.layout,
            self.model_size.config.windows,
            wants_stop=self._wants_stop(),
            wants_save=self.save_schedule.is_late,
            data_seconds=data_seconds,
            busy_seconds=busy_seconds,
            has_failed_save=self.saver.has_failed,
            source_losses=source_losses,
            deal_hash=self.feed.dealt.hash,
        )
        if measured.has_failed_save:
            self.heartbeat.enter_save("waiting for the save that failed")
            self.saver.raise_failure()
        self.slow_ranks.note(measured.busy_seconds, self.report)
        return measured

    def _before_update(self) -> None:
        """Look at the weights before they change, and let a save have its copy of them."""
        self.guards.before_update()
        self.saver.wait_copied()

    def _give_up_step(self, stepper: Stepper) -> None:
        """Leave a step that was cut short as if it had not begun: its data come again."""
        self.state.optimizer.zero_grad(set_to_none=True)
        reshard(stepper.stages)

    def _wants_stop(self) -> bool:
        """Tell whether this rank wants to stop after the step that was just trained."""
        settings = self.config.checkpoint
        minutes = (time.monotonic() - self.started) / 60
        limit = settings.exit_duration_in_mins
        is_late = limit is not None and minutes >= limit
        is_last = _is_multiple(self.state.step, settings.exit_interval)
        return self.signals.asked or is_late or is_last

    # ------------------------------------------------------------ evaluating, saving

    def _should_evaluate(self, phase: Phase) -> bool:
        logging = self.config.logging
        if not logging.eval_iters or not self.plan.corpus.validation:
            return False  # else a stop would leave one to be made up for
        is_end = self.state.clock >= phase.end
        return is_end or _is_multiple(self.state.step, logging.eval_interval)

    def _evaluate(self, stepper: Stepper, phase: Phase) -> bool:
        """Measure all that there is -> False where a stop cut it short; the rest is made up for."""
        self.heartbeat.enter_evaluation(phase.name)
        gc.collect()
        step = self.state.step
        place = {"step": step, "tokens": self.state.clock, "phase": phase.name}
        records = []
        try:
            for record in self.evaluator.run(stepper, phase):
                self.reporter.evaluation(place | record)
                records.append(record)
        except Interrupted:
            self.reporter.say(
                f"evaluation at step {step:,} cut short by a stop; the next start makes up for it"
            )
            return False
        self.evaluation_due = None
        self.saver.note_evaluation(step, score_of(records))
        self.stop.restart()  # training has another pace
        if self.layout.device.type == "cuda":
            # metrics.jsonl has the peak of training.
            torch.cuda.reset_peak_memory_stats(self.layout.device)
        return True

    def _save(self, phase: Phase, *, ends_phase: bool, is_last: bool) -> None:
        """Write a checkpoint, where there is something to save."""
        self.heartbeat.enter_save("saving")
        self.saver.save(
            phase, self.tally, self.evaluation_due, ends_phase=ends_phase, is_last=is_last
        )
        self.save_schedule.restart()


def _is_multiple(step: int, interval: int | None) -> bool:
    """Tell whether an interval is over after `step`; an interval of 0 or None never is."""
    return bool(interval) and step % interval == 0
