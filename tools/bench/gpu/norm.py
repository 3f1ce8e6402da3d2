"""Measure our compiled norm beside torch's own, forward and backward: which one a GPU should
run."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from model.pointwise import rms_norm
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import SEED, Card, Scale

EPSILON = 1e-6
SHAPES = {"32,768 tokens of 2,048": (32768, 2048), "32 heads of 128": (32768 * 32, 128)}
"""A 1B model's hidden states at 4 samples of 8K, and one layer's queries under qk-norm."""
REPEATS = 5
CALLS = 10
"""Calls that are timed together: one alone takes as long to launch as it does to run."""
BYTES_PER_ELEMENT = 5 * 2
"""In bf16: forward reads x and writes the result, backward reads x and the gradient and writes
one."""

Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The rows and the weight, to the normed rows."""


def norm(card: Card, scale: Scale, report: Report) -> None:
    """Report the seconds of a forward and backward, and the rate of the bytes that it must move."""
    ways: dict[str, Norm] = {
        "ours": lambda x, weight: rms_norm(x, weight, EPSILON),
        "F.rms_norm": lambda x, weight: F.rms_norm(x, (x.shape[-1],), weight, EPSILON),
    }
    for shape, (rows, size) in SHAPES.items():
        # A model gives a norm rows of one size. After another size torch makes kernels for any,
        # whose backward reads its inputs twice.
        torch.compiler.reset()
        for name, way in ways.items():
            case = f"{name}, {shape}"
            with report.trying(case):
                measure(card, report, case, way, scale.tokens(rows), size, scale)


def measure(
    card: Card, report: Report, case: str, way: Norm, rows: int, size: int, scale: Scale
) -> None:
    """Report one way on rows [rows, size]."""
    dtype = getattr(torch, scale.dtype)
    generator = torch.Generator(card.device).manual_seed(SEED)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=card.device, dtype=dtype)

    x = draw(rows, size).requires_grad_()
    weight = draw(size).requires_grad_()
    grad = draw(rows, size)

    def steps() -> None:
        for _ in range(CALLS):
            x.grad = weight.grad = None
            way(x, weight).backward(grad)

    seconds = card.median(steps, repeats=REPEATS, warm_ups=1) / CALLS
    report.add("seconds", seconds, "s", case=case)
    rate = BYTES_PER_ELEMENT * rows * size / seconds / 1e12
    report.add("bandwidth", rate, "TB/s", case=case, note="of the bytes that it must move")
