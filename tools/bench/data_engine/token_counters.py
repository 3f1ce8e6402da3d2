"""Count inputs and labels per token, knowing nothing of the data engine."""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def count_batch(tokens, labels, document_masking, starts, inputs_seen, labels_seen):
    """Count a batch, up to 255 per token; returns the first place with a wrong label, or -1.

    A label is the token after its input. Without document masking it may also be the first token of
    a document.

    Args:
        tokens, labels: int64 [batch]; a label below 0 is no target, token 0 is padding.
        starts: int64 [documents], ids of their first tokens, sorted.
        inputs_seen, labels_seen: uint8 [all tokens + 1], changed in place.
    """
    wrong = -1
    for i in range(len(tokens)):
        token = tokens[i]
        label = labels[i]
        if token > 0:
            inputs_seen[token] = min(inputs_seen[token] + 1, 255)
        # Padding, a document's last token, or one beyond the sample.
        if label < 0:
            continue
        labels_seen[label] = min(labels_seen[label] + 1, 255)
        # Within a document ids count on.
        follows = token > 0 and label == token + 1
        if not follows and not document_masking and token > 0:
            place = np.searchsorted(starts, label)
            follows = place < len(starts) and starts[place] == label
        if not follows and wrong < 0:
            wrong = i
    return wrong


@numba.njit(nogil=True, cache=True)
def mark_tokens(starts, lengths, out):
    """Add one to `out` at each token of the given spans."""
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            out[token] += 1


@numba.njit(nogil=True, cache=True)
def find_difference(starts, lengths, expected, inputs, labels, firsts_may):
    """Find the first token with a wrong count: (token, 0 as input or 1 as label), or (-1, 0).

    Args:
        expected: uint8 [all tokens + 1], how often each must be an input.
        firsts_may: may a document's first token be a label once?
    """
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            if inputs[token] != expected[token]:
                return token, 0
            # A label as often as the token before it was an input.
            if token > starts[i]:
                if labels[token] != inputs[token - 1]:
                    return token, 1
            elif labels[token] > (1 if firsts_may else 0):
                return token, 1
    return -1, 0
