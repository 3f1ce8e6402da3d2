"""How the backend `mixed` splits an attention call: long documents for cuDNN, the others together.

A cuDNN execution plan is made for each new shape and takes tens to hundreds of milliseconds. A
document is therefore padded at its end to one of a bounded set of lengths.
"""

from collections.abc import Hashable
from itertools import groupby
from math import ceil, sqrt

import torch

from model.attention_backends.backend import HeadShape
from model.attention_backends.documents import KernelCall, PackedDocuments

LAUNCH_SECONDS = 0.4e-3
"""Seconds in which the host launches one document's calls of cuDNN, forward and backward, with what
pads them.

On an H100's host (torch 2.11) 0.29 to 0.33 ms for each document of 384, 896, 1,920 and 3,968 tokens
with 4 heads of 128, 0.46 to 0.69 ms with 8 heads of 64: the length did not matter, so that the card
waited for the host.
"""
VARLEN_SECONDS = 24e-15
"""Seconds that the varlen op takes for each L^2 m H, forward and backward of a document of L tokens
with m query heads of size H.

On an H100 24 fs at 32,256 tokens with 4 heads of 128, and 26 at 16,128 with 8 heads of 64; cuDNN
took 12 and 18.
"""
NEVER = 2**40
"""A crossover that no document reaches."""
GRANULE_TOKENS = 256
"""Least step between padded lengths; from 8,192 tokens on 1/16 of the power of two is more."""


def padded_length(tokens: int) -> int:
    """Round a document's length up to one for which cuDNN makes a plan.

    It is a multiple of 1/16 of the largest power of two that the document reaches, and of
    GRANULE_TOKENS: at most 16 lengths between a power of two and the next, 144 from 1 token to a
    million. From 4,096 tokens on this adds at most 6.3 % to the length, 2.2 % on average (and twice
    that to the operations); from 2,048 to 4,096 twice as much, and below 2,048 up to 255 tokens.
    """
    power = 1 << (tokens.bit_length() - 1)
    granule = max(GRANULE_TOKENS, power // 16)
    return -(-tokens // granule) * granule


def assumed_crossover(heads: HeadShape) -> int:
    """Estimate from how many tokens on a document is faster through cuDNN, unless it is measured.

    It is the length at which the varlen op takes as long as launching cuDNN's calls does, rounded
    up to one that needs no padding: 2,048 tokens with 32 heads of 128, and 5,888 with 4. Measured
    with 4 heads of 128: above 3,968 and at most 8,064; with 8 of 64: above 8,064 and at most
    16,128, where 5,888 is too short.
    """
    query_heads, _, size = heads
    return padded_length(ceil(sqrt(LAUNCH_SECONDS / (VARLEN_SECONDS * query_heads * size))))


def split_documents(documents: PackedDocuments, crossover: int) -> list[KernelCall]:
    """Split a call's documents into kernel calls, in order; later layers look the result up."""
    if crossover not in documents.kernel_calls:
        documents.kernel_calls[crossover] = _split(documents, crossover)
    return documents.kernel_calls[crossover]


def _split(documents: PackedDocuments, crossover: int) -> list[KernelCall]:
    bounds_q = documents.bounds_q
    bounds_k = documents.bounds_k
    lengths_q = [end - begin for begin, end in zip(bounds_q, bounds_q[1:], strict=False)]
    lengths_k = [end - begin for begin, end in zip(bounds_k, bounds_k[1:], strict=False)]

    def is_for_cudnn(number: int) -> bool:
        # cuDNN's causal mask is for as many keys as queries.
        return lengths_q[number] >= crossover and lengths_q[number] == lengths_k[number]

    def group_of(number: int) -> Hashable:
        """Name the kernel call of a document: neighbours with the same answer share one."""
        if not is_for_cudnn(number):
            return "short"
        length = lengths_q[number]
        # A padded document is alone: the rows after it serve as its padding.
        return length if padded_length(length) == length else (length, number)

    calls = []
    end = 0
    for _, numbers in groupby(range(len(lengths_q)), group_of):
        first = end
        end += len(list(numbers))
        if bounds_q[end] == bounds_q[first]:
            continue  # no query: a kernel would be launched for nothing
        length = lengths_q[first] if is_for_cudnn(first) else 0
        calls.append(
            KernelCall(
                rows_q=slice(bounds_q[first], bounds_q[end]),
                rows_k=slice(bounds_k[first], bounds_k[end]),
                documents=end - first,
                length=length,
                padded=padded_length(length) if length else 0,
                cu_q=_from_zero(documents.cu_q, bounds_q, first, end),
                cu_k=_from_zero(documents.cu_k, bounds_k, first, end),
                max_q=max(lengths_q[first:end]),
                max_k=max(lengths_k[first:end]),
            )
        )
    return calls


def _from_zero(cu: torch.Tensor, bounds: list[int], first: int, end: int) -> torch.Tensor:
    """Cut out the bounds of some documents, on the device: no transfer, nothing to wait for."""
    some = cu[first : end + 1]
    return some - bounds[first] if bounds[first] else some
