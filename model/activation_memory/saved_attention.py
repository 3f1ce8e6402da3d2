"""Attention calls whose results are kept while their q, k and v are forgotten, and made again for
backward.

Whatever the kernel, its backward needs q, k, v, the output and the log-sum-exp. The graph of the
call stays alive; the storages of q, k and v are emptied, and filled with recomputed values just
before the backward. So attention's forward runs once, and a call keeps its output [n, m, H] and
log-sum-exp [m, n] only.

Sources: LoongTrain's selective checkpoint (arXiv 2406.18485); for storages that are emptied, FSDP2.
"""

from collections.abc import Callable

import torch

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]
"""Differentiable attention (q, k, v) -> the output in parts: the rows of each of the kernel's
calls, in order."""


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """A call's output as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KeptCall:
    """One call, between its forward and its backward; its inputs are to be emptied by the caller.

    Parts are kept as the kernel's graph has them, since what they are joined to would be a second
    copy.
    """

    def __init__(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        self.inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            self.parts = call(*self.inputs)

    @property
    def outputs(self) -> list[torch.Tensor]:
        return [part.detach() for part in self.parts]

    @property
    def output(self) -> torch.Tensor:
        return join(self.outputs)

    def empty_outputs(self) -> None:
        """Free the outputs, of which there are copies; but those that a kernel cut out of something
        larger."""
        for part in self.parts:
            # A copy has the order of the elements, not what lies between them; its memory is taken
            # over as it is.
            if part.untyped_storage().nbytes() == part.numel() * part.element_size():
                empty(part)

    def refill_outputs(self, copies: list[torch.Tensor]) -> None:
        """Take the copies' memory over, if the outputs were emptied."""
        for part, copy in zip(self.parts, copies, strict=True):
            if part.untyped_storage().nbytes() == 0:
                _move(copy.untyped_storage(), part.untyped_storage())

    def gradients(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """(dq, dk, dv), for q, k, v as they were, whose memory is taken over, and the output's
        gradient; once."""
        for values, storage in zip(_storages((q, k, v)), _storages(self.inputs), strict=True):
            if storage.nbytes() == 0:  # else an earlier call with the same k and v has filled it
                _move(values, storage)
        # The graph holds its leaves, and the tape lives as long as the whole step's graph.
        (inputs, parts), self.inputs, self.parts = (self.inputs, self.parts), (), []
        return torch.autograd.grad(parts, inputs, grad.split([len(part) for part in parts]))


def empty(*tensors: torch.Tensor) -> None:
    """Free the memory under tensors that nobody reads before it is filled again."""
    for storage in _storages(tensors):
        storage.resize_(0)


def _storages(tensors: tuple[torch.Tensor, ...]) -> list[torch.UntypedStorage]:
    """The memory under the tensors, each piece once (what one exchange brought shares one), in
    order of appearance."""
    return list({x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}.values())


def _move(values: torch.UntypedStorage, storage: torch.UntypedStorage) -> None:
    storage.resize_(values.nbytes())
    storage.copy_(values)  # below autograd, for which the tensor has not changed
    values.resize_(0)


class _Replay(torch.autograd.Function):
    """A kept call's output, as a function of the recomputed q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, kept: KeptCall):
        ctx.kept = kept
        ctx.save_for_backward(q, k, v)
        return kept.output

    @staticmethod
    def backward(ctx, grad):
        return *ctx.kept.gradients(*ctx.saved_tensors, grad), None


class AttentionTape:
    """The attention calls of one layer and microbatch: recorded in its forward, played back for its
    backward."""

    def __init__(self):
        self.calls: list[KeptCall] = []
        self.position: int | None = None  # of the next call to play; None while recording

    @property
    def playing(self) -> bool:
        return self.position is not None

    def play(self) -> None:
        """From here on give back what was recorded, in the same order."""
        self.position = 0

    def next_call(self) -> KeptCall:
        self.position += 1
        return self.calls[self.position - 1]

    def attend(self, call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The output of `call`, run now or played; recording has no gradient, playing has that of
        the call.

        A recorded call needs q, k and v only to be played: `empty` them as soon as nothing else
        reads them.
        """
        if self.playing:
            return _Replay.apply(q, k, v, self.next_call())
        self.calls.append(KeptCall(call, q, k, v))
        return self.calls[-1].output
