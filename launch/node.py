"""Run one node's processes: `python -m launch.node` is what train.sh starts, once for each launch.

It wraps torchrun. Before it come the checks that torchrun answers with a traceback or with silence:
is the address one that exists, is the port free, are the other nodes there, which interface leads to
them. After it, an orderly stop and a refusal print nothing, and a crash one line that names the rank.
"""

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed import DistError, TCPStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig

from launch import network
from launch.meeting import Node0, NotMet, meet_as_node_0, meet_as_other, open_store, say
from launch.tether import end_with_parent

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TETHER = Path(__file__).with_name("tether.py")
LOGGERS_OF_TORCHRUN = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
SAID_BY_US = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode")


def main(argv: list[str] | None = None) -> int:
    """Run this node's processes once.

    Returns:
        0 if all succeeded, 1 if one failed or a node did not come, 2 if the settings cannot work,
        128 and the number of a signal that ended them.
    """
    settings = _parse(argv)
    end_with_parent(settings.parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no KeyboardInterrupt while nothing is started
    try:
        address, port, store = _prepare(settings)
    except ValueError as error:
        return _give_up(str(error), "refused", 2)
    except NotMet as error:
        return _give_up(str(error), "unmet", 1)
    code = _run_torchrun(settings, address, port)
    del store  # it must live as long as the processes
    return code


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch.node", description=__doc__.split("\n")[0])
    parser.add_argument("--parent", type=int, required=True, help="process whose end ends everything")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--nproc-per-node", type=int, default=1)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=0, help="0: a free one, on one node")
    parser.add_argument("--grace", type=int, default=120, help="seconds from a stop signal to the kill")
    parser.add_argument("--join-wait", type=int, default=1800, help="seconds to wait for the others")
    parser.add_argument("module", help="what each process runs, and its arguments")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def _prepare(settings: argparse.Namespace) -> tuple[str, int, TCPStore | None]:
    """Choose the interface and meet the other nodes -> where torchrun's store is, and the store on node 0."""
    master = settings.master_addr.strip("[]")
    addresses = []
    if settings.nnodes > 1:
        addresses = network.resolve(master, min(network.RESOLVE_SECONDS, settings.join_wait))
    chosen = network.choose_interface(master, addresses, settings.nnodes)
    _set_interface(chosen)
    store = None
    port = settings.master_port
    if settings.node_rank == 0:
        store = open_store(port)
        port = store.port
    if settings.nnodes == 1:
        return "127.0.0.1", port, store
    if settings.node_rank == 0:
        meet_as_node_0(store, settings.nnodes, settings.join_wait)
    else:
        node0 = Node0(master, addresses[0], port)
        meet_as_other(node0, settings.node_rank, settings.nnodes, settings.join_wait)
    return f"[{master}]" if ":" in master else master, port, store


def _set_interface(chosen: network.Interface | None) -> None:
    """Tell gloo and NCCL the interface, and the user which and why."""
    settings = network.interface_settings(chosen, dict(os.environ))
    os.environ.update(settings)
    if settings:
        names = " and ".join(name.split("_")[0].replace("GLOO", "gloo") for name in settings)
        say(
            f"{names} use {chosen.name} ({chosen.address}): {chosen.reason}; "
            f"{' and '.join(settings)} choose another"
        )
    elif chosen is None and not os.environ.get("GLOO_SOCKET_IFNAME"):
        say("which interface leads to MASTER_ADDR is unknown: gloo and NCCL choose for themselves")


def _run_torchrun(settings: argparse.Namespace, address: str, port: int) -> int:
    """Start the processes and see them through -> as `main` returns."""
    if "LOGLEVEL" not in os.environ:  # who asks torch for its log gets all of it
        for name in LOGGERS_OF_TORCHRUN:
            logging.getLogger(name).addFilter(_is_news)
    # Each worker is tied to this process, then becomes the trainer.
    tied = ["-I", "-S", str(TETHER), str(os.getpid()), sys.executable, "-u", "-m", settings.module]
    words = f"""
        --nnodes {settings.nnodes} --node-rank {settings.node_rank}
        --nproc-per-node {settings.nproc_per_node}
        --master-addr {address} --master-port {port} --max-restarts 0
        --signals-to-handle {SIGNALS} --no-python
        """.split()
    words += _grace_words(settings.grace)
    try:
        torchrun.run(torchrun.parse_args([*words, sys.executable, *tied, *settings.arguments]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as failed:
        if not _has_outcome():  # otherwise the trainer has said why
            say(f"error: {_describe_failure(failed)}")
        return 1
    except DistError as error:
        say(f"error: the nodes lost each other while they started: {str(error).splitlines()[0]}")
        return 1
    return 0


def _grace_words(grace: int) -> list[str]:
    """Return torchrun's flag for the seconds between a stop signal and the kill."""
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return ["--shutdown-timeout", str(grace)]
    PContext.close.__defaults__ = (None, grace)  # torch 2.11: a default of 30 s that no flag changes
    return []


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(SAID_BY_US)


def _describe_failure(failed: ChildFailedError) -> str:
    rank, first = failed.get_first_failure()
    if first.exitcode < 0:
        how = f"was killed by {first.signal_name()}"
        if -first.exitcode == signal.SIGKILL:
            how += " (if nobody did, the machine ran out of memory: see dmesg)"
    else:
        how = f"failed with exit code {first.exitcode}"
    others = len(failed.failures) - 1
    more = f"; {others} more at the same time" if others else ""
    return f"rank {rank} (local rank {first.local_rank}, process {first.pid}) {how}{more}"


def _has_outcome() -> bool:
    path = os.environ.get("ITHACA_OUTCOME_FILE")
    return path is not None and Path(path).exists()


def _give_up(text: str, outcome: str, code: int) -> int:
    """Say why nothing was started, and tell train.sh."""
    say(f"error: {text}")
    path = os.environ.get("ITHACA_OUTCOME_FILE")
    if path is not None:
        Path(path).write_text(outcome)
    return code


if __name__ == "__main__":
    sys.exit(main())
