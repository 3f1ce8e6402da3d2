"""What a run writes about itself: metrics.jsonl, validation.jsonl, ledger.jsonl, events.jsonl.

Each step is in metrics.jsonl exactly once: after a restart, lines of steps that are done again are
removed first. events.jsonl keeps everything that happened, in the order of the wall clock.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from data.files import write_atomically
from pretrain.config.config import Config
from pretrain.logs.console import Console, Outlook
from pretrain.logs.lines import evaluation_line, evaluation_values
from pretrain.logs.sinks import SafeSink, Told, open_sinks
from pretrain.logs.step_record import StepRecord
from pretrain.logs.wandb_sink import read_run_id, write_run_id

EVALUATION_KEY = ("kind", "step", "phase", "set", "seq_length", "cut", "depth")
"""Fields of a line of validation.jsonl that say what was measured; the others are results."""


class JsonLines:
    """An append-only file of one JSON object per line."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, last_step: float) -> int:
        """Drop the lines of later steps, and a last line that a kill cut short.

        Returns:
            The last step that there was; 0 without any.
        """
        found = self.read()
        if self.path.exists():
            kept = [line for line in found if line["step"] <= last_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        return max((line["step"] for line in found), default=0)

    def read(self) -> list[dict[str, Any]]:
        """Read the whole lines; none where there is no file yet."""
        if not self.path.exists():
            return []
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # the cut end of an interrupted write
        return lines

    def append(self, record: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def append_event(folder: Path, kind: str, step: int, clock: int, text: str) -> None:
    """Write an event of a run whose files are not open; rank 0 under the lock of the folder."""
    events = JsonLines(folder / "events.jsonl")
    events.rewind(math.inf)  # a line that a kill cut short would swallow this one
    events.append(_event(kind, step, clock, text))


def _event(kind: str, step: int, clock: int, text: str) -> dict[str, Any]:
    return {"time": time.time(), "event": kind, "step": step, "tokens": clock, "text": text}


class Reporter:
    """Writes on global rank 0 only; on other ranks every method does nothing.

    Args:
        last_step: step of the checkpoint that the run starts from.
        wandb_run_id: of the wandb run that the checkpoint's run had; None = a new one.
    """

    def __init__(
        self, config: Config, last_step: int, wandb_run_id: str | None, *, is_writer: bool
    ):
        self.is_writer = is_writer
        is_terminal = is_writer and sys.stdout.isatty()
        self.console = Console(config.logging.log_interval, is_terminal=is_terminal)
        self.has_lost_console = False
        self.has_lengths = bool(config.logging.eval_seq_lengths)
        self.metrics: JsonLines | None = None
        self.validation: JsonLines | None = None
        self.ledger: JsonLines | None = None
        self.events: JsonLines | None = None
        self.evaluated: set[tuple] = set()
        """What validation.jsonl has already."""
        self.sinks: list[SafeSink] = []
        self.wandb_run_id = wandb_run_id
        if not is_writer:
            return
        told = Told(last_step, last_step)
        if config.checkpoint.save:
            told = self._open(Path(config.checkpoint.save), last_step)
            # A run that was killed before its first checkpoint has no other note of it.
            wandb_run_id = wandb_run_id or read_run_id(config.checkpoint.save)
        self.sinks, self.wandb_run_id = open_sinks(config, told, wandb_run_id)
        if config.checkpoint.save and self.wandb_run_id:
            write_run_id(config.checkpoint.save, self.wandb_run_id)

    def _open(self, folder: Path, last_step: int) -> Told:
        """Open the files in the --save folder, as they were at `last_step`.

        Returns:
            What an earlier start has told the sinks.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.validation = JsonLines(folder / "validation.jsonl")
        self.ledger = JsonLines(folder / "ledger.jsonl")
        self.events = JsonLines(folder / "events.jsonl")
        # Steps after the checkpoint are done again, and write their lines again.
        told_until = self.metrics.rewind(last_step)
        for lines in (self.validation, self.ledger):
            lines.rewind(last_step)
        # What happened is never dropped; only a line that was cut short goes.
        self.events.rewind(math.inf)
        self.evaluated = {evaluation_key(line) for line in self.validation.read()}
        return Told(last_step, told_until)

    def step(self, record: StepRecord, outlook: Outlook) -> None:
        """Write one optimizer step."""
        if not self.is_writer:
            return
        line = record.to_json()
        if self.metrics:
            self.metrics.append(line)
        # Curves are numbers: what is not known, and the tokens of each source, go by themselves.
        values = {
            name: value
            for name, value in line.items()
            if value is not None and not isinstance(value, dict)
        }
        by_source = {
            f"{key}/{name}": value
            for key in ("sources", "source_losses")
            for name, value in (line[key] or {}).items()
            if value is not None
        }
        self._log(values | by_source, record.step)
        self.console.step(record, outlook)
        self._note_lost_console(record)

    def _note_lost_console(self, record: StepRecord) -> None:
        """Write once that nobody sees the lines any more."""
        # The launcher gives its processes streams that know it: launch/console.py.
        reason = getattr(sys.stdout, "lost", "")
        if reason and not self.has_lost_console:
            self.has_lost_console = True
            text = f"standard output did not take a line ({reason}); the run goes on without them"
            self.event("console lost", record.step, record.tokens, text)

    def evaluation(self, record: dict[str, Any]) -> None:
        """Write one result of evaluation/evaluate.py: a line of validation.jsonl.

        One that is there already (a phase's first evaluation, done again after a restart) is only
        printed.
        """
        if not self.is_writer:
            return
        # Exactly once in the file, though it may be measured twice.
        key = evaluation_key(record)
        if key not in self.evaluated:
            self.evaluated.add(key)
            if self.validation:
                self.validation.append(record)
            values = evaluation_values(record, has_lengths=self.has_lengths)
            self._log(values, record["step"])
        self.console.say(evaluation_line(record))

    def event(self, kind: str, step: int, clock: int, text: str) -> None:
        """Write something that happened to the run, with the time of day; it is never removed.

        Args:
            kind: start, restart, recovered, phase, save, unsaved, deleted, damaged, retention,
                export, export failed, export left, skipped, spike, rewind, flip, replay, no target,
                slow rank, rank well again, console lost, refused, stopped, again or done; damaged
                at a start is written by `append_event`.
        """
        if self.events:
            self.events.append(_event(kind, step, clock, text))

    def account(self, step: int, clock: int, rows: list[dict[str, Any]]) -> None:
        """Write what each phase has drawn of each source, at a save (data/ledger.py: account)."""
        if self.ledger:
            self.ledger.append({"step": step, "tokens": clock, "account": rows})

    def say(self, text: str) -> None:
        """Print a line."""
        if self.is_writer:
            self.console.say(text)

    def close(self) -> None:
        """Close the bar, and what sends the numbers elsewhere."""
        self.console.close()
        for sink in self.sinks:
            sink.close()

    def _log(self, values: dict[str, Any], step: int) -> None:
        for sink in self.sinks:
            sink.log(values, step)


def evaluation_key(record: dict[str, Any]) -> tuple:
    """Tell what a line of validation.jsonl measured."""
    # Lines of old versions name no kind: they had the loss alone.
    with_kind = {"kind": "loss"} | record
    return tuple(with_kind.get(name) for name in EVALUATION_KEY)
