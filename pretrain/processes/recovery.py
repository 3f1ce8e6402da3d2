"""Say how long a run stood still before it trained again, and where that time went.

The launcher lets its processes start, and import what takes seconds, before all nodes are there.
With its word that they are comes the story of how it came to this start: launch/story.py.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field

from parallel.layout import import_parallel_state
from pretrain.config.load import has_gate


@dataclass
class Recovery:
    """Holds moments in seconds since 1970, from the end of the launch before to the first step."""

    reason: str = ""
    """What ended the launch before: "failure", "layout", or nothing for the first one."""
    failed: float = 0.0
    """When the first process failed."""
    noticed: float = 0.0
    """When the launcher knew."""
    ended: float = 0.0
    """When all processes were gone."""
    launched: float = 0.0
    """When this launch began."""
    met: float = 0.0
    """When all nodes were there."""
    opened: float = 0.0
    """When this launch's processes were let through."""
    marks: list[tuple[str, float]] = field(default_factory=list)
    """What this process has done since then, each with the moment of its end."""

    def mark(self, name: str) -> None:
        """Note that something has just ended."""
        if self.reason:
            self.marks.append((name, time.time()))

    def describe(self, step: int) -> str:
        """Say in a line where the time until the end of `step` went; "" in a first launch."""
        if not self.reason:
            return ""
        self.mark("first step")
        moments = [("to end", self.ended), ("to launch", self.launched), *self.marks]
        if self.reason == "failure":
            moments.insert(0, ("to notice", self.noticed))
        start = self.failed
        parts = []
        for name, moment in moments:
            parts.append(f"{max(0.0, moment - start):.1f} s {name}")
            start = max(start, moment)
        self.reason = ""  # said once
        total = start - self.failed
        return f"back at step {step:,} after {total:.1f} s: {', '.join(parts)}"


def wait_at_gate() -> Recovery:
    """Wait until the launcher lets this process through -> how it came to this start."""
    if not has_gate():
        return Recovery()
    import_parallel_state()
    imported = time.time()
    line = sys.stdin.readline()
    if not line:  # the launcher has changed its mind
        sys.stdout.flush()
        os._exit(0)
    recovery = Recovery(**json.loads(line))
    recovery.marks = [("imports", imported)]
    if recovery.opened > imported:
        recovery.mark("waiting for its turn")
    return recovery
