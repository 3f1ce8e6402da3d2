"""Decide from a run's files what it does now, and how long it still takes."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from launch.rank_view import RankView
from pretrain.logs.run_facts import PhaseFacts
from tools.shared.number_text import length
from tools.watching.run_files import Record, RunFiles

RECENT_STEPS = 9
"""Steps whose median says how fast the run is: one that waited says nothing of the next ones."""
QUIET_SECONDS = 30.0
"""Least silence that is worth a word."""
QUIET_STEPS = 5
"""Steps' time without a step that is worth a word."""
OUTCOMES = ("done", "stopped", "refused", "again")
"""Events after which no process of the run is there."""
STARTS = ("start", "restart")
WAITS_SECONDS = 10.0
"""How long a rank waits for another before that is told."""

Clock = Callable[[float], str]
"""Spell a time in seconds."""


@dataclass(frozen=True)
class Remaining:
    """Says how much of a phase, or of the run, is over, and the time that is left."""

    begin: int
    tokens: int
    end: int
    seconds: float | None
    """At the present pace; None = not known."""

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, (self.tokens - self.begin) / max(1, self.end - self.begin)))


def is_over(files: RunFiles) -> bool:
    """Tell whether the run has ended for good; one that was stopped may go on."""
    last = last_turn(files)
    return last is not None and last["event"] in ("done", "refused")


def last_turn(files: RunFiles) -> Record | None:
    """Find the last event with which processes began or ended."""
    turns = (*OUTCOMES, *STARTS)
    return next((each for each in reversed(files.events) if each["event"] in turns), None)


def last_event(files: RunFiles, kind: str) -> Record | None:
    """Find the last event of a kind."""
    return next((each for each in reversed(files.events) if each["event"] == kind), None)


def recent_steps(files: RunFiles) -> list[Record]:
    """List the last steps of the present phase."""
    return [
        step for step in files.steps[-RECENT_STEPS:] if step["phase"] == files.steps[-1]["phase"]
    ]


def median_of_steps(files: RunFiles, name: str) -> float | None:
    """Take the median of a field over the last steps of the present phase; None = not known."""
    values = [step[name] for step in recent_steps(files) if step.get(name) is not None]
    return statistics.median(values) if values else None


def describe_state(files: RunFiles, now: float, clock: Clock) -> str:
    """Say in one line what the run does, or waits for."""
    if not files.exists:
        return f"nothing there yet: the folder does not exist ({files.folder}); waiting for it"
    turn = last_turn(files)
    if turn is None and not files.steps:
        return "nothing there yet: no run has started in this folder"
    if turn is not None and turn["event"] in OUTCOMES:
        return _describe_end(turn, now, clock)
    if files.holder_is_gone:
        where = f"; its errors are in errors/{files.errors}" if files.errors else ""
        return f"{files.holder} has ended without a word: the launcher may start it again{where}"
    if turn is not None and (not files.steps or turn["time"] > (files.step_time or 0)):
        return f"started {clock(now - turn['time'])} ago, no step yet{_evaluates(files, now)}"
    return _describe_steps(files, now, clock)


def _describe_end(turn: Record, now: float, clock: Clock) -> str:
    """Say how the processes ended, and when."""
    kind = turn["event"]
    state = {"again": "starting again", "stopped": "stopped in order"}.get(kind, kind)
    # Many texts begin with the kind.
    text = turn.get("text", "").removeprefix(f"{kind}: ")
    return f"{state}, {clock(now - turn['time'])} ago" + (f": {text}" if text else "")


def _describe_steps(files: RunFiles, now: float, clock: Clock) -> str:
    """Say how long ago the last step was, and whether that is unusual."""
    assert files.step_time is not None
    age = max(0.0, now - files.step_time)
    usual = median_of_steps(files, "step_seconds")
    pace = f" (a step takes {clock(usual)})" if usual is not None else ""
    if age <= max(QUIET_SECONDS, QUIET_STEPS * (usual or 0.0)):
        return f"training: last step {clock(age)} ago{pace}"
    # What it did since is known where it wrote something.
    if evaluates := _evaluates(files, now):
        return f"no step for {clock(age)}{pace}{evaluates}"
    if files.errors_time is not None and files.errors_time > files.step_time:
        return f"no step for {clock(age)}{pace}; failed meanwhile: errors/{files.errors}"
    return f"no step for {clock(age)}{pace}: it evaluates, saves, starts again, or stands still"


def _evaluates(files: RunFiles, now: float) -> str:
    """Add that an evaluation goes on; empty where none does."""
    latest = files.evaluation_time or 0
    is_newest = latest > (files.step_time or 0)
    return ", evaluates" if is_newest and now - latest < 2 * QUIET_SECONDS else ""


def describe_ranks(ranks: list[RankView], clock: Clock) -> list[str]:
    """Say what rank 0 does, and which others of this machine do not wait while most do."""
    if not ranks:
        return []
    lines = [f"rank {ranks[0].rank}: {_describe_rank(ranks[0], clock)}"]
    waiting = [rank for rank in ranks if rank.wait and rank.wait.seconds > WAITS_SECONDS]
    busy = [rank for rank in ranks if rank.wait is None]
    if waiting and busy:
        names = ", ".join(f"rank {rank.rank} ({rank.activity})" for rank in busy[:3])
        more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
        lines.append(f"{len(waiting)} of {len(ranks)} ranks here wait; not waiting: {names}{more}")
    return lines


def _describe_rank(rank: RankView, clock: Clock) -> str:
    text = f"{rank.activity or 'nothing said yet'} for {clock(rank.activity_seconds)}"
    if rank.wait is not None and rank.wait.seconds > WAITS_SECONDS:
        text += f"; waits in {rank.wait.op} over {rank.wait.axis} for {clock(rank.wait.seconds)}"
    return text


# ---------------------------------------------------------------- how far it is


def present_phase(files: RunFiles) -> PhaseFacts | None:
    """Find the phase of the last step among those of the last start; None = not known."""
    if files.facts is None or not files.steps:
        return None
    name = files.steps[-1]["phase"]
    return next((phase for phase in files.facts.phases if phase.name == name), None)


def remaining_of_phase(files: RunFiles) -> Remaining | None:
    """Say how much of the present phase is left; None = not known."""
    phase = present_phase(files)
    return None if phase is None else _remaining(files, phase.start, phase.end)


def remaining_of_run(files: RunFiles) -> Remaining | None:
    """Say how much of the run is left; None = not known."""
    if files.facts is None or not files.facts.phases or not files.steps:
        return None
    return _remaining(files, files.facts.phases[0].start, files.facts.phases[-1].end)


def _remaining(files: RunFiles, begin: int, end: int) -> Remaining:
    tokens = files.steps[-1]["tokens"]
    rate = median_of_steps(files, "tokens_per_second")
    seconds = max(0, end - tokens) / rate if rate else None
    return Remaining(begin, tokens, end, seconds)


def describe_phase(files: RunFiles) -> str:
    """Name the phase of the last step, its place among the phases, its context."""
    step = files.steps[-1]
    phase = present_phase(files)
    place = ""
    if phase is not None and files.facts is not None:
        place = f" ({files.facts.phases.index(phase) + 1} of {len(files.facts.phases)})"
    context = step.get("seq_length")
    return f"{step['phase']}{place}" + (f", context {length(context)}" if context else "")
