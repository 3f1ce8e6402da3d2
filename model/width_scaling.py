"""Width scaling (muP): what changes with the role of a parameter in a model wider than its base.

A learning rate that was found on a narrow model is then right for a wide one: every update changes
the activations by as much at any width. Source of the table: "Tensor Programs V" (arXiv 2203.03466,
table 8). It treats the output weight as it does the embedding, and divides the logits by the
width's ratio (`ModelConfig.logits_divisor`), so that a tied embedding needs no rule of its own.
"""

from typing import Literal, NamedTuple

Role = Literal["embedding", "output", "hidden", "vector"]
"""What a parameter is for: a row per token id on the way in, or on the way out (a tied one is an
embedding); a matrix between two hidden vectors; a norm, a bias or a sink."""

FanIn = Literal["hidden", "heads", "ffn"]
"""What a hidden matrix reads: the residual stream, all heads side by side, or the MLP's inside."""


class Powers(NamedTuple):
    """Holds powers of one ratio: how many numbers a hidden matrix sums, over how many the base
    model's does."""

    init: float
    """Power for the standard deviation of initial weights."""
    learning_rate: float
    """Power for the learning rate, with Adam."""


TABLE: dict[Role, Powers] = {
    "embedding": Powers(init=0.0, learning_rate=0.0),
    "output": Powers(init=0.0, learning_rate=0.0),
    # A sum of n independent numbers grows as the root of n; a sum of n updates that all point the
    # same way grows as n.
    "hidden": Powers(init=-0.5, learning_rate=-1.0),
    "vector": Powers(init=0.0, learning_rate=0.0),
}


class Scaling(NamedTuple):
    """Holds the factors of one parameter; all are 1 at the base width, and without muP."""

    init: float
    """On the standard deviation of its initial weights."""
    learning_rate: float
    weight_decay: float
    """A step shrinks weights by learning rate x weight decay; this factor keeps that product."""
    epsilon: float
    """On Adam's epsilon: gradients of all roles shrink as the logits' divisor grows."""


def scaling_of_role(role: Role, fan_in_ratio: float, width_ratio: float) -> Scaling:
    """Return the factors of a parameter.

    Args:
        fan_in_ratio: how many numbers the parameter sums, over how many the base model's does.
        width_ratio: hidden_size over the base model's.
    """
    powers = TABLE[role]
    learning_rate = fan_in_ratio**powers.learning_rate
    return Scaling(
        init=fan_in_ratio**powers.init,
        learning_rate=learning_rate,
        weight_decay=1 / learning_rate,
        epsilon=1 / width_ratio,
    )


def width_problems(hidden_size: int, base: int | None) -> list[str]:
    """Say why a model cannot be a wider form of its base."""
    if base is None or base < 1 or hidden_size < 1 or hidden_size % base == 0:
        return []
    divisors = [n for n in range(1, hidden_size + 1) if hidden_size % n == 0]
    nearest = sorted(sorted(divisors, key=lambda n: abs(n - base))[:3])
    return [
        f"mup_base_hidden_size = {base}: must divide hidden_size = {hidden_size}. "
        f"Fix: one of {nearest}, or another hidden_size."
    ]
