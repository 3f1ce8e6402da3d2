"""Which rotary embedding each layer has: the model's, that of layers with a window, or none."""

from collections.abc import Sequence
from typing import Literal

from model.windows import Window

LayerRope = Literal["main", "window", "none"]
"""main is the current phase's rope; window the one of window_rotary_base, in all phases; none is
attention without positions (NoPE)."""


def layer_ropes(
    windows: Sequence[Window], no_rope_freq: Sequence[int], *, windows_have_own: bool
) -> tuple[LayerRope, ...]:
    """Return the rope of each layer.

    Args:
        windows: of the layers.
        no_rope_freq: as Megatron-LM means it. One number n: every n-th layer has no rope. Several:
            1 for each layer without and 0 for each with. Empty: all have one.
        windows_have_own: layers with a window have a rope of their own.
    """
    found: list[LayerRope] = []
    for number, window in enumerate(windows, start=1):
        if _has_no_rope(no_rope_freq, number):
            found.append("none")
        else:
            found.append("window" if windows_have_own and window is not None else "main")
    return tuple(found)


def _has_no_rope(no_rope_freq: Sequence[int], number: int) -> bool:
    """Return whether a layer, counted from 1, is one without rope."""
    if not no_rope_freq:
        return False
    if len(no_rope_freq) == 1:
        return number % no_rope_freq[0] == 0
    # A model of other depth, made for a comparison, repeats the pattern.
    return bool(no_rope_freq[(number - 1) % len(no_rope_freq)])


def shortest_no_rope(pattern: Sequence[int]) -> list[int]:
    """Spell which layers have no rope as shortly as no_rope_freq can.

    Args:
        pattern: for each layer 1 (without) or 0 (with).
    """
    if not any(pattern):
        return []
    for every in range(1, len(pattern) + 1):
        if list(pattern) == [int(_has_no_rope([every], n)) for n in range(1, len(pattern) + 1)]:
            return [every]
    return list(pattern)


def no_rope_problems(no_rope_freq: Sequence[int], num_layers: int) -> list[str]:
    """List what is wrong with no_rope_freq, as `name = value: rule. Fix: ...`."""
    given = list(no_rope_freq)
    if len(given) == 1 and not 1 <= given[0] <= num_layers:
        return [
            f"no_rope_freq = {given[0]}: every so many layers one has no rope, so it must be from "
            f"1 to num_layers = {num_layers}. Fix: remove it for rope in all layers."
        ]
    if len(given) > 1 and (len(given) != num_layers or not set(given) <= {0, 1}):
        return [
            f"no_rope_freq = {given}: must be one number, or for each of the {num_layers} layers 1 "
            "(without rope) or 0 (with). Fix: correct it."
        ]
    return []
