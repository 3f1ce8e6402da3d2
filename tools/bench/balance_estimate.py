"""What a step waits for by the cost of its documents: no model is run, the data engine is."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.config import Packing
from data.dealing import Meeting, StepShape, deal, imbalance
from data.document_cost import DocumentCost
from data.mixture import Mixture, fresh_mixture
from data.packing.place import Place
from data.sample_costs import sample_costs
from data.segments import DataSettings
from data.units import show_tokens
from model.config import ModelConfig
from model.presets import PRESETS
from pretrain.planner.model_size import document_cost_of
from tools.bench.balance_documents import LONG_FROM, LONG_SHARE, LONG_UP_TO, make_stream

MODEL = "llama3-8b"
VOCABULARY = 128_256
SPARE = 1.1
"""A stream has so many times the tokens that are drawn: its end is never reached."""


def cost_of_8b() -> DocumentCost:
    """Make the cost of documents for an 8B model, in FLOPs."""
    return document_cost_of(ModelConfig(**PRESETS[MODEL]), VOCABULARY)


@dataclass(frozen=True)
class Documents:
    """Describes documents and the length of the samples that they are packed into."""

    seq_length: int
    long_share: float = LONG_SHARE
    """Share of the tokens that are in long documents."""
    long_up_to: int = LONG_UP_TO

    def describe(self) -> str:
        """Name them."""
        if not self.long_share:
            return "lognormal"
        limits = f"{show_tokens(LONG_FROM)} to {show_tokens(self.long_up_to)}"
        return f"{self.long_share:.0%} in {limits}"


@dataclass(frozen=True)
class DrawnSamples:
    """Holds what samples cost, in the order of the stream."""

    documents: Documents
    packed: np.ndarray
    """float64 [samples], packed without a look at their cost."""
    even: np.ndarray
    """The same, packed with `balance: window` for the steps in which they are drawn."""


def draw(documents: Documents, samples: int, samples_per_step: int, seed: int) -> DrawnSamples:
    """Draw samples as the loader does."""
    cost = cost_of_8b()
    length = documents.seq_length
    stream = make_stream(
        round(SPARE * samples * length),
        documents.long_share,
        seed,
        long_up_to=documents.long_up_to,
    )
    # As the trainer makes them, of one source from its beginning.
    settings = DataSettings(length, ((1.0, "documents"),), "best_fit")
    packed, even = (
        Mixture(each, {"documents": stream}, {"documents": Place()})
        for each in (
            settings,
            replace(settings, equal_cost=cost, samples_per_step=samples_per_step),
        )
    )
    return DrawnSamples(
        documents,
        packed=_costs_of(packed, samples, cost),
        even=_costs_of(even, samples, cost),
    )


def _costs_of(mixture: Mixture, samples: int, cost: DocumentCost) -> np.ndarray:
    return sample_costs(mixture, 0, samples, cost, document_masking=True)


# ---------------------------------------------------------------- what steps of them wait for


@dataclass(frozen=True)
class Waits:
    """Holds what steps wait for over the mean of their ranks, by how samples are packed and dealt.

    Ranks meet in every microbatch, if nothing else is said.
    """

    documents: Documents
    dp_size: int
    num_microbatches: int
    steps: int
    in_order: float
    dealt: float
    least_dealt: float
    """The least that any dealing of the same samples could wait for."""
    met_once: float
    """Dealt, where ranks wait for each other once a step."""
    even: float
    """Dealt, of samples that were packed with `balance: window`."""


def waits_of(drawn: DrawnSamples, dp_size: int, num_microbatches: int) -> Waits:
    """Compute what all whole steps of the samples wait for."""

    def shape_of(meeting: Meeting) -> StepShape:
        return StepShape(
            dp_size=dp_size,
            num_microbatches=num_microbatches,
            micro_batch_size=1,
            meeting=meeting,
        )

    shape = shape_of("microbatch")
    once = shape_of("step")
    costs = steps_of(drawn.packed, shape)
    even = steps_of(drawn.even, shape)
    least = [least_of_any_dealing(step, shape) for step in costs]
    return Waits(
        documents=drawn.documents,
        dp_size=dp_size,
        num_microbatches=num_microbatches,
        steps=len(costs),
        in_order=over_mean([shape.waits(step) for step in costs], costs, dp_size),
        dealt=over_mean(dealt_waits(costs, shape), costs, dp_size),
        least_dealt=over_mean(least, costs, dp_size),
        met_once=over_mean(dealt_waits(costs, once), costs, dp_size),
        even=over_mean(dealt_waits(even, shape), even, dp_size),
    )


def steps_of(costs: np.ndarray, shape: StepShape) -> np.ndarray:
    """Cut samples into whole steps -> float64 [steps, samples of a step]."""
    steps = len(costs) // shape.samples
    assert steps, f"{len(costs)} samples are no step of {shape.samples}"
    return costs[: steps * shape.samples].reshape(steps, shape.samples)


def dealt_waits(costs: np.ndarray, shape: StepShape) -> list[float]:
    """Compute what each step waits for when its samples are dealt by cost."""
    return [shape.waits(step[deal(step, shape)]) for step in costs]


def over_mean(waits: Sequence[float], costs: np.ndarray, dp_size: int) -> float:
    """Divide what all steps wait for by the mean of their ranks."""
    return float(sum(waits)) * dp_size / float(costs.sum())


def least_of_any_dealing(costs: np.ndarray, shape: StepShape) -> float:
    """Compute the least that a step can wait for, of microbatches of one sample.

    Of the n x dp_size + 1 costliest samples one at least is outside any n microbatches, so that the
    next slowest microbatch waits for that one or longer.
    """
    assert shape.micro_batch_size == 1 and shape.meeting == "microbatch", shape
    return float(np.sort(costs)[::-1][:: shape.dp_size].sum())


# ---------------------------------------------------------------- how long dealing takes


def time_dealing(packing: Packing, samples: int, seq_length: int, repeats: int, seed: int) -> dict:
    """Measure what the loader does to deal a step, on the core of this process.

    Returns:
        documents of the step, and the CPU seconds of each repeat.
    """
    cost = cost_of_8b()
    stream = make_stream(round(SPARE * samples * seq_length), 0.0, seed)
    mixture = fresh_mixture([(1.0, stream)], seq_length, packing)
    # Microbatches of several samples are more work to deal than those of one.
    shape = StepShape(
        dp_size=samples // 16, num_microbatches=4, micro_batch_size=4, meeting="microbatch"
    )

    def deal_step() -> None:
        costs = sample_costs(mixture, 0, samples, cost, document_masking=True)
        slots = deal(costs, shape)
        imbalance(costs, slots, shape)
        imbalance(costs, None, shape)

    # What is compiled, and the packed window, which reading the step needs anyway.
    deal_step()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        deal_step()
        seconds.append(time.process_time() - begin)
    documents = sum(len(found.lengths) for _, found in mixture.document_lengths(0, samples))
    return {"documents": documents, "seconds": seconds, "median": statistics.median(seconds)}
