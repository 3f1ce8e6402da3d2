"""Notes every collective of this process in its record, whoever calls it and on any backend.

Our own collectives, FSDP2's, the pipeline's sends and receives and those of checkpoints all go
through the methods of torch's ProcessGroup and wait by Work.wait. These two classes are the one
place below all of them, and above the backends, so that is where the log listens: a call costs two
notes, about three microseconds, beside a collective of a hundred and more.

On GPUs `Work.wait` lets the stream wait and not the host. There the record says which collectives
the host has handed to the device, and NCCL's own flight recorder what the device has done.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed import ProcessGroup, Work

from parallel.layout import Axis
from parallel.rank_record import NO_PEER, RankRecord

COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
}
"""Method of ProcessGroup -> what it is called; torch 2.11 and 2.13 have different ones of them."""
PAIRS = {"send": "send", "recv": "recv"}
"""The same for methods between two ranks: their second argument is the other one."""
MOST_PENDING = 4096
"""Collectives that were begun and not waited for; more than that are forgotten."""


class CollectiveLog:
    """Listens to all collectives from `listen` to `close`.

    Only axes that were given a name are noted: what a thread beside the training does on groups of
    its own is no sign of life of the training.
    """

    def __init__(self, record: RankRecord):
        self.record = record
        self._slots: dict[ProcessGroup, tuple[int, int, tuple[int, ...]]] = {}
        """Slots of a group's collectives, and of its sends and receives; its ranks."""
        self._numbers: dict[int, int] = {}
        """Collectives of each slot so far."""
        self._pending: dict[int, tuple[int, bytes, int, int]] = {}
        """Slot, op, number and peer by the id of the Work that is to be waited for."""
        self._originals: list[tuple[type, str, Any]] = []

    def listen(self) -> None:
        """Hear every collective from now on."""
        assert not self._originals, "it listens already"
        for name, op in COLLECTIVES.items():
            self._replace(ProcessGroup, name, self._noting(op))
        for name, op in PAIRS.items():
            self._replace(ProcessGroup, name, self._noting_pair(op))
        self._replace(Work, "wait", self._waiting)

    def name_axes(self, axes: Iterable[Axis]) -> None:
        """Give the groups of these axes a slot each, under the name that comes first."""
        for axis in axes:
            group = axis.group
            if axis.size == 1 or group is None or group in self._slots:
                continue
            own = self.record.add_slot(axis.name, axis.ranks, counts_alike=True)
            pairs = own
            if axis.name == "pp":
                pairs = self.record.add_slot("pp pairs", axis.ranks, counts_alike=False)
            self._slots[group] = (own, pairs, axis.ranks)

    def close(self) -> None:
        """Give torch its own methods back, and forget all groups."""
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals = []
        self._slots = {}
        self._numbers = {}
        self._pending = {}
        self.record.drop_slots()

    # ------------------------------------------------------------ what takes the methods' places

    def _replace(
        self, owner: type, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        original = getattr(owner, name, None)
        if original is not None:
            # As the class holds it: what getattr returns would no longer take `self` when put back.
            self._originals.append((owner, name, inspect.getattr_static(owner, name)))
            setattr(owner, name, wrap(original))

    def _noting(self, op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make what notes a collective of the whole group."""
        word = op.encode()

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def noted(group: ProcessGroup, *args: Any, **options: Any) -> Any:
                found = self._slots.get(group)
                if found is None:
                    return original(group, *args, **options)
                slot = found[0]
                number = self._next_number(slot)
                self.record.begin(slot, word, number, count_bytes(args[0]) if args else 0)
                work = original(group, *args, **options)
                self._expect(work, (slot, word, number, NO_PEER))
                return work

            return noted

        return wrap

    def _noting_pair(self, op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Make what notes a send or a receive."""
        word = op.encode()

        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def noted(group: ProcessGroup, tensors: Any, other: int, *args: Any) -> Any:
                found = self._slots.get(group)
                if found is None:
                    return original(group, tensors, other, *args)
                _, slot, ranks = found
                number = self._next_number(slot)
                peer = ranks[other]
                self.record.begin(slot, word, number, count_bytes(tensors), peer)
                work = original(group, tensors, other, *args)
                self._expect(work, (slot, word, number, peer))
                return work

            return noted

        return wrap

    def _waiting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Make what notes a wait."""

        def waiting(work: Work, *args: Any, **options: Any) -> Any:
            found = self._pending.pop(id(work), None)
            if found is None:
                return original(work, *args, **options)
            slot, op, number, peer = found
            since = self.record.wait(slot, op, number, peer)
            done = original(work, *args, **options)
            # A wait that fails stays in the record: it says where the rank was.
            self.record.end_wait(slot, since)
            return done

        return waiting

    def _next_number(self, slot: int) -> int:
        number = self._numbers.get(slot, 0) + 1
        self._numbers[slot] = number
        return number

    def _expect(self, work: Work | None, found: tuple[int, bytes, int, int]) -> None:
        """Remember which collective a Work is; one whose id is used again has been dropped."""
        if work is None:  # one of several that are waited for together
            return
        if len(self._pending) >= MOST_PENDING:
            self._pending.clear()
        self._pending[id(work)] = found


def count_bytes(tensors: Any) -> int:
    """Count the bytes of a tensor, or of nested lists of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    if isinstance(tensors, list | tuple):
        return sum(count_bytes(part) for part in tensors)
    return 0
