"""Tell the other nodes that this node's launch has failed, and hear it from them.

A process that is gone, or that refused to train, is noticed by the others only when a time-out of
theirs ends, minutes later and without a name. Through the store that the nodes met at they hear of
it at once, end their own processes, and say which node it was.
"""

import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass

import torch.distributed as dist

from launch.meeting import PREFIX, Node0, call

POLL_SECONDS = 1.0
OWN_WORD_SECONDS = 5.0
"""How long this node's processes may still say themselves what is wrong."""
ENDED = f"{PREFIX}ended"


@dataclass(frozen=True)
class Ending:
    """How a node's launch failed."""

    node_rank: int
    host: str
    text: str
    is_refusal: bool
    """Would it end the same way once more?"""

    def describe(self) -> str:
        return f"node {self.node_rank} ({self.host}) ended this launch: {self.text}"


def announce(node0: Node0, node_rank: int, text: str, *, is_refusal: bool) -> None:
    """Tell the other nodes that this one's launch failed; the first to say so is heard."""
    ending = Ending(node_rank, socket.gethostname(), text, is_refusal)
    store = call(node0)
    if store is not None:  # otherwise node 0 is gone: there is nobody to tell
        with suppress(dist.DistError):
            store.compare_set(ENDED, "", json.dumps(asdict(ending)))
    if node_rank == 0:  # the store ends with this process
        time.sleep(2 * POLL_SECONDS)


class Watch(threading.Thread):
    """Look for another node's ending, and send this process SIGTERM when there is one.

    Make it before any process is started: the call to node 0 holds back stderr for a moment, which
    a process that starts then would keep.
    """

    def __init__(self, node0: Node0, node_rank: int):
        super().__init__(daemon=True)
        self.store = call(node0)
        self.node_rank = node_rank
        self.heard: Ending | None = None
        self.is_over = threading.Event()

    def run(self) -> None:
        store = self.store
        if store is None:
            return
        with suppress(dist.DistError):  # node 0 is gone: there is nothing more to hear
            while not store.check([ENDED]):
                if self.is_over.wait(POLL_SECONDS):
                    return
            ending = Ending(**json.loads(store.get(ENDED)))
            if ending.node_rank != self.node_rank and not self.is_over.wait(OWN_WORD_SECONDS):
                self.heard = ending
                os.kill(os.getpid(), signal.SIGTERM)
