"""What a person sees of a run: a line per interval, and in a terminal a progress bar below it."""

import sys
from dataclasses import dataclass

from tqdm import tqdm

from pretrain.logs.lines import RecentRate, console_line, describe_duration
from pretrain.logs.step_record import StepRecord

BAR_FORMAT = "{desc} {percentage:3.0f} %|{bar}| {postfix}"


@dataclass(frozen=True)
class Outlook:
    """What is left when a step is done, in tokens of the clock."""

    phase_start: int
    phase_end: int
    run_end: int


class Console:
    """Prints a run's lines on rank 0.

    Args:
        interval: steps between two lines.
        is_terminal: does somebody watch? A file gets no bar.
    """

    def __init__(self, interval: int, *, is_terminal: bool):
        self.interval = interval
        self.is_terminal = is_terminal
        self.recent_rate = RecentRate()
        self._bar: tqdm | None = None
        self._phase = ""

    def step(self, record: StepRecord, outlook: Outlook) -> None:
        """Show one step."""
        rate = self.recent_rate.after(record)
        phase_seconds = (outlook.phase_end - record.tokens) / rate
        run_seconds = (outlook.run_end - record.tokens) / rate
        if record.step % self.interval == 0:
            self.say(console_line(record, rate, phase_seconds, run_seconds))
        if self.is_terminal:
            self._move_bar(record, outlook, phase_seconds, run_seconds)

    def say(self, text: str) -> None:
        """Print lines, above the bar where there is one."""
        if self._bar is not None:
            self._bar.clear()
        print(text, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def _move_bar(
        self, record: StepRecord, outlook: Outlook, phase_seconds: float, run_seconds: float
    ) -> None:
        """Show how much of the phase is done."""
        if record.phase != self._phase:
            self.close()
            self._phase = record.phase
        if self._bar is None:
            self._bar = tqdm(
                total=outlook.phase_end - outlook.phase_start,
                desc=f"{record.phase} {record.seq_length:,}",
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                leave=False,
                file=sys.stdout,
            )
        left = f"phase {describe_duration(phase_seconds)}, run {describe_duration(run_seconds)}"
        self._bar.n = record.tokens - outlook.phase_start
        self._bar.set_postfix_str(f"step {record.step:,}, left: {left}")
