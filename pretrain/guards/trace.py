"""Everything that a rank sends while it computes, by fingerprint, whichever library sends it.

Between what a rank receives and what it sends next, its computing is a function of nothing else. So
of two equal runs, a rank whose sent values differ although all that it had received was the same
has computed something else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.guards.fingerprint import fingerprint

NAMESPACES = ("c10d", "_c10d_functional")
"""The namespaces of torch's operators that send or receive."""
RECEIVES = ("recv_", "recv_any_source_", "irecv", "barrier")
"""Operators whose tensors are not sent."""
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Passage:
    """A point at which a rank sends or receives, or a result that it keeps."""

    key: Key
    """The same on all ranks that take part in it."""
    name: str
    """What it is, for people."""


class Trace(TorchDispatchMode):
    """Notes every passage while it is entered; on any backend, below FSDP2 and the pipeline."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank = rank
        self.passages: list[Passage] = []
        self.fingerprints: list[torch.Tensor] = []
        """One for each passage, of what it sends; 0 where it only receives."""
        self._counts: Counter[Key] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile run its kernels as it does without a trace."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace in NAMESPACES:
            self._note(func._schema, args, kwargs)
        return func(*args, **kwargs)

    def keep(self, name: str, result: torch.Tensor) -> None:
        """Note a result of the whole run that is this rank's alone."""
        self.passages.append(Passage(("result", self.rank, name), name))
        self.fingerprints.append(fingerprint(result))

    def _note(self, schema, args, kwargs) -> None:
        """Note a call, before it changes its tensors."""
        declared = [argument.name for argument in schema.arguments]
        values = dict(zip(declared, args, strict=False)) | kwargs
        ranks = _ranks_of(values)
        if ranks is None:
            return  # waiting for a tensor sends nothing
        operation = schema.name.split("::")[1]
        base = self._key(values, ranks)
        number = self._counts[base]
        self._counts[base] += 1
        # A backward runs as a task of autograd's.
        in_backward = torch._C._current_graph_task_id() != -1
        part = "backward" if in_backward else "forward"
        name = f"{operation.strip('_')} {number + 1} of {part} with ranks {_short(ranks)}"
        self.passages.append(Passage((*base, number), name))
        sent = [] if operation in RECEIVES else list(_sent(values))
        total = torch.zeros((), dtype=torch.int64, device=sent[0].device if sent else None)
        for tensor in sent:
            # The sum of several tensors depends on their order, too.
            total = total * 3 + fingerprint(tensor)
        self.fingerprints.append(total)

    def _key(self, values: Mapping[str, Any], ranks: Sequence[int]) -> Key:
        """Name the group, or of a message its two ends."""
        if "dst" in values:
            return ("message", self.rank, ranks[values["dst"]])
        if "src" in values:
            return ("message", ranks[values["src"]], self.rank)
        # Short, since all ranks get the keys of all: a group may have a thousand ranks.
        return ("group", xxhash.xxh3_64_intdigest(repr(tuple(ranks)).encode()))


def _ranks_of(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return the global ranks of a call's group; None where the call has no group."""
    if "process_group" in values:
        name = dist.ProcessGroup.unbox(values["process_group"]).group_name
    elif "group_name" in values:
        name = values["group_name"]
    else:
        return None
    group = dist.distributed_c10d._resolve_process_group(name)
    return tuple(dist.get_process_group_ranks(group))


def _sent(values: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that a call sends: its inputs, not the memory for its results."""
    for name, value in values.items():
        if name.startswith("input") or name in ("tensor", "tensors"):
            yield from _tensors(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


def _short(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown}, ... ({len(ranks)})"


# ---------------------------------------------------------------- who computed something else


@dataclass(frozen=True)
class Comparison:
    """Two equal runs of one rank, compared."""

    place: str
    """The rank and its machine."""
    stage: int
    """Its rank on the pipeline axis."""
    passages: list[Passage]
    differs: list[bool]
    """For each passage, whether the two runs sent something else."""

    @property
    def first(self) -> int | None:
        """The number of the first passage that differs."""
        return self.differs.index(True) if True in self.differs else None


def find_origins(ranks: Sequence[Comparison]) -> list[int]:
    """Find the ranks that sent something else although all that they had received was the same.

    The others that differ took part, before they did, in a passage into which another rank had put
    something else.
    """
    spoilt: dict[Key, set[int]] = {}
    for rank, comparison in enumerate(ranks):
        for passage, differs in zip(comparison.passages, comparison.differs, strict=True):
            if differs:
                spoilt.setdefault(passage.key, set()).add(rank)
    origins = []
    for rank, comparison in enumerate(ranks):
        first = comparison.first
        if first is None:
            continue
        before = comparison.passages[:first]
        if not any(spoilt.get(passage.key, set()) - {rank} for passage in before):
            origins.append(rank)
    return origins
