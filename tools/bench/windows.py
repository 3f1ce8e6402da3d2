"""Attention with a sliding window against attention to the whole document: does its time fall with
the window?

One process's attention on the CPU, forward and backward, through the backend that a run would take
there. All windows and lengths run in turns, in an order that turns from round to round.
"""

import sys
import time
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from data.stream import usable_cores
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from model.scoring import Scoring, ScoringNeeds
from model.windows import Window, pairs_seen
from tools.bench.option_checks import find_too_small
from tools.bench.report import bar, describe_machine, markdown_table, publish

CPU = torch.device("cpu")
RATIO_BAR = 0.2
"""Share of the whole document's time that the first window may take at the longest length."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    lengths: tuple[int, ...] = (4096, 8192, 16384)
    """Tokens of the one document."""
    windows: tuple[int, ...] = (1024, 512, 2048)
    """Tokens of the windows; the first one is judged."""
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 64
    repeats: int = 7
    """Rounds that are timed, after one that is not."""
    output: str | None = None
    """Also append the report to this file."""


@dataclass(frozen=True)
class Case:
    """Describes one attention call."""

    length: int
    window: Window

    @property
    def pairs(self) -> float:
        """Pairs of tokens of which one sees the other."""
        return float(pairs_seen(np.array([self.length]), self.window)[0])


def run(arguments: Arguments) -> int:
    """Time all cases, print the table; 0 if the bar holds, 2 where there is nothing to judge."""
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    longest = max(arguments.lengths)
    torch.set_num_threads(usable_cores())
    machine = describe_machine(())
    cases = [
        Case(length, window)
        for length in arguments.lengths
        for window in (None, *arguments.windows)
        if window is None or window < length
    ]
    calls = {case: make_call(case, arguments) for case in cases}
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(1 + arguments.repeats):
        for case in cases[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            calls[case]()
            # The first round warms up.
            if turn:
                times[case].append(time.perf_counter() - start)
    seconds = {case: median(each) for case, each in times.items()}
    rows = [row_of(case, seconds) for case in cases]
    judged = seconds[Case(longest, arguments.windows[0])] / seconds[Case(longest, None)]
    header = ["tokens", "window", "seconds", "of the whole", "pairs of the whole"]
    name = f"time with a window of {arguments.windows[0]:,} at {longest:,} tokens over the whole's"
    publish(
        "\n".join([machine, "", markdown_table(header, rows), "", bar(name, judged, RATIO_BAR)]),
        arguments.output,
    )
    return 0 if judged <= RATIO_BAR else 1


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    too_small = find_too_small(
        arguments, lengths=1, windows=1, heads=1, kv_heads=1, head_size=1, repeats=1
    )
    if too_small:
        return too_small
    longest = max(arguments.lengths)
    if arguments.windows[0] >= longest:
        return (
            f"--windows {arguments.windows[0]}: the first must be below the longest of --lengths, "
            f"{longest}. Fix: a shorter one."
        )
    if arguments.heads % arguments.kv_heads:
        return (
            f"--kv-heads {arguments.kv_heads}: must divide --heads {arguments.heads}. "
            "Fix: for example 1."
        )
    return None


def make_call(case: Case, arguments: Arguments):
    """Make a call's forward and backward, on tensors of its own."""
    attend, _ = choose_attention("auto", CPU, torch.float32, needs=ScoringNeeds(windows=True))
    q, k, v = (
        torch.randn(case.length, heads, arguments.head_size).requires_grad_()
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads)
    )
    edges = torch.tensor([0, case.length], dtype=torch.int32)
    (documents,) = pack_documents(edges, [(0, case.length)], CPU)
    gradient = torch.randn(case.length, arguments.heads, arguments.head_size)

    scoring = Scoring(case.window)

    def call() -> None:
        torch.autograd.grad(attend(q, k, v, documents, scoring), (q, k, v), gradient)

    return call


def row_of(case: Case, seconds: dict[Case, float]) -> list[str]:
    """Write the cells of a case."""
    whole = Case(case.length, None)
    return [
        f"{case.length:,}",
        "-" if case.window is None else f"{case.window:,}",
        f"{seconds[case]:.3f}",
        f"{seconds[case] / seconds[whole]:.3f}",
        f"{case.pairs / whole.pairs:.3f}",
    ]
