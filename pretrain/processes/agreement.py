"""Do all processes of a run share what they must? Compared as soon as they have met.

Ranks that differ in a setting, in their data or in their code train on without a word: each shard
of the weights is updated by another optimizer, or some ranks wait for others until the time-out. So
each process writes down everything that must be the same as name -> text (shared_facts.py), and one
digest of 16 bytes goes to everybody. Only where digests differ are the texts exchanged, and the
differences named with their ranks, on every rank alike.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from parallel.collectives import all_reduce
from parallel.layout import Axis
from pretrain.processes.code_version import ROOT, describe_commit

SHOWN_DIFFERENCES = 8
SHOWN_CHARACTERS = 100
SHOWN_RANGES = 6
"""Ranges of consecutive ranks that are named for one value."""


class Refused(ValueError):
    """Bad input that all ranks of all nodes know of and raise together."""


@contextmanager
def known_to_all() -> Iterator[None]:
    """Turn bad input that all ranks find inside together into `Refused`."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Shared:
    """What must be the same, by kind: name -> text."""

    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the user gives: settings, tokenizer, code, packages, kind of device."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the files of the data hold, in the order of this run."""
    start: dict[str, str] = dataclasses.field(default_factory=dict)
    """The checkpoint that the run starts from; another may be published while processes start."""
    derived: dict[str, str] = dataclasses.field(default_factory=dict)
    """What follows from the two, and from the memory of the machine where that decides."""
    problem: str | None = None
    """Why this process cannot train at all."""

    def digest(self) -> bytes:
        """Hash everything into 16 bytes."""
        parts = [self.settings, self.data, self.start, self.derived]
        text = repr(([sorted(part.items()) for part in parts], self.problem))
        return xxhash.xxh3_128_digest(text.encode())


# ---------------------------------------------------------------- the comparison


def require_agreement(shared: Shared, world: Axis) -> None:
    """Compare `shared` with that of all other ranks; collective over `world`, on CPU tensors alone.

    Raises:
        Refused: a rank has a problem, or ranks differ in what the user gives; a line each.
        RuntimeError: ranks found different checkpoints to start from; another start may mend it.
    """
    # All of them come to this point, so a problem of all ranks goes the same way as one of a few.
    if _all_equal(shared.digest(), world):
        if shared.problem is not None:
            raise Refused(_describe_problems([shared.problem] * world.size))
        return
    found = _gather(shared, world)
    if any(other.problem is not None for other in found):
        raise Refused(_describe_problems([other.problem for other in found]))

    # What is named first explains what comes after it: another seed is another order of the
    # documents.
    same_command = "the same command and code"
    if lines := describe_differences([other.settings for other in found], same_command):
        raise Refused("\n".join(lines))
    if lines := describe_differences([other.data for other in found], "the same files"):
        raise Refused("\n".join(lines))
    by_restart = (
        "a restart mends it where a checkpoint was published meanwhile; else let --save be the "
        "same folder"
    )
    if lines := describe_differences([other.start for other in found], by_restart):
        raise RuntimeError("\n".join(lines))
    by_memory = "where machines differ in memory, --device-memory-gib, to choose alike"
    raise Refused("\n".join(describe_differences([other.derived for other in found], by_memory)))


def _all_equal(digest: bytes, world: Axis) -> bool:
    """Tell whether the digest is that of all ranks: then the highest is the lowest, too."""
    # Two halves of 63 bits, and their negatives: one maximum gives the highest and the lowest.
    halves = [int.from_bytes(digest[at : at + 8]) >> 1 for at in (0, 8)]
    own = torch.tensor([*halves, *(-half for half in halves)], dtype=torch.int64, device="cpu")
    highest = all_reduce(own, world, dist.ReduceOp.MAX)
    return bool((highest[:2] == -highest[2:]).all())


def _gather(shared: Shared, world: Axis) -> list[Shared]:
    """Collect what each rank shares, in the order of the ranks."""
    # As plain values: another version of this file may have other classes.
    own = (dataclasses.asdict(shared), describe_commit(ROOT))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own, group=world.group)
    names = [field.name for field in dataclasses.fields(Shared)]
    found = []
    for parts, commit in everyone:
        known = {name: parts[name] for name in names if name in parts}
        found.append((Shared(**known), commit))
    return _with_commits(found)


def _with_commits(found: Sequence[tuple[Shared, str]]) -> list[Shared]:
    """Name the code of each rank by the commit, too, where ranks differ in their code.

    Where the source files are the same it does not matter which commit a node believes to be at.
    """
    everyone = [shared for shared, _ in found]
    if len({shared.settings.get("code") for shared in everyone}) == 1:
        return everyone
    named = []
    for shared, commit in found:
        code = f"{shared.settings.get('code')} ({commit})"
        named.append(dataclasses.replace(shared, settings=shared.settings | {"code": code}))
    return named


# ---------------------------------------------------------------- the words


def _describe_problems(problems: Sequence[str | None]) -> str:
    """Write the lines of the ranks that cannot train, each once, with their ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        for line in (problem or "").splitlines():
            ranks.setdefault(line, []).append(rank)
    return "\n".join(f"on {describe_ranks(found)}: {line}" for line, found in ranks.items())


def describe_differences(texts: Sequence[Mapping[str, str]], remedy: str) -> list[str]:
    """Write a line for each name whose text is not the same on all ranks.

    Args:
        texts: name -> text of each rank, in the order of the ranks.
        remedy: what to give to every node.
    """
    names = dict.fromkeys(name for found in texts for name in found)
    lines = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(texts):
            ranks.setdefault(found.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(
                f"{describe_ranks(at)}: {_short(text)}" for text, at in ranks.items()
            )
            lines.append(
                f"{name}: must be the same on all ranks ({values}). Fix: {remedy} on every node."
            )
    if len(lines) > SHOWN_DIFFERENCES:
        rest = [line.split(": must be")[0] for line in lines[SHOWN_DIFFERENCES:]]
        left_out = f"and {len(rest)} more differ: {_short(', '.join(rest))}"
        lines = [*lines[:SHOWN_DIFFERENCES], left_out]
    return lines


def describe_ranks(ranks: Sequence[int]) -> str:
    """Write ascending ranks as ranges: "rank 3", "ranks 0-3, 8"."""
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    shown = ", ".join(
        str(low) if low == high else f"{low}-{high}" for low, high in ranges[:SHOWN_RANGES]
    )
    more = ", ..." if len(ranges) > SHOWN_RANGES else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _short(text: str) -> str:
    """Cut a long text; the hash tells long texts with one beginning apart."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... (hash {xxhash.xxh3_64_hexdigest(text.encode())[:8]})"
