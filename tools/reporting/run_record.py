"""Read what a run wrote about itself in its --save folder.

Only metrics.jsonl must exist. What else is missing stays empty, and a sentence in `notes` names
what could not be read.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpointing.damage import find_verified
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.config_yaml import read_config_text, read_config_yaml
from pretrain.logs.run_facts import RunFacts
from tools.shared.number_text import length, short

NEEDED = {
    "metrics": ("step", "tokens", "phase", "seq_length", "loss", "lr", "tokens_per_second"),
    "loss": ("step", "tokens", "valid_loss"),
    "context_gain": ("step", "tokens", "seq_length", "cut", "gain"),
    "passkey": ("step", "tokens", "seq_length", "depth", "accuracy"),
    "event": ("time", "event", "step", "tokens"),
    "account": ("step", "tokens", "account"),
}
"""Kind of line -> fields that it must have."""
STARTS = ("start", "restart")
"""Events with which processes begin."""
OUTCOMES = ("done", "stopped", "refused")
"""Events with which a run ends; after "again" it starts by itself."""


class PhaseSpan(NamedTuple):
    """A span of the clock with one phase and one context length; positions in tokens."""

    name: str
    seq_length: int
    begin: int
    end: int


@dataclass(frozen=True)
class RunRecord:
    """Hold what a run wrote about itself, in the order of its clock."""

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
    """Configuration of the latest checkpoint, or of the last start; None = not known."""
    progress: Progress | None = None
    """progress.json of the latest checkpoint; None = not known."""
    facts: RunFacts | None = None
    """What the last start said of itself; None = not known."""
    written: float | None = None
    """Seconds since 1970 at which the last step was written; None = not known."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    def batches(self) -> list[int]:
        """List the tokens of each step's batch; from the clock where the records do not say."""
        tokens = [step["tokens"] for step in self.steps]
        found = [
            step.get("global_batch_tokens") or end - begin
            for step, begin, end in zip(self.steps, [0, *tokens], tokens, strict=False)
        ]
        first = self.steps[0]
        if first["step"] > 1 and not first.get("global_batch_tokens") and len(found) > 1:
            # The clock began in another folder: its first step is not the whole clock so far.
            found[0] = min(found[0], found[1])
        return found

    def phases(self) -> list[PhaseSpan]:
        """List the spans of the run, in order."""
        spans: list[PhaseSpan] = []
        begin = self.steps[0]["tokens"] - self.batches()[0]
        for step in self.steps:
            # Another phase, or another length in the same one, begins a new span.
            key = (step["phase"], step["seq_length"])
            if not spans or spans[-1][:2] != key:
                spans.append(PhaseSpan(*key, begin, step["tokens"]))
            spans[-1] = spans[-1]._replace(end=step["tokens"])
            begin = step["tokens"]
        return spans

    def steps_of(self, span: PhaseSpan) -> list[dict]:
        """List the steps that end within the span."""
        return [step for step in self.steps if span.begin < step["tokens"] <= span.end]

    def restarts(self) -> tuple[list[dict], list[dict]]:
        """Separate restarts after an interruption from those that a phase's layout needed.

        Returns:
            (unplanned events, planned events)
        """
        unplanned = []
        planned = []
        before = None
        for event in self.events:
            # The trainer notes "again" before it ends for another layout.
            if event["event"] == "restart":
                (planned if before == "again" else unplanned).append(event)
            before = event["event"]
        return unplanned, planned

    def events_of(self, kind: str) -> list[dict]:
        """List the events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def outcome(self) -> dict | None:
        """Find the event with which the run ended; None where it goes on, or none says so."""
        for event in reversed(self.events):
            if event["event"] in OUTCOMES:
                return event
            if event["event"] in STARTS:
                break
        return None

    def wall_times(self) -> tuple[float, float] | None:
        """Find when the run first started and when it last wrote something; None = not known."""
        if not self.events:
            return None
        begun = self.events[0]["time"]
        # Copying a folder may change when its files were written.
        if outcome := self.outcome():
            return begun, outcome["time"]
        return begun, max(self.events[-1]["time"], self.written or 0)


def series_of(records: list[dict]) -> dict[tuple[str, int | None], list[dict]]:
    """Group records by (validation set, context length), sorted; "valid", the run's own, is first.

    The length is None where none is recorded.
    """
    series: dict[tuple[str, int | None], list[dict]] = {}
    for record in records:
        series.setdefault((record.get("set", "valid"), record.get("seq_length")), []).append(record)
    return dict(
        sorted(
            series.items(), key=lambda item: (item[0][0] != "valid", item[0][0], item[0][1] or 0)
        )
    )


def before_and_after(records: list[dict], span: PhaseSpan) -> tuple[dict | None, dict | None]:
    """Find the last record before a phase and the last one of it; None where there is none."""
    before = [record for record in records if record["tokens"] <= span.begin]
    after = [
        record
        for record in records
        if span.begin < record["tokens"] <= span.end and record.get("phase", span.name) == span.name
    ]
    return before[-1] if before else None, after[-1] if after else None


def repeated_tokens(account: list[dict]) -> dict[str, tuple[int, int]]:
    """Count per source the tokens drawn in its second and later epochs, and all tokens drawn.

    An account's epochs are cumulative over a source's rows, passed-over ones included; so they also
    say how long one epoch is.
    """
    rows_of: dict[str, list[dict]] = {}
    for row in account:
        rows_of.setdefault(row["source"], []).append(row)
    found = {}
    for source, rows in rows_of.items():
        # Length of one epoch in tokens.
        read = sum(row["tokens"] for row in rows)
        epochs = rows[-1]["epochs"]
        epoch = round(read / epochs) if epochs else math.inf
        place = 0
        repeated = 0
        for row in rows:
            end = place + row["tokens"]
            # Of [place, end), what lies beyond the first epoch was there before.
            if not row["skipped"]:
                repeated += max(0, end - max(place, epoch))
            place = end
        found[source] = (int(repeated), sum(row["tokens"] for row in rows if not row["skipped"]))
    return found


def read_lines(path: Path) -> list[dict]:
    """Read the records of a .jsonl file; a last line that is still being written is left out.

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
    """Return the records, or raise ValueError where one lacks a field that its kind needs."""
    for record in records:
        if missing := [name for name in NEEDED[kind] if name not in record]:
            raise ValueError(
                f"{path}: step {record.get('step', '?')} has no {', '.join(missing)}. "
                "Fix: give a file that this trainer wrote."
            )
    return records


