"""Notes what every rank sends and in which order, below all libraries.

FSDP2, DTensor, pipelining and our own collectives all pass through here.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Call:
    """Describes one collective, or one message between two ranks.

    Of a message `peer` is the other's global rank.
    """

    operation: str
    group: str
    ranks: tuple[int, ...]
    elements: int | None
    """None where ranks may send unequal parts."""
    dtype: str
    step: int
    peer: int | None = None
    sent_parts: tuple[int, ...] = ()
    """Elements that an all-to-all sends to each rank of the group."""
    received_parts: tuple[int, ...] = ()
    """Elements that it receives from each."""
    sent_bytes: float = 0
    """Bytes that this rank sends to others, as a ring does it in collectives of a whole group."""

    def __str__(self) -> str:
        return f"{self.operation} of {self.elements} x {self.dtype} in step {self.step}"


class Recorder(TorchDispatchMode):
    """Notes every call of c10d while it is entered; `step` is written into each."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self.step = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.note(func, args)
        return func(*args, **(kwargs or {}))

    def note(self, function, args) -> None:
        """Note the operation where it is a call of c10d."""
        if function.namespace not in ("c10d", "_c10d_functional"):
            return
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
        operation = function._schema.name.split("::")[1]
        tensors = [
            tensor
            for value in args
            for tensor in (value if isinstance(value, list) else [value])
            if isinstance(tensor, torch.Tensor)
        ]
        peer = next((ranks[values[end]] for end in ("dst", "src") if end in values), None)
        is_exchange = "alltoall" in operation
        sent_parts = _parts(values, "input", len(ranks)) if is_exchange else ()
        self.calls.append(
            Call(
                operation,
                name,
                ranks,
                None if is_exchange else tensors[0].numel(),
                str(tensors[0].dtype).removeprefix("torch."),
                self.step,
                peer,
                sent_parts,
                _parts(values, "output", len(ranks)) if is_exchange else (),
                _sent_bytes(operation, tensors, sent_parts, ranks),
            )
        )


def _parts(values: dict, side: str, size: int) -> tuple[int, ...]:
    """Count the elements of each rank's block on one side of an all-to-all."""
    whole = values[side]
    rows = values.get(f"{side}_split_sizes") or [whole.shape[0] // size] * size
    of_row = whole.numel() // max(1, whole.shape[0])
    return tuple(count * of_row for count in rows)


def _sent_bytes(
    operation: str, tensors: list[torch.Tensor], sent_parts: tuple[int, ...], ranks: tuple[int, ...]
) -> float:
    """Count the bytes that leave this rank."""
    if operation == "recv_":
        return 0
    if operation == "send":
        return tensors[0].nbytes
    if sent_parts:
        own = sent_parts[ranks.index(dist.get_rank())]
        return tensors[0].element_size() * (sum(sent_parts) - own)
    # A ring passes all but one part of the larger side on; a sum goes round twice.
    rounds = 2 if operation.startswith("allreduce") else 1
    largest = max(tensor.nbytes for tensor in tensors)
    return rounds * largest * (len(ranks) - 1) / len(ranks)


def first_difference(calls: list[list[Call]], numbers: list[int] | None = None) -> str | None:
    """Say where two ranks disagree, or return None.

    Any two ranks must make the collectives of all groups that hold both in one common order, and
    each must receive what the other sends.

    Args:
        calls: of each rank.
        numbers: the ranks' global ranks; by default 0, 1, ...
    """
    numbers = numbers or list(range(len(calls)))
    of_rank = dict(zip(numbers, calls, strict=True))
    for a, b in combinations(numbers, 2):
        ours, theirs = (
            [
                call
                for call in of_rank[rank]
                if call.peer is None and a in call.ranks and b in call.ranks
            ]
            for rank in (a, b)
        )
        problem = _compare(ours, theirs, a, b)
        for sender, receiver in ((a, b), (b, a)):
            sent = _messages(of_rank[sender], "send", receiver)
            got = _messages(of_rank[receiver], "recv_", sender)
            problem = problem or _compare(sent, got, sender, receiver, ignore_operation=True)
        if problem:
            return problem
    return None


def _messages(calls: list[Call], operation: str, peer: int) -> list[Call]:
    return [call for call in calls if call.operation == operation and call.peer == peer]


def _compare(
    ours: list[Call], theirs: list[Call], a: int, b: int, *, ignore_operation: bool = False
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
        problem = _compare_blocks(mine, other, a, b) or _compare_blocks(other, mine, b, a)
        if problem:
            return f"group {mine.ranks}: call {index}: {problem}"
    if len(ours) != len(theirs):
        longer, shorter, calls = (a, b, ours) if len(ours) > len(theirs) else (b, a, theirs)
        return (
            f"call {min(len(ours), len(theirs))}: rank {longer} makes "
            f"{calls[min(len(ours), len(theirs))]}, rank {shorter} makes no more calls"
        )
    return None


def _compare_blocks(mine: Call, other: Call, a: int, b: int) -> str | None:
    """Compare what rank a sends to b in an all-to-all with what b expects from a."""
    if not mine.sent_parts or not other.received_parts:
        return None
    sent = mine.sent_parts[mine.ranks.index(b)]
    expected = other.received_parts[other.ranks.index(a)]
    if sent == expected:
        return None
    return f"{mine.operation}: rank {a} sends {sent} elements to rank {b}, which expects {expected}"
