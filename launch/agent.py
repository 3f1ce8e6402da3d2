"""Look after this node's processes: bring them together with those of the other nodes, hand signals
on, and say how they end.

An orderly stop or a refusal is said by the trainer. After a crash the console ends with the error
of the rank that failed first, on every node.
"""

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from launch import comparison
from launch import story as stories
from launch.comparison import Comparison
from launch.failures import Failure, find_first, publish_errors, read_records
from launch.meeting import REPORT_SECONDS, Patience, launch_name, meet_as_node_0, meet_as_other
from launch.outcome import (
    UNSTARTED,
    NotMet,
    give_up,
    read_outcome,
    say,
    write_outcome,
    write_signature,
)
from launch.records import errors_folder
from launch.settings import Settings
from launch.stop import HeardStop, Interrupted, part_as_node_0, part_as_other
from launch.store import Node0, open_store
from launch.story import Story
from launch.surroundings import RunFacts, Surroundings, gather
from launch.tether import StopAsked
from launch.watch import Watch
from launch.watchdog import Watchdog, watched
from launch.workers import Ended, Workers

POLL_SECONDS = 0.05
"""The seconds between two looks at the processes."""
FOLLOW_SECONDS = 2.0
"""The seconds in which processes that lose a peer may still say so before they are ended."""
WORD_SECONDS = 5.0
"""The seconds in which another node may say what failed, or processes here find it themselves."""
GATHER_SECONDS = 60.0
"""The seconds in which a machine that trains alone is looked at; a driver may never answer."""
IMPORT_SECONDS = 600.0
"""The seconds in which processes import torch on nodes that have met, however short JOIN_WAIT."""
PART_SECONDS = 10.0
"""The seconds that a node which is asked to stop looks for others that it has not met yet."""


def run(
    launch: "Launch", addresses: list[str], listening: socket.socket | None, records: Path
) -> int:
    """Meet the other nodes, then let the processes train -> the exit code of `launch.node`.

    Args:
        addresses: what MASTER_ADDR resolves to; not read with one node.
        listening: where node 0 answers; None on the others.
        records: the folder of what each rank does.
    """
    settings = launch.settings
    asked = launch.asked
    store = None if listening is None else open_store(listening)
    node0 = None
    if settings.nnodes > 1:
        port = settings.port
        node0 = Node0(settings.master, addresses[0], port)
    try:
        name = launch_name()
        if node0 is not None:
            patience = Patience(settings.join_wait, asked)
            if store is not None:
                name = meet_as_node_0(store, settings, patience)
            else:
                name = meet_as_other(node0, settings, patience)
            launch.watch = Watch(node0, settings.node_rank, settings.nnodes)
            launch.watch.start()
        shown = os.path.join(settings.errors, name) if settings.errors else ""
        launch.shown = shown or str(errors_folder())
        places = settings.node_rank, settings.nnodes, settings.nproc_per_node
        with watched(records, launch.shown, node0, *places) as watchdog:
            launch.watchdog = watchdog
            return launch.run()
    except (ValueError, NotMet) as error:
        return give_up(error)
    except HeardStop as heard:
        say(heard.stop.describe())
        write_outcome(UNSTARTED)
        return 0  # this train.sh was not asked itself
    except Interrupted as interrupted:
        number = asked.number
        assert number is not None
        seconds = min(settings.grace, PART_SECONDS)
        if interrupted.is_told or node0 is None:
            pass
        elif store is not None:
            part_as_node_0(store, settings.nnodes, number, seconds)
        else:
            part_as_other(node0, settings.node_rank, number, seconds)
        write_outcome(UNSTARTED)
        return 128 + number
    finally:
        launch.workers.kill()
        del store  # it must live as long as the processes


class _Failed(Exception):
    """Reports that another node has failed while the nodes are compared."""


