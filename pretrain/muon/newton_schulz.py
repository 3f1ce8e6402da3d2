"""Newton-Schulz: make a matrix nearly orthogonal by matrix products alone.

Each step is an odd polynomial of the matrix's singular values, which drives all of them towards 1
and leaves its singular vectors as they are (https://kellerjordan.github.io/posts/muon). Shapes:
K matrices, M rows, N columns.
"""

from collections.abc import Sequence
from typing import Literal

import torch

CoefficientType = Literal["simple", "quintic"]
Coefficients = tuple[float, float, float]

COEFFICIENTS: dict[CoefficientType, tuple[Coefficients, ...]] = {
    # Keller Jordan's, which arXiv 2502.16982 and torch.optim.Muon use in every step.
    "simple": ((3.4445, -4.7750, 2.0315),),
    # You Jiacheng's, others in each step; Megatron-LM's default.
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""Factors a, b and c in X <- a X + b (X X^T) X + c (X X^T)^2 X, step by step; further steps repeat
the last."""
SMALLEST_NORM = 1e-7
"""A matrix of a smaller norm is divided by this instead, as torch.optim.Muon does."""


def steps_of(kind: CoefficientType, count: int) -> list[Coefficients]:
    """Return the coefficients of each of `count` steps."""
    known = COEFFICIENTS[kind]
    return [known[min(step, len(known) - 1)] for step in range(count)]


def orthogonalize(x_KMN: torch.Tensor, steps: Sequence[Coefficients]) -> torch.Tensor:
    """Orthogonalize K matrices that have at most as many rows as columns.

    X X^T then has the size of the shorter side. Products are in the dtype of the matrices; those of
    bf16 are summed in fp32.
    """
    assert x_KMN.shape[1] <= x_KMN.shape[2], "the caller transposes"
    # The norm over all elements is at least the largest singular value.
    wide = torch.promote_types(x_KMN.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_KMN, dim=(1, 2), keepdim=True, dtype=wide)
    x_KMN = x_KMN / norm.clamp(min=SMALLEST_NORM).to(x_KMN.dtype)
    for a, b, c in steps:
        gram_KMM = x_KMN @ x_KMN.mT
        polynomial_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, polynomial_KMM, x_KMN, beta=a)
    return x_KMN


def orthogonalize_all(
    matrices: Sequence[torch.Tensor], steps: Sequence[Coefficients]
) -> list[torch.Tensor]:
    """Orthogonalize [K, rows, columns] tensors, those of the same shape in one batch.

    A shape and its transpose count as the same.
    """
    batches: dict[torch.Size, list[int]] = {}
    wide = [matrix if matrix.shape[1] <= matrix.shape[2] else matrix.mT for matrix in matrices]
    for number, matrix in enumerate(wide):
        batches.setdefault(matrix.shape[1:], []).append(number)
    found = list(matrices)
    for numbers in batches.values():
        batch = torch.cat([wide[number] for number in numbers])
        parts = orthogonalize(batch, steps).split([wide[number].shape[0] for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            is_transposed = wide[number] is not matrices[number]
            found[number] = part.mT if is_transposed else part
    return found


def count_flops(rows: int, columns: int, steps: int) -> int:
    """Count the floating-point operations of one matrix."""
    short, long = sorted((rows, columns))
    # Two products of [short, long], one of [short, short].
    return steps * (4 * short * short * long + 2 * short**3)
