"""Tell what happened between the end of one launch and the start of the next, in time stamps.

The launcher that ends writes it beside the outcome file; the next one hands it to its workers,
which print where the time went once they train again.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass
class Story:
    """Holds moments in seconds since 1970; 0 where a launch is the first one.

    pretrain/processes/recovery.py reads the same names.
    """

    reason: str = ""
    """What ended the launch before: "failure", "layout" (the next phase has another one), or
    nothing."""
    failed: float = 0.0
    """When the first process failed, by its own word where it had one."""
    noticed: float = 0.0
    """When the launcher knew."""
    ended: float = 0.0
    """When all processes of that launch were gone."""
    launched: float = 0.0
    """When this launch began."""
    met: float = 0.0
    """When all nodes were there."""
    opened: float = 0.0
    """When the workers were let through: after the wait before a restart."""


def begin() -> Story:
    """Go on with the story of the launch before, if there was one."""
    story = Story()
    path = _path()
    if path is not None and path.exists():
        story = Story(**json.loads(path.read_text()))
    story.launched = time.time()
    return story


def keep(reason: str, failed: float, noticed: float) -> None:
    """Leave the end of this launch for the next one."""
    path = _path()
    if path is not None:
        story = Story(reason, failed=failed, noticed=noticed, ended=time.time())
        path.write_text(json.dumps(asdict(story)))


def _path() -> Path | None:
    outcome = os.environ.get("ITHACA_OUTCOME_FILE")
    return Path(outcome).with_name("story.json") if outcome else None
