"""What runs in every run, and what only with --all."""

from collections.abc import Callable, Iterable

import pytest


def cases(names: Iterable[str], with_all: Callable[[str], bool]) -> list:
    """Parameters for the names, of which some are marked `long`."""
    return [
        pytest.param(name, marks=pytest.mark.long) if with_all(name) else name for name in names
    ]
