"""Describe what surrounds one node's processes, and judge whether all nodes fit together.

The launcher gathers this while its processes import torch. What the run itself is (settings, code,
data) the trainer writes down as name -> text: pretrain/processes/start_facts.py.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

SMI_SECONDS = 20.0
"""The seconds in which nvidia-smi answers, also on a machine of eight GPUs that has just booted."""
CLOCK_SECONDS = 1.0
"""The difference of two nodes' clocks from which on it is said: times in logs mislead then."""
SHOWN_LINES = 8
"""Most lines of one kind that are printed."""
SHOWN_CHARACTERS = 100
"""Most characters of a value that are printed."""


@dataclass(frozen=True)
class Group:
    """Texts that must be the same on all nodes, and what to do where they are not."""

    texts: dict[str, str]
    remedy: str


@dataclass(frozen=True)
class RunFacts:
    """Holds what the trainer says of the run on one node; empty where it has ended before."""

    groups: list[Group] = field(default_factory=list)
    """What is to be the same, in the order in which differences explain each other."""
    notes: dict[str, str] = field(default_factory=dict)
    """What is shown beside a text of the same name, and may differ."""
    problems: list[str] = field(default_factory=list)
    """Why this node cannot train."""
    shown: dict[str, str] = field(default_factory=dict)
    """Rows of the table."""

    @staticmethod
    def read(path: Path) -> "RunFacts | None":
        """Read the file that the trainer writes; None before it is there."""
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        found["groups"] = [Group(**group) for group in found["groups"]]
        return RunFacts(**found)


@dataclass(frozen=True)
class Surroundings:
    """Describes one node."""

    host: str
    address: str
    """The address, with its interface, that the other nodes use."""
    gpus: int
    """How many torch finds."""
    gpu_names: str
    """What they are, with their driver."""
    software: str
    free_bytes: int | None
    """What is free where the run saves; None without --save, or where it cannot be written."""
    run: RunFacts = field(default_factory=RunFacts)
    problems: list[str] = field(default_factory=list)
    """What is wrong with this node by itself."""
    clock_ahead: float = 0.0
    """Seconds that its clock is ahead of node 0's."""

    def to_text(self) -> str:
        """Write it for the store."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_text(text: str | bytes) -> "Surroundings":
        """Read what `to_text` wrote."""
        found = json.loads(text)
        run = found["run"]
        run["groups"] = [Group(**group) for group in run["groups"]]
        return Surroundings(**found | {"run": RunFacts(**run)})


# ---------------------------------------------------------------- one node


def gather(address: str, nproc_per_node: int, save: Path | None) -> Surroundings:
    """Look at this machine; takes as long as nvidia-smi does."""
    gpus = torch.cuda.device_count()
    names = list_gpus()
    problems = gpu_problems(gpus, names, nproc_per_node)
    free = None
    if save is not None:
        folder = existing_part(save)
        problem = folder_problem(save, folder)
        if problem is None:
            free = shutil.disk_usage(folder).free
        else:
            problems.append(problem)
    return Surroundings(
        host=socket.gethostname(),
        address=address,
        gpus=gpus,
        gpu_names=describe_gpus(gpus, names),
        software=software(),
        free_bytes=free,
        problems=problems,
    )


def list_gpus() -> list[str]:
    """Ask nvidia-smi for the name and the driver of each GPU of this machine.

    Returns:
        None of them where CUDA_VISIBLE_DEVICES hides all, or there is no nvidia-smi.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.replace(", ", ", driver ") for line in result.stdout.splitlines() if line]


def describe_gpus(gpus: int, names: Sequence[str]) -> str:
    """Name the GPUs that torch finds, of those that nvidia-smi lists."""
    if not names:
        return f"{gpus} that nvidia-smi does not list" if gpus else "none"
    hidden = f"{gpus} of " if gpus < len(names) else ""
    return hidden + count_alike(names)


def count_alike(names: Sequence[str]) -> str:
    """Write equal names once, with how many there are: "8 x H100, driver 550"."""
    return "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def gpu_problems(gpus: int, names: Sequence[str], nproc_per_node: int) -> list[str]:
    """List why the processes of this node cannot have a GPU each, where there are any."""
    if 0 < gpus < nproc_per_node:
        return [
            f"NPROC_PER_NODE = {nproc_per_node}: must be at most {gpus}, the GPUs that torch finds."
            " Fix: fewer processes, or look at nvidia-smi and CUDA_VISIBLE_DEVICES."
        ]
    if gpus == 0 and names:
        return [
            f"torch {torch.__version__} finds none of {count_alike(names)}. Fix: a torch that fits "
            "the driver, or CUDA_VISIBLE_DEVICES= to train on the CPU."
        ]
    return []


def software() -> str:
    """Name the versions of what exchanges and computes numbers."""
    parts = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if dist.is_nccl_available():
        version = torch.cuda.nccl.version()
        parts.append("NCCL " + ".".join(map(str, version)))
    return ", ".join(parts)


