"""Training on one GPU: gradients of several microbatches, and Muon's updates."""

import warnings

import pytest
import torch

from parallel.shard import own_shard
from pretrain.config.optimizer_config import OptimizerConfig
from pretrain.muon.muon import Muon
from pretrain.optimizer import build_optimizer, update
from tools.bench.contenders import BenchModel, Ours, make_sample, one_process

pytestmark = pytest.mark.gpu
VOCABULARY = 512
CONFIG = BenchModel(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=2,
)
"""Large enough that the streams of FSDP2 have work at the same time."""
STRATEGIES = ("optim", "optim_grads", "optim_grads_params")
PRECISIONS = {"medium": 0.05, "highest": 1e-3}
"""Precision of Muon's products -> how far an update may be off: bf16 rounds to 0.4 %, by step."""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 0.02)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_microbatches_are_added_up(strategy, dtype, tolerance):
    """FSDP2 adds to them on another stream than the one that computes the next microbatch."""
    samples = [make_sample([700, 324], VOCABULARY, seed, "cuda") for seed in range(4)]
    with one_process() as layout:
        trainer = Ours(CONFIG, VOCABULARY, dtype, layout, seed=1, strategy=strategy)
        parameters = dict(trainer.stages[0].named_parameters())
        sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in parameters.items()}
        for sample in samples:
            trainer.clear()
            trainer.forward_backward(sample)
            for name, parameter in parameters.items():
                # All samples have as many targets.
                sums[name] += own_shard(parameter.grad).cpu().double() / len(samples)
        # More than once: what is in a buffer that is used too early may be right by chance.
        for _ in range(3):
            trainer.clear()
            trainer.stepper.run(samples, train=True)
            for name, parameter in parameters.items():
                error = relative(own_shard(parameter.grad), sums[name])
                assert error < tolerance, f"{name}: {error:.1e}"


def with_muon(trainer: Ours, precision: str, **settings) -> OptimizerConfig:
    """Give a trainer Muon for its optimizer."""
    config = OptimizerConfig(optimizer="muon", muon_fp32_matmul_prec=precision, **settings)
    trainer.optimizer = build_optimizer(trainer.stages, CONFIG, config)
    return config


def orthogonalized(gradient: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz's polynomials, of singular values instead of a matrix, in fp64."""
    left, values, right = torch.linalg.svd(gradient, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("precision", PRECISIONS)
def test_muon_updates_by_the_orthogonalized_gradient(precision):
    """The first momentum is a multiple of the gradient, which the norm takes out again."""
    lr = 0.1
    generator = torch.Generator("cuda").manual_seed(2)
    with one_process() as layout:
        trainer = Ours(CONFIG, VOCABULARY, "bfloat16", layout, seed=1, optimizer=False)
        config = with_muon(trainer, precision)
        muon = trainer.optimizer
        assert isinstance(muon, Muon)
        expected_dtype = torch.bfloat16 if precision == "medium" else torch.float32
        assert {bucket.dtype for bucket in muon.buckets} == {expected_dtype}
        for parameter in trainer.stages[0].parameters():
            shard = own_shard(parameter)
            noise = torch.randn(shard.shape, generator=generator, device="cuda")
            parameter.grad = torch.zeros_like(parameter)
            own_shard(parameter.grad).copy_(noise)
        hidden = [each.parameter for each in muon.hidden]
        before = [own_shard(each).detach().cpu().double() for each in hidden]
        refused = torch.zeros((), dtype=torch.bool, device="cuda")
        update(muon, lr, refused)
        assert all(
            torch.equal(own_shard(each).cpu().double(), was)
            for each, was in zip(hidden, before, strict=True)
        ), "a step that does not count changes a weight"
        update(muon, lr, ~refused)
        for each, was in zip(hidden, before, strict=True):
            gradient = own_shard(each.grad).cpu().double()
            scale = 0.2 * max(gradient.shape) ** 0.5
            moved = -lr * (scale * orthogonalized(gradient) + config.weight_decay * was)
            error = relative(own_shard(each).detach().cpu().double() - was, moved)
            assert error < PRECISIONS[precision], f"{tuple(each.shape)}: {error:.1e}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_host_waits_at_most_twice_in_a_step_of_muon(precision):
    with one_process() as layout:
        trainer = Ours(CONFIG, VOCABULARY, "bfloat16", layout, seed=1, optimizer=False)
        with_muon(trainer, precision)
        sample = make_sample([700, 324], VOCABULARY, 1, layout.device)
        trainer.step(sample)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                trainer.step(sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    syncs = [
        f"{each.filename}:{each.lineno}"
        for each in found
        if "synchronizing CUDA operation" in str(each.message)
    ]
    assert 1 <= len(syncs) <= 2, syncs
