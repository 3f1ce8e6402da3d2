"""Whether all ranks see the same --save folder.

Each rank writes its own file of a checkpoint. Where two nodes have two folders of one name, a
checkpoint would be published without the files of the other node.
"""

import os
import socket
import uuid
from pathlib import Path

import torch.distributed as dist

from parallel.layout import Axis
from pretrain.processes.agreement import describe_ranks


def require_shared_folder(root: str | os.PathLike, world: Axis) -> None:
    """Check that every rank finds what rank 0 writes into `root`; collective over `world`.

    Raises:
        ValueError: some ranks have another folder there; on all ranks.
    """
    # A new name each time: network file systems remember what was not there.
    told: list[str | None] = [f".seen-by-all-ranks.{uuid.uuid4().hex}", None]
    if world.rank == 0:
        try:
            (Path(root) / str(told[0])).touch()
        except OSError as error:
            told[1] = error.strerror
    dist.broadcast_object_list(told, src=0, group=world.group)
    if told[1]:
        raise ValueError(f"save = {root}: cannot be written ({told[1]}). Fix: give another --save.")
    mark = Path(root) / str(told[0])
    blind_on: list[str | None] = [None] * world.size
    dist.all_gather_object(
        blind_on, None if mark.exists() else socket.gethostname(), group=world.group
    )
    if world.rank == 0:
        mark.unlink(missing_ok=True)
    blind = [rank for rank, host in enumerate(blind_on) if host is not None]
    if blind:
        raise ValueError(
            f"save = {root}: must be one folder for all ranks ({describe_ranks(blind)}, first on "
            f"{blind_on[blind[0]]}, does not find there what rank 0 wrote). Fix: a folder on a "
            "shared file system, by its whole path."
        )
