"""The moments of a run: what it is doing now, as its files and its output tell.

Somebody who wants to hurt a run in its save waits here until a save begins, and then a random part
of the time that the last one took.
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pretrain.checkpointing.folders import LATEST, MANIFEST
from tools.faults.file_events import (
    CREATED,
    MODIFIED,
    MOVED_TO,
    FileEvent,
    FileEvents,
)
from tools.faults.launched_run import LaunchedRun
from tools.faults.traces import Kind

Moment = Kind | Literal["evaluation"]
"""What a run can be met in: what a kill can hit, and an evaluation."""

Happening = Literal[
    "step",
    "step before a save",
    "step before an evaluation",
    "evaluated",
    "partial",
    "manifest",
    "pointer",
    "deleting",
    "index",
]

WINDOWS: dict[Moment, tuple[Happening, Happening | None]] = {
    "evaluation": ("step before an evaluation", "evaluated"),
    "index": ("index", None),
    "step": ("step", "step"),
    "copy": ("step before a save", "partial"),
    "write": ("partial", "manifest"),
    "publish": ("manifest", "pointer"),
    "retention": ("deleting", None),
}
"""Moment -> what it begins with, and what it ends with; None = over in less than a millisecond."""


@dataclass
class Pace:
    """How long the parts of a save and of a step took last, to hit the middle of one."""

    seconds: dict[Moment, float] = field(default_factory=dict)
    since: dict[Moment, float] = field(default_factory=dict)

    def note(self, happening: Happening, now: float) -> None:
        """Note the end of what ends now, and the beginning of what begins."""
        for kind, (begin, end) in WINDOWS.items():
            if happening == end and kind in self.since:
                self.seconds[kind] = now - self.since.pop(kind)
            if happening == begin:
                self.since[kind] = now

    def forget(self) -> None:
        """Drop what a kill cut short."""
        self.since.clear()


class Moments:
    """Waits for the moments of a run.

    Args:
        cache: the run's --data-cache-path.
        save_interval: steps between saves.
        eval_interval: steps between evaluations.
    """

    def __init__(
        self,
        run: LaunchedRun,
        chance: random.Random,
        *,
        cache: Path | None,
        save_interval: int,
        eval_interval: int | None = None,
    ):
        self.run = run
        self.chance = chance
        self.cache = cache
        self.save_interval = save_interval
        self.eval_interval = eval_interval
        self.pace = Pace()
        run.save.mkdir(parents=True, exist_ok=True)
        self.events = FileEvents(run.save, *([cache] if cache else []))
        self.start_seconds = 5.0
        self.crossings = 0
        self.begun: Kind | None = "start"
        """How this launch came to be, until its first step is trained."""

    def forget(self, begun: Kind) -> None:
        """Drop what was cut short: the run starts again."""
        self.pace.forget()
        self.events.forget()
        self.begun = begun

    def wait_for(self, kind: Moment, launched: float) -> bool:
        """Wait for a moment; False if the run ends before."""
        begin, _ = WINDOWS.get(kind, (None, None))
        # The first of them after a start is not like the others.
        left = self.chance.randint(1, 3) if begin == "step" else 1
        since = launched if kind == "start" or self.begun == kind == "crossing" else None
        # Less than a whole one: the next start may be faster than the last.
        share = 0.8 * self.chance.random()
        while self.run.is_alive():
            for event in self.events.wait(0.02):
                for happening in self._happenings(event):
                    self._follow(happening, event.time, launched)
                    left -= happening == begin
                    if left == 0 and happening == begin:
                        time.sleep(share * self.pace.seconds.get(kind, 0.0))
                        return True
            if self.run.starts_for_layouts() > self.crossings:
                self.crossings = self.run.starts_for_layouts()
                self.begun = "crossing"
                since = time.monotonic() if kind == "crossing" else since
            if since is not None and time.monotonic() - since > share * self.start_seconds:
                return True
        return False

    def _follow(self, happening: Happening, now: float, launched: float) -> None:
        """Learn from what happened how long things take, and how far the run is."""
        self.pace.note(happening, now)
        if happening == "step" and self.begun is not None:
            if self.begun == "start":
                self.start_seconds = now - launched
            self.begun = None

    def _happenings(self, event: FileEvent) -> list[Happening]:
        """Say what an entry of a folder that changed means for the run."""
        name = event.name
        is_new = bool(event.mask & (CREATED | MOVED_TO))
        if event.folder == self.cache:
            return ["index"] if is_new and name.startswith(".") else []
        if event.folder != self.run.save:
            return ["manifest"] if is_new and name == MANIFEST else []
        if name == "metrics.jsonl" and event.mask & MODIFIED:
            return self._after_step(self.run.last_step())
        if name == "validation.jsonl" and event.mask & MODIFIED:
            return ["evaluated"]
        if name == LATEST:
            return ["pointer"] if is_new else []
        if not name.startswith(".iter_"):
            return []
        if name.endswith(".partial"):
            if event.mask & CREATED:
                self.events.add(event.folder / name)
                return ["partial"]
            return []
        return ["deleting"] if is_new else []

    def _after_step(self, step: int) -> list[Happening]:
        """Say what a line of metrics.jsonl means."""
        found: list[Happening] = ["step"]
        if step % self.save_interval == 0:
            found.append("step before a save")
        if self.eval_interval and step % self.eval_interval == 0:
            found.append("step before an evaluation")
        return found
