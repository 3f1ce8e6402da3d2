"""What a step's samples cost, from the lengths of their documents alone: no token is read."""

import numpy as np

from data.batch import PADDING_SEQUENCE_TOKENS
from data.document_cost import DocumentCost
from data.first_pass import FirstPass
from data.mixture import Mixture
from data.stream import DocumentLengths


def sample_costs(
    samples: Mixture | FirstPass,
    first: int,
    count: int,
    cost: DocumentCost,
    *,
    document_masking: bool,
) -> np.ndarray:
    """Compute the costs of samples [first, first + count) -> float64 [count].

    Args:
        document_masking: does attention stop at the ends of documents?
    """
    costs = np.zeros(count)
    tokens = np.zeros(count, dtype=np.int64)
    # A source at a time: each has a stream of its own, which knows its lengths.
    for which, documents in samples.document_lengths(first, count):
        tokens_before = np.concatenate([[0], np.cumsum(documents.lengths)])
        tokens[which] = np.diff(tokens_before[documents.begins])
        if not document_masking:
            # A whole sample is one sequence.
            documents = DocumentLengths(tokens[which], np.arange(len(which) + 1))
        costs[which] = cost.of_samples(*documents)
    return costs + padding_costs(samples.settings.seq_length - tokens, cost)


def padding_costs(tokens: np.ndarray, cost: DocumentCost) -> np.ndarray:
    """Compute the cost of padding, which is cut into sequences of its own -> float64 [samples].

    Args:
        tokens: padding of each sample, int64 [samples].
    """
    whole, rest = np.divmod(tokens, PADDING_SEQUENCE_TOKENS)
    (of_whole,) = cost.of_documents(np.array([PADDING_SEQUENCE_TOKENS]))
    return whole * of_whole + np.where(rest > 0, cost.of_documents(rest), 0.0)
