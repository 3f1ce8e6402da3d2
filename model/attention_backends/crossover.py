"""Measures from how many tokens on a document is faster through cuDNN: a second or two at start.

Both compute the same call, through the backend that will train (attention_backends/mixed.py): documents of one length,
forward and backward, with this rank's heads. The documents are half a granule short of the length
to which cuDNN's are padded, as documents are on average.

A rank with few heads computes a document of 8,192 tokens in less time than its kernels take to
launch, which says nothing of longer ones. So the fewer heads, the longer the documents measured.
"""

from collections.abc import Callable
from math import ceil, log2, sqrt

import torch

from model.attention_backends.choice import HeadShape, Segments, make_segments
from model.attention_backends.mixed import NEVER, mixed_attention, padded_length

SHORTEST = 512
"""Tokens to which the shortest measured documents are padded; the next are twice as long, and so
on."""
LONGEST = 8192
"""Tokens of the longest ones with MANY_HEADS query heads: milliseconds, long against a launch."""
MANY_HEADS = 32
REPEATS = 5
"""Timed calls, after one that is not timed."""


def padded_lengths(heads: HeadShape) -> list[int]:
    """The lengths to measure, padded: the work of the longest document is that of MANY_HEADS and
    LONGEST, or more."""
    doublings = ceil(log2(sqrt(max(1.0, MANY_HEADS / heads[0]))))
    longest = LONGEST << doublings
    return [SHORTEST << number for number in range((longest // SHORTEST).bit_length())]


def document_length(padded: int) -> int:
    """Tokens of a document that cuDNN pads to `padded`: the average of those."""
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
    """Milliseconds through cuDNN and through the varlen op, by the documents' length.

    Args:
        time_call: milliseconds of (attend, q, k, v, segments); by default by the GPU's clock.
    """
    time_call = time_call or _time_on_gpu
    query, kv, size = heads
    lengths = padded_lengths(heads)
    # A generator of its own: the run's random numbers stay what they are.
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(
            lengths[-1], count, size, generator=generator, device=device, dtype=dtype
        ).requires_grad_()
        for count in (query, kv, kv)
    )
    found = {}
    for length in (document_length(padded) for padded in lengths):
        documents = lengths[-1] // length  # whole ones
        total = documents * length
        bounds = torch.arange(documents + 1, dtype=torch.int32, device="cpu") * length
        (segments,) = make_segments(bounds, [(0, total)], device)
        found[length] = tuple(
            time_call(mixed_attention(crossover), q[:total], k[:total], v[:total], segments)
            for crossover in (1, NEVER)
        )
    return found


def crossover_of(milliseconds: dict[int, tuple[float, float]]) -> int:
    """The shortest measured length from which on cuDNN stays ahead.

    Where it is behind at the longest one, it is given documents of at least twice that length,
    which nobody measured: its published rates are higher, and a launch matters less.
    """
    found = 2 * max(milliseconds)
    for length in sorted(milliseconds, reverse=True):
        of_cudnn, of_varlen = milliseconds[length]
        if of_cudnn >= of_varlen:
            break
        found = length
    return found


def _time_on_gpu(attend: Callable, q, k, v, segments: Segments) -> float:
    """Milliseconds of a forward and backward."""

    def call() -> None:
        out = attend(q, k, v, segments)
        torch.autograd.grad(out, (q, k, v), out.detach())

    call()  # makes cuDNN's plans
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / REPEATS
