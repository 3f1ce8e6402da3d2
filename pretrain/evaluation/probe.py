"""Scores of microbatches that an evaluation lays out by hand, one probe each, on any layout."""

from collections.abc import Sequence

from data.excerpts import Excerpt, lay_out
from parallel.context import token_pieces
from parallel.layout import Layout
from parallel.schedule import accepts
from pretrain.step import Scores, Stepper


def microbatch_count(wanted: int, layout: Layout) -> int:
    """The least number of microbatches per data-parallel rank, at least `wanted`, that the pipeline
    schedule runs."""
    count = max(1, wanted)
    while not accepts(layout.schedule, layout.pp.size, count):
        count += 1
    return count


def score_probes(
    stepper: Stepper,
    probes: Sequence[Sequence[Excerpt]],
    longest: int,
    *,
    token_multiple: int,
    padding: int,
    vocab_size: int,
) -> Scores:
    """One microbatch per probe -> their scores, on every rank. Collective over the world.

    Padding makes up what the layout needs: tokens to a multiple of `token_multiple`, and
    microbatches without a target to a count that data parallelism and the pipeline schedule take.

    Args:
        longest: tokens that a probe's excerpts have at most.
    """
    layout = stepper.layout
    total = -(-longest // token_multiple) * token_multiple
    count = microbatch_count(-(-len(probes) // layout.dp.size), layout)
    pieces = token_pieces(total, layout)
    numbers = range(layout.dp.rank, count * layout.dp.size, layout.dp.size)
    scores = stepper.score(
        [
            lay_out(
                probes[number] if number < len(probes) else (),
                total,
                pieces,
                padding=padding,
                vocab_size=vocab_size,
            ).to(layout.device)
            for number in numbers
        ]
    )
    return Scores(
        *(
            values[: len(probes)]
            for values in (scores.loss_sums, scores.num_targets, scores.first_choices)
        )
    )
