"""The leak probe: one token is changed, and only later logits of its own document may change.

Without document masking the whole sample is the document.
"""

import torch
import torch.distributed as dist

from data.batch import Batch
from data.loader import Loader
from parallel.collectives import all_reduce
from parallel.context import token_pieces
from parallel.layout import Layout
from pretrain.step import Stepper
from tests.dist.parity import VOCABULARY


def probe(stepper: Stepper, layout: Layout, loader: Loader) -> tuple[list[str], bool]:
    """Forward twice, the second time with one token changed; the next document stands in the same
    sample.

    Returns:
        What changed on this rank that must not, bit for bit; whether a later token of the document
        changed.
    """
    batches, place = _find(layout, loader)
    before = _logits(stepper, batches)
    pieces = token_pieces(int(batches[0].cu_seqlens[-1]), layout)
    here = torch.cat([torch.arange(a, b) for a, b in pieces])
    changed_in, start, stop = place or (-1, 0, 0)
    target = start + (stop - start - 1) // 2
    if place:
        tokens = batches[changed_in].tokens
        tokens[here == target] = (tokens[here == target] + 1) % VOCABULARY
    after = _logits(stepper, batches)
    problems = []
    reached = False
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        changed = (old != new).any(dim=1)
        allowed = (here >= target) & (here < stop) & (index == changed_in)
        if (changed & ~allowed).any():
            problems.append(
                f"microbatch {index}, tokens {here[changed & ~allowed][:5].tolist()}; the "
                f"changed one is {target} of microbatch {changed_in}, in the document [{start}, "
                f"{stop})"
            )
        reached |= bool((changed & allowed & (here > target)).any())
    return problems, reached


def _find(layout: Layout, loader: Loader) -> tuple[list[Batch], tuple[int, int, int] | None]:
    """A step in which some rank has what the probe needs -> (its microbatches, where this rank has
    it or None).

    Without masking no document follows another in a sample: then any sample will do.
    """
    for step in range(20):
        batches = loader.read(step * loader.global_batch_tokens)
        place = next(
            (
                (index, a, b)
                for index, batch in enumerate(batches)
                for a, b in zip(
                    batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False
                )
                if b - a > 2
                and (
                    b % loader.seq_length
                    or b - a == loader.seq_length
                    and not loader.document_masking
                )
            ),
            None,
        )
        found = torch.tensor(int(place is not None))
        if all_reduce(found, layout.world, dist.ReduceOp.MAX):
            return batches, place
    raise AssertionError("no document is followed by another: the probe proves nothing")


def _logits(stepper: Stepper, batches: list) -> list[torch.Tensor]:
    """This rank's logits of every microbatch; none without the last stage."""
    found = []
    last = [stage for stage in stepper.stages if stage.is_last]

    def listening(original):
        def head_inputs(x_tD):
            x_tD, weight_vD = original(x_tD)
            found.append(x_tD @ weight_vD.T)
            return x_tD, weight_vD

        return head_inputs

    for stage in last:
        stage.head_inputs = listening(stage.head_inputs)
    stepper.run(batches, train=False)
    for stage in last:
        del stage.head_inputs
    return found
