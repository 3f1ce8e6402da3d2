"""Measures from how many tokens on a document is faster through cuDNN: a second or two at start.

Both compute the same call, through the backend that will train (mixed.py): documents of one length,
forward and backward, with this rank's heads. The documents are half a granule short of the length
to which cuDNN's are padded, as documents are on average.

A rank with few heads computes a document of 8,192 tokens in less time than its kernels take to
launch, which says nothing of longer ones. So the fewer heads, the longer the documents measured.

The time is that of a call with nothing before it. On an H100 with 4 heads of 128 it was the host's
up to 3,968 tokens: 0.3 ms for each document of cuDNN, whatever its length (kernel_calls.py). A run
whose card is far behind its host does not wait for those launches: there shorter documents may be
faster through cuDNN, too, which is not measured.
"""

from collections.abc import Callable
from math import ceil, log2, sqrt

import torch

from model.attention_backends.backend import HeadShape
from model.attention_backends.documents import PackedDocuments, pack_documents
from model.attention_backends.kernel_calls import NEVER, padded_length
from model.attention_backends.mixed import mixed_attention

SHORTEST = 512
"""Tokens to which the shortest measured documents are padded; the next are twice as long, and so
on."""
LONGEST = 8192
"""Tokens of the longest ones with MANY_HEADS query heads: milliseconds, long against a launch."""
MANY_HEADS = 32
"""Query heads of a large model's call on one rank."""
REPEATS = 5
"""Timed calls, after one that is not timed."""


def padded_lengths(heads: HeadShape) -> list[int]:
    """List the padded lengths to measure, each twice the one before.

    The work of the longest document is that of MANY_HEADS and LONGEST, or more.
    """
    query_heads = heads[0]
    # Work grows with heads x length^2.
    missing_work = max(1.0, MANY_HEADS / query_heads)
    doublings = ceil(log2(sqrt(missing_work)))
    longest = LONGEST << doublings
    return [SHORTEST << number for number in range((longest // SHORTEST).bit_length())]


def document_length(padded: int) -> int:
    """Return the average length of the documents that cuDNN pads to `padded`, in tokens."""
    shorter = padded
    while padded_length(shorter - 1) == padded:
        shorter -= 1
    return (shorter + padded) // 2


def measure(
    heads: HeadShape,
    device: torch.device,
    dtype: torch.dtype,
    time_call: Callable[..., float] | None = None,
) -> dict[int, tuple[float, float]]:
    """Time documents of several lengths: length -> milliseconds by cuDNN and by the varlen op.

    Args:
        time_call: milliseconds of (attend, q, k, v, documents); by default by the GPU's clock.
    """
    time_call = time_call or _time_on_gpu
    query_heads, kv_heads, size = heads
    lengths = padded_lengths(heads)
    # A generator of its own: the run's random numbers stay what they are.
    generator = torch.Generator(device=device).manual_seed(0)

    def random_heads(count: int) -> torch.Tensor:
        shape = (lengths[-1], count, size)
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        return x.requires_grad_()

    q = random_heads(query_heads)
    k = random_heads(kv_heads)
    v = random_heads(kv_heads)
    found = {}
    for length in (document_length(padded) for padded in lengths):
        # As many whole documents as the longest one has tokens.
        count = lengths[-1] // length
        total = count * length
        bounds = torch.arange(count + 1, dtype=torch.int32, device="cpu") * length
        (documents,) = pack_documents(bounds, [(0, total)], device)
        qkv = (q[:total], k[:total], v[:total])
        by_cudnn = time_call(mixed_attention(1), *qkv, documents)
        by_varlen = time_call(mixed_attention(NEVER), *qkv, documents)
        found[length] = (by_cudnn, by_varlen)
    return found


def crossover_of(milliseconds: dict[int, tuple[float, float]]) -> int:
    """Find the shortest measured length from which on cuDNN stays ahead.

    Where it is behind at the longest one, it is given documents of at least twice that length,
    which was not measured: on longer documents its rate is higher, and a launch matters less.
    """
    found = 2 * max(milliseconds)
    for length in sorted(milliseconds, reverse=True):
        by_cudnn, by_varlen = milliseconds[length]
        if by_cudnn >= by_varlen:
            break
        found = length
    return found


def _time_on_gpu(attend: Callable, q, k, v, documents: PackedDocuments) -> float:
    """Time a forward and backward by the GPU's clock, in milliseconds."""

    def call() -> None:
        out = attend(q, k, v, documents)
        torch.autograd.grad(out, (q, k, v), out.detach())

    call()  # makes cuDNN's plans
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPEATS
