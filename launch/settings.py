"""Read what train.sh asks of one node's launch."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Describes one launch of this node's processes."""

    parent: int
    """The process id of train.sh, whose end ends everything."""
    nnodes: int
    node_rank: int
    nproc_per_node: int
    master: str
    """MASTER_ADDR: a name or an address, without the brackets of IPv6."""
    port: int
    """MASTER_PORT; 0 on one node, where the kernel chooses."""
    grace: int
    """Seconds from a stop signal to the kill."""
    join_wait: int
    """Seconds to wait for the other nodes."""
    number: int
    """Counts the launches of this train.sh, from 1."""
    pause: int
    """Seconds to wait before the processes train: the launch before has failed."""
    errors: str
    """The folder for what goes wrong, of the run's user; empty without --save."""
    module: str
    """The Python module that each process runs."""
    arguments: list[str]
    """What the module gets as its command line."""


def parse(argv: list[str] | None) -> Settings:
    """Read the command line of `python -m launch.node`."""
    parser = argparse.ArgumentParser(prog="launch.node", description=__doc__)
    for name in ("parent", "nnodes", "node-rank", "nproc-per-node"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--master-addr", dest="master", required=True)
    parser.add_argument("--master-port", dest="port", type=int, required=True)
    parser.add_argument("--errors", default="")
    for name in ("grace", "join-wait", "number", "pause"):
        parser.add_argument(f"--{name}", type=int, required=True)
    # From the first word without dashes on, everything is the trainer's own.
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    found = vars(parser.parse_args(argv))
    found["master"] = found["master"].strip("[]")  # an IPv6 address may come as [::1]
    return Settings(**found)
