"""Keep the nodes of a launch together: what one must know of another goes through node 0's store.

By itself a process that is gone, or that refused to train, is noticed elsewhere only when some
timeout ends, minutes later and without a name. So each node's launcher tells the others by a key in
the store of the meeting when it is asked to stop, when its processes fail, and every second that it
is still there. In the end all nodes leave together: node 0, which has the store, goes last.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch.distributed as dist

from launch.failures import Ending, Failure
from launch.outcome import say
from launch.stop import Stop, announce_stop, read_stop
from launch.store import (
    BEAT,
    ENDED,
    LINGER_SECONDS,
    MEMBERS,
    OVER,
    Node0,
    connect,
    leave_store,
    why_unreachable,
)

POLL_SECONDS = 0.5
"""The seconds between two looks at the store, and between two signs of life."""
SILENT_SECONDS = 20.0
"""The seconds without a sign of life after which a node counts as gone."""
PAUSE_SECONDS = 5.0
"""A look that comes this late means that this launcher stood still, and not node 0."""
ANSWER_SECONDS = 5.0
"""The seconds in which node 0's store answers, also where the machine is busy."""
SUSPECT_SECONDS = 4.0
"""The same where processes have just lost their connections to it."""
GONE = "its launcher is gone, or the network to it is cut"
"""What is known of a node that says nothing."""


