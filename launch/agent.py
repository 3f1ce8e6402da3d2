"""Run this node's processes by torchrun, once the nodes have met.

torchrun's own messages about an orderly stop or a refusal are left out. After a crash one line
names the rank that failed first, below the traceback of the worker itself.
"""

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

from launch.meeting import Node0, meet_as_node_0, meet_as_other, open_store
from launch.outcome import NotMet, give_up, read_outcome, read_outcome_of_failure, say
from launch.settings import Settings
from launch.watch import Watch, announce
from launch.watchdog import watched

SIGNALS_OF_TORCHRUN = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""The signals that torchrun is to hand on; any other one would kill it and orphan its workers."""
TETHER = Path(__file__).with_name("tether.py")
LOGGERS_OF_TORCHRUN = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
SAID_BY_US = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode")
"""The beginnings of torchrun's messages about ends that this file or the trainer reports."""


def run(settings: Settings, addresses: list[str]) -> int:
    """Meet the other nodes, then run the processes -> the exit code of `launch.node`.

    Args:
        addresses: what MASTER_ADDR resolves to; not read with one node.
    """
    try:
        store, port = _meet(settings, addresses)
    except (ValueError, NotMet) as error:
        return give_up(error)
    if settings.nnodes == 1:
        code, _ = _run_torchrun(settings, "127.0.0.1", port)
    else:
        code = _run_among_others(settings, Node0(settings.master, addresses[0], port))
    del store  # it must live as long as the processes
    return code


def _run_among_others(settings: Settings, node0: Node0) -> int:
    """Run the processes, follow other nodes' failures, tell them of ours -> the exit code."""
    # While torchrun runs here, the watch ends it when another node has failed.
    watch = Watch(node0, settings.node_rank)
    watch.start()
    address = f"[{node0.master}]" if ":" in node0.master else node0.master
    code, failure = _run_torchrun(settings, address, node0.port)
    watch.is_over.set()

    if watch.heard is None:  # the end is this node's own
        outcome = read_outcome()
        if failure and outcome in (None, "refused"):
            announce(node0, settings.node_rank, failure, is_refusal=outcome == "refused")
        return code
    # The end came from another node; a process here may have found the same error.
    if read_outcome_of_failure() is not None:
        return code
    if watch.heard.is_refusal:
        return give_up(ValueError(watch.heard.describe()))
    say(f"error: {watch.heard.describe()}")
    return 1


def _meet(settings: Settings, addresses: list[str]) -> tuple[TCPStore | None, int]:
    """Wait until all nodes are there -> the store (on node 0 only) and its port."""
    if settings.node_rank > 0:
        node0 = Node0(settings.master, addresses[0], settings.port)
        meet_as_other(node0, settings.node_rank, settings.nnodes, settings.join_wait)
        return None, settings.port
    store = open_store(settings.port)
    if settings.nnodes > 1:
        meet_as_node_0(store, settings.nnodes, settings.join_wait)
    return store, store.port


def _run_torchrun(settings: Settings, address: str, port: int) -> tuple[int, str]:
    """Run the processes to their end -> the exit code, and what failed ("" if nothing)."""
    if "LOGLEVEL" not in os.environ:  # whoever asks torch for its log gets all of it
        for name in LOGGERS_OF_TORCHRUN:
            logging.getLogger(name).addFilter(_is_news)
    # A worker first ties its life to this process, then becomes the trainer.
    tied = ["-I", "-S", str(TETHER), str(os.getpid()), sys.executable, "-u", "-m", settings.module]
    words = f"""
        --nnodes {settings.nnodes} --node-rank {settings.node_rank}
        --nproc-per-node {settings.nproc_per_node}
        --master-addr {address} --master-port {port} --max-restarts 0
        --signals-to-handle {SIGNALS_OF_TORCHRUN} --no-python
        """.split()
    words += _grace_words(settings.grace)
    node0 = Node0(settings.master, address, port) if settings.nnodes > 1 else None
    with watched(node0, settings.node_rank, settings.nnodes, settings.nproc_per_node) as watchdog:
        try:
            torchrun.run(torchrun.parse_args([*words, sys.executable, *tied, *settings.arguments]))
            return 0, ""
        except SignalException as stop:
            return 128 + stop.sigval, ""
        except ChildFailedError as failed:
            if read_outcome_of_failure() is not None:  # the trainer has already said why
                return 1, "it refused to train; its own output says why"
            text = watchdog.verdict or _describe_failure(failed)
        except DistError as error:
            text = f"the nodes lost each other while they started: {str(error).splitlines()[0]}"
    if watchdog.verdict is None:  # else it is said already
        say(f"error: {text}")
    return 1, text


def _grace_words(grace: int) -> list[str]:
    """Return torchrun's flag for the seconds between a stop signal and the kill."""
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return ["--shutdown-timeout", str(grace)]
    # torch 2.11 has no such flag, and closes its workers with this argument's default of 30 s.
    PContext.close.__defaults__ = (None, grace)
    return []


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a message of torchrun says what nobody else does."""
    return not str(record.msg).startswith(SAID_BY_US)


def _describe_failure(failed: ChildFailedError) -> str:
    """Name the rank that failed first, and how, in a line."""
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
