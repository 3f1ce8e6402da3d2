"""A run of launch/train.sh in the background, on one node or on several nodes of this machine."""

import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SH = ROOT / "launch" / "train.sh"
POLL_SECONDS = 0.05
"""Seconds between two looks at a run: shorter than a save, and its cores are left to the run."""
PORTS = (20_000, 32_768)
"""Where a port is looked for: below those that Linux gives to connections by default."""
END_SECONDS = 90
"""Seconds that a run may take to end in order before it is killed."""


def free_port() -> int:
    """Find a port that nobody has, and that the kernel gives to nobody by itself.

    A port that the kernel chose may go to the next connection of any program as soon as it is
    closed here, long before the run opens it.
    """
    while True:
        port = random.SystemRandom().randrange(*PORTS)
        try:
            with socket.create_server(("", port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise


class Node:
    """The train.sh of one node, started as often as somebody asks, and all that it printed."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path | None):
        self.command = command
        self.environment = environment
        self.folder = folder
        self.lines: list[str] = []
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Start train.sh, the first time or again."""
        self.starts += 1
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def _read(self, output: Sequence[str]) -> None:
        """Keep each line as soon as it is printed."""
        self.lines.extend(output)

    def is_alive(self) -> bool:
        """Tell whether train.sh is still there."""
        return self.process.poll() is None

    def launcher(self) -> int | None:
        """Find the process id of the launcher (launch.node); None where there is none."""
        for child in children_of(self.process.pid):
            if b"launch.node" in command_of(child):
                return child
        return None

    def workers(self) -> list[int]:
        """List the process ids of this node's trainers, by local rank."""
        launcher = self.launcher()
        if launcher is None:
            return []
        return [pid for pid in children_of(launcher) if b"pretrain.train" in command_of(pid)]

    def tree(self) -> list[int]:
        """List the process ids of train.sh and of all that it started, parents first."""
        found = [self.process.pid]
        for pid in found:
            found.extend(children_of(pid))
        return found


class LaunchedRun:
    """Run launch/train.sh in the background, and look at what it does.

    Args:
        arguments: of the trainer, without --save.
        processes: on each node.
        nodes: train.sh is started this often, each time as another node on this machine.
        before: words before the command of each node, like those that enter a network namespace.
        environment: further variables, for each node.
    """

    def __init__(
        self,
        arguments: list[str],
        save: Path,
        processes: int,
        *,
        nodes: int = 1,
        before: Sequence[Sequence[str]] = (),
        environment: dict[str, str] | None = None,
    ):
        self.save = save
        common = os.environ | {
            "NPROC_PER_NODE": str(processes),
            "OMP_NUM_THREADS": "1",
            "ITHACA_PYTHON": sys.executable,
            # Every kill is a failure that is started again at once.
            "RETRY_WAIT": "0",
            "MAX_RESTARTS": "1000",
            "GRACE": "60",
        }
        if nodes > 1:
            common |= {
                "NNODES": str(nodes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "GLOO_SOCKET_IFNAME": "lo",
            }
        command = ["bash", str(TRAIN_SH), *arguments, "--save", str(save)]
        self.nodes = [
            Node(
                [*(before[rank] if before else ()), *command],
                common | ({"NODE_RANK": str(rank)} if nodes > 1 else {}) | (environment or {}),
                None,
            )
            for rank in range(nodes)
        ]

    @property
    def process(self) -> subprocess.Popen[str]:
        """The train.sh of node 0."""
        return self.nodes[0].process

    @property
    def lines(self) -> list[str]:
        """All that node 0 printed."""
        return self.nodes[0].lines

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl; lines of steps that are done again come and go."""
        try:
            return json.loads((self.save / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def events(self) -> list[dict]:
        """Read events.jsonl as far as it is written."""
        try:
            lines = (self.save / "events.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # a line that is being written, or that a kill cut short
        return found

    def starts_for_layouts(self) -> int:
        """Count the restarts for another layout so far."""
        return sum("needs another layout: starting again" in line for line in self.lines)

    def trainers(self) -> list[int]:
        """List the process ids of the trainers that the nodes' launchers have started."""
        return [pid for node in self.nodes for pid in node.workers()]

    def workers(self) -> list[int]:
        """List the process ids of this run's trainers, also of those whose launcher is gone."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            words = command_of(int(folder.name))
            if (
                b"pretrain.train" in words
                and str(self.save).encode() in words
                and b"launch.node" not in words
            ):
                found.append(int(folder.name))
        return sorted(found)

    def is_alive(self) -> bool:
        """Tell whether the train.sh of any node is still there."""
        return any(node.is_alive() for node in self.nodes)

    def wait(self, timeout: float | None = None) -> tuple[int, str]:
        """Wait for the train.sh of node 0; returns its exit code, and all that it printed."""
        code = self.process.wait(timeout)
        self.nodes[0].reader.join(5)
        return code, "".join(self.lines)

    def wait_for_all(self, timeout: float | None = None) -> list[tuple[int, str]]:
        """Wait for all nodes; returns the exit code of each, and all that it printed."""
        ends = []
        for node in self.nodes:
            code = node.process.wait(timeout)
            node.reader.join(5)
            ends.append((code, "".join(node.lines)))
        return ends

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Wait until the condition holds; False if the run ends before."""
        while self.is_alive():
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def wait_until_done(self) -> None:
        """Wait for the end of the run on all nodes.

        Raises:
            RuntimeError: it did not end as done.
        """
        for code, said in self.wait_for_all():
            if code != 0:
                raise RuntimeError("the run failed:\n" + "\n".join(said.splitlines()[-30:]))

    def end(self) -> None:
        """End the run, and leave no process behind."""
        alive = [node for node in self.nodes if node.is_alive()]
        for node in alive:
            node.process.terminate()
        for node in alive:
            try:
                node.process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                node.process.kill()
        for worker in self.workers():
            kill(worker)


def children_of(pid: int) -> list[int]:
    """List the children of a process, the eldest first; none where it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def command_of(pid: int) -> list[bytes]:
    """Read the words of a process's command line; none where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def kill(pid: int) -> None:
    """Send SIGKILL to a process that may have ended by itself."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
