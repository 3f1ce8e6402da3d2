"""The balance benchmark's tables and bars, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.document_cost import DocumentCost
from data.stream import usable_cores
from data.units import show_tokens
from tools.bench.balance_documents import MEAN_TOKENS
from tools.bench.balance_estimate import Documents, Waits, cost_of_8b
from tools.bench.balance_step import DEALT, IN_ORDER, Job, Timed, ratio, whose_attention
from tools.bench.data_engine.corpus import SPREAD
from tools.bench.report import bar, markdown_table

STEP_BAR = 0.75
"""Step time dealt by cost over that in order."""
DEAL_BAR = 1.05
"""Slowest rank over the mean: 128K, 16 microbatches, dealt, with `balance: window` or without."""
WINDOW_BAR = 1.10
"""The same: 1M, one sample for each rank, `balance: window`."""
DEALING_BAR = 0.050
"""Seconds in which a step is dealt."""


@dataclass(frozen=True)
class TimedJob:
    """Holds timed steps, by how samples were dealt."""

    model: str
    """Length at which an 8B model's attention has the share that it has here."""
    job: Job
    times: Mapping[str, Timed]


def describe(
    machine: str,
    timed: Sequence[TimedJob],
    waits: Sequence[Waits],
    dealing: Mapping[str, dict],
) -> str:
    """Write the whole result.

    Args:
        dealing: by packing, what `time_dealing` returned.
    """
    parts = [
        "## Work balanced over the data ranks",
        "",
        machine,
        "",
        f"Documents: lognormal with a mean of {MEAN_TOKENS:,} tokens and sigma {SPREAD:g}; where "
        "some are long, their lengths are uniform in the logarithm. Packed by best_fit.",
    ]
    if timed:
        parts += ["", *describe_steps(timed)]
    return "\n".join([*parts, "", *describe_waits(waits), "", *describe_dealing(dealing)])


# ---------------------------------------------------------------- timed steps


def describe_steps(timed: Sequence[TimedJob]) -> list[str]:
    """Write the table of timed steps, and judge them."""
    header = ["attention as", "data ranks", "dealing", "step s", "of in order"]
    header += ["a core each, CPU s", "of in order", "slowest / mean by cost"]
    rows = []
    for each in timed:
        in_order = each.times[IN_ORDER]
        rows += [
            [
                whose_attention(each.model),
                str(each.job.processes),
                name,
                f"{statistics.median(found.seconds):.2f}",
                f"{ratio(found.seconds, in_order.seconds):.3f}",
                f"{statistics.median(found.cpu_seconds):.2f}",
                f"{ratio(found.cpu_seconds, in_order.cpu_seconds):.3f}",
                f"{statistics.mean(found.imbalance):.3f}",
            ]
            for name, found in each.times.items()
        ]
    job = timed[0].job
    jobs = {whose_attention(each.model): each.job for each in timed}
    costs = ", ".join(
        f"{_whole_over_short(each.model.cost, job.seq_length):.2f} ({whose})"
        for whose, each in jobs.items()
    )
    large = _whole_over_short(cost_of_8b(), job.seq_length)
    documents = Documents(job.seq_length, job.long_share).describe()
    return [
        f"Steps of {job.num_microbatches} microbatches of {show_tokens(job.seq_length)} on each "
        f"rank, {documents}, {job.dtype}, {job.steps} steps, each dealt in both ways in turn. By "
        f"FLOPs a document that fills a sample costs its tokens' products {costs} times; an 8B "
        f"model {large:.2f}. Medians; ratios step by step.",
        "",
        markdown_table(header, rows),
        "",
        *(line for each in timed for line in _bars_of_steps(each)),
    ]


def _bars_of_steps(timed: TimedJob) -> list[str]:
    """Judge timed steps; what no dealing can reach is said beside it."""
    dealt = timed.times[DEALT]
    in_order = timed.times[IN_ORDER]
    whose = whose_attention(timed.model)
    name = f"attention as {whose}, {timed.job.processes} data ranks: dealt / in order"
    # No dealing does better than ranks that never wait.
    least = statistics.median(1 / each for each in in_order.imbalance)
    bound = f" (by cost nobody would wait at {least:.3f})"
    lines = [bar(name + bound, ratio(dealt.seconds, in_order.seconds), STEP_BAR)]
    if timed.job.processes > usable_cores():
        # The cores of ranks that wait compute for the others.
        share = ratio(dealt.cpu_seconds, in_order.cpu_seconds)
        lines.append(bar(f"{name}, with a core for each rank", share, STEP_BAR))
    return lines


def _whole_over_short(cost: DocumentCost, seq_length: int) -> float:
    """Compare a sample of one document with its tokens, without any attention."""
    (whole,) = cost.of_documents(np.array([seq_length]))
    return float(whole) / (cost.per_token * seq_length)


# ---------------------------------------------------------------- estimates


def describe_waits(waits: Sequence[Waits]) -> list[str]:
    """Write the table of estimates, and judge them."""
    header = ["documents", "tokens", "ranks x microbatches", "steps", "in order", "dealt"]
    header += ["least of any dealing", "met once a step", "balance window"]
    rows = [
        [
            found.documents.describe(),
            show_tokens(found.documents.seq_length),
            f"{found.dp_size} x {found.num_microbatches}",
            str(found.steps),
            *(
                f"{figure:.3f}"
                for figure in (
                    found.in_order,
                    found.dealt,
                    found.least_dealt,
                    found.met_once,
                    found.even,
                )
            ),
        ]
        for found in waits
    ]
    return [
        "What steps wait for over the mean of their ranks, by the FLOPs of an 8B model; ranks meet "
        'in every microbatch but in "met once a step".',
        "",
        markdown_table(header, rows),
        "",
        *(line for found in waits for line in _bars_of_waits(found)),
    ]


def _bars_of_waits(found: Waits) -> list[str]:
    """Judge what steps wait for; one sample for each rank leaves nothing to deal."""
    documents = found.documents
    name = (
        f"{show_tokens(documents.seq_length)}, {found.dp_size} x {found.num_microbatches}, "
        f"{documents.describe()}: slowest / mean"
    )
    if found.num_microbatches == 1:
        return [bar(f"{name}, balance window", found.even, WINDOW_BAR)]
    bound = f"no dealing below {found.least_dealt:.3f}"
    return [
        bar(f"{name}, dealt ({bound})", found.dealt, DEAL_BAR),
        bar(f"{name}, balance window", found.even, DEAL_BAR),
    ]


# ---------------------------------------------------------------- the time of dealing


def describe_dealing(dealing: Mapping[str, dict]) -> list[str]:
    """Write how long dealing takes, and judge it."""
    header = ["packing", "documents", "CPU ms, median", "least", "most"]
    rows = [
        [
            packing,
            f"{found['documents']:,}",
            *(
                f"{1e3 * seconds:.1f}"
                for seconds in (found["median"], min(found["seconds"]), max(found["seconds"]))
            ),
        ]
        for packing, found in dealing.items()
    ]
    return [
        "Dealing one step on one core: lengths, costs, slots, the imbalance before and after.",
        "",
        markdown_table(header, rows),
        "",
        *(
            bar(f"{packing}: s of dealing a step", found["median"], DEALING_BAR)
            for packing, found in dealing.items()
        ),
    ]
