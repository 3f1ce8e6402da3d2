"""What one rank found wrong, known to all of them, so that all end together and name it."""

import socket
from typing import TypeVar

import torch
import torch.distributed as dist

from parallel.collectives import all_reduce
from parallel.layout import Axis, Layout

Found = TypeVar("Found")


class WrongNumbers(RuntimeError):
    """A rank holds or computes numbers that are wrong; all ranks raise it with the same text."""


def place_of(rank: int) -> str:
    """Name this process: its rank and its machine."""
    return f"rank {rank} on {socket.gethostname()}"


def any_rank(layout: Layout, *, found: bool) -> bool:
    """Tell whether any rank of the world found something; collective, the host waits."""
    count = torch.tensor(int(found), device=layout.device)
    return int(all_reduce(count, layout.world)) > 0


def gather(own: Found, world: Axis) -> list[Found]:
    """Collect what each rank found, in the order of the ranks."""
    if world.size == 1:
        return [own]
    found: list = [None] * world.size
    dist.all_gather_object(found, own, group=world.group)
    return found
