"""All guards of a training loop, called at the points of a step where each has its place."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from parallel.layout import Layout
from pretrain.guards.replay import Replay
from pretrain.guards.spikes import Limits, Spike, SpikeWatch
from pretrain.guards.verdict import WrongNumbers
from pretrain.guards.weight_check import WeightCheck
from pretrain.logs.metrics import Reporter
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState
from pretrain.step import CountedMicrobatch, Stepper, StepResult


class Guards:
    """Watches the numbers of a run, and says what it sees; the same on all ranks."""

    def __init__(self, plan: Plan, layout: Layout, state: TrainState, reporter: Reporter):
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
        """Say what the last step was."""
        if self.spike is None:
            return
        is_skipped = self.settings.spike_policy != "warn"
        done = "nothing was updated" if is_skipped else "trained as any other (--spike-policy)"
        text = f"step {self.state.step:,} of phase {phase.name}: spike, {self.spike}; {done}"
        self.reporter.say(text)
        self.reporter.event("spike", self.state.step, self.state.clock, text)

    @contextmanager
    def _reported(self, kind: str) -> Iterator[None]:
        """Write an event of what ends the run."""
        try:
            yield
        except WrongNumbers as error:
            self.reporter.event(kind, self.state.step, self.state.clock, str(error))
            raise
