"""Stand in for the trainer without torch: `ACTION` in the environment says what a rank does."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def main() -> int:
    if "ITHACA_FACTS" in os.environ:  # where the launcher compares nodes
        partial = Path(os.environ["ITHACA_FACTS"] + ".partial")
        partial.write_text('{"groups": []}')
        partial.rename(os.environ["ITHACA_FACTS"])
    if not sys.stdin.readline():  # the launcher's word that all nodes are there
        return 0
    rank = int(os.environ["RANK"])
    is_first_here = os.environ["LOCAL_RANK"] == "0"
    here = Path(os.environ["HERE"])
    outcome = Path(os.environ["ITHACA_OUTCOME_FILE"])
    action = os.environ.get("ACTION", "done")
    if action == "train once":
        action = "done" if (here / f"ready.{rank}").exists() else "train"
    (here / f"pid.{rank}").write_text(str(os.getpid()))
    (here / f"ready.{rank}").touch()
    if action == "done":
        if is_first_here:
            outcome.write_text("done")
        return 0
    if action == "refuse":
        if is_first_here:
            print("error: lr = -1: must be positive. Fix: a positive one.", file=sys.stderr)
            outcome.write_text("refused")
        return 2
    if action == "refuse on node 1" and rank == 1:
        print("error: data_path = x: does not exist. Fix: another one.", file=sys.stderr)
        outcome.write_text("refused")
        return 2
    if action == "crash" and rank == 1:
        raise RuntimeError("the loss is a pear")
    if action == "segfault" and rank == 1:
        ctypes.string_at(0)
    if action == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "all_reduce":
        _all_reduce(here, rank)
        if is_first_here:
            outcome.write_text("done")
        return 0
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: _stop(outcome, is_first_here=is_first_here))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    while True:  # as if training
        time.sleep(60)


def _stop(outcome: Path, *, is_first_here: bool) -> None:
    """End as the trainer does before its first step, whoever sent the signal."""
    if is_first_here:
        outcome.write_text("unstarted")
    sys.exit(0)


def _all_reduce(here: Path, rank: int) -> None:
    """Sum over all ranks by gloo, the way start_world joins them."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("cpu:gloo")
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    (here / f"sum.{rank}").write_text(f"{total.item()} over {interface}")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