def existing_part(folder: Path) -> Path:
    """Find the nearest folder around `folder` that exists, or the file that is in the way."""
    # What may not be looked at counts as absent here: Path.exists would raise.
    return next(place for place in _with_parents(folder) if os.path.exists(place))


def _with_parents(folder: Path) -> list[Path]:
    whole = folder.absolute()
    return [whole, *whole.parents]


def folder_problem(save: Path, existing: Path) -> str | None:
    """Say why nothing can be written to where the run saves, by trying it."""
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except OSError as error:
        reason = f"{existing} is a file" if existing.is_file() else error.strerror
        return (
            f"save = {save}: cannot be written ({reason}). Fix: a folder that every node may "
            "write to."
        )


# ---------------------------------------------------------------- one folder for all


def leave_mark(save: Path) -> str:
    """Leave a file where the run saves, for other nodes to find -> its path, "" if it fails."""
    # A new name each time: network file systems remember what was not there.
    mark = existing_part(save) / f".seen-by-all-nodes.{uuid.uuid4().hex}"
    try:
        mark.touch()
    except OSError:  # node 0 says so as its own problem
        return ""
    return str(mark)


def mark_problem(save: Path, mark: str) -> str | None:
    """Say that the folder in which this node saves is not node 0's."""
    name = Path(mark).name
    # The folder itself may have been made since node 0 left the mark beside its place.
    if not mark or any(os.path.exists(place / name) for place in _with_parents(save)):
        return None
    return (
        f"save = {save}: must be one folder for all nodes; what node 0 wrote to "
        f"{Path(mark).parent} is not there. Fix: a folder on a shared file system, by its whole "
        "path."
    )


# ---------------------------------------------------------------- all nodes


def judge(nodes: Sequence[Surroundings]) -> list[str]:
    """List what keeps these nodes from training together, a line each."""
    lines = _own_problems(nodes)
    if lines:
        return _shorten(lines)
    kinds = {rank: {"device": "GPU" if node.gpus else "CPU"} for rank, node in enumerate(nodes)}
    if lines := differences(nodes, kinds, "GPUs that torch finds, or CUDA_VISIBLE_DEVICES="):
        return lines
    # Whoever has no facts has ended, and its end says why.
    speaking = {rank: node.run.groups for rank, node in enumerate(nodes) if node.run.groups}
    for groups in zip(*speaking.values(), strict=True):
        texts = {rank: group.texts for rank, group in zip(speaking, groups, strict=True)}
        if lines := differences(nodes, texts, groups[0].remedy):
            return lines
    return []


def _own_problems(nodes: Sequence[Surroundings]) -> list[str]:
    """List the problems of single nodes, each once with those that have it."""
    found: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        for problem in (*node.problems, *node.run.problems):
            found.setdefault(problem, []).append(number)
    hosts = [node.host for node in nodes]
    return [
        problem if len(ranks) == len(nodes) else f"{name_nodes(ranks, hosts)}: {problem}"
        for problem, ranks in found.items()
    ]


def differences(
    nodes: Sequence[Surroundings], texts: dict[int, dict[str, str]], remedy: str
) -> list[str]:
    """Write a line for each name whose text is not the same on all nodes.

    Args:
        texts: number of a node -> its texts by name.
        remedy: what to give to every node.
    """
    hosts = [node.host for node in nodes]
    lines = []
    for name in dict.fromkeys(name for found in texts.values() for name in found):
        ranks: dict[str, list[int]] = {}
        for rank, found in texts.items():
            ranks.setdefault(found.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(
                f"{name_nodes(at, hosts)}: {_cut(text)}{_in_brackets(nodes[at[0]].run.notes, name)}"
                for text, at in ranks.items()
            )
            lines.append(
                f"{name}: must be the same on all nodes ({values}). Fix: {remedy} on every node."
            )
    return _shorten(lines)


def name_nodes(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name nodes by numbers and the first one's host: "node 1 (host1)", "nodes 0-6, 9 (host0)"."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ", ".join(
        str(low) if low == high else f"{low}-{high}" for low, high in ranges[:SHOWN_LINES]
    )
    more = ", ..." if len(ranges) > SHOWN_LINES else ""
    if len(ranks) == 1:
        return f"node {shown} ({hosts[ranks[0]]})"
    return f"nodes {shown}{more} (first {hosts[ranks[0]]})"


def _in_brackets(notes: dict[str, str], name: str) -> str:
    return f" ({notes[name]})" if name in notes else ""


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _shorten(lines: list[str]) -> list[str]:
    """Leave out lines beyond the first few, and say how many."""
    if len(lines) <= SHOWN_LINES:
        return lines
    return [*lines[:SHOWN_LINES], f"and {len(lines) - SHOWN_LINES} more"]
