"""What is said of each step once it is done: its line, and what was unusual about it."""

from collections.abc import Sequence

from pretrain.config.load import warn
from pretrain.logs.console import Outlook
from pretrain.logs.metrics import Reporter
from pretrain.logs.step_record import StepRecord
from pretrain.logs.tally import StepTally
from pretrain.processes.recovery import Recovery
from pretrain.schedule.phases import Phase


class StepReports:
    """Reports the steps of a process: to files and sinks, as events, and on the console."""

    def __init__(
        self, reporter: Reporter, tally: StepTally, recovery: Recovery, phases: Sequence[Phase]
    ):
        self.reporter = reporter
        self.tally = tally
        self.recovery = recovery
        self.phases = phases

    def report(self, record: StepRecord) -> None:
        """Report one step."""
        if text := self.recovery.describe(record.step):
            self.reporter.say(text)
            self._event("recovered", record, text)
        phase = next(phase for phase in self.phases if phase.name == record.phase)
        self.reporter.step(record, Outlook(phase.start, phase.end, self.phases[-1].end))
        if record.skipped:
            text = f"loss {record.loss}, gradient norm {record.grad_norm}"
            self._event("skipped", record, text)
        if record.num_targets == 0:
            self._report_no_target(record)

    def _report_no_target(self, record: StepRecord) -> None:
        count = self.tally.of_process.steps - self.tally.of_process.with_targets
        text = (
            f"step {record.step:,}: no document of its batch gives a target; {count:,} such "
            "steps since the start"
        )
        self._event("no target", record, text)
        # On the console the first, second, fourth, eighth ... of them.
        if self.reporter.is_writer and count & (count - 1) == 0:
            warn(text)

    def _event(self, kind: str, record: StepRecord, text: str) -> None:
        self.reporter.event(kind, record.step, record.tokens, text)
