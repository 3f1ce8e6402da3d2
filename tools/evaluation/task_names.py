"""Which tasks an evaluation runs: those that were named, or all that have what they need."""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from tools.evaluation.needles import NeedleTask
from tools.evaluation.ruler import TASKS

PROBES = ("loss", "context_gain", "passkey")
"""The trainer's own, on documents."""
GROUPS = {"probes": PROBES, "ruler": tuple(TASKS)}


class TaskNames(NamedTuple):
    """Tasks in the order in which they are run."""

    probes: list[str]
    ruler: list[str]

    @property
    def with_text(self) -> list[str]:
        """Those of RULER whose haystack is a text where one is given."""
        return [
            name
            for name in self.ruler
            if isinstance(task := TASKS[name], NeedleTask) and task.haystack == "text"
        ]


def choose_tasks(asked: Sequence[str], *, has_documents: bool, has_others: bool) -> TaskNames:
    """Choose the tasks.

    Args:
        asked: --tasks; names, or names of groups.
        has_documents: the probes have what to read.
        has_others: tasks of the harness are asked for, which may be all.

    Raises:
        ValueError: a name that no task has.
    """
    if not asked and not has_others:
        asked = ("probes", "ruler") if has_documents else ("ruler",)
    known = [*GROUPS, *PROBES, *TASKS]
    unknown = [name for name in asked if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ValueError(
            f"tasks = {' '.join(unknown)}: no such task. Fix: "
            f"{f'did you mean {near[0]}? Or ' if near else ''}one of {', '.join(known)}."
        )
    wanted = {name for each in asked for name in GROUPS.get(each, (each,))}
    return TaskNames(
        [name for name in PROBES if name in wanted], [name for name in TASKS if name in wanted]
    )
