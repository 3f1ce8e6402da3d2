"""Measures from how many tokens on a document is faster through cuDNN: a second or two at start.

Both compute the same call, through the backend that will train (mixed.py): TOKENS tokens in
documents of one length, forward and backward, with this rank's heads. The documents are half a
granule short of the length to which cuDNN's are padded, as documents are on average.
"""

from collections.abc import Callable

import torch

from model.kernels import HeadShape, Segments, make_segments
from model.mixed import NEVER, mixed_attention, padded_length

TOKENS = 8192
"""Tokens of a call: enough to fill a GPU, few enough to be quick."""
PADDED_LENGTHS = (512, 1024, 2048, 4096, 8192)
REPEATS = 5
"""Timed calls, after one that is not timed."""


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
    # A generator of its own: the run's random numbers stay what they are.
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(
            TOKENS, count, size, generator=generator, device=device, dtype=dtype
        ).requires_grad_()
        for count in (query, kv, kv)
    )
    found = {}
    for length in (document_length(padded) for padded in PADDED_LENGTHS):
        bounds = torch.tensor(
            [*range(0, TOKENS, length), TOKENS], dtype=torch.int32, device="cpu"
        )
        (segments,) = make_segments(bounds, [(0, TOKENS)], device)
        found[length] = tuple(
            time_call(mixed_attention(crossover), q, k, v, segments) for crossover in (1, NEVER)
        )
    return found


def crossover_of(milliseconds: dict[int, tuple[float, float]]) -> int:
    """The shortest measured length from which on cuDNN stays ahead; NEVER if there is none."""
    found = NEVER
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
