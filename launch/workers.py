"""Start this node's worker processes, signal them, and see how each ends.

They start before the nodes have met: importing torch takes each of them seconds, which pass while
the launcher does the same, looks for the other nodes and waits. At their gate, a line on their
standard input, they then wait for the word that all nodes are there.

torchrun could start them. But its agent waits 300 s for nodes that have left, which nothing in
torch 2.11 or 2.13 can set from outside, gives workers that lost a peer as long to end as workers
that save, and starts workers only after its own import of torch.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.outcome import say
from launch.records import errors_folder
from launch.settings import Settings
from launch.story import Story
from launch.tether import STOP_SIGNALS

KILL_SECONDS = 20.0
"""The seconds in which a killed process must be gone; in a driver's wait it may never be."""


@dataclass(frozen=True)
class Ended:
    """Describes how one worker ended."""

    rank: int
    local_rank: int
    pid: int
    code: int
    """The exit code; -N where signal N ended it."""
    time: float
    """When this was noticed, in seconds since 1970."""


class Workers:
    """Keep the worker processes of one launch of this node.

    The kernel ties their lives to the thread that makes this object.
    """

    def __init__(self, settings: Settings, port: int, facts: Path):
        """Start them.

        Args:
            port: the one on which node 0's store answers.
            facts: where local rank 0 writes what it is about to train, for other nodes to compare.
        """
        self.settings = settings
        self.facts = facts
        self.first_rank = settings.node_rank * settings.nproc_per_node
        self.ended: list[Ended] = []
        self._said_left = ""
        # A worker answers a stop signal once it has imported torch: it inherits this mask.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.processes = [
                self._start(local_rank, port) for local_rank in range(settings.nproc_per_node)
            ]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _start(self, local_rank: int, port: int) -> subprocess.Popen:
        settings = self.settings
        command = [sys.executable, "-u", "-m", "launch.worker", str(os.getpid()), settings.module]
        environment = {
            "RANK": self.first_rank + local_rank,
            "WORLD_SIZE": settings.nnodes * settings.nproc_per_node,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": settings.nproc_per_node,
            "GROUP_RANK": settings.node_rank,
            "MASTER_ADDR": settings.master,
            "MASTER_PORT": port,
            # torch connects to the store of node 0's launcher in place of opening one.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "ITHACA_GATE": "stdin",
        }
        if local_rank == 0 and settings.nnodes > 1:
            environment["ITHACA_FACTS"] = str(self.facts)
        return subprocess.Popen(
            [*command, *settings.arguments],
            env=os.environ | {name: str(value) for name, value in environment.items()},
            stdin=subprocess.PIPE,
            # Ctrl-C goes to train.sh alone, which hands it on.
            start_new_session=True,
        )

    def open_gate(self, story: Story) -> None:
        """Let the workers meet each other, and tell them how it came to this start."""
        line = json.dumps(asdict(story)).encode() + b"\n"
        for process in self.processes:
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # it has ended, which `poll` sees
                process.stdin.write(line)
                process.stdin.close()

    def poll(self) -> list[Ended]:
        """Look which workers have ended -> all that have so far, in the order in which they did."""
        known = {ended.local_rank for ended in self.ended}
        for local_rank, process in enumerate(self.processes):
            if local_rank not in known and process.poll() is not None:
                rank = self.first_rank + local_rank
                code = process.returncode
                self.ended.append(Ended(rank, local_rank, process.pid, code, time.time()))
        return self.ended

    def are_over(self) -> bool:
        """Tell whether every worker has ended."""
        return len(self.poll()) == len(self.processes)

    def signal(self, number: int) -> None:
        """Send a signal to every worker that still runs."""
        for process in self.processes:
            process.send_signal(number)

    def kill(self) -> None:
        """End every worker that still runs, now."""
        running = [process for process in self.processes if process.poll() is None]
        for process in running:
            process.kill()
        # Whoever was waited for once is not waited for again.
        limit = time.monotonic() + (0.0 if self._said_left else KILL_SECONDS)
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, limit - time.monotonic()))
        # The kernel ends such a process once the disk or the driver answers; it trains no more.
        left = ", ".join(str(process.pid) for process in running if process.poll() is None)
        if left and left != self._said_left:
            say(
                f"warning: killed, and still there after {KILL_SECONDS:.0f} s: process {left} on "
                f"{socket.gethostname()}. A disk or a driver does not answer there (see dmesg)"
            )
            self._said_left = left

    def error_file(self, rank: int) -> Path:
        """Return where a rank leaves what went wrong in it."""
        return errors_folder() / f"rank{rank}.txt"
