"""Does muP hold for a model? `bash launch/ithaca.sh coordinate-check [--plot F.png]` trains it at
several widths for a few steps, with muP and without, and shows how large its activations are and by
how much they changed, as root mean squares. With muP they are as large at any width.

`--sweep` trains two widths with several learning rates instead: with muP the best one is the same.

The model is the preset tiny with two layers on synthetic text, or that of `--config RUN.yaml`, with
flags of the run after `--` (its learning rate, its data). Heads keep their size.

Exit code 0: the activations are flat within `--tolerance`, or the best rates are the same or
neighbours; 1: they are not; 2: nothing was trained.
"""

import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from model.config import ModelConfig
from parallel.layout import Layout
from pretrain.config.config import CheckpointConfig, Config
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import Plan, make_plan
from tools.bench.contenders import one_process
from tools.outputs.files import check_file, is_own_picture
from tools.shared.door import run_door, warn
from tools.shared.message_text import count_of
from tools.width_check.activations import KINDS, MeanSquares
from tools.width_check.plot import plot_check, plot_sweep
from tools.width_check.tables import (
    Found,
    Losses,
    check_lines,
    losses_line,
    mean_losses,
    rates_line,
    spread,
    steps_between,
)
from tools.width_check.widths import Data, Trainer, at_width, read_data

NAME = "tools.coordinate_check"
WITH = "with muP"
WITHOUT = "without"
RUN = (
    "--model tiny --num-layers 2 --init-method-std 0.1 --lr 4e-3 --mock-data --vocab-size 16 "
    "--seq-length 128 --global-batch-size 8 --micro-batch-size 8 --train-iters 1000000 "
    "--eval-iters 0"
).split()
"""The run without --config: 1,024 tokens a step. The vocabulary is small beside the least width,
since the rows of more tokens than dims overlap by chance, which is less at larger widths."""
LAST_SHARE = 0.2
"""Share of a sweep's steps, its last ones, whose mean loss is compared."""


@dataclass(kw_only=True)
class Arguments:
    widths: list[int] = field(default_factory=list)
    """Values of hidden_size; the first is muP's base. By default 64 to 1,024, and 64 and 256 for
    --sweep."""
    steps: int | None = None
    """Steps to train; by default 10, and 100 for --sweep."""
    seeds: int = 3
    """Seeds of initial weights, 0 and up, whose mean is shown; the run's own is not taken."""
    zero_output: bool = True
    """Start an untied output's weight at 0, as "Tensor Programs V" (appendix D.2) advises: random
    logits at the start fade as the root of the width, and hide what muP keeps flat."""
    sweep: bool = False
    """Search the best learning rate of each width."""
    learning_rates: list[float] = field(
        default_factory=lambda: [2.0**power for power in range(-11, -2)]
    )
    """Learning rates of --sweep, from the smallest."""
    tolerance: float = 0.1
    """How far an activation's size may be from the mean of the widths, as a share; --sweep has
    none."""
    config: str | None = None
    """A run's YAML file."""
    plot: str | None = None
    """PNG file to draw."""


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    # What follows "--" are flags of the run.
    own = words[: words.index("--")] if "--" in words else words
    run_flags = words[len(own) + 1 :]
    return run_door(
        Arguments,
        lambda arguments: run(arguments, run_flags),
        name=NAME,
        description=__doc__,
        argv=own,
    )


