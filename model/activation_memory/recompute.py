"""What a layer keeps for its backward: everything, or less at the price of computing it again.

    none            everything
    selective       all of the attention; the MLP is computed again from its input
    full            the layer's input
    attention_kept  the layer's input, the attention's output and its log-sum-exp: attention's
                    forward runs once

What a layer keeps under full and attention_kept may wait in the host's memory (offload.py).

Figures against torch's own way, selective activation checkpointing
(torch.utils.checkpoint.create_selective_checkpoint_contexts, with a policy that keeps the attention
operator's results), by `bash launch/ithaca.sh bench recompute`: 2 layers of hidden size 256, 1,024
tokens in 2 documents; MiB of live tensors and median time of forward and backward over ours, on 2
cores of a Xeon with bf16 units, torch 2.13:

    way                     kept in fp32   peak in fp32   time in fp32   in bf16 (memory: half)
    full                    2.00           29.42          1              1
    full, torch             4.06           30.45          1.02           1.05
    attention_kept          4.06           29.42          1              1
    attention_kept, torch   6.06           30.45          1.12           1.11

Legend: t tokens, D hidden.
"""

from typing import Protocol

import torch
from torch.autograd.graph import get_gradient_edge

from model.activation_memory.offload import Host
from model.activation_memory.saved_attention import AttentionTape
from model.activation_memory.settings import KEEPS_INPUT_ONLY, MemorySettings
from model.positions import Positions


class LayerInHalves(Protocol):
    """A layer as this file sees it: a = x + attention(norm(x)), then a + mlp(norm(a))."""

    def after_attention(
        self,
        x_tD: torch.Tensor,
        positions: Positions,
        settings: MemorySettings,
        tape: AttentionTape | None,
    ) -> torch.Tensor:
        """Compute the first half: x -> a."""
        ...

    def after_mlp(self, a_tD: torch.Tensor, settings: MemorySettings) -> torch.Tensor:
        """Compute the second half: a -> the layer's output."""
        ...

    def mlp_gradient(
        self, a_tD: torch.Tensor, grad_tD: torch.Tensor, settings: MemorySettings
    ) -> torch.Tensor:
        """Backward of the second half, from its input; parameters get their gradients."""
        ...


class _Layer(torch.autograd.Function):
    """A layer of which only the input is kept (and its attention's results)."""

    @staticmethod
    def forward(
        ctx,
        x_tD,
        layer: LayerInHalves,
        positions: Positions,
        settings: MemorySettings,
        host: Host | None,
    ):
        ctx.layer = layer
        # What was measured in the forward is not measured again.
        ctx.positions = positions.without_logits()
        ctx.settings = settings
        ctx.tape = AttentionTape() if settings.recompute_granularity == "attention_kept" else None
        a_tD = layer.after_attention(x_tD, positions, settings, ctx.tape)
        out_tD = layer.after_mlp(a_tD, settings)
        # Keep the input and the attention's results, here or in the host's memory.
        ctx.on_host = None
        if host is None:
            ctx.save_for_backward(x_tD)
        else:
            calls = ctx.tape.calls if ctx.tape else []

            def free_outputs() -> None:
                for call in calls:
                    call.free_outputs()

            outputs = [part for call in calls for part in call.outputs]
            ctx.on_host = host.send([x_tD, *outputs], free_outputs)
        return out_tD

    @staticmethod
    def backward(ctx, *grads):
        (grad_tD,) = grads
        if ctx.on_host is None:
            (x_tD,) = ctx.saved_tensors
        else:
            x_tD, *outputs = ctx.on_host.take()
            for call in ctx.tape.calls if ctx.tape else ():
                call.refill_outputs([outputs.pop(0) for _ in call.parts])
        if ctx.tape is not None:
            ctx.tape.play()
        # The first half again, with a graph.
        x_tD = x_tD.detach().requires_grad_()
        with torch.enable_grad():
            a_tD = ctx.layer.after_attention(x_tD, ctx.positions, ctx.settings, ctx.tape)
        # Backward through the second half, then through the first.
        grad_a = ctx.layer.mlp_gradient(a_tD.detach(), grad_tD, ctx.settings)
        edge = get_gradient_edge(a_tD)
        del a_tD  # only its place in the graph is needed from here on
        torch.autograd.backward(edge, grad_a)
        return x_tD.grad, None, None, None, None


class _MLP(torch.autograd.Function):
    """The second half of a layer, of which only the input is kept."""

    @staticmethod
    def forward(ctx, a_tD, layer: LayerInHalves, settings: MemorySettings):
        ctx.layer = layer
        ctx.settings = settings
        ctx.save_for_backward(a_tD)
        return layer.after_mlp(a_tD, settings)

    @staticmethod
    def backward(ctx, *grads):
        (grad_tD,) = grads
        (a_tD,) = ctx.saved_tensors
        return ctx.layer.mlp_gradient(a_tD.detach(), grad_tD, ctx.settings), None, None


def run_layer(
    layer: LayerInHalves,
    x_tD: torch.Tensor,
    positions: Positions,
    settings: MemorySettings,
    host: Host | None,
) -> torch.Tensor:
    """Compute a layer's output [t, D]; it keeps for backward what the settings say.

    Parameters get their gradients in the course of the backward (they are not the functions'
    arguments): FSDP2 reduces them after the layer's backward, once.

    Args:
        host: where the kept tensors wait; None = on the device.
    """
    # Without gradients nothing is kept anyway.
    level = settings.recompute_granularity if torch.is_grad_enabled() else None
    if level in KEEPS_INPUT_ONLY:
        return _Layer.apply(x_tD, layer, positions, settings, host)
    a_tD = layer.after_attention(x_tD, positions, settings, None)
    if level == "selective":
        return _MLP.apply(a_tD, layer, settings)
    return layer.after_mlp(a_tD, settings)
