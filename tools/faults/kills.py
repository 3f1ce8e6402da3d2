"""Kill a run again and again, in everything that it does, and note what each kill hit."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.faults.comparison import read_steps
from tools.faults.launched_run import POLL_SECONDS, LaunchedRun, Node, is_running, kill
from tools.faults.moments import Moments
from tools.faults.traces import KINDS, Kind, Traces, name_kind, published_step, read_traces

Victim = Literal["rank", "all ranks", "launcher", "train.sh", "node"]

VICTIMS: dict[Victim, int] = {"rank": 6, "all ranks": 2, "launcher": 1, "train.sh": 1, "node": 1}
"""Who is killed, and how often among all kills: one trainer, all of them, the launcher that starts
them, the script above it, or everything on a node at once."""

STARTS = ("start", "restart")
"""Events with which a run begins."""
GONE_SECONDS = 180
"""Seconds in which the processes of a run must be gone after one of them was killed."""


@dataclass
class Kill:
    """One kill: what it was meant for, whom it met, and what that one was doing."""

    meant: Kind
    victim: Victim
    hit: Kind
    time: float
    """By the wall clock, as in events.jsonl."""
    step: int
    """The last step that was trained."""
    pointer: int | None = None
    """The published step, once all processes were gone."""
    newest: int | None = None
    """The last whole checkpoint then."""


class Killer:
    """Kills the processes of a run, one kill after the other.

    Args:
        cache: the run's --data-cache-path; it is emptied before a kill in the making of an index.
        save_interval: steps between saves.
    """

    def __init__(
        self,
        run: LaunchedRun,
        kinds: Iterable[Kind],
        seed: int,
        *,
        cache: Path | None,
        save_interval: int,
    ):
        self.run = run
        self.cache = cache
        self.save_interval = save_interval
        self.chance = random.Random(seed)
        self.wanted = list(kinds)
        self.kills: list[Kill] = []
        self.seen: dict[int, set[float]] = {}
        """Step -> the losses that it ever had."""
        self.moments = Moments(run, self.chance, cache=cache, save_interval=save_interval)

    def kill_all(self, count: int) -> list[Kill]:
        """Kill `count` times, or until the run ends; returns what was hit.

        Raises:
            RuntimeError: processes stayed after a kill.
        """
        try:
            while len(self.kills) < count and self._kill_once():
                pass
        finally:
            self.moments.events.close()
        return self.kills

    # ------------------------------------------------------------ one kill

    def _kill_once(self) -> bool:
        """Wait for a moment and kill; False if the run ends before."""
        kind = self._choose_kind()
        if kind == "index" and self.cache is not None:
            # The next start makes its indices again.
            shutil.rmtree(self.cache)
            self.cache.mkdir()
            self.moments.events.add(self.cache)
        before = read_traces(self.run.save, self.cache)
        self.revive()
        launched = time.monotonic()
        if not self.run.wait_until(self._has_all_workers):
            return False
        victim = self._choose_victim()
        node = self.chance.choice(self.run.nodes)
        # Found before the moment: it may be over in less time than that takes.
        workers = self.run.trainers()
        victims = self._find(victim, node)
        if not self.moments.wait_for(kind, launched):
            return False
        if not all(is_running(pid) for pid in victims):
            # A restart for another layout has replaced them.
            workers = self.run.trainers()
            victims = self._find(victim, node)
        now = time.time()
        for pid in victims:
            kill(pid)
        after = read_traces(self.run.save, self.cache)
        self._note(kind, victim, now, before, after)
        self._wait_until_gone(workers, victims)
        # A start on the next layout that was killed is tried again.
        hit = self.kills[-1].hit
        self.moments.forget("crossing" if hit == "crossing" else "start")
        return True

    def _choose_kind(self) -> Kind:
        """Choose the kind that was hit least of those that are wanted."""
        hits = Counter(each.hit for each in self.kills)
        tries = Counter(each.meant for each in self.kills)
        least = min(hits[kind] + tries[kind] for kind in self.wanted)
        rare = [kind for kind in self.wanted if hits[kind] + tries[kind] == least]
        return self.chance.choice(rare)

    def _choose_victim(self) -> Victim:
        (victim,) = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))
        return victim

    def _find(self, victim: Victim, node: Node) -> list[int]:
        """List the processes that a kill ends by itself; the others follow from it."""
        launcher = node.launcher()
        if victim == "rank":
            return [self.chance.choice(node.workers() or [node.process.pid])]
        if victim == "all ranks":
            return self.run.trainers()
        if victim == "launcher":
            return [launcher or node.process.pid]
        return [node.process.pid] if victim == "train.sh" else node.tree()

    def _has_all_workers(self) -> bool:
        return all(node.workers() for node in self.run.nodes if node.is_alive())

    def revive(self) -> None:
        """Start the train.sh of a node again that a kill has ended, as a cluster does."""
        for node in self.run.nodes:
            if node.process.poll() == -signal.SIGKILL:
                node.start()

    # ------------------------------------------------------------ afterwards

    def _note(self, kind: Kind, victim: Victim, now: float, before: Traces, after: Traces) -> None:
        """Note what a kill hit, by what it left."""
        step = self.run.last_step()
        last_due = step - step % self.save_interval
        hit = name_kind(
            before,
            after,
            begun=self.moments.begun,
            is_due=last_due > (after.pointer or 0),
        )
        self.kills.append(Kill(kind, victim, hit, now, step, after.pointer, after.newest))
        for line in read_steps(self.run.save):
            self.seen.setdefault(line["step"], set()).add(line["loss"])

    def _wait_until_gone(self, workers: list[int], victims: list[int]) -> None:
        """Wait until processes are gone, and note what is published then.

        Nodes that have not met yet need not start again with the one that was killed: their workers
        may stay, and train with it.

        Raises:
            RuntimeError: one stays that should not.
        """
        last = self.kills[-1]
        limit = time.monotonic() + GONE_SECONDS
        while True:
            # Those who have not met it wait for it.
            self.revive()
            pointer = published_step(self.run.save)
            newest = read_traces(self.run.save, self.cache).newest
            left = [pid for pid in {*workers, *victims} if is_running(pid)]
            if self._has_begun_after(last) and set(left) <= set(self.run.trainers()):
                return  # what is published now may be of this start; what was is noted
            last.pointer = pointer
            last.newest = newest
            if not left:
                return
            if time.monotonic() > limit:
                raise RuntimeError(
                    f"{GONE_SECONDS} s after a kill ({last}) these processes still run: {left}"
                )
            time.sleep(POLL_SECONDS)

    def _has_begun_after(self, last: Kill) -> bool:
        """Tell whether the run has begun once more since a kill."""
        return any(
            event["event"] in STARTS and event["time"] > last.time for event in self.run.events()
        )


def wrong_starts(kills: list[Kill], events: list[dict]) -> list[str]:
    """List the starts after a kill that did not begin at the newest published checkpoint.

    Args:
        events: of the killed run's events.jsonl.
    """
    starts = [event for event in events if event["event"] in STARTS]
    ends = [each.time for each in kills[1:]] + [float("inf")]
    found = []
    for each, end in zip(kills, ends, strict=True):
        first = next((start for start in starts if each.time < start["time"] < end), None)
        if first is not None and first["step"] not in (each.pointer or 0, each.newest or 0):
            found.append(
                f"after the kill at step {each.step} ({each.hit}) the run went on from step "
                f"{first['step']}, and {each.pointer} was published"
            )
    return found


def other_losses(seen: dict[int, set[float]], alone: Path) -> list[str]:
    """List the steps that ever had another loss than in the run that was left alone."""
    expected = {line["step"]: line["loss"] for line in read_steps(alone)}
    return [
        f"step {step} once had a loss of {sorted(values)} and not {expected.get(step)}"
        for step, values in sorted(seen.items())
        if values != {expected.get(step)}
    ]


def describe_kills(kills: list[Kill]) -> list[str]:
    """Say how many kills hit what, and whom."""
    hits = Counter(each.hit for each in kills)
    victims = Counter(each.victim for each in kills)
    exact = sum(each.hit == each.meant for each in kills)
    return [
        f"{len(kills)} kills, {exact} of them in what they were meant for",
        "hit: " + ", ".join(f"{kind} {hits[kind]}" for kind in KINDS),
        "killed: " + ", ".join(f"{victim} {victims[victim]}" for victim in VICTIMS),
    ]