def run(arguments: Arguments, run_flags: list[str]) -> int:
    """Check, or sweep, as the arguments say -> the exit code.

    Raises:
        ValueError: the model, the run or the arguments cannot be.
    """
    check_arguments(arguments)
    for line in without_effect(arguments):
        warn(line)
    if arguments.plot:
        check_file("plot", Path(arguments.plot), NAME, is_own_picture)
    base = ["--config", arguments.config] if arguments.config else RUN
    plan = plan_fresh(load_config(spell([*base, *run_flags])))
    widths = arguments.widths or ([64, 256] if arguments.sweep else [64, 128, 256, 512, 1024])
    steps = arguments.steps or (100 if arguments.sweep else 10)
    # All widths are legal before the first is trained.
    for width in widths:
        problems = at_width(plan.config.model, width, widths[0], mup=True).validate()
        if problems:
            raise ValueError("\n".join(problems))
    if arguments.zero_output and not plan.config.model.untie_embeddings_and_output_weights:
        warn("zero_output = True: has no effect, since the output's weight is the embedding's")
    first = plan.phases[0]
    if steps > first.steps:
        warn(
            f"steps = {steps}: phase {first.name!r}, the run's first, has {first.steps}; the "
            "others read on in its data, at its length"
        )
    with one_process() as layout, torch.random.fork_rng(devices=[]):
        data = read_data(plan, layout, steps)
        if arguments.sweep:
            return sweep(arguments, plan, layout, data, widths)
        return check(arguments, plan, layout, data, widths)


