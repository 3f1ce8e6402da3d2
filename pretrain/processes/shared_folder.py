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
    """Check that every rank finds a file that rank 0 writes into `root`; collective over `world`.

    Raises:
        ValueError: some ranks have another folder there; on all ranks.
    """
    # Rank 0 leaves a mark, under a new name each time: network file systems remember what was not
    # there.
    name = f".seen-by-all-ranks.{uuid.uuid4().hex}"
    problem: str | None = None
    if world.rank == 0:
        try:
            (Path(root) / name).touch()
        except OSError as error:
            problem = error.strerror
    told = [name, problem]
    dist.broadcast_object_list(told, src=0, group=world.group)
    name, problem = told
    if problem:
        raise ValueError(f"save = {root}: cannot be written ({problem}). Fix: give another --save.")

    # Everybody looks for it; the hosts that do not find it are named.
    mark = Path(root) / str(name)
    hosts: list[str | None] = [None] * world.size
    host = None if mark.exists() else socket.gethostname()
    dist.all_gather_object(hosts, host, group=world.group)
    if world.rank == 0:
        mark.unlink(missing_ok=True)
    blind = [rank for rank, host in enumerate(hosts) if host is not None]
    if blind:
        raise ValueError(
            f"save = {root}: must be one folder for all ranks ({describe_ranks(blind)}, first on "
            f"{hosts[blind[0]]}, does not find there what rank 0 wrote). Fix: a folder on a "
            "shared file system, by its whole path."
        )
