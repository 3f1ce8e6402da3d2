"""A number for the bits of a tensor, computed where the tensor lives and without waiting for it."""

import torch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""Bytes of an element -> the integers that its bits are read as; none is wider than half of the
sum, so that no flips of two highest bits cancel."""
STRIDE = -7046029254386353131
"""2^64 over the golden ratio: neighbours get unlike factors."""
CHUNK_ELEMENTS = 2**22
"""Elements that are widened to 64 bits at a time."""


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Sum up all bits, each element times an odd factor of its position, modulo 2^64.

    Any change of a single element changes it; of several elements, all but one in about 2^32 or
    fewer. The order of the sum does not matter, so that it is the same on any device.

    Returns:
        int64 scalar on the tensor's device.
    """
    values = tensor.detach().reshape(-1)
    values = values.view(INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, values.numel(), CHUNK_ELEMENTS):
        part = values[start : start + CHUNK_ELEMENTS].to(torch.int64)
        positions = torch.arange(
            start, start + part.numel(), dtype=torch.int64, device=values.device
        )
        factors = (positions * STRIDE) | 1
        total += (part * factors).sum()
    return total