def read_run(folder: Path) -> RunRecord:
    """Read the record of the run in `folder`.

    Raises:
        ValueError: there is no run, nothing to show yet, or a file that is not the trainer's.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(
            f"load = {folder}: no metrics.jsonl in it. Fix: give the --save folder of a run."
        )
    steps = _checked(metrics, read_lines(metrics), "metrics")
    if not steps:
        raise ValueError(f"load = {folder}: metrics.jsonl holds no step yet. Fix: train one.")
    notes: list[str] = []
    validation = folder / "validation.jsonl"
    evaluated = _read_optional(validation, notes)

    def evaluations_of(kind: str) -> list[dict]:
        lines = [line for line in evaluated if line.get("kind", "loss") == kind]
        return _by_clock(_checked(validation, lines, kind))

    ledger = folder / "ledger.jsonl"
    accounts = _checked(ledger, _read_optional(ledger, notes), "account")
    event_file = folder / "events.jsonl"
    events = _checked(event_file, _read_optional(event_file, notes), "event")
    config, progress = _read_checkpoint(folder, notes)
    facts = _read_facts(folder, notes)
    if config is None and facts is not None:
        config = _read_settings(facts, notes)
    # The last save's account, or that of the checkpoint where ledger.jsonl is missing.
    account: list[dict] = []
    account_tokens = 0
    if accounts:
        account = accounts[-1]["account"]
        account_tokens = accounts[-1]["tokens"]
    elif progress is not None and progress.data is not None and "account" in progress.data:
        account = progress.data["account"]
        account_tokens = progress.clock
    place = folder.resolve()
    return RunRecord(
        name=f"{place.parent.name} / {place.name}",
        steps=_by_clock(steps),
        evaluations=evaluations_of("loss"),
        gains=evaluations_of("context_gain"),
        passkeys=evaluations_of("passkey"),
        events=events,
        account=account,
        account_tokens=account_tokens,
        config=config,
        progress=progress,
        facts=facts,
        written=metrics.stat().st_mtime,
        notes=notes,
    )


def _by_clock(records: list[dict]) -> list[dict]:
    # A run that was rewound wrote later lines for an earlier clock.
    return sorted(records, key=lambda record: record["tokens"])


def _read_optional(path: Path, notes: list[str]) -> list[dict]:
    if path.is_file():
        return read_lines(path)
    notes.append(f"There is no {path.name} in the folder.")
    return []


def _read_checkpoint(folder: Path, notes: list[str]) -> tuple[Config | None, Progress | None]:
    """Read configuration and progress of the latest checkpoint; None, with a note, on failure."""
    config = None
    progress = None
    try:
        published = find_verified(folder)
        if published is None:
            notes.append("No checkpoint is published in the folder.")
        else:
            progress = Progress.read(published)
            config = read_config_yaml(str(published / "config.yaml"))
    except (ValueError, OSError) as error:
        notes.append(f"The latest checkpoint could not be read whole: {error}")
    return config, progress


def _read_facts(folder: Path, notes: list[str]) -> RunFacts | None:
    """Read run.json; None, with a note, where it is missing or is not ours."""
    try:
        facts = RunFacts.read(folder)
    except (ValueError, OSError) as error:
        notes.append(f"run.json could not be read: {error}")
        return None
    if facts is None:
        notes.append("There is no run.json in the folder: device, host and code are not known.")
    return facts


def _read_settings(facts: RunFacts, notes: list[str]) -> Config | None:
    """Read the settings of the last start; None, with a note, where they are another version's."""
    try:
        return read_config_text(facts.settings, "run.json")
    except ValueError as error:
        notes.append(f"The settings in run.json could not be read: {error}")
        return None


def summary(run: RunRecord) -> str:
    """Summarize the run in a few lines of text."""
    last = run.steps[-1]
    lines = [
        f"{last['step']:,} steps, {short(last['tokens'])} tokens, "
        f"training loss {run.steps[0]['loss']:.4f} -> {last['loss']:.4f}"
    ]
    # A line per validation set, with its length where there are several.
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
    # A line per phase.
    for span in run.phases():
        speeds = [step["tokens_per_second"] for step in run.steps_of(span)]
        lines.append(
            f"phase {span.name}: length {span.seq_length:,}, {short(span.end - span.begin)} "
            f"tokens, {short(statistics.median(speeds))} tokens/s"
        )
    return "\n".join(lines)
