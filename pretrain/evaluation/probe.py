"""Scores of microbatches that an evaluation lays out by hand, one probe each, on any layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.batch import Batch
from data.dealing import Dealing, StepShape, deal
from data.document_cost import DocumentCost
from data.excerpts import Excerpt, lay_out
from data.sample_costs import padding_costs
from parallel.context import token_pieces
from pretrain.evaluation.lengths import microbatch_count
from pretrain.processes.deals import require_same_deals
from pretrain.step import Scores, Stepper


@dataclass(frozen=True)
class ProbeShape:
    """What the layout and the model need of every microbatch of probes."""

    token_multiple: int
    """The number of tokens must be a multiple of this."""
    padding: int
    """Token id that fills the rest."""
    vocab_size: int
    dealing: Dealing | None = None
    """What probes are dealt to the data ranks by; None = they are dealt in turn."""


def score_probes(
    stepper: Stepper, probes: Sequence[Sequence[Excerpt]], longest: int, shape: ProbeShape
) -> Scores:
    """Score one microbatch per probe; collective over the world.

    Padding makes up what the layout needs: tokens to a multiple, and microbatches without a target
    to a count that data parallelism and the pipeline schedule take.

    Args:
        probes: the excerpts of documents that each one consists of.
        longest: tokens that a probe's excerpts have at most.

    Returns:
        The scores of each probe, on every rank.

    Raises:
        Refused: ranks dealt the probes in different ways; on all ranks.
    """
    layout = stepper.layout
    total = -(-longest // shape.token_multiple) * shape.token_multiple
    per_rank = -(-len(probes) // layout.dp.size)
    count = microbatch_count(per_rank, layout)
    pieces = token_pieces(total, layout)

    def read(number: int) -> Batch:
        excerpts = probes[number] if number < len(probes) else ()
        batch = lay_out(excerpts, total, pieces, padding=shape.padding, vocab_size=shape.vocab_size)
        return batch.to(layout.device)

    numbers = _deal_probes(probes, total, count, layout.dp.size, shape.dealing)
    if shape.dealing is not None:
        require_same_deals([numbers], layout, "an evaluation")
    own = numbers[layout.dp.rank :: layout.dp.size]
    scores = stepper.score([read(number) for number in own.tolist()]).in_order(numbers)
    return Scores(
        scores.loss_sums[: len(probes)],
        scores.num_targets[: len(probes)],
        scores.num_correct[: len(probes)],
    )


def _deal_probes(
    probes: Sequence[Sequence[Excerpt]],
    total: int,
    count: int,
    dp_size: int,
    dealing: Dealing | None,
) -> np.ndarray:
    """Deal probes and what makes up their number -> the number in each slot (data/dealing.py).

    Args:
        total: tokens of a microbatch, with its padding.
        count: microbatches of each data rank.
    """
    slots = count * dp_size
    if dealing is None:
        return np.arange(slots)
    # What makes up their number is padding alone.
    filled = [*probes, *[()] * (slots - len(probes))]
    shape = StepShape(
        dp_size=dp_size, num_microbatches=count, micro_batch_size=1, meeting=dealing.meeting
    )
    return deal(probe_costs(filled, total, dealing.cost), shape)


def probe_costs(probes: Sequence[Sequence[Excerpt]], total: int, cost: DocumentCost) -> np.ndarray:
    """Compute what each probe costs, padded to `total` tokens -> float64 [probes]."""
    lengths = [excerpt.length for excerpts in probes for excerpt in excerpts]
    begins = np.cumsum([0, *map(len, probes)])
    # Tokens before each excerpt, and from them those of each probe.
    before = np.cumsum([0, *lengths])
    padding = total - np.diff(before[begins])
    return cost.of_samples(np.array(lengths, dtype=np.int64), begins) + padding_costs(padding, cost)
