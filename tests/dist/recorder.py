"""What every rank sends and in which order, seen below all libraries: FSDP2, DTensor, pipelining
and our own."""

from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    """One collective, or one message between two ranks (then `peer` is the other's global rank)."""

    operation: str
    group: str
    ranks: tuple[int, ...]
    elements: int | None
    """None where ranks may send unequal parts."""
    dtype: str
    step: int
    peer: int | None = None

    def __str__(self) -> str:
        return f"{self.operation} of {self.elements} x {self.dtype} in step {self.step}"


class Recorder(TorchDispatchMode):
    """Notes every call of c10d while it is entered; `step` is written into each."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.step = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self._note(function, args)
        return function(*args, **(kwargs or {}))

    def _note(self, function, args) -> None:
        values = {
            argument.name: value
            for argument, value in zip(function._schema.arguments, args, strict=False)
        }
        if "process_group" in values:
            name = dist.ProcessGroup.unbox(values["process_group"]).group_name
        elif "group_name" in values:
            name = values["group_name"]
        else:
            return  # waiting for a tensor or wrapping it sends nothing
        ranks = tuple(
            dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))
        )
        tensors = [
            tensor
            for value in args
            for tensor in (value if isinstance(value, list) else [value])
            if isinstance(tensor, torch.Tensor)
        ]
        operation = function._schema.name.split("::")[1]
        peer = next((ranks[values[end]] for end in ("dst", "src") if end in values), None)
        self.calls.append(
            Call(
                operation,
                name,
                ranks,
                None if "alltoall" in operation else tensors[0].numel(),
                str(tensors[0].dtype).removeprefix("torch."),
                self.step,
                peer,
            )
        )


def first_difference(calls: list[list[Call]]) -> str | None:
    """Where two ranks disagree, or None. calls[r] are those of rank r.

    Any two ranks must make the collectives of all groups that hold both in one common order, and
    each must receive what the other sends.
    """
    for a, b in combinations(range(len(calls)), 2):
        ours, theirs = (
            [
                call
                for call in calls[rank]
                if call.peer is None and a in call.ranks and b in call.ranks
            ]
            for rank in (a, b)
        )
        problem = _compare(ours, theirs, a, b)
        for sender, receiver in ((a, b), (b, a)):
            sent = [
                call for call in calls[sender] if call.operation == "send" and call.peer == receiver
            ]
            got = [
                call
                for call in calls[receiver]
                if call.operation == "recv_" and call.peer == sender
            ]
            problem = problem or _compare(sent, got, sender, receiver, ignore_operation=True)
        if problem:
            return problem
    return None


def _compare(
    ours: list[Call], theirs: list[Call], a: int, b: int, ignore_operation: bool = False
) -> str | None:
    def key(call: Call) -> tuple:
        return (
            None if ignore_operation else call.operation,
            call.group,
            call.elements,
            call.dtype,
            call.step,
        )

    for index, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if key(mine) != key(other):
            return (
                f"group {mine.ranks}: call {index}: rank {a} makes {mine}, rank {b} makes {other}"
            )
    if len(ours) != len(theirs):
        longer, shorter, calls = (a, b, ours) if len(ours) > len(theirs) else (b, a, theirs)
        return (
            f"call {min(len(ours), len(theirs))}: rank {longer} makes "
            f"{calls[min(len(ours), len(theirs))]}, rank {shorter} makes no more calls"
        )
    return None
