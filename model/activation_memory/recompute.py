"""What a layer keeps for its backward: everything, or less at the price of computing it again.

    none            everything
    selective       all of the attention; the MLP is computed again from its input
    full            the layer's input
    attention_kept  the layer's input, the attention's output and its log-sum-exp: attention's forward runs once

What a layer keeps under full and attention_kept may wait in the host's memory (activation_memory/offload.py). A layer
whose halves are `after_attention` (x -> a = x + attention) and `mlp_gradient` (the backward of a +
mlp) is all that this file knows.
"""

import torch
from torch.autograd.graph import get_gradient_edge

from model.activation_memory.offload import Host
from model.activation_memory.saved_attention import AttentionTape
from model.activation_memory.settings import KEEPS_INPUT_ONLY, MemorySettings


class _Layer(torch.autograd.Function):
    """A layer of which only the input is kept (and its attention's results)."""

    @staticmethod
    def forward(ctx, x_tD, layer, positions, settings: MemorySettings, host: Host | None):
        ctx.layer = layer
        ctx.positions = positions
        ctx.settings = settings
        ctx.tape = AttentionTape() if settings.recompute_granularity == "attention_kept" else None
        a_tD = layer.after_attention(x_tD, positions, settings, ctx.tape)
        out_tD = layer.after_mlp(a_tD, settings)
        ctx.on_host = None
        if host is None:
            ctx.save_for_backward(x_tD)
        else:
            calls = ctx.tape.calls if ctx.tape else []

            def empty_outputs() -> None:
                for call in calls:
                    call.empty_outputs()

            ctx.on_host = host.send(
                [x_tD, *(part for call in calls for part in call.outputs)], empty_outputs
            )
        return out_tD

    @staticmethod
    def backward(ctx, grad_tD):
        if ctx.on_host is None:
            (x_tD,) = ctx.saved_tensors
        else:
            x_tD, *outputs = ctx.on_host.take()
            for call in ctx.tape.calls if ctx.tape else ():
                call.refill_outputs([outputs.pop(0) for _ in call.parts])
        if ctx.tape is not None:
            ctx.tape.play()
        x_tD = x_tD.detach().requires_grad_()
        with torch.enable_grad():
            a_tD = ctx.layer.after_attention(x_tD, ctx.positions, ctx.settings, ctx.tape)
        grad_a = ctx.layer.mlp_gradient(a_tD.detach(), grad_tD, ctx.settings)
        edge = get_gradient_edge(a_tD)
        del a_tD  # only its place in the graph is needed from here on
        torch.autograd.backward(edge, grad_a)
        return x_tD.grad, None, None, None, None


class _MLP(torch.autograd.Function):
    """The second half of a layer, of which only the input is kept."""

    @staticmethod
    def forward(ctx, a_tD, layer, settings: MemorySettings):
        ctx.layer = layer
        ctx.settings = settings
        ctx.save_for_backward(a_tD)
        return layer.after_mlp(a_tD, settings)

    @staticmethod
    def backward(ctx, grad_tD):
        (a_tD,) = ctx.saved_tensors
        return ctx.layer.mlp_gradient(a_tD.detach(), grad_tD, ctx.settings), None, None


def run_layer(
    layer, x_tD: torch.Tensor, positions, settings: MemorySettings, host: Host | None
) -> torch.Tensor:
    """The layer's output [t, D], with what it keeps for backward as the settings say.

    Parameters get their gradients in the course of the backward (they are not the functions'
    arguments): FSDP2 reduces them after the layer's backward, once.

    Args:
        host: where the kept tensors wait; None = on the device.
    """
    level = settings.recompute_granularity if torch.is_grad_enabled() else None
    if level in KEEPS_INPUT_ONLY:
        return _Layer.apply(x_tD, layer, positions, settings, host)
    a_tD = layer.after_attention(x_tD, positions, settings, None)
    return (
        _MLP.apply(a_tD, layer, settings)
        if level == "selective"
        else layer.after_mlp(a_tD, settings)
    )
