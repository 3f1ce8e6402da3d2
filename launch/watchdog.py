"""Find a rank that is stopped or stuck, say who is at fault, and end the launch.

A thread of the launcher looks at this node's ranks once a second: at their records, and at what the
kernel says of their processes. It belongs to another process than the ranks, so that it sees them
also when they cannot say anything. Node 0 decides, after it has asked the other nodes:

- a rank that a signal has stopped for --watchdog-seconds;
- no rank of the run has shown a sign of life for that long, nor for three times the longest usual
  silence, nor for as long as a slow activity (a start, a save, a compilation) may take, nor, where
  all ranks wait in the same collectives and nobody is missing, for as long as a network may.

Then everybody's stacks are written, the page goes to the folder of errors, and all nodes end their
ranks, so that train.sh starts again.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed import DistError

from launch.exchange import Exchange
from launch.outcome import say
from launch.page import write_page
from launch.rank_view import GONE, RankView, find_starting, read_ranks
from launch.records import errors_folder
from launch.stacks import dump_flight_recorders, dump_stacks, kill_ranks
from launch.store import Node0, connect
from launch.verdict import (
    count_ranks,
    describe_wait,
    is_network_down,
    judge,
    who_waits_for_whom,
)

POLL_SECONDS = 1.0
"""The seconds between two looks."""
USUAL_SECONDS = 30.0
"""The seconds of --watchdog-seconds until the ranks have read their settings."""
REPORT_SECONDS = 10.0
"""The seconds between two lines about ranks that wait."""
SLOW_REPORT_SECONDS = 60.0
"""The seconds between two lines about what takes long while nobody waits for another rank."""
GAP_FACTOR = 3
"""How many times the longest usual silence is waited for."""
PAUSE_SECONDS = 5.0
"""A look that comes this late means that this machine stood still, and not the ranks."""
STACK_SECONDS = 8.0
"""The seconds that node 0 waits for the stacks of the other nodes."""
CLOSE_SECONDS = 30.0
"""The seconds in which a page that is being written must be finished."""
SHOWN_LINES = 9
"""Lines of a verdict on the console; the page has all."""


class Watchdog(threading.Thread):
    """Watches the ranks of this node until `close`."""

    def __init__(
        self,
        records: Path,
        errors: Path,
        shown: str,
        exchange: Exchange,
        nproc_per_node: int,
        node0: Node0 | None = None,
    ):
        """Make the watchdog of a node.

        Args:
            records: the folder of the ranks' records.
            errors: the folder of the pages.
            shown: where the user finds them.
            node0: where the exchange connects again after a cut; None where it has no need to.
        """
        super().__init__(name="watchdog", daemon=True)
        self.records = records
        self.errors = errors
        self.shown = shown
        self.exchange = exchange
        self.node0 = node0
        self.nproc_per_node = nproc_per_node
        self.verdict: str | None = None
        """Why the ranks were ended, in a line; None while they were not."""
        self._is_over = threading.Event()
        self._stopped_since: dict[int, float] = {}
        self._last_look = time.monotonic()
        self._resumed_at = self._last_look
        self._next_report = 0.0

    def close(self) -> None:
        """Stop watching: the processes have ended."""
        self._is_over.set()
        self.join(CLOSE_SECONDS)  # not for a node 0 that does not answer any more

    def run(self) -> None:
        """Look once a second."""
        while not self._is_over.wait(POLL_SECONDS) and self.verdict is None:
            if self.exchange.store is None and self.node0 is not None:
                self.exchange.store = connect(self.node0)
            try:
                self.look()
            except DistError:
                # Node 0 is gone, which launch/watch.py says, or a network that comes back.
                self.exchange.store = None
            except Exception as error:
                say(f"warning: the watchdog of this node has ended, and none is left: {error!r}")
                return

    def look(self) -> None:
        """Look at the ranks once, and do what follows."""
        views = self._read()
        if self.exchange.node_rank > 0:
            self._follow(views)
        elif views:
            self._lead(views)

    def _read(self) -> list[RankView]:
        """Read this node's ranks; what this process slept through is no silence of theirs."""
        now = time.monotonic()
        if now - self._last_look > PAUSE_SECONDS:
            self._resumed_at = now
            self._stopped_since = {}
        self._last_look = now
        views = []
        node = self.exchange.node_rank
        found = read_ranks(self.records, node)
        if len(found) < self.nproc_per_node:
            found += find_starting(self.records, node)
        for view in found:
            stopped = 0.0
            if view.is_stopped:
                stopped = now - self._stopped_since.setdefault(view.pid, now)
            else:
                self._stopped_since.pop(view.pid, None)
            silence = min(view.silence, now - self._resumed_at)
            views.append(dataclasses.replace(view, silence=silence, stopped_seconds=stopped))
        return views

    # ------------------------------------------------------------ node 0 decides

    def _lead(self, views: Sequence[RankView]) -> None:
        """Ask the others where something seems wrong, report, and end what stands still."""
        if all(view.process_state in GONE for view in views):
            return  # over, and the launcher waits for those of the other nodes
        limit = silence_limit(views)
        early = min(REPORT_SECONDS, limit / 2) if limit else REPORT_SECONDS
        is_suspicious = (
            min(view.silence for view in views) >= early
            or any(view.is_stopped for view in views)
            or self.exchange.others_suspect
        )
        if not is_suspicious:
            self.exchange.rest()
            self._next_report = 0.0
            return
        answers = self.exchange.ask()
        everyone = sorted([*views, *answers.views], key=lambda view: view.rank)
        silence = min(view.silence for view in everyone)
        if set(answers.missing) - set(answers.silent):
            return  # they have a moment to answer
        silent = [f"node {node}" for node in answers.silent]
        if limit and is_standing(everyone, limit):
            self._end(views, everyone, silent, answers.silent)
        elif silence < early and not any(view.is_stopped for view in everyone):
            self.exchange.rest()
        elif silence >= REPORT_SECONDS and time.monotonic() >= self._next_report:
            self._report(everyone, silent, silence)

    def _report(self, everyone: Sequence[RankView], silent: Sequence[str], silence: float) -> None:
        """Say for whom ranks wait; or, less often, what takes so long."""
        texts = describe_wait_of_all(everyone, silent)
        self._next_report = time.monotonic() + REPORT_SECONDS
        if not texts and silence >= SLOW_REPORT_SECONDS:
            texts = describe_slow(everyone)
            self._next_report = time.monotonic() + SLOW_REPORT_SECONDS
        for text in texts:
            say(text)

    def _end(
        self,
        own: Sequence[RankView],
        everyone: Sequence[RankView],
        silent: Sequence[str],
        silent_nodes: Sequence[int],
    ) -> None:
        """Write the page, say it, and end the ranks."""
        lines = judge(everyone, silent).lines
        self.verdict = lines[0]
        self.exchange.tell_verdict(lines)
        stacks = self._dump(own)
        stacks |= self.exchange.collect_stacks(silent_nodes, STACK_SECONDS)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        page = write_page(lines, everyone, stacks, when)
        where = self._save_page(page)
        _say_verdict(lines)
        say(f"what every rank did, and its Python stack: {where}")
        kill_ranks(own)

    def _save_page(self, page: str) -> str:
        """Write the page -> its path, or why there is none."""
        path = self.errors / f"stuck-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            self.errors.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
        except OSError as error:
            return f"not written ({path}: {error.strerror})"
        return os.path.join(self.shown, path.name)

    def _dump(self, own: Sequence[RankView]) -> dict[int, str]:
        """Have this node's ranks write where they are -> rank: stacks."""
        dump_flight_recorders(str(self.records / "nccl"), own)
        return dump_stacks(self.records, own)

    # ------------------------------------------------------------ the other nodes follow

    def _follow(self, views: Sequence[RankView]) -> None:
        """Answer node 0, and end the ranks when it says so."""
        if any(view.is_stopped for view in views):
            self.exchange.suspect()
        self.exchange.answer(views)
        lines = self.exchange.heard_verdict()
        if lines is None:
            return
        self.verdict = lines[0]
        with suppress(DistError):  # these ranks end all the same
            self.exchange.send_stacks(self._dump(views))
        _say_verdict(lines[:1])  # many nodes may share a console: node 0 says all
        say("what every rank did, and its Python stack: in the file that node 0 names")
        kill_ranks(views)


