"""All guards of a training loop, called at the points of a step where each has its place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from parallel.layout import Layout
from pretrain.guards.replay import Replay
from pretrain.guards.rewinds import RewindAsked, plan_rewind, write_rewinds
from pretrain.guards.spikes import Limits, Spike, SpikeWatch
from pretrain.guards.verdict import WrongNumbers, any_rank
from pretrain.guards.weight_check import WeightCheck
from pretrain.logs.metrics import Reporter
from pretrain.plan import Plan
from pretrain.processes.agreement import Refused
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState
from pretrain.step import CountedMicrobatch, Stepper, StepResult


class Guards:
    """Watches the numbers of a run, and says what it sees; the same on all ranks."""

    def __init__(self, plan: Plan, layout: Layout, state: TrainState, reporter: Reporter):
        self.plan = plan
        self.layout = layout
        self.settings = plan.config.guards
        self.state = state
        self.reporter = reporter
        self.watch = SpikeWatch(self.settings, state.spikes)
        self.weights = WeightCheck(state, layout)
        self.replay = Replay(layout, reporter.say)
        self.spike: Spike | None = None
        """What the last step was."""

    def before_step(
        self,
        phase: Phase,
        batch_tokens: int,
        stepper: Stepper,
        microbatches: Sequence[CountedMicrobatch],
    ) -> Limits:
        """Replay where that is due -> what the step may reach and still update."""
        interval = self.settings.replay_interval
        if interval and (self.state.step + 1) % interval == 0:
            with self._reported("replay"):
                self.replay.run(stepper, microbatches, phase.name)
        return self.watch.before_step(phase.name, batch_tokens)

    def before_update(self) -> None:
        """Check that nothing wrote to the weights since the last update, where that is due."""
        with self._reported("flip"):
            self.weights.before_update()

    def after_step(self, result: StepResult) -> None:
        """Judge the step that was just trained, before it is counted."""
        step = self.state.step + 1
        interval = self.settings.check_weight_hash_across_dp_replicas_interval
        if interval and step % interval == 0:
            self.weights.after_update()
        self.spike = None
        if result.num_targets:
            self.spike = self.watch.after_step(result.loss, result.grad_norm)

    def report(self, phase: Phase) -> None:
        """Say what the last step was, and do about it what the policy says.

        Raises:
            RewindAsked: the run is to go back.
            Refused: it went back too often.
        """
        if self.spike is None:
            return
        is_skipped = self.settings.spike_policy != "warn"
        done = "nothing was updated" if is_skipped else "trained as any other (--spike-policy)"
        text = f"step {self.state.step:,} of phase {phase.name}: spike, {self.spike}; {done}"
        self.reporter.say(text)
        self.reporter.event("spike", self.state.step, self.state.clock, text)
        if self.settings.spike_policy == "rewind":
            self._rewind(phase, text)

    def _rewind(self, phase: Phase, reason: str) -> None:
        """Note what the next start passes over, and end this one; all ranks alike."""
        rewinds = self.plan.rewinds
        if len(rewinds) >= self.settings.max_rewinds:
            text = (
                f"{reason}; the run went back {len(rewinds)} times already (max_rewinds). Fix: "
                "look at the data and the learning rate; --spike-policy skip or warn goes on."
            )
            self.reporter.event("refused", self.state.step, self.state.clock, text)
            raise Refused(text)
        rewind = plan_rewind(
            rewinds,
            self.plan.ledger.rewinds_passed,
            step=self.state.step,
            end=self.state.clock,
            skip_tokens=self.settings.rewind_skip_steps * self.state.last_batch,
            earliest=max([phase.start, *self.plan.ledger.skip_starts]),
            reason=reason,
        )
        save = self.plan.config.checkpoint.save
        assert save is not None, "a rewind needs --save, which validate() asks for"
        if self.layout.world.is_first:
            write_rewinds(save, [*rewinds, rewind])
        # Nobody starts again before the note is there.
        any_rank(self.layout, found=False)
        text = (
            f"rewind {rewind.number} of at most {self.settings.max_rewinds}: starting again from "
            f"the last checkpoint, past what it would draw from token {rewind.start:,} to "
            f"{rewind.end:,}"
        )
        self.reporter.event("rewind", self.state.step, self.state.clock, text)
        raise RewindAsked(text)

    @contextmanager
    def _reported(self, kind: str) -> Iterator[None]:
        """Write an event of what ends the run."""
        try:
            yield
        except WrongNumbers as error:
            self.reporter.event(kind, self.state.step, self.state.clock, str(error))
            raise
