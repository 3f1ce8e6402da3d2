"""Sliding windows: which layers have one, and how many pairs of tokens their attention scores.

In a layer with a window of W tokens, a token sees itself and the W - 1 tokens before it, as far as
they are of its document. Megatron-LM writes that as `--window-size W-1,0`: how many tokens are seen
on the left and on the right.
"""

from collections.abc import Sequence

import numpy as np

PAST_WINDOW = 64
"""Tokens beyond a window that a comparison has."""
Window = int | None
"""Tokens that a token sees, itself included; None = all of its document up to itself."""


def layer_windows(size: Sequence[int], skip: Sequence[int], num_layers: int) -> tuple[Window, ...]:
    """Return the window of each layer.

    Megatron-LM's name `skip` is about layers without a window, its pattern about those with one.

    Args:
        size: window_size, tokens on the left and on the right; empty = no layer has a window.
        skip: window_attn_skip_freq. One number n: every n-th layer sees its whole document.
            Several: 1 for each layer with a window and 0 for each without. Empty: all have one.
    """
    if not size:
        return (None,) * num_layers
    window = size[0] + 1
    if not skip:
        return (window,) * num_layers
    if len(skip) == 1:
        # Megatron-LM counts layers from 1.
        return tuple(window if number % skip[0] else None for number in range(1, num_layers + 1))
    return tuple(window if has_window else None for has_window in skip)


def shortest_skip(pattern: Sequence[int]) -> list[int]:
    """Spell which layers have a window as shortly as window_attn_skip_freq can.

    Args:
        pattern: for each layer 1 (with a window) or 0 (without).
    """
    if all(pattern):
        return []
    for every in range(2, len(pattern) + 1):
        if list(pattern) == [int(number % every > 0) for number in range(1, len(pattern) + 1)]:
            return [every]
    return list(pattern)


def tokens_beyond(windows: Sequence[Window], least: int) -> int:
    """Return how many tokens show what the windows do, at least `least`."""
    longest = max((window for window in windows if window is not None), default=0)
    return max(least, longest + PAST_WINDOW if longest else 0)


def window_problems(size: Sequence[int], skip: Sequence[int], num_layers: int) -> list[str]:
    """List what is wrong with the settings of windows, as `name = value: rule. Fix: ...`."""
    given = list(size)
    pattern = list(skip)
    if not given:
        if not pattern:
            return []
        return [
            f"window_attn_skip_freq = {pattern}: says which layers have a window, but window_size "
            "is not given. Fix: give it, or remove this."
        ]
    if len(given) != 2 or given[0] < 0 or given[1] != 0:
        return [
            f"window_size = {given}: must be two numbers, the tokens that a token sees before it, "
            "and 0 after it. Fix: 1023 0 for a window of 1,024 tokens, the token itself included."
        ]
    if len(pattern) == 1 and not 2 <= pattern[0] <= num_layers:
        return [
            f"window_attn_skip_freq = {pattern[0]}: every so many layers one sees its whole "
            f"document, so it must be from 2 to num_layers = {num_layers}. Fix: remove it for "
            "windows in all layers, or remove window_size for none."
        ]
    if len(pattern) > 1 and (len(pattern) != num_layers or not set(pattern) <= {0, 1}):
        return [
            f"window_attn_skip_freq = {pattern}: must be one number, or for each of the "
            f"{num_layers} layers 1 (with a window) or 0 (without). Fix: correct it."
        ]
    return []


def pairs_seen(lengths: np.ndarray, window: Window) -> np.ndarray:
    """Count the pairs of tokens of which one sees the other, for documents of these lengths."""
    lengths = np.asarray(lengths, dtype=np.float64)
    # Up to the window's length a token sees all before it, from there on as many as the window has.
    growing = lengths if window is None else np.minimum(lengths, window)
    pairs = growing * (growing + 1) / 2
    return pairs if window is None else pairs + (lengths - growing) * window


def mean_pairs_seen(lengths: np.ndarray, windows: Sequence[Window]) -> np.ndarray:
    """Average `pairs_seen` over the layers, whose windows are given."""
    counted = {window: windows.count(window) for window in windows}
    total = sum(count * pairs_seen(lengths, window) for window, count in counted.items())
    return np.asarray(total) / len(windows)
