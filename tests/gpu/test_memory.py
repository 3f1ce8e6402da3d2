"""Kept layer inputs in the host's memory: the same gradients, less memory on the GPU."""

import pytest
import torch
from torch import nn

from model.memory import run_layer

pytestmark = pytest.mark.gpu
LAYERS, TOKENS, WIDTH = 8, 8192, 1024


def gradients(layers: nn.ModuleList, offload: bool) -> tuple[list[torch.Tensor], int]:
    """Gradients of all layers, and the bytes at the peak above what is there now."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).cuda()
    shift = torch.ones(WIDTH, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for layer in layers:
        x = run_layer(lambda x, shift, layer=layer: x + layer(x) + shift, x, (shift,), "full", offload)
    grads = torch.autograd.grad(x.square().sum(), list(layers.parameters()))
    return list(grads), torch.cuda.max_memory_allocated() - before


def test_offloaded_inputs_leave_the_gpu_and_come_back():
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(LAYERS)]).cuda()
    (kept, kept_bytes), (offloaded, offloaded_bytes) = gradients(layers, False), gradients(layers, True)
    assert all(torch.equal(a, b) for a, b in zip(kept, offloaded, strict=True))
    assert kept_bytes - offloaded_bytes > 0.7 * (LAYERS - 2) * TOKENS * WIDTH * 4
