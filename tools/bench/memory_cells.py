"""Hold the figures of the memory benchmark: a rung or a peer at one length."""

from dataclasses import dataclass

from tools.bench.contenders import (
    OURS,
)
from tools.bench.peers import PEERS

MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """Hold the figures of one rung at one length."""

    peak: int = 0
    """Bytes above the built model."""
    seconds: float = 0.0
    runs: int = 0
    loss: float = 0.0
    note: str = ""
    """Why there are no figures, or ""."""


def label(name: str) -> str:
    """Name a contender in a table."""
    return name if name in PEERS else f"{OURS}, {name}"