def silence_limit(views: Sequence[RankView]) -> float:
    """Return the seconds of silence that the user allows; 0 = any."""
    known = [view.watchdog_seconds for view in views if view.watchdog_seconds is not None]
    # The plan refuses a negative number, but the ranks tell it before.
    return max(0.0, max(known, default=USUAL_SECONDS))


def is_standing(views: Sequence[RankView], limit: float) -> bool:
    """Tell whether a rank is stopped, or the whole run has been silent for too long."""
    if any(view.stopped_seconds >= limit for view in views):
        return True
    if any(view.watchdog_seconds is None for view in views):
        return False  # some ranks are starting, which takes as long as it takes
    usual = GAP_FACTOR * max(view.longest_gap for view in views)
    patience = max(view.patience for view in views)
    if is_network_down(views):
        # It may come back, and no rank would be better off after a restart.
        patience = max(view.slow_seconds for view in views)
    return min(view.silence for view in views) >= max(limit, usual, patience)


def describe_wait_of_all(views: Sequence[RankView], silent: Sequence[str]) -> list[str]:
    """Say for whom ranks wait, in a line or two; nothing where no rank waits for another."""
    waits_for = who_waits_for_whom(views)
    waiting = [view for view in views if view.wait is not None]
    if not (waits_for or waiting or silent):
        return []
    place = ""
    if waiting:
        first = max(waiting, key=lambda view: view.wait.seconds if view.wait else 0.0)
        place = f" in {describe_wait(first)}"
    lines = judge(views, silent).lines
    return [f"ranks wait{place}: {lines[0]}", *lines[1:3]]


def describe_slow(views: Sequence[RankView]) -> list[str]:
    """Say in a line what takes long and may; nothing for a step, which reports itself."""
    slow: dict[str, list[RankView]] = {}
    for view in views:
        if view.patience > 0:
            slow.setdefault(view.activity, []).append(view)
    parts = []
    for activity, members in slow.items():
        seconds = max(view.activity_seconds for view in members)
        parts.append(f"{count_ranks(len(members))} {activity} for {seconds:.0f} s")
    return [f"this takes long: {'; '.join(parts)}"] if parts else []


def _say_verdict(lines: Sequence[str]) -> None:
    say("error: the run stands still: " + lines[0])
    for text in lines[1:SHOWN_LINES]:
        say(text)
    say("ending all ranks of this launch")


@contextmanager
def watched(
    records: Path, shown: str, node0: Node0 | None, node_rank: int, nnodes: int, nproc: int
) -> Iterator[Watchdog]:
    """Watch the ranks of this node.

    Args:
        records: the folder of the ranks' records.
        shown: the folder in which the user finds the page, which is written to this node's own.
        node0: where the store is; None with one node.
    """
    store = None if node0 is None else connect(node0)
    exchange = Exchange(store, node_rank, nnodes)
    watchdog = Watchdog(records, errors_folder(), shown, exchange, nproc, node0)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
