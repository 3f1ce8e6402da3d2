"""Context gain: how much lower a target's loss is with the whole document before it than with less.

Targets come in blocks of consecutive tokens of a document, spread over the places that have at
least `cut` tokens before them. The full pass reads the document from its beginning. The cut pass
reads, for each block, only the window that begins `cut` tokens before the block, as a document of
its own; a target then has cut to cut + block - 1 tokens of context. Both passes take one microbatch
per document. Gain = loss with the cut context - loss with the full one, in nats per target: 0 for a
model that makes no use of what is further away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.blend import BlendOrder
from data.excerpts import Excerpt
from data.sources import Blend
from data.stream import Reader
from pretrain.evaluation.probe import ProbeShape, score_probes
from pretrain.step import Scores, Stepper

BOOTSTRAP_DRAWS = 2000
INTERVAL_PERCENTILES = (2.5, 97.5)
"""Ends of the 95 % interval."""
CUTS_PER_BLOCK = 8
"""A block of targets has the cut's tokens over this."""


class Document(NamedTuple):
    """A document of a validation set."""

    reader: Reader
    number: int
    length: int

    def read(self, start: int, count: int) -> np.ndarray:
        """Read tokens [start, start + count) -> int64."""
        out = np.empty(count, dtype=np.int64)
        self.reader.read_spans(np.array([self.number]), np.array([start]), np.array([count]), out)
        return out


@dataclass(frozen=True)
class ContextGain:
    """Nats per target; the interval is of 95 %, None with fewer than two documents."""

    loss_full: float
    loss_cut: float
    gain_low: float | None
    gain_high: float | None
    documents: int
    num_targets: int

    @property
    def gain(self) -> float:
        return self.loss_cut - self.loss_full


# ---------------------------------------------------------------- documents and targets


def choose_documents(blend: Blend, cut: int, seq_length: int, count: int) -> list[Document]:
    """Choose documents of at least 2 x cut tokens: those that fill most of `seq_length`.

    A few long documents among short ones would give nearly all targets, and short ones say nothing
    of a long context. Of equally full ones the first in the order of the streams; of several
    streams in the shares of their weights, as far as each has such documents.
    """
    # The least length of the `count` fullest.
    lengths = np.concatenate([np.minimum(stream.lengths, seq_length) for _, stream in blend])
    least = np.partition(lengths, -count)[-count] if count < len(lengths) else 0

    found = [stream.first_documents(count, max(int(least), 2 * cut)) for _, stream in blend]
    limits = [len(numbers) for numbers in found]
    order = BlendOrder([weight for weight, _ in blend], limits)
    sources, places = order.draw(0, min(count, sum(limits)))
    chosen = []
    for source, place in zip(sources.tolist(), places.tolist(), strict=True):
        reader = blend[source][1].reader
        number = found[source][place]
        chosen.append(Document(reader, number, int(reader.document_lengths[number])))
    return chosen


def target_blocks(length: int, cut: int) -> np.ndarray:
    """Place the targets of a document -> int64 [blocks, 2], half-open ranges of its tokens.

    As many blocks as there are windows that the cut pass can place into `length` tokens; each lies
    in the middle of an equal share of the tokens that have `cut` or more before them.

    Args:
        length: tokens of the document that are read, at least 2 x cut.
    """
    assert length >= 2 * cut, (length, cut)
    block = max(1, cut // CUTS_PER_BLOCK)
    count = length // (cut + block)
    share = (length - cut) / count
    middles = (np.arange(count) + 0.5) * share
    starts = cut + (middles - block / 2).astype(np.int64)
    return np.stack([starts, starts + block], axis=1)


def full_probe(document: Document, length: int, cut: int) -> list[Excerpt]:
    """Take the document's first `length` tokens, with its blocks as targets."""
    return [Excerpt(document.read, 0, length, target_blocks(length, cut))]


def cut_probe(document: Document, length: int, cut: int) -> list[Excerpt]:
    """Take the same targets, each block at the end of a window of its own."""
    return [
        Excerpt(document.read, start - cut, end - start + cut, np.array([[start, end]]))
        for start, end in target_blocks(length, cut).tolist()
    ]


# ---------------------------------------------------------------- the measurement


def measure(
    stepper: Stepper,
    documents: Sequence[Document],
    seq_length: int,
    cut: int,
    seed: int,
    shape: ProbeShape,
) -> ContextGain:
    """Score both passes over the first `seq_length` tokens of the documents.

    Collective over the world.

    Args:
        seed: of the bootstrap.
    """
    lengths = [min(document.length, seq_length) for document in documents]

    def score(probe: Callable[[Document, int, int], list[Excerpt]]) -> Scores:
        probes = [
            probe(document, length, cut)
            for document, length in zip(documents, lengths, strict=True)
        ]
        return score_probes(stepper, probes, max(lengths), shape)

    full = score(full_probe)
    cut_short = score(cut_probe)
    assert np.array_equal(full.num_targets, cut_short.num_targets), "both score the same targets"
    return summarize(full.loss_sums, cut_short.loss_sums, full.num_targets, seed)


def summarize(
    full_sums: np.ndarray, cut_sums: np.ndarray, targets: np.ndarray, seed: int
) -> ContextGain:
    """Compute means over all targets, and the gain's interval by a paired bootstrap over documents.

    The percentiles are moved away from the gain by the factor by which Student's interval of a mean
    is wider than the bootstrap's: of few documents the plain ones hold the true gain far too rarely
    (four: 79 of 100).

    Args:
        full_sums: fp64 [documents], losses summed over the document's targets.
        cut_sums: the same with the cut context.
        targets: int64 [documents].

    Source: percentile bootstrap, Efron and Tibshirani, An Introduction to the Bootstrap (1993),
    chapter 13; its width with few observations, Hesterberg (arXiv 1411.5279), section 3.2.
    """
    documents = len(targets)
    total = int(targets.sum())
    differences = cut_sums - full_sums
    gain = float(differences.sum() / total)
    low = None
    high = None
    if documents > 1:
        # Documents are drawn with replacement, both passes of one together.
        generator = np.random.default_rng(seed)
        draws = generator.integers(0, documents, size=(BOOTSTRAP_DRAWS, documents))
        gains = differences[draws].sum(axis=1) / targets[draws].sum(axis=1)
        factor = _student_widening(documents)
        low, high = (
            gain + factor * (end - gain)
            for end in np.percentile(gains, INTERVAL_PERCENTILES).tolist()
        )
    return ContextGain(
        loss_full=float(full_sums.sum() / total),
        loss_cut=float(cut_sums.sum() / total),
        gain_low=low,
        gain_high=high,
        documents=documents,
        num_targets=total,
    )


def _student_widening(documents: int) -> float:
    """Divide the width of Student's 95 % interval of a mean by that of the bootstrap."""
    free = documents - 1
    upper = INTERVAL_PERCENTILES[1] / 100
    # Half a second to import, and scipy.stats takes longer.
    from scipy.special import ndtri, stdtrit

    # Quantiles of Student's t and of the normal distribution.
    quantiles = float(stdtrit(free, upper) / ndtri(upper))
    # The bootstrap divides the variance by the number of documents, Student by one less.
    return quantiles * (documents / free) ** 0.5
