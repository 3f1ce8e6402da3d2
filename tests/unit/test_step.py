"""A training step in one process: what it computes on the device, and what it leaves out."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.guards.spikes import NO_LIMITS, Limits
from pretrain.step import is_good_step, train_step
from tools.bench.contenders import OPTIMIZER, BenchModel, Ours, make_sample, one_process

VOCABULARY = 64
CONFIG = BenchModel(num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)
LARGE = 64 * 64
"""Elements of the smallest matrix of the model."""


class LargeOperators(TorchDispatchMode):
    """Names of the operators that read a tensor as large as a matrix of the model."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        if any(x.numel() >= LARGE for x in tensors):
            self.names.add(func._schema.name.removeprefix("aten::").rstrip("_"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer():
    """(our trainer in one process, a sample of 10 tokens)."""
    with one_process() as layout:
        yield (
            Ours(CONFIG, VOCABULARY, "float32", layout, seed=1),
            make_sample([6, 4], VOCABULARY, 1),
        )


def test_one_rank_does_not_divide_its_gradients_by_one(trainer):
    ours, sample = trainer
    with LargeOperators() as operators:
        ours.forward_backward(sample)
    assert "mm" in operators.names  # it sees what runs in backward
    assert "div" not in operators.names


def test_a_gradient_above_the_limit_is_scaled_down_to_it(trainer):
    ours, sample = trainer
    parameters = list(ours.stages[0].parameters())
    seen = []
    ours.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.to_local().clone() for p in parameters)
    )
    result = train_step(ours.stepper, ours.optimizer, [sample], OPTIMIZER.lr, clip_grad=0.01)
    assert result.grad_norm > 0.1
    assert math.sqrt(sum(float(grad.double().square().sum()) for grad in seen)) == pytest.approx(
        0.01, rel=1e-4
    )


@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_a_step_without_a_finite_gradient_changes_nothing(trainer, clip_grad):
    """Neither weights nor moments nor the optimizer's count of steps; the next step is as if it had
    not been."""
    ours, sample = trainer
    optimizer = ours.optimizer
    train_step(ours.stepper, optimizer, [sample], OPTIMIZER.lr, clip_grad)
    parameters = list(ours.stages[0].parameters())

    def state() -> list[torch.Tensor]:
        moments = [
            optimizer.state[p][key] for p in parameters for key in ("step", "exp_avg", "exp_avg_sq")
        ]
        tensors = [x.to_local() if hasattr(x, "to_local") else x for x in (*parameters, *moments)]
        return [x.detach().clone() for x in tensors]

    weight = ours.stages[0].final_norm.weight.to_local().detach()
    weight[0] = float("inf")
    before = state()
    result = train_step(ours.stepper, optimizer, [sample], OPTIMIZER.lr, clip_grad)
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    weight[0] = 1.0
    result = train_step(ours.stepper, optimizer, [sample], OPTIMIZER.lr, clip_grad)
    assert not result.skipped and not torch.equal(before[0], state()[0])


@pytest.mark.parametrize("limit", ["loss", "grad_norm"])
def test_a_step_beyond_its_limit_changes_nothing_and_one_at_it_does(trainer, limit):
    ours, sample = trainer
    weight = ours.stages[0].final_norm.weight.to_local().detach()
    before = weight.clone()

    def step(value: float):
        limits = Limits(**{limit: value})
        return train_step(ours.stepper, ours.optimizer, [sample], OPTIMIZER.lr, 1.0, limits)

    reached = getattr(step(0.0), limit)
    assert torch.equal(weight, before)
    assert step(math.nextafter(reached, 0)).skipped
    assert torch.equal(weight, before)
    assert not step(reached).skipped
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_or_norm_that_is_not_finite_is_never_good(value):
    one = torch.tensor(1.0, dtype=torch.float64)
    other = torch.tensor(value, dtype=torch.float64)
    assert bool(is_good_step(one, one, NO_LIMITS))
    assert not bool(is_good_step(other, one, NO_LIMITS))
    assert not bool(is_good_step(one, other, NO_LIMITS))
