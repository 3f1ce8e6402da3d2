"""Time a training step, its own products and its attention.

The step benchmark runs these functions in fresh processes.
"""

import gc
import time
from collections.abc import Callable

import torch

from model.attention_backends.choice import choose_attention
from tools.bench.contenders import (
    OURS,
    VOCABULARY,
    Dtype,
    Ours,
    make_sample,
    one_process,
    preset,
)
from tools.bench.fresh import measured, trim
from tools.bench.peers import PEERS, check_losses, make_contender
from tools.bench.products import KINDS, Replay, TimedAttend, record

CPU = torch.device("cpu")
PLAIN_SIZE = 2048
"""Rows, columns and depth of the plain product."""


def time_steps(
    settings: dict[str, dict],
    lengths: list[int],
    dtype: Dtype,
    repeats: int,
    seed: int,
    autocast: bool = False,
) -> dict:
    """Time each contender's step, our products and attention, and a plain product, in turns.

    In each round everything runs once, in an order that turns from round to round.

    Raises:
        ValueError: losses differ.
    """
    with one_process() as layout:
        sample = make_sample(lengths, VOCABULARY, seed)
        contenders = {
            name: make_contender(
                name, preset("tiny", **changes), VOCABULARY, dtype, layout, seed, autocast=autocast
            )
            for name, changes in settings.items()
        }
        # First the results, then the times; these steps warm up, too.
        losses = check_losses(contenders, sample)
        # The products and kernels that each of our modes calls, to be run alone.
        replays = {
            name: Replay(record(lambda contender=contender: contender.step(sample)))
            for name, contender in contenders.items()
            if name not in PEERS
        }
        plain = PlainProduct(PLAIN_SIZE, dtype)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        own: dict[str, dict[str, list[float]]] = {
            name: {kind: [] for kind in KINDS} for name in replays
        }
        rates: list[float] = []
        # Warm up what is timed alone.
        for replay in replays.values():
            replay.run()
        plain.gflops()

        def time_one(name: str) -> None:
            seconds[name].append(seconds_of(lambda: contenders[name].step(sample)))

        def replay_one(name: str) -> None:
            for kind, found in replays[name].run().items():
                own[name][kind].append(found)

        in_turns(
            [
                *(lambda name=name: time_one(name) for name in contenders),
                *(lambda name=name: replay_one(name) for name in replays),
                lambda: rates.append(plain.gflops()),
            ],
            repeats,
        )
    return {"seconds": seconds, "own": own, "plain_gflops": rates, "loss": losses[OURS][0]}


def in_turns(tasks: list[Callable[[], None]], rounds: int) -> None:
    """Run every task once a round, in an order that turns, without the garbage collector."""
    for number in range(rounds):
        for task in tasks[:: -1 if number % 2 else 1]:
            gc.collect()
            gc.disable()
            task()
            gc.enable()


def seconds_of(task: Callable[[], object]) -> float:
    """Time a task."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


class PlainProduct:
    """Multiply two square matrices: what the cores reach without anything around it."""

    def __init__(self, size: int, dtype: Dtype):
        generator = torch.Generator().manual_seed(0)
        self.size = size
        self.left, self.right = (
            torch.randn(size, size, generator=generator).to(getattr(torch, dtype)) for _ in range(2)
        )
        self.out = torch.empty_like(self.left)

    def gflops(self) -> float:
        """Measure the rate of one product."""
        seconds = seconds_of(lambda: torch.mm(self.left, self.right, out=self.out))
        return 2 * self.size**3 / seconds / 1e9


def peak_of_step(
    name: str, changes: dict, lengths: list[int], dtype: Dtype, seed: int, autocast: bool = False
) -> dict:
    """Measure one step's seconds and its peak above the built model and optimizer."""
    with one_process() as layout:
        contender = make_contender(
            name, preset("tiny", **changes), VOCABULARY, dtype, layout, seed, autocast=autocast
        )
        # A first step makes the moments, and what is made once.
        contender.step(make_sample([64], VOCABULARY, seed))
        sample = make_sample(lengths, VOCABULARY, seed)
        trim()
        with measured() as found:
            contender.step(sample)
    return found


def attention_times(
    shapes: list[list[int]], changes: dict, dtype: Dtype, repeats: int, seed: int
) -> dict:
    """Time `attend`, forward and backward, in every repeat of our step on each of the shapes."""
    with one_process() as layout:
        config = preset("tiny", **changes)
        attend, _ = choose_attention(config.attention_backend, CPU, getattr(torch, dtype))
        timer = TimedAttend(attend, CPU)
        ours = Ours(config, VOCABULARY, dtype, layout, seed, timer)
        samples = [make_sample(lengths, VOCABULARY, seed) for lengths in shapes]
        seconds: list[list[float]] = [[] for _ in shapes]

        def time_one(place: int) -> None:
            with timer.counting() as found:
                ours.step(samples[place])
            seconds[place] += found

        in_turns([lambda place=place: time_one(place) for place in range(len(shapes))], repeats + 1)
    # The first round warmed up.
    return {"seconds": [times[1:] for times in seconds]}
