"""Time from a SIGKILL to the first new step, and that of a phase crossing:
`bash launch/ithaca.sh bench restart`.

A small run on two layouts is killed again and again; what it says of each way back (the event
`recovered`) is split into its parts: to notice, to end, to launch, imports, plan, groups, state,
first step. Beside them stands what a part must take: the imports alone in a fresh process. From the
measured parts follows on paper what share of the time a run of 1,024 GPUs trains.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import yaml

from tools.bench.option_checks import find_too_small
from tools.bench.report import bar, bar_at_least, describe_machine, markdown_table, publish
from tools.faults.kills import Killer
from tools.faults.launched_run import LaunchedRun
from tools.shared.effective_time import (
    GIGABYTE,
    GROUPS_SECONDS,
    NOTICE_SECONDS,
    SECONDS_PER_MINUTE,
    FailureCosts,
)

PART = re.compile(r"([\d.]+) s ([a-z][a-z ]*[a-z])")
"""A part of the event `recovered`, as pretrain/processes/recovery.py writes it."""
SAVE_INTERVAL = 5
STEPS_PER_KILL = 12
TOKENS_PER_STEP = 256
OURS = 1.2
"""Times what it must be, at most, for a part that is ours."""
SHARE_BAR = 0.98
IMPORTS = """
import pretrain.train
from parallel.layout import import_parallel_state
import_parallel_state()
"""
"""What a worker imports before it says that it is ready: pretrain/processes/recovery.py."""


@dataclass(kw_only=True)
class AtScale:
    """What is assumed of a run on many GPUs."""

    mean_hours_to_failure: float = 7.9
    """The mean of jobs of 1,024 GPUs on Meta's research clusters (arXiv 2410.21680)."""
    notice_seconds: float = NOTICE_SECONDS
    """The time until a rank that hangs is found; one that dies is known at once."""
    groups_seconds: float = GROUPS_SECONDS
    """The time to make the groups of all ranks; on this machine far less."""
    read_gigabytes_per_second: float = 1
    """The rate at which each node reads a checkpoint."""
    state_gigabytes_per_node: float = 80
    """What a node reads of 70B parameters over 8 x 4 ranks: the fp32 weights of a stage (70 GB),
    and its share of the moments and of the files to verify."""
    save_minutes: float = 5
    """The time between saves; half of it is trained again after a failure."""
    stall_seconds: float = 0.2
    """The time that a save keeps the steps waiting."""


@dataclass(kw_only=True)
class Arguments:
    kills: int = 5
    """Kills; the middle one counts of each part."""
    processes: int = 2
    """Processes of the run."""
    at_scale: AtScale = field(default_factory=AtScale)
    """What the estimate for 1,024 GPUs assumes."""
    output: str | None = None
    """Also append the report to this file."""


def read_parts(text: str) -> dict[str, float]:
    """Read the parts of a way back: "back at step 8 after 9.1 s: 0.1 s to notice, ..."."""
    return {name: float(seconds) for seconds, name in PART.findall(text.partition(":")[2])}


def middle_of(ways: Iterable[dict[str, float]]) -> dict[str, float]:
    """Take the median of each part."""
    values = defaultdict(list)
    for way in ways:
        for name, seconds in way.items():
            values[name].append(seconds)
    return {name: median(each) for name, each in values.items()}


def estimate(parts: dict[str, float], assumed: AtScale) -> tuple[float, list[str]]:
    """Estimate the share of the time in which a large run trains; also as lines of arithmetic."""
    # Ours as measured; what depends on the cluster's size as assumed.
    replaced = ("to notice", "groups", "state")
    costs = FailureCosts(
        hours_to_failure=assumed.mean_hours_to_failure,
        notice_seconds=assumed.notice_seconds,
        own_seconds=sum(seconds for name, seconds in parts.items() if name not in replaced),
        groups_seconds=assumed.groups_seconds,
        read_bytes=assumed.state_gigabytes_per_node * GIGABYTE,
        read_bytes_per_second=assumed.read_gigabytes_per_second * GIGABYTE,
        save_seconds=assumed.save_minutes * SECONDS_PER_MINUTE,
        stall_seconds=assumed.stall_seconds,
    )
    return costs.effective_share, costs.arithmetic()


def time_imports(count: int) -> float:
    """Time the imports of the trainer in a fresh process; the median of `count`."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def run(arguments: Arguments) -> int:
    """Kill a run, print where the time went; 0 if the bars hold, 2 where it cannot run."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="ithaca-restart-") as folder:
        events = _killed_run(Path(folder), arguments)
    ways = [read_parts(event["text"]) for event in events if event["event"] == "recovered"]
    failures = middle_of(way for way in ways if "to notice" in way)
    crossings = middle_of(way for way in ways if "to notice" not in way)
    rows = [
        [part, *(f"{parts[part]:.1f}" if part in parts else "" for parts in (failures, crossings))]
        for part in {**failures, **crossings}
    ]
    totals = [f"{sum(parts.values()):.1f}" for parts in (failures, crossings)]
    imports = time_imports(3)
    ratio = failures.get("imports", 0) / imports
    share, lines = estimate(failures, arguments.at_scale)
    publish(
        "\n".join(
            [
                describe_machine(()),
                "",
                markdown_table(
                    ["seconds", "SIGKILL to the first new step", "phase crossing"],
                    [*rows, ["all", *totals]],
                ),
                "",
                f"The imports alone, in a fresh process: {imports:.1f} s.",
                bar("imports over that", ratio, OURS),
                *(f"- {line}" for line in lines),
                bar_at_least("effective training time", share, SHARE_BAR),
            ]
        ),
        arguments.output,
    )
    return 0 if share >= SHARE_BAR and ratio <= OURS and failures and crossings else 1


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    # The second phase cuts the model over all processes, which one process cannot do.
    too_small = find_too_small(arguments, kills=1, processes=2)
    if too_small:
        return too_small
    # The estimate divides by these.
    for name in ("mean_hours_to_failure", "read_gigabytes_per_second", "save_minutes"):
        value = getattr(arguments.at_scale, name)
        if not value > 0:
            flag = f"--at-scale.{name.replace('_', '-')}"
            return f"{flag} {value:g}: must be above 0. Fix: leave it out."
    return None


def _killed_run(folder: Path, arguments: Arguments) -> list[dict]:
    """Train a small model on two layouts, with kills; returns the events of the run."""
    steps = STEPS_PER_KILL * (arguments.kills + 1)
    phases = [
        {"name": "one", "train_tokens": steps * TOKENS_PER_STEP},
        {
            "name": "two",
            "train_tokens": steps * TOKENS_PER_STEP // 4,
            "tensor_model_parallel_size": arguments.processes,
        },
    ]
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({"phases": phases}))
    flags = f"""--config {config} --model tiny --mock-data --vocab-size 4096 --seq-length 64
        --global-batch-size 4 --lr 1e-3 --eval-iters 0 --save-interval {SAVE_INTERVAL}"""
    killed = LaunchedRun(flags.split(), folder / "save", arguments.processes)
    try:
        killer = Killer(killed, ["step"], 1, cache=None, save_interval=SAVE_INTERVAL)
        killer.kill_all(arguments.kills)
        killer.revive()
        killed.wait_until_done()
    finally:
        killed.end()
    return killed.events()