def plan_fresh(config: Config) -> Plan:
    """Plan a run as if it had not begun, and were to start from fresh weights.

    Raises:
        ValueError: the run cannot be.
    """
    # Some settings need a folder for checkpoints: an empty one stands for the run's.
    with TemporaryDirectory() as empty:
        fresh = replace(config, checkpoint=CheckpointConfig(save=empty))
        return make_plan(fresh, 1, only_print=True)


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for numbers that are not legal."""
    widths = arguments.widths
    is_repeated = len(set(widths)) < len(widths)
    if any(width < 1 for width in widths) or len(widths) == 1 or is_repeated:
        raise ValueError(
            f"widths = {' '.join(map(str, widths))}: must be two or more different widths above "
            "0. Fix: --widths 64 128 256."
        )
    rates = arguments.learning_rates
    # Places in the list tell how far apart the best ones are.
    is_rising = all(low < high for low, high in pairwise([0.0, *rates, math.inf]))
    if not rates or not is_rising:
        raise ValueError(
            f"learning_rates = {' '.join(map(str, rates))}: must be above 0 and rise. "
            "Fix: leave them out."
        )
    if not 0 <= arguments.tolerance < math.inf:
        raise ValueError(
            f"tolerance = {arguments.tolerance}: must be a number of at least 0. Fix: leave it out."
        )
    for name in ("steps", "seeds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1. Fix: leave it out.")


def without_effect(arguments: Arguments) -> list[str]:
    """Name the settings that were given and that what is run does not read."""
    if arguments.sweep:
        unread = ("tolerance",)
        where = "with --sweep"
    else:
        unread = ("learning_rates",)
        where = "without --sweep"
    usual = Arguments()
    values = {name: getattr(arguments, name) for name in unread}
    return [
        f"{name} = {value}: has no effect {where}"
        for name, value in values.items()
        if value != getattr(usual, name)
    ]


def check(arguments: Arguments, plan: Plan, layout: Layout, data: Data, widths: list[int]) -> int:
    """Train all widths with and without muP, and show how large activations are."""
    lr = plan.config.optimizer.lr
    found = {}
    print(
        f"{count_of(len(data.steps), 'step')} at learning rate {lr:g}, root mean squares over "
        f"{count_of(arguments.seeds, 'seed')}\n"
        "spread = largest distance from the mean of the widths, "
        "last = from the second widest to the widest"
    )
    for name in (WITH, WITHOUT):
        found[name] = measure(arguments, plan, layout, data, widths, mup=name == WITH)
        print("\n".join(check_lines(name, found[name])), flush=True)
    if arguments.plot:
        plot_check(found, Path(arguments.plot))
        print(f"wrote {arguments.plot}")
    wide = [kind for kind in KINDS if spread(found[WITH].sizes[kind]) > arguments.tolerance]
    allowed = f"{100 * arguments.tolerance:g} %"
    if wide:
        print(f"not flat within {allowed} with muP: {', '.join(wide)}")
        return 1
    print(f"flat within {allowed} with muP: {', '.join(KINDS)}")
    return 0


def measure(
    arguments: Arguments, plan: Plan, layout: Layout, data: Data, widths: list[int], *, mup: bool
) -> Found:
    """Measure the activations of all widths, each over all seeds."""
    sizes: dict[str, dict[int, float]] = defaultdict(dict)
    changes: dict[str, dict[int, float]] = defaultdict(dict)
    for width in widths:
        model = at_width(plan.config.model, width, widths[0], mup=mup)
        of_seeds = [
            one_check(plan, make_trainer(arguments, plan, model, layout, seed), data)
            for seed in range(arguments.seeds)
        ]
        for kind in KINDS:
            of_kind = [each[kind] for each in of_seeds]
            sizes[kind][width] = math.sqrt(statistics.fmean(each.size for each in of_kind))
            changes[kind][width] = math.sqrt(statistics.fmean(each.change for each in of_kind))
    return Found(sizes, changes)


def make_trainer(
    arguments: Arguments, plan: Plan, model: ModelConfig, layout: Layout, seed: int
) -> Trainer:
    """Build the model of one width and seed."""
    trainer = Trainer(plan, model, layout, seed)
    if arguments.zero_output and model.untie_embeddings_and_output_weights:
        trainer.clear_output()
    return trainer


def one_check(plan: Plan, trainer: Trainer, data: Data) -> dict[str, MeanSquares]:
    """Train one model -> mean squares of each kind of activation."""
    before = trainer.activations(data)
    for _ in trainer.losses(data.steps, plan.config.optimizer.lr):
        pass
    return trainer.mean_squares(data, before)


def sweep(arguments: Arguments, plan: Plan, layout: Layout, data: Data, widths: list[int]) -> int:
    """Train all widths with all learning rates, with and without muP."""
    rates = arguments.learning_rates
    last = compared_steps(data)
    found: dict[str, dict[int, Losses]] = {}
    for name in (WITH, WITHOUT):
        found[name] = {}
        print(
            f"{name}: mean loss of the last {last} of {count_of(len(data.steps), 'step')} over "
            f"{count_of(arguments.seeds, 'seed')}; * = the best"
        )
        print(rates_line(rates), flush=True)
        for width in widths:
            model = at_width(plan.config.model, width, widths[0], mup=name == WITH)
            of_seeds = [
                one_sweep(arguments, plan, model, layout, data, seed)
                for seed in range(arguments.seeds)
            ]
            found[name][width] = mean_losses(of_seeds)
            print(losses_line(width, found[name][width], of_seeds), flush=True)
    if arguments.plot:
        plot_sweep(rates, found, Path(arguments.plot))
        print(f"wrote {arguments.plot}")
    apart = {name: steps_between(rates, losses) for name, losses in found.items()}
    print("; ".join(f"{name}: {_describe(count)}" for name, count in apart.items()))
    return int(apart[WITH] is None or apart[WITH] > 1)


def compared_steps(data: Data) -> int:
    """Count the last steps of a run whose mean loss is compared."""
    return max(1, round(LAST_SHARE * len(data.steps)))


def one_sweep(
    arguments: Arguments, plan: Plan, model: ModelConfig, layout: Layout, data: Data, seed: int
) -> Losses:
    """Train a model of one seed with each learning rate -> mean loss of the last steps."""
    last = compared_steps(data)
    losses = {}
    for rate in arguments.learning_rates:
        trainer = make_trainer(arguments, plan, model, layout, seed)
        losses[rate] = statistics.fmean(list(trainer.losses(data.steps, rate))[-last:])
    return losses


def _describe(apart: int | None) -> str:
    """Say how far apart the best rates of the widths are."""
    return "a width diverged at every rate" if apart is None else f"best rates {apart} apart"


if __name__ == "__main__":
    sys.exit(main())
