"""Run this node's processes by torchrun, once the nodes have met.

What torchrun says of an orderly stop and of a refusal is left out; a crash gets one line that names
the rank, after the worker's own traceback.
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
from launch.report import NotMet, give_up, read_outcome, read_outcome_of_failure, say
from launch.settings import Settings
from launch.watch import Watch, announce

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
TETHER = Path(__file__).with_name("tether.py")
LOGGERS_OF_TORCHRUN = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)
SAID_BY_US = ("Received %s death signal", "Sending process %s closing signal", "failed (exitcode")


def run(settings: Settings, addresses: list[str]) -> int:
    """Meet the other nodes, then run the processes -> the exit code of `launch.node`.

    Args:
        addresses: what MASTER_ADDR resolves to; with one node it is not looked at.
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
    """Run the processes, heed the other nodes' failures and tell them of ours -> the exit code."""
    watch = Watch(node0, settings.node_rank)
    watch.start()
    address = f"[{node0.master}]" if ":" in node0.master else node0.master
    code, failure = _run_torchrun(settings, address, node0.port)
    watch.is_over.set()
    if watch.heard is None:
        outcome = read_outcome()
        if failure and outcome in (None, "refused"):
            announce(node0, settings.node_rank, failure, is_refusal=outcome == "refused")
        return code
    if read_outcome_of_failure() is not None:  # a process here has found the same
        return code
    if watch.heard.is_refusal:
        return give_up(ValueError(watch.heard.describe()))
    say(f"error: {watch.heard.describe()}")
    return 1


def _meet(settings: Settings, addresses: list[str]) -> tuple[TCPStore | None, int]:
    """Wait until all nodes are there -> on node 0 the store, and its port everywhere."""
    if settings.node_rank > 0:
        node0 = Node0(settings.master, addresses[0], settings.port)
        meet_as_other(node0, settings.node_rank, settings.nnodes, settings.join_wait)
        return None, settings.port
    store = open_store(settings.port)
    if settings.nnodes > 1:
        meet_as_node_0(store, settings.nnodes, settings.join_wait)
    return store, store.port


def _run_torchrun(settings: Settings, address: str, port: int) -> tuple[int, str]:
    """Start the processes and see them through -> the exit code, and what failed, if anything."""
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
        return 128 + stop.sigval, ""
    except ChildFailedError as failed:
        if read_outcome_of_failure() is not None:  # the trainer has said why
            return 1, "it refused to train; its own output says why"
        text = _describe_failure(failed)
        say(f"error: {text}")
        return 1, text
    except DistError as error:
        text = f"the nodes lost each other while they started: {str(error).splitlines()[0]}"
        say(f"error: {text}")
        return 1, text
    return 0, ""


def _grace_words(grace: int) -> list[str]:
    """Return torchrun's flag for the seconds between a stop signal and the kill."""
    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return ["--shutdown-timeout", str(grace)]
    # In torch 2.11 no flag changes the 30 s that are the argument's default.
    PContext.close.__defaults__ = (None, grace)
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
