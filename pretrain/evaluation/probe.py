"""Scores of microbatches that an evaluation lays out by hand, one probe each, on any layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.batch import Batch
from data.excerpts import Excerpt, lay_out
from parallel.context import token_pieces
from pretrain.evaluation.lengths import microbatch_count
from pretrain.step import Scores, Stepper


@dataclass(frozen=True)
class ProbeShape:
    """What the layout and the model need of every microbatch of probes."""

    token_multiple: int
    """The number of tokens must be a multiple of this."""
    padding: int
    """Token id that fills the rest."""
    vocab_size: int


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

    # Dealt to the data-parallel ranks in turn, as the loader deals samples.
    numbers = range(layout.dp.rank, count * layout.dp.size, layout.dp.size)
    scores = stepper.score([read(number) for number in numbers])
    return Scores(
        scores.loss_sums[: len(probes)],
        scores.num_targets[: len(probes)],
        scores.num_correct[: len(probes)],
    )
