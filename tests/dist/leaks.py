"""The leak probe: one token is changed, and only later logits of its own document may change.

Without document masking the whole sample is the document.
"""

import torch

from parallel.context import token_pieces
from parallel.layout import Layout
from pretrain.step import Stepper


def probe(stepper: Stepper, layout: Layout, batches: list) -> tuple[list[str], bool]:
    """Forward twice, the second time with one token of the first microbatch changed; `batches` is changed.

    Returns:
        What changed on this rank that must not, bit for bit; whether anything changed that may.
    """
    before = _logits(stepper, batches)
    bounds = batches[0].cu_seqlens.tolist()
    pieces = token_pieces(bounds[-1], layout)
    here = torch.cat([torch.arange(a, b) for a, b in pieces])
    length, start = max((b - a, a) for a, b in zip(bounds, bounds[1:], strict=False))
    target = start + length // 2
    batches[0].tokens[here == target] += 1
    after = _logits(stepper, batches)
    may_change = (here >= target) & (here < start + length)
    problems, reached = [], False
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = (old != new).any(dim=1)
        allowed = may_change if index == 0 else torch.zeros_like(may_change)
        if (changed & ~allowed).any():
            problems.append(f"microbatch {index}, tokens {here[changed & ~allowed][:5].tolist()}; the changed one is "
                            f"{target} of the document [{start}, {start + length})")
        reached |= bool((changed & allowed).any())
    return problems, reached


def _logits(stepper: Stepper, batches: list) -> list[torch.Tensor]:
    """This rank's logits of every microbatch; none without the last stage."""
    found, last = [], [stage for stage in stepper.stages if stage.is_last]
    for stage in last:
        stage.logits = lambda x, original=stage.logits: found.append(original(x)) or found[-1]
    stepper.run(batches, train=False)
    for stage in last:
        del stage.logits
    return found