class Launch:
    """Follows this node's processes from their gate to their end."""

    def __init__(
        self,
        settings: Settings,
        workers: Workers,
        asked: StopAsked,
        story: Story,
        address: str = "",
    ):
        self.settings = settings
        self.save = Path(settings.errors).parent if settings.errors else None
        """Where the run saves."""
        # nvidia-smi may take seconds, in which the nodes meet.
        self._gathered = ThreadPoolExecutor(1).submit(
            gather,
            address,
            settings.nproc_per_node,
            self.save if settings.nnodes > 1 else None,  # on one node the trainer says it
        )
        self.workers = workers
        self.asked = asked
        self.story = story
        self.shown = ""
        """The folder in which the user finds what went wrong; the same on all nodes with --save."""
        self.watch: Watch | None = None
        """What joins several nodes; None on one."""
        self.watchdog: Watchdog | None = None
        self._stopped_at: float | None = None
        self._is_handed_on = False

    def run(self) -> int:
        """Let the processes train, to their end -> the exit code."""
        self.story.met = time.time()
        self._compare()
        self._pause()
        self.story.opened = time.time()
        self._say_start()
        self.workers.open_gate(self.story)

        failure = self._follow()
        if failure is not None:
            return self._fail(failure)
        return self._end_in_order()

    def _compare(self) -> None:
        """Find out whether what surrounds the nodes, and what they are to train, fits together.

        Raises:
            ValueError: it does not; on all nodes.
            NotMet: a node did not tell in time.
            Interrupted, HeardStop: this node, or another one, is asked to stop.
        """
        settings = self.settings
        if self.watch is None:
            self._look_at_own()
            return
        patience = Patience(
            max(settings.join_wait, IMPORT_SECONDS),
            remedy="look at the output there, give it the same code",
            first_report=REPORT_SECONDS,  # all nodes import torch for some seconds
        )
        compared = Comparison(
            settings.node_rank, settings.nnodes, self.save, self._own_surroundings
        )
        try:
            nodes = compared.wait(self.watch.require_store, patience, self._require_company)
        except (ValueError, NotMet):
            self.watch.part()
            raise
        except _Failed:
            return  # what follows says it
        if nodes and settings.number == 1:
            meeting = f"{settings.master} port {settings.port}"
            comparison.show(nodes, settings.nproc_per_node, meeting, str(self.save or ""))

    def _look_at_own(self) -> None:
        """Raise ValueError where this node, which trains alone, cannot."""
        limit = time.monotonic() + GATHER_SECONDS
        while not self._gathered.done():
            self._require_no_stop()
            if time.monotonic() > limit:
                say(f"warning: nvidia-smi does not answer within {GATHER_SECONDS:.0f} s")
                return
            time.sleep(POLL_SECONDS)
        if problems := self._gathered.result().problems:
            raise ValueError("\n".join(problems))

    def _own_surroundings(self) -> Surroundings | None:
        """Return what this node has gathered; None while it is not complete."""
        run = RunFacts.read(self.workers.facts)
        if not self._gathered.done() or (run is None and not self.workers.poll()):
            return None
        # A process that has ended says nothing of its run.
        return replace(self._gathered.result(), run=run or RunFacts())

    def _require_company(self) -> None:
        """Leave the comparison where there is nothing left to compare."""
        self._require_no_stop()
        if self.watch is not None and self.watch.heard is not None:
            raise _Failed

    def _pause(self) -> None:
        """Wait before processes that have just failed train again.

        Raises:
            Interrupted, HeardStop: this node, or another one, is asked to stop.
        """
        limit = time.monotonic() + self.settings.pause
        while time.monotonic() < limit or self.asked.number is not None:
            self._require_no_stop()
            time.sleep(POLL_SECONDS)

    def _require_no_stop(self) -> None:
        """Leave before the processes train.

        Raises:
            Interrupted, HeardStop: this node, or another one, is asked to stop.
        """
        watch = self.watch
        if self.asked.number is not None:
            if watch is not None:
                watch.announce_stop(self.asked.number)
                watch.leave(self.settings.grace)  # others may train already
            raise Interrupted(is_told=watch is not None)
        if watch is not None and watch.stop is not None:
            stop = watch.stop
            watch.leave(self.settings.grace)
            raise HeardStop(stop)

    def _say_start(self) -> None:
        settings = self.settings
        if settings.node_rank > 0:  # node 0's processes say more than enough
            first = self.workers.first_rank
            last = first + settings.nproc_per_node - 1
            ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
            say(f"node {settings.node_rank} of {settings.nnodes} trains: {ranks}")

    # ------------------------------------------------------------ while they train

    def _follow(self) -> Failure | None:
        """Wait until all processes have ended in order (None), or until one has failed."""
        workers = self.workers
        while not workers.are_over():
            time.sleep(POLL_SECONDS)
            self._pass_stop_on()
            if self.watch is not None:
                self.watch.notice_silence()
                if self.watch.heard is not None:
                    return self.watch.heard.failure
            if self._has_failed(workers.poll()):
                return self._choose_failure()
            if self._is_late():
                say(f"processes go on {self.settings.grace} s after they should end: killing them")
                workers.kill()
                return None
        return self._choose_failure() if self._has_failed(workers.poll()) else None

    def _pass_stop_on(self) -> None:
        """Hand a request to stop on: to the processes, and between this node and the others."""
        watch = self.watch
        if self.asked.number is not None:
            if self._stopped_at is None:
                self._stopped_at = time.monotonic()
                self.workers.signal(self.asked.number)
                if watch is not None:
                    watch.announce_stop(self.asked.number)
        elif watch is not None and watch.stop is not None:
            self._ask_train_sh(watch)

    def _ask_train_sh(self, watch: Watch) -> None:
        """Let this node's own train.sh be asked as another node's was."""
        assert watch.stop is not None
        if not self._is_handed_on:
            self._is_handed_on = True
            say(watch.stop.describe())
            os.kill(self.settings.parent, watch.stop.number)

    def _has_failed(self, ended: list[Ended]) -> bool:
        """Tell whether a process failed by itself, or has written that it will."""
        by_signal = -self.asked.number if self.asked.number is not None else 0
        if any(end.code not in (0, by_signal) for end in ended):
            return True
        first = self.workers.first_rank
        return bool(read_records(range(first, first + len(self.workers.processes))))

    def _choose_failure(self) -> Failure:
        """Let the others say why they end, too, then choose what explains it -> that failure."""
        limit = time.monotonic() + FOLLOW_SECONDS
        while not self.workers.are_over() and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)
        ended = list(self.workers.poll())
        self.workers.kill()
        if self.watchdog is not None and self.watchdog.verdict is not None:
            return Failure(self.watchdog.verdict, time=time.time())
        failure = find_first(self.workers, ended)
        if read_outcome() == "refused":
            text = "it refused to train; its own output says why"
            return Failure(text, is_refusal=True, time=failure.time)
        return failure

    def _is_late(self) -> bool:
        """Tell whether processes go on though they were asked to stop, or others have ended."""
        if self._stopped_at is None:
            if self.workers.ended:
                self._stopped_at = time.monotonic()
            return False
        return time.monotonic() > self._stopped_at + self.settings.grace

    # ------------------------------------------------------------ how they end

    def _end_in_order(self) -> int:
        """Leave with the other nodes -> the exit code."""
        settings = self.settings
        code = 0 if self.asked.number is None else 128 + self.asked.number
        outcome = read_outcome()
        if self.watch is not None:
            self.watch.leave(settings.grace)
            if self.watch.stop is not None and self.asked.number is None:
                self._ask_train_sh(self.watch)
            if settings.node_rank > 0:
                say(f"node {settings.node_rank} of {settings.nnodes}: {outcome or 'no outcome'}")
        if outcome == "again":
            now = time.time()
            stories.keep("layout", now, now)
        return code

    def _fail(self, failure: Failure) -> int:
        """End the other processes, tell the other nodes, say why -> the exit code."""
        noticed = time.time()
        stop_came_first = self._stopped_at is not None and self.asked.number is not None
        heard = self.watch.heard if self.watch is not None else None
        if heard is not None and failure.is_refusal:
            self._wait_for_own_word()
        self.workers.kill()
        if self.watch is not None and heard is None:
            # Only connections are lost here: another node may know why.
            if not failure.is_cause:
                self.watch.wait_for_word(WORD_SECONDS)
            if self.watch.heard is None:
                self.watch.announce(failure)
            heard = self.watch.heard
        if self.watch is not None:
            self.watch.part()
        failed = min(failure.time or noticed, noticed)
        stories.keep("failure", failed, noticed)

        # A refusal has been said by a process here, or is another node's.
        if read_outcome() == "refused":
            return 2
        text = failure.summary
        if heard is not None:
            failure = heard.failure
            text = heard.describe()
        if failure.is_refusal:
            return give_up(ValueError(text))
        self._say_failure(failure, text)
        if stop_came_first:
            assert self.asked.number is not None
            return 128 + self.asked.number
        return 1

    def _wait_for_own_word(self) -> None:
        """Let processes here say the same refusal themselves."""
        limit = time.monotonic() + WORD_SECONDS
        while not self.workers.are_over() and time.monotonic() < limit:
            time.sleep(POLL_SECONDS)

    def _say_failure(self, failure: Failure, text: str) -> None:
        """Print the error that explains the others, and where these are."""
        write_signature(failure.signature)
        folder = publish_errors(self.shown)
        # Many nodes may share a console: where it failed, and node 0's, are enough for all lines.
        heard = self.watch is not None and self.watch.heard is not None
        if failure.details and (self.settings.node_rank == 0 or not heard):
            print(failure.details, file=sys.stderr, flush=True)
        if self.watchdog is None or self.watchdog.verdict is None:  # it has said so itself
            say(f"error: {text}")
        if folder:
            say(f"what every rank of this node said is in {folder}")
