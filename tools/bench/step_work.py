"""Time a training step, its own products and its attention.

The step benchmark runs these functions in fresh processes.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from data.batch import Batch
from model.attention_backends.choice import choose_attention
from parallel.layout import Layout
from tools.bench.contenders import (
    VOCABULARY,
    Contender,
    Dtype,
    Ours,
    make_sample,
    one_process,
    preset,
)
from tools.bench.fresh import measured, trim
from tools.bench.peers import LOSS_TOLERANCES, make_contender
from tools.bench.products import Replay, TimedAttend, record

CPU = torch.device("cpu")
PLAIN_SIZE = 2048
"""Rows, columns and depth of the plain product."""


@contextmanager
def serve_contender(
    name: str, changes: dict, lengths: list[int], dtype: Dtype, seed: int, autocast: bool = False
) -> Iterator[dict[str, Callable]]:
    """Offer one contender's calls: the losses of its first steps, and the seconds of one more."""
    with one_process() as layout:
        contender = _make_tiny(name, changes, dtype, layout, seed, autocast)
        sample = make_sample(lengths, VOCABULARY, seed)

        def seconds() -> float:
            with no_collector():
                return seconds_of(lambda: contender.step(sample))

        yield {
            "losses": lambda: [contender.step(sample) for _ in LOSS_TOLERANCES],
            "seconds": seconds,
        }


@contextmanager
def serve_alone(
    settings: dict[str, dict], lengths: list[int], dtype: Dtype, seed: int
) -> Iterator[dict[str, Callable]]:
    """Offer what is timed alone: the products and kernels of each of our modes, a plain product."""
    with one_process() as layout:
        sample = make_sample(lengths, VOCABULARY, seed)
        calls = {
            name: _record_step(_make_tiny(name, changes, dtype, layout, seed), sample)
            for name, changes in settings.items()
        }
    # The contenders are gone, and so is their memory.
    trim()
    replays = {name: Replay(found) for name, found in calls.items()}
    plain = PlainProduct(PLAIN_SIZE, dtype)

    def replay(name: str) -> dict[str, float]:
        with no_collector():
            return replays[name].run()

    def gflops() -> float:
        with no_collector():
            return plain.gflops()

    # Warm up.
    for name in replays:
        replay(name)
    gflops()
    yield {"replay": replay, "plain_gflops": gflops}


def _make_tiny(
    name: str, changes: dict, dtype: Dtype, layout: Layout, seed: int, autocast: bool = False
) -> Contender:
    """Make a contender that trains the tiny preset."""
    config = preset("tiny", **changes)
    return make_contender(name, config, VOCABULARY, dtype, layout, seed, autocast=autocast)


def _record_step(contender: Contender, sample: Batch) -> Counter:
    """Record the calls of a contender's second step, when all that is made once is there."""
    contender.step(sample)
    return record(lambda: contender.step(sample))


def in_turns(tasks: list[Callable[[], None]], rounds: int) -> None:
    """Run every task once a round, in an order that turns, without the garbage collector."""
    for number in range(rounds):
        for task in tasks[:: -1 if number % 2 else 1]:
            with no_collector():
                task()


@contextmanager
def no_collector() -> Iterator[None]:
    """Collect garbage now, and not inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
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
        contender = _make_tiny(name, changes, dtype, layout, seed, autocast)
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
