"""What a run wrote about itself in its --save folder, read for tools.report.

Only metrics.jsonl has to be there. What else is missing stays empty, and what cannot be read is
told in `notes`.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.load import read_config_yaml
from tools.shared.number_text import length, short

NEEDED = {
    "metrics": ("step", "tokens", "phase", "seq_length", "loss", "lr", "tokens_per_second"),
    "loss": ("step", "tokens", "valid_loss"),
    "context_gain": ("step", "tokens", "seq_length", "cut", "gain"),
    "passkey": ("step", "tokens", "seq_length", "depth", "accuracy"),
    "event": ("time", "event", "step", "tokens"),
    "account": ("step", "tokens", "account"),
}
"""Fields that a line of each kind must have."""


class Stretch(NamedTuple):
    """A stretch of the clock with one phase and one context length; positions in tokens."""

    name: str
    seq_length: int
    begin: int
    end: int


@dataclass(frozen=True)
class Run:
    """What a run wrote about itself, in the order of its clock."""

    name: str
    steps: list[dict]
    evaluations: list[dict] = field(default_factory=list)
    """Validation losses."""
    gains: list[dict] = field(default_factory=list)
    """Context gains."""
    passkeys: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)
    """In the order in which they were written: they are never rewound."""
    account: list[dict] = field(default_factory=list)
    """What was drawn: a row per segment and source (data/ledger.py: account)."""
    account_tokens: int = 0
    """Clock of the account."""
    config: Config | None = None
    """Of the latest checkpoint."""
    progress: Progress | None = None
    """How far the run had come at its latest checkpoint."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    def batches(self) -> list[int]:
        """Tokens of each step's global batch; from the clock where the records do not say."""
        tokens = [step["tokens"] for step in self.steps]
        found = [
            step.get("global_batch_tokens") or end - begin
            for step, begin, end in zip(self.steps, [0, *tokens], tokens, strict=False)
        ]
        first = self.steps[0]
        if first["step"] > 1 and not first.get("global_batch_tokens") and len(found) > 1:
            found[0] = min(found[0], found[1])  # the clock began in another folder
        return found

    def phases(self) -> list[Stretch]:
        """The stretches of the run, in order."""
        stretches: list[Stretch] = []
        begin = self.steps[0]["tokens"] - self.batches()[0]
        for step in self.steps:
            key = (step["phase"], step["seq_length"])
            if not stretches or stretches[-1][:2] != key:
                stretches.append(Stretch(*key, begin, step["tokens"]))
            stretches[-1] = stretches[-1]._replace(end=step["tokens"])
            begin = step["tokens"]
        return stretches

    def steps_of(self, stretch: Stretch) -> list[dict]:
        return [step for step in self.steps if stretch.begin < step["tokens"] <= stretch.end]

    def restarts(self) -> tuple[list[dict], list[dict]]:
        """Restart events: (after an interruption, planned: because a phase needs another
        layout)."""
        unplanned = []
        planned = []
        before = None
        for event in self.events:
            if event["event"] == "restart":
                (planned if before == "again" else unplanned).append(event)
            before = event["event"]
        return unplanned, planned

    def events_of(self, kind: str) -> list[dict]:
        return [event for event in self.events if event["event"] == kind]


def series_of(records: list[dict]) -> dict[tuple[str, int | None], list[dict]]:
    """(validation set, context length) -> its records, in order; the length is None where none is
    recorded."""
    series: dict[tuple[str, int | None], list[dict]] = {}
    for record in records:
        series.setdefault((record.get("set", "valid"), record.get("seq_length")), []).append(record)
    return dict(
        sorted(
            series.items(), key=lambda item: (item[0][0] != "valid", item[0][0], item[0][1] or 0)
        )
    )


def before_and_after(records: list[dict], stretch: Stretch) -> tuple[dict | None, dict | None]:
    """The last record up to the beginning of a phase, and the last one of the phase; None where
    there is none."""
    before = [record for record in records if record["tokens"] <= stretch.begin]
    after = [
        record
        for record in records
        if stretch.begin < record["tokens"] <= stretch.end
        and record.get("phase", stretch.name) == stretch.name
    ]
    return before[-1] if before else None, after[-1] if after else None


def repeated_tokens(account: list[dict]) -> dict[str, tuple[int, int]]:
    """Source -> (tokens drawn in its second and later epochs, tokens drawn), as the account shows
    them.

    An account's epochs are cumulative over a source's rows, passed-over ones included; so they also
    say how long one epoch is.
    """
    rows_of: dict[str, list[dict]] = {}
    for row in account:
        rows_of.setdefault(row["source"], []).append(row)
    found = {}
    for source, rows in rows_of.items():
        read = sum(row["tokens"] for row in rows)
        epochs = rows[-1]["epochs"]
        epoch = round(read / epochs) if epochs else math.inf
        place = 0
        repeated = 0
        for row in rows:
            end = place + row["tokens"]
            if not row["skipped"]:
                repeated += max(0, end - max(place, epoch))
            place = end
        found[source] = (int(repeated), sum(row["tokens"] for row in rows if not row["skipped"]))
    return found