class Watch(threading.Thread):
    """Tells the other nodes of this one, and hears of them.

    Start no process while one is made: it connects, and for that moment stderr leads to nowhere.
    """

    def __init__(self, node0: Node0, node_rank: int, nnodes: int):
        super().__init__(name="watch", daemon=True)
        self.store = connect(node0)
        self.node0 = node0
        self.node_rank = node_rank
        self.nnodes = nnodes
        self.heard: Ending | None = None
        """Another node's failure."""
        self.stop: Stop | None = None
        """The first request to stop, whose ever it was."""
        self.is_over = threading.Event()
        self._beats: list[bytes] = []
        self._alive_at = [time.monotonic()] * nnodes
        """When each node's sign of life last changed; only node 0 looks at all of them."""
        self._lock = threading.Lock()
        self._noticed_at = time.monotonic()
        self._woke_at = self._noticed_at
        """When this launcher last went on after it had stood still itself."""

    # ------------------------------------------------------------ while processes run

    def run(self) -> None:
        """Give signs of life and look at the store, until a node has failed or all is over here."""
        number = 0
        while not self.is_over.wait(POLL_SECONDS):
            number += 1
            try:
                self._look(number)
                self._alive_at[0] = time.monotonic()
            except dist.DistError as error:
                if self._lost_node_0(error):
                    return
            if self.heard is not None:
                return

    def _look(self, number: int) -> None:
        store = self.require_store()
        store.set(f"{BEAT}{self.node_rank}", str(number))
        self.stop = self.stop or read_stop(store)
        if store.check([ENDED]):
            self._hear(store.get(ENDED))
        elif self.node_rank == 0:
            self._count_beats(store)

    def _hear(self, text: bytes) -> None:
        ending = Ending.from_text(text)
        if ending.node_rank != self.node_rank:
            self.heard = ending

    def _count_beats(self, store: dist.TCPStore) -> None:
        """Look on node 0 for nodes that have fallen silent, and tell everybody."""
        beats = store.multi_get([f"{BEAT}{rank}" for rank in range(self.nnodes)])
        now = time.monotonic()
        with self._lock:
            for rank, beat in enumerate(beats):
                if not self._beats or beat != self._beats[rank]:
                    self._alive_at[rank] = now
            self._beats = beats
        self.blame_silent(SILENT_SECONDS)

    def blame_silent(self, limit: float) -> None:
        """Let every node hear on node 0 that a node is gone, where one is silent for `limit` s."""
        store = self.require_store()
        with self._lock:
            silence = [time.monotonic() - at for at in self._alive_at]
        longest = max(range(self.nnodes), key=silence.__getitem__)
        # Node 0 itself may have been stopped for a while: then all seem silent.
        is_silent = silence[longest] > limit and silence[0] < POLL_SECONDS + 1.0
        if self.node_rank != 0 or longest == 0 or not is_silent:
            return
        host = json.loads(store.get(MEMBERS))[longest]
        text = f"{GONE}: no sign of life for {silence[longest]:.0f} s"
        self._post(Ending(longest, host, Failure(text, time=time.time()), is_gone=True))

    def _lost_node_0(self, error: dist.DistError) -> bool:
        """Tell whether node 0 is gone for good, after an error of the store."""
        if self.is_over.is_set():
            return True
        if self.node_rank == 0:
            return False
        # A node 0 that has started again waits for members; one behind a cut network answers
        # nothing, and may come back.
        reason = why_unreachable(self.node0)
        self.store = connect(self.node0)
        if self.store is not None:
            with suppress(dist.DistError):
                if self.store.check([MEMBERS]):
                    return False
            reason = "it has started again"
        silence = time.monotonic() - self._alive_at[0]
        is_gone = self.store is not None or reason == os.strerror(errno.ECONNREFUSED)
        if not is_gone and silence < SILENT_SECONDS:
            return False
        text = "its launcher is gone" if is_gone else GONE
        failure = Failure(f"{text}: {reason or str(error).splitlines()[0]}", time=time.time())
        self.heard = Ending(0, self.node0.master, failure)
        return True

    def require_store(self) -> dist.TCPStore:
        """Return the connection to node 0's store; raise DistNetworkError without one."""
        if self.store is None:
            raise dist.DistNetworkError("no connection to node 0")
        return self.store

    def notice_silence(self) -> None:
        """Take node 0 to be gone where its store has not answered for long.

        The thread cannot tell: where node 0's launcher is stopped, its kernel holds the connection,
        and the answer does not come.
        """
        now = time.monotonic()
        if now - self._noticed_at > PAUSE_SECONDS:
            self._woke_at = now
        self._noticed_at = now
        silence = now - max(self._alive_at[0], self._woke_at)
        if self.node_rank == 0 or self.heard is not None or silence < SILENT_SECONDS:
            return
        failure = Failure(f"{GONE}: no answer for {silence:.0f} s", time=time.time())
        self.heard = Ending(0, self.node0.master, failure, is_gone=True)

    # ------------------------------------------------------------ what this node says

    def announce(self, failure: Failure) -> None:
        """Tell the other nodes that this one's launch failed; only the first failure is stored."""
        # Where node 0 is gone, nobody is there to tell.
        _within(ANSWER_SECONDS, self._post, Ending(self.node_rank, socket.gethostname(), failure))

    def _post(self, ending: Ending) -> None:
        store = self.require_store()
        self._hear(store.compare_set(ENDED, "", ending.to_text()))

    def announce_stop(self, number: int) -> None:
        """Tell the other nodes that this one is asked to stop."""
        if self.stop is None:
            _within(ANSWER_SECONDS, self._announce_stop, number)

    def _announce_stop(self, number: int) -> None:
        self.stop = announce_stop(self.require_store(), self.node_rank, number)

    def wait_for_word(self, seconds: float) -> None:
        """Wait for another node to say what failed, where here only connections were lost."""
        limit = time.monotonic() + seconds
        while self.heard is None and time.monotonic() < limit:
            time.sleep(0.1)
            with suppress(dist.DistError):
                self.blame_silent(SUSPECT_SECONDS)

    # ------------------------------------------------------------ leaving together

    def leave(self, seconds: float) -> None:
        """Wait until the processes of all nodes are over; give up after some seconds.

        When this returns, `stop` is known alike on all nodes.
        """
        if not _within(seconds + ANSWER_SECONDS, self._wait_until_all_are_over, seconds):
            say("node 0 does not answer: leaving alone")
            self.is_over.set()
            return
        self.part()

    def _wait_until_all_are_over(self, seconds: float) -> None:
        store = self.require_store()
        store.set(f"{OVER}/{self.node_rank}", "")
        limit = time.monotonic() + seconds
        if self.node_rank == 0:
            names = [f"{OVER}/{rank}" for rank in range(self.nnodes)]
        else:
            names = [OVER]
        while not store.check(names):
            if self.heard is not None:
                return
            if time.monotonic() >= limit:
                say(f"the processes of other nodes go on after {seconds:.0f} s: leaving alone")
                return
            time.sleep(0.1)
        if self.node_rank == 0:
            store.set(OVER, "")
        # Whoever is asked to stop says so before it is over.
        self.stop = self.stop or read_stop(store)

    def part(self) -> None:
        """Say no more; node 0 keeps the store until the others have read the last word."""
        self.is_over.set()
        is_one_gone = self.heard is not None and self.heard.is_gone
        present = self.nnodes - 1 if is_one_gone else self.nnodes
        _within(LINGER_SECONDS + ANSWER_SECONDS, self._leave_store, present)

    def _leave_store(self, present: int) -> None:
        leave_store(self.require_store(), self.node_rank, present)


def _within(seconds: float, function: Callable[..., None], *args: object) -> bool:
    """Call a function that uses the store -> False where it goes on after some seconds.

    A store that is gone ends it: node 0 has left, which it does when all others may.
    """

    def call() -> None:
        with suppress(dist.DistError):
            function(*args)

    thread = threading.Thread(target=call, name="last word", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
