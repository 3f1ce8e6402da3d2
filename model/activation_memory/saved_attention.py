"""Attention calls whose results are kept while their q, k and v are freed and made again.

Whatever the kernel, its backward needs q, k, v, the output and the log-sum-exp. The graph of the
call stays alive; the storages of q, k and v are freed, and filled with recomputed values just
before the backward. So attention's forward runs once, and a call keeps its output [n, m, H] and
log-sum-exp [m, n] only.

torch's own way is a policy that keeps the attention operator's results (recompute.py measures it).

Sources: LoongTrain's selective checkpoint (arXiv 2406.18485); for storages that are freed, FSDP2.

Legend: n queries, m query heads, H head size.
"""

from collections.abc import Callable

import torch

PartsOfOutput = Callable[..., list[torch.Tensor]]
"""Differentiable attention (q, k, v), or (q, k, v, sinks), -> the output in parts: the rows of each
of the kernel's calls, in order."""


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Join the parts of an output to one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class KeptCall:
    """One call, between its forward and its backward; the caller frees its inputs.

    Parts are kept as the kernel's graph has them, since what they are joined to would be a second
    copy.
    """

    def __init__(
        self,
        attend: PartsOfOutput,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ):
        self.inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        if sinks is not None:
            # A copy: the parameter's memory may be freed before the backward (FSDP2).
            self.inputs += (sinks.detach().clone().requires_grad_(),)
        with torch.enable_grad():
            self.parts = attend(*self.inputs)

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The parts of the output, without a graph."""
        return [part.detach() for part in self.parts]

    @property
    def output(self) -> torch.Tensor:
        """The output as one tensor, without a graph."""
        return join(self.outputs)

    def free_outputs(self) -> None:
        """Free the outputs, of which there are copies; one cut out of a larger tensor stays."""
        for part in self.parts:
            # `refill_outputs` takes the memory of a copy over as it is, so the output must be all
            # of its own memory.
            if part.untyped_storage().nbytes() == part.numel() * part.element_size():
                free_storage(part)

    def refill_outputs(self, copies: list[torch.Tensor]) -> None:
        """Take the copies' memory over, where the outputs were freed."""
        for part, copy in zip(self.parts, copies, strict=True):
            if part.untyped_storage().nbytes() == 0:
                _move(copy.untyped_storage(), part.untyped_storage())

    def gradients(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of q, k and v, and of the sinks where there are some; once.

        Args:
            q, k, v: the values as they were, made again; their memory is taken over.
            grad: the gradient of the output.
        """
        for values, storage in zip(_storages((q, k, v)), _storages(self.inputs[:3]), strict=True):
            # Else an earlier call with the same k and v has filled it.
            if storage.nbytes() == 0:
                _move(values, storage)
        inputs = self.inputs
        parts = self.parts
        # The graph holds its leaves, and the tape lives as long as the whole step's graph.
        self.inputs = ()
        self.parts = []
        return torch.autograd.grad(parts, inputs, grad.split([len(part) for part in parts]))


def free_storage(*tensors: torch.Tensor) -> None:
    """Free the memory under tensors that nobody reads before it is filled again."""
    for storage in _storages(tensors):
        storage.resize_(0)


def _storages(tensors: tuple[torch.Tensor, ...]) -> list[torch.UntypedStorage]:
    """List the storages under the tensors, each once, in order of appearance.

    What one exchange brought shares one.
    """
    return list({x.untyped_storage()._cdata: x.untyped_storage() for x in tensors}.values())


def _move(values: torch.UntypedStorage, storage: torch.UntypedStorage) -> None:
    """Fill a freed storage with the values of another one, which is freed."""
    storage.resize_(values.nbytes())
    storage.copy_(values)  # below autograd, for which the tensor has not changed
    values.resize_(0)


class _Replay(torch.autograd.Function):
    """A kept call's output, as a function of the recomputed q, k and v."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, kept: KeptCall):
        ctx.has_sinks = sinks is not None
        ctx.kept = kept
        ctx.save_for_backward(q, k, v)
        return kept.output

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        found = ctx.kept.gradients(*ctx.saved_tensors, grad)
        return (*found, None) if ctx.has_sinks else (*found, None, None)


class AttentionTape:
    """The attention calls of one layer and microbatch.

    They are recorded in the layer's forward and played back for its backward.
    """

    def __init__(self):
        self.calls: list[KeptCall] = []
        self.position: int | None = None
        """Number of the next call to play; None while recording."""

    @property
    def playing(self) -> bool:
        """Are calls given back, instead of made and recorded?"""
        return self.position is not None

    def play(self) -> None:
        """Give back what was recorded from here on, in the same order."""
        self.position = 0

    def next_call(self) -> KeptCall:
        """Return the next recorded call."""
        assert self.position is not None, "the tape is still recording"
        self.position += 1
        return self.calls[self.position - 1]

    def attend(
        self,
        attend: PartsOfOutput,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the output of `attend`, run now or played.

        Recording has no gradient, playing has that of the call. A recorded call needs q, k and v
        only to be played: `free_storage` them as soon as nothing else reads them.
        """
        if self.playing:
            return _Replay.apply(q, k, v, sinks, self.next_call())
        self.calls.append(KeptCall(attend, q, k, v, sinks))
        return self.calls[-1].output