def read_lines(path: Path) -> list[dict]:
    """The records of a .jsonl file; a last line that is still being written is left out.

    Raises:
        ValueError: the file is broken in the middle.
    """
    texts = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, text in enumerate(texts, 1):
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError as error:
            if number < len(texts):
                raise ValueError(
                    f"{path}: line {number} is not JSON ({error}). Fix: remove that line."
                ) from None
    return records


def _checked(path: Path, records: list[dict], kind: str) -> list[dict]:
    """The records, each with the fields that its kind needs; raises ValueError otherwise."""
    for record in records:
        if missing := [name for name in NEEDED[kind] if name not in record]:
            raise ValueError(
                f"{path}: step {record.get('step', '?')} has no {', '.join(missing)}. "
                "Fix: give a file that this trainer wrote."
            )
    return records


def read_run(folder: Path) -> Run:
    """Raises ValueError if there is no run in `folder`, nothing to show yet, or a file that is not
    the trainer's."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(
            f"load = {folder}: no metrics.jsonl in it. Fix: give the --save folder of a run."
        )
    steps = _checked(metrics, read_lines(metrics), "metrics")
    if not steps:
        raise ValueError(f"load = {folder}: metrics.jsonl holds no step yet. Fix: train one.")
    notes: list[str] = []
    evaluated = _read_optional(folder / "validation.jsonl", notes)
    of_kind = {
        kind: _checked(
            folder / "validation.jsonl",
            [line for line in evaluated if line.get("kind", "loss") == kind],
            kind,
        )
        for kind in ("loss", "context_gain", "passkey")
    }
    accounts = _checked(
        folder / "ledger.jsonl", _read_optional(folder / "ledger.jsonl", notes), "account"
    )
    events = _checked(
        folder / "events.jsonl", _read_optional(folder / "events.jsonl", notes), "event"
    )
    config, progress = _read_checkpoint(folder, notes)
    last = accounts[-1] if accounts else None
    if last is None and progress is not None and "account" in (progress.data or {}):
        last = {"tokens": progress.clock, "account": progress.data["account"]}
    place = folder.resolve()
    return Run(
        f"{place.parent.name} / {place.name}",
        _by_clock(steps),
        *map(_by_clock, of_kind.values()),
        events,
        last["account"] if last else [],
        last["tokens"] if last else 0,
        config,
        progress,
        notes,
    )


def _by_clock(records: list[dict]) -> list[dict]:
    return sorted(records, key=lambda record: record["tokens"])


def _read_optional(path: Path, notes: list[str]) -> list[dict]:
    if path.is_file():
        return read_lines(path)
    notes.append(f"There is no {path.name} in the folder.")
    return []


def _read_checkpoint(folder: Path, notes: list[str]) -> tuple[Config | None, Progress | None]:
    """Configuration and progress of the latest checkpoint; None, with a note, for what cannot be
    read."""
    config = progress = None
    try:
        published = find_published(folder)
        if published is None:
            notes.append("No checkpoint is published in the folder.")
        else:
            progress = Progress.read(published)
            config = read_config_yaml(str(published / "config.yaml"))
    except (ValueError, OSError) as error:
        notes.append(f"The latest checkpoint could not be read whole: {error}")
    return config, progress


def summary(run: Run) -> str:
    """The run in a few lines of text."""
    last = run.steps[-1]
    lines = [
        f"{last['step']:,} steps, {short(last['tokens'])} tokens, training loss {run.steps[0]['loss']:.4f} -> "
        f"{last['loss']:.4f}"
    ]
    series = series_of(run.evaluations)
    for (name, seq_length), evaluations in series.items():
        first = evaluations[0]
        final = evaluations[-1]
        of_set = "" if name == "valid" else f" of {name}"
        at = (
            f" at {length(seq_length)}"
            if seq_length and len({found for _, found in series}) > 1
            else ""
        )
        lines.append(
            f"validation loss{of_set}{at} {first['valid_loss']:.4f} (step {first['step']:,}) -> "
            f"{final['valid_loss']:.4f} (step {final['step']:,})"
        )
    for stretch in run.phases():
        speeds = [step["tokens_per_second"] for step in run.steps_of(stretch)]
        lines.append(
            f"phase {stretch.name}: length {stretch.seq_length:,}, {short(stretch.end - stretch.begin)} "
            f"tokens, {short(statistics.median(speeds))} tokens/s"
        )
    return "\n".join(lines)
