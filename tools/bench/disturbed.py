"""Kill a run again and again and compare it with the same run left alone:
`bash launch/ithaca.sh bench disturbed`.

Both runs go through launch/train.sh with the same configuration, at the same time. Of the one,
random processes get SIGKILL: a trainer, all of them, the launcher, train.sh, a whole node; while it
starts, makes an index of its data, trains, copies the state, writes and publishes a checkpoint,
deletes an old one, starts again on the next phase's layout. What each kill hit is counted by what
it left on disk. Every step's data digest and loss, also of steps that a kill made undone, and the
last checkpoint's weights, optimizer state and place in the data must be the same bit for bit; each
restart must begin at the newest published checkpoint; then tools.audit_data counts every token of
the disturbed run.
"""

import json
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pretrain.config.load import load_config
from tools.audit_data import audit
from tools.bench.option_checks import find_too_small
from tools.faults.comparison import differences
from tools.faults.kills import Killer, describe_kills, other_losses, wrong_starts
from tools.faults.launched_run import LaunchedRun
from tools.faults.traces import KINDS, Kind


@dataclass(kw_only=True)
class Arguments:
    config: str
    """YAML of the run; its phases may change layouts."""
    output: str
    """New folder for the two runs' checkpoints: disturbed/ and alone/."""
    flags: str = ""
    """Further flags of the trainer, as one word: --flags="--data-path P --tokenizer-model M"."""
    kills: int = 20
    """Kills of the one run."""
    kinds: list[Kind] = field(default_factory=lambda: list(KINDS))
    """What the run is to be doing when it is killed; crossing needs phases of several layouts."""
    processes: int = 4
    """Processes of the run on each node."""
    nodes: int = 1
    """Nodes, all of them on this machine."""
    seed: int = 1
    """Seed of the moments of the kills."""


def run(arguments: Arguments) -> int:
    """Run twice at the same time, once disturbed, and compare.

    Returns:
        the exit code: 0, 1 where the two differ, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    output = Path(arguments.output)
    argv = words_of(arguments)
    save_interval = load_config(argv).checkpoint.save_interval
    assert save_interval, "find_problem has seen it"
    output.mkdir(parents=True)
    cache = output / "index"
    cache.mkdir()
    began = time.monotonic()
    alone = LaunchedRun(argv, output / "alone", arguments.processes * arguments.nodes)
    disturbed = LaunchedRun(
        [*argv, "--data-cache-path", str(cache)],
        output / "disturbed",
        arguments.processes,
        nodes=arguments.nodes,
    )
    try:
        killer = Killer(
            disturbed, arguments.kinds, arguments.seed, cache=cache, save_interval=save_interval
        )
        kills = killer.kill_all(arguments.kills)
        killer.revive()
        disturbed.wait_until_done()
        alone.wait_until_done()
    finally:
        disturbed.end()
        alone.end()
    (output / "kills.jsonl").write_text("".join(f"{json.dumps(asdict(kill))}\n" for kill in kills))
    print("\n".join(describe_kills(kills)))
    print(f"{disturbed.last_step()} steps, {time.monotonic() - began:.0f} s", flush=True)
    found = [
        *differences(output / "alone", output / "disturbed"),
        *other_losses(killer.seen, output / "alone"),
        *wrong_starts(kills, disturbed.events()),
    ]
    found += _missing(arguments, Counter(each.hit for each in kills))
    print(
        "compared: "
        + (
            "; ".join(found)
            if found
            else "every step's data, loss, gradient norm and learning rate, "
            "the weights, the optimizer state and the place in the data are the same, bit for bit, "
            "and each start was from the newest published checkpoint"
        )
    )
    # Every token of the disturbed run, counted.
    lines, well = audit(str(output / "disturbed"))
    print("\n".join(lines))
    return 1 if found or not well else 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(arguments, kills=1, processes=1, nodes=1)
    if too_small:
        return too_small
    if not arguments.kinds:
        return f"--kinds: has no value. Fix: leave it out, or give some of {', '.join(KINDS)}."
    # Nothing of another run is compared, or written over.
    if Path(arguments.output).exists():
        return f"--output {arguments.output}: exists already. Fix: a new folder."
    try:
        shlex.split(arguments.flags)
    except ValueError as error:
        return f"--flags {arguments.flags}: {error}. Fix: close every quotation."
    try:
        saves = bool(load_config(words_of(arguments)).checkpoint.save_interval)
    except ValueError as error:
        return str(error)
    return None if saves else "save_interval: a run that does not save cannot go on. Fix: set it."


def words_of(arguments: Arguments) -> list[str]:
    """Write the trainer's command line, as far as both runs share it."""
    return ["--config", arguments.config, *shlex.split(arguments.flags)]


def _missing(arguments: Arguments, hits: Counter[Kind]) -> list[str]:
    """List what should have been hit and was not."""
    found = []
    if hits.total() < arguments.kills:
        found.append(f"the run ended after {hits.total()} of {arguments.kills} kills")
    # With few kills, one that comes too late may have been the only one of its kind.
    if arguments.kills >= 4 * len(arguments.kinds):
        found += [f"no kill hit {kind}" for kind in arguments.kinds if not hits[kind]]
    return found
