"""All guards of a training loop, called at the points of a step where each has its place."""

from pretrain.guards.spikes import Limits, Spike, SpikeWatch
from pretrain.logs.metrics import Reporter
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase
from pretrain.state import TrainState
from pretrain.step import StepResult


class Guards:
    """Watches the numbers of a run, and says what it sees; the same on all ranks."""

    def __init__(self, plan: Plan, state: TrainState, reporter: Reporter):
        self.settings = plan.config.guards
        self.state = state
        self.reporter = reporter
        self.watch = SpikeWatch(self.settings, state.spikes)
        self.spike: Spike | None = None
        """What the last step was."""

    def before_step(self, phase: Phase, batch_tokens: int) -> Limits:
        """Return what the step may reach and still update."""
        return self.watch.before_step(phase.name, batch_tokens)

    def after_step(self, result: StepResult) -> None:
        """Judge the step that was just trained."""
        self.spike = None
        if result.num_targets:
            self.spike = self.watch.after_step(result.loss, result.grad_norm)

    def report(self, phase: Phase) -> None:
        """Say what the last step was, and act on it as the policy is."""
        if self.spike is None:
            return
        is_skipped = self.settings.spike_policy != "warn"
        done = "nothing was updated" if is_skipped else "trained as any other (--spike-policy)"
        text = f"step {self.state.step:,} of phase {phase.name}: spike, {self.spike}; {done}"
        self.reporter.say(text)
        self.reporter.event("spike", self.state.step, self.state.clock, text)
