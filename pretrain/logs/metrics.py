"""What a run says about itself: metrics.jsonl, validation.jsonl, ledger.jsonl, events.jsonl, the
console line.

Each step stands in metrics.jsonl exactly once: after a restart, lines of steps that are done again
are removed first. events.jsonl keeps everything that happened, in the order of the wall clock.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from data.files import write_atomically
from pretrain.config.config import Config
from pretrain.logs.sinks import open_sinks

EVALUATION_KEY = ("kind", "step", "phase", "set", "seq_length", "cut", "depth")
"""Fields of a line of validation.jsonl that say what was measured; the others are what was
found."""


class JsonLines:
    """An append-only file of one JSON object per line."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, last_step: float) -> None:
        """Drop the lines of later steps, and a last line that a kill cut short."""
        if self.path.exists():
            kept = [line for line in self.read() if line["step"] <= last_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def read(self) -> list[dict]:
        lines = []
        for text in self.path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # the cut end of an interrupted write
        return lines

    def append(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class Reporter:
    """Writes on global rank 0 only; on other ranks every method does nothing.

    Args:
        last_step: step of the checkpoint that the run starts from.
    """

    def __init__(self, config: Config, is_writer: bool, last_step: int, wandb_run_id: str | None):
        self.is_writer = is_writer
        self.interval = config.logging.log_interval
        self.metrics = self.validation = self.ledger = self.events = None
        self.wandb_run_id = wandb_run_id
        self.sinks = []
        self.has_lengths = bool(config.logging.eval_seq_lengths)
        self.evaluated: set[tuple] = set()
        if not is_writer:
            return
        if config.checkpoint.save:
            folder = Path(config.checkpoint.save)
            folder.mkdir(parents=True, exist_ok=True)
            self.metrics, self.validation = (
                JsonLines(folder / "metrics.jsonl"),
                JsonLines(folder / "validation.jsonl"),
            )
            self.ledger = JsonLines(folder / "ledger.jsonl")
            self.events = JsonLines(folder / "events.jsonl")
            for lines in (self.metrics, self.validation, self.ledger):
                lines.rewind(last_step)
            self.events.rewind(math.inf)
            self.evaluated = {evaluation_key(line) for line in self.validation_lines()}
        self.sinks, self.wandb_run_id = open_sinks(config, last_step, wandb_run_id)

    def step(self, record: dict[str, Any], remaining_tokens: int) -> None:
        """One optimizer step; `record` is the line of metrics.jsonl."""
        if not self.is_writer:
            return
        if self.metrics:
            self.metrics.append(record)
        plain = {k: v for k, v in record.items() if v is not None and not isinstance(v, dict)}
        of_sources = {
            f"sources/{name}": tokens for name, tokens in (record.get("sources") or {}).items()
        }
        self._log(plain | of_sources, record["step"])
        if record["step"] % self.interval == 0:
            print(console_line(record, remaining_tokens), flush=True)

    def evaluation(self, record: dict[str, Any]) -> None:
        """One result of evaluation/evaluate.py: its line of validation.jsonl. One that stands there already (a
        phase's first evaluation, done again after a restart) is only printed."""
        if not self.is_writer:
            return
        key = evaluation_key(record)
        if key not in self.evaluated:
            self.evaluated.add(key)
            if self.validation:
                self.validation.append(record)
            self._log(evaluation_values(record, self.has_lengths), record["step"])
        print(evaluation_line(record), flush=True)

    def event(self, kind: str, step: int, clock: int, text: str) -> None:
        """Something that happened to the run, with the time of day. Kinds: start, restart, phase,
        save, unsaved, skipped, no target, refused, stopped, again, done. Lines are never
        removed."""
        if self.events:
            self.events.append(
                {"time": time.time(), "event": kind, "step": step, "tokens": clock, "text": text}
            )

    def _log(self, values: dict[str, Any], step: int) -> None:
        for sink in self.sinks:
            sink.log(values, step)

    def account(self, step: int, clock: int, rows: list[dict]) -> None:
        """What was drawn of each source in each phase (data/ledger.py: account), at a save."""
        if self.ledger:
            self.ledger.append({"step": step, "tokens": clock, "account": rows})

    def validation_lines(self) -> list[dict]:
        return self.validation.read() if self.validation.path.exists() else []

    def say(self, text: str) -> None:
        if self.is_writer:
            print(text, flush=True)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


def evaluation_key(record: dict[str, Any]) -> tuple:
    return tuple(record.get(name, "loss" if name == "kind" else None) for name in EVALUATION_KEY)


def evaluation_values(record: dict[str, Any], has_lengths: bool) -> dict[str, float]:
    """A record's numbers by the names of their curves; `has_lengths`: the loss is measured at
    several lengths."""
    of_set = "" if record.get("set", "valid") == "valid" else f"/{record['set']}"
    if record["kind"] == "loss":
        return {
            f"valid_loss{of_set}" + (f"/{record['seq_length']}" if has_lengths else ""): record[
                "valid_loss"
            ]
        }
    if record["kind"] == "context_gain":
        names = ("gain", "gain_low", "gain_high", "loss_full", "loss_cut")
        return {
            f"context_gain{of_set}/{name}": record[name]
            for name in names
            if record[name] is not None
        }
    where = f"passkey/{record['seq_length']}/{record['depth']:g}"
    return {f"{where}/{name}": record[name] for name in ("accuracy", "answer_loss")}


def evaluation_line(record: dict[str, Any]) -> str:
    """A record in one readable line."""
    of_set = "" if record.get("set", "valid") == "valid" else f" of {record['set']}"
    where = (
        f"{of_set} at step {record['step']} ({record['phase']}, {record['seq_length']:,} tokens): "
    )
    if record["kind"] == "loss":
        return f"evaluation{where}loss {record['valid_loss']:.4f} over {record['num_targets']:,} targets"
    if record["kind"] == "context_gain":
        interval = (
            "no interval from 1 document"
            if record["gain_low"] is None
            else f"95 % {record['gain_low']:.4f} to {record['gain_high']:.4f}, {record['documents']} documents"
        )
        return (
            f"context gain{where}{record['gain']:.4f} nats ({interval}): loss {record['loss_full']:.4f} with the "
            f"whole context, {record['loss_cut']:.4f} with {record['cut']:,} tokens"
        )
    return (
        f"passkey{where}depth {record['depth']:g}, {100 * record['accuracy']:.0f} % of {record['trials']} found, "
        f"loss {record['answer_loss']:.4f} per answer token"
    )


def console_line(record: dict[str, Any], remaining_tokens: int) -> str:
    """A step in one readable line."""
    rate = record["tokens_per_second"]
    parts = [
        f"step {record['step']:>6,}",
        f"{record['phase']} {record['seq_length']:,}",
        f"tokens {_short(record['tokens'])}",
        f"loss {record['loss']:.4f}",
        f"grad {record['grad_norm']:.3f}",
        f"lr {record['lr']:.2e}",
        f"{_short(rate)} tok/s",
        f"{record['peak_memory_bytes'] / 2**30:.2f} GiB",
    ]
    if record["mfu"] is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f} %")
    if record["skipped"]:
        parts.append("SKIPPED: gradient not finite")
    return " | ".join(parts) + f" | ETA {_duration(remaining_tokens / rate)}"


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
