"""Count inputs and labels per token, knowing nothing of the data engine."""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def count_batch(tokens, labels, document_masking, starts, inputs_seen, labels_seen):
    """Count a batch, up to 255; the first place whose label cannot follow its token, or -1.

    It is the next token, or without document masking perhaps another document's first. starts:
    sorted.
    """
    wrong = -1
    for i in range(len(tokens)):
        token = tokens[i]
        label = labels[i]
        if token > 0:
            inputs_seen[token] = min(inputs_seen[token] + 1, 255)
        if label < 0:
            continue
        labels_seen[label] = min(labels_seen[label] + 1, 255)
        follows = token > 0 and label == token + 1
        if not follows and not document_masking and token > 0:
            place = np.searchsorted(starts, label)
            follows = place < len(starts) and starts[place] == label
        if not follows and wrong < 0:
            wrong = i
    return wrong


@numba.njit(nogil=True, cache=True)
def mark_tokens(starts, lengths, out):
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            out[token] += 1


@numba.njit(nogil=True, cache=True)
def find_difference(starts, lengths, expected, inputs, labels, firsts_may):
    """(first token that is wrong, 0 as input or 1 as label), or (-1, 0)."""
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            if inputs[token] != expected[token]:
                return token, 0
            if token > starts[i]:
                if labels[token] != inputs[token - 1]:
                    return token, 1
            elif labels[token] > (1 if firsts_may else 0):
                return token, 1
    return -1, 0
