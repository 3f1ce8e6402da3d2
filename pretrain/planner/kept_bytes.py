"""Bytes that a layer keeps, and points at which its backward holds most."""

from dataclasses import dataclass


def pinned_bytes(size: int) -> int:
    """Return what a tensor takes in pinned memory.

    torch's allocator for the host hands it out in powers of two.
    """
    return 2 ** (size - 1).bit_length() if size else 0


@dataclass(frozen=True)
class KeptBytes:
    """Bytes that wait for backward."""

    device: int
    host: int = 0
    """The part of them that moves to the host's memory where the layer is offloaded."""


@dataclass(frozen=True)
class PeakCandidate:
    """A point of a layer's backward at which much is held, beside what all layers keep."""

    freed: int
    """Bytes that the layer at work kept and that are no longer there."""
    made: int
    """Bytes made for it."""
    gradients: int
    """Bytes of the parameters' gradients, before FSDP2 takes them."""
