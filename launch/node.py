"""Run one node's processes: train.sh starts `python -m launch.node` once for each launch.

It checks first what would end in a traceback or in silence (does the address exist, is the port
free, which interface leads to the other nodes), starts the processes, which import torch, and does
the same to meet the other nodes. The exit code is 0 if all processes succeeded, 1 if one failed or
a node did not come, 2 if the settings cannot work, 128 + the number of a signal that ended them.
"""

import os
import sys

from launch import network
from launch import story as stories
from launch.console import outlive_console
from launch.outcome import give_up, say, say_that_it_hears
from launch.records import open_records
from launch.settings import Settings, parse
from launch.tether import StopAsked, end_with_parent
from launch.workers import Workers


def main(argv: list[str] | None = None) -> int:
    """Run this node's processes once -> the exit code."""
    story = stories.begin()
    settings = parse(argv)
    # No process may go on when train.sh is gone.
    if not end_with_parent(settings.parent):
        say(
            "warning: another program runs between train.sh and Python, so that processes may stay "
            "behind after a kill -9. Fix: a wrapper in ITHACA_PYTHON that ends with exec"
        )
    asked = StopAsked()
    say_that_it_hears()
    try:
        addresses = _choose_interface(settings)
        address = network.shown_address(dict(os.environ))
        # The nodes meet on node 0.
        listening = network.listen(settings.port) if settings.node_rank == 0 else None
    except ValueError as error:
        return give_up(error)
    port = settings.port if listening is None else listening.getsockname()[1]
    records = open_records()
    workers = Workers(settings, port, records / "facts.json")
    from launch import agent  # torch takes seconds, in which the processes import it, too

    launch = agent.Launch(settings, workers, asked, story, address)
    return agent.run(launch, addresses, listening, records)


def _choose_interface(settings: Settings) -> list[str]:
    """Choose the network between the nodes -> the addresses of node 0, none for a single node."""
    addresses: list[str] = []
    if settings.nnodes > 1:
        wait = min(network.RESOLVE_SECONDS, settings.join_wait)
        addresses = network.resolve(settings.master, wait)
    chosen = network.choose_interface(settings.master, addresses, settings.nnodes)
    _set_interface(chosen, settings.nnodes)
    return addresses


def _set_interface(chosen: network.Interface | None, nnodes: int) -> None:
    """Tell gloo and NCCL the interface, and the user which it is and why."""
    settings = network.interface_settings(chosen, dict(os.environ))
    os.environ.update(settings)  # the processes inherit it
    if chosen is not None and settings and nnodes > 1:  # on one node it is always lo
        names = " and ".join(name.split("_")[0].replace("GLOO", "gloo") for name in settings)
        say(
            f"{names} use {chosen.name} ({chosen.address}): {chosen.reason}; "
            f"{' and '.join(settings)} choose another"
        )
    elif chosen is None and not os.environ.get("GLOO_SOCKET_IFNAME"):
        say("which interface leads to MASTER_ADDR is unknown: gloo and NCCL choose for themselves")


if __name__ == "__main__":
    outlive_console()
    code = main()
    sys.stderr.flush()
    # The next launch need not wait until Python has taken torch down.
    os._exit(code)
