"""Tell the other nodes that this node's launch has failed, and hear it from them.

By itself a process that is gone, or that refused to train, is noticed elsewhere only when some
timeout ends, minutes later and without a name. Through the store of the meeting the other nodes
hear of it at once, end their own processes, and say which node it was.
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

from launch.meeting import PREFIX, Node0, connect

POLL_SECONDS = 1.0
"""The seconds between two looks at the store."""
OWN_WORD_SECONDS = 5.0
"""The seconds in which this node's processes may still find and say the same error themselves."""
ENDED = f"{PREFIX}ended"
"""The key under which the first failure is stored."""


@dataclass(frozen=True)
class Ending:
    """Describes how a node's launch failed."""

    node_rank: int
    host: str
    text: str
    is_refusal: bool
    """True where another try would end the same way."""

    def describe(self) -> str:
        """Say it in a line for the users of the other nodes."""
        return f"node {self.node_rank} ({self.host}) ended this launch: {self.text}"


def announce(node0: Node0, node_rank: int, text: str, *, is_refusal: bool) -> None:
    """Tell the other nodes that this one's launch failed; only the first failure is stored."""
    ending = Ending(node_rank, socket.gethostname(), text, is_refusal)
    store = connect(node0)
    if store is not None:  # None: node 0 is gone, and nobody is there to tell
        with suppress(dist.DistError):
            store.compare_set(ENDED, "", json.dumps(asdict(ending)))
    if node_rank == 0:  # the store ends with this process: let the others read it first
        time.sleep(2 * POLL_SECONDS)


class Watch(threading.Thread):
    """Waits for another node's failure, and then sends this process SIGTERM.

    Make it before any process is started: while it connects, stderr leads to nowhere for a moment,
    which a process that starts then would inherit.
    """

    def __init__(self, node0: Node0, node_rank: int):
        super().__init__(daemon=True)
        self.store = connect(node0)
        self.node_rank = node_rank
        self.heard: Ending | None = None
        self.is_over = threading.Event()  # set when this node's own processes have ended

    def run(self) -> None:
        """Look at the store until a node has failed or this node's processes have ended."""
        store = self.store
        if store is None:
            return
        with suppress(dist.DistError):  # node 0 is gone: nothing more will come
            while not store.check([ENDED]):
                if self.is_over.wait(POLL_SECONDS):
                    return
            ending = Ending(**json.loads(store.get(ENDED)))
            # SIGTERM makes torchrun end this node's processes.
            if ending.node_rank != self.node_rank and not self.is_over.wait(OWN_WORD_SECONDS):
                self.heard = ending
                os.kill(os.getpid(), signal.SIGTERM)
