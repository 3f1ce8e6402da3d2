"""A training step on a GPU: fused kernels against the CPU's results, and host syncs."""

import warnings

import pytest
import torch

from model import compiled
from model.config import ModelConfig
from model.presets import PRESETS
from model.products import add_product
from pretrain.qk_clip import LogitWatch
from tests.unit.test_fused import arguments_of_compiled_functions, clones, compiled_function

pytestmark = pytest.mark.gpu
MOST_SYNCS = 2


def to_gpu(value, dtype: torch.dtype):
    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to("cuda", dtype if x.is_floating_point() else None)

    return torch.utils._pytree.tree_map(move, value)


def round_to(dtype: torch.dtype):
    def rounded(x):
        is_real = isinstance(x, torch.Tensor) and x.is_floating_point()
        return x.to(dtype).to(x.dtype) if is_real else x

    return rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", arguments_of_compiled_functions())
def test_fused_kernels_give_what_the_cpu_gives(name, dtype):
    function = compiled_function(name)
    given = arguments_of_compiled_functions()[name]
    on_gpu = to_gpu(given, dtype)
    # The same rounded numbers, computed in fp32.
    on_cpu = torch.utils._pytree.tree_map(round_to(dtype), clones(given))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves((function(*on_cpu), on_cpu))
        found = torch.utils._pytree.tree_leaves((compiled.run(function, *on_gpu), on_gpu))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(
                one.cpu().to(other.dtype), other, rtol=tolerance, atol=tolerance
            )


def test_a_bf16_product_is_added_to_fp32_without_a_rounded_product():
    left, right = torch.randn(2, 64, 64, device="cuda").bfloat16()
    total = torch.ones(64, 64, device="cuda")
    add_product(total, left, right)
    torch.testing.assert_close(total, left.float() @ right.float() + 1, rtol=1e-5, atol=1e-5)


@pytest.fixture
def trainer():
    """(our trainer's tiny model on one GPU, a sample), after one step."""
    from tools.bench.contenders import Ours, make_sample, one_process, preset

    with one_process() as layout:
        ours = Ours(preset("tiny"), 512, "bfloat16", layout, seed=1)
        sample = make_sample([256, 256], 512, 1, layout.device)
        ours.step(sample)
        yield ours, sample


@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_the_host_waits_at_most_twice_in_a_step(trainer, threshold):
    ours, sample = trainer
    if threshold is not None:
        # Heads are clipped in each step.
        ours.stepper.logit_watch = LogitWatch(
            ours.stages,
            ModelConfig(**PRESETS["tiny"]),
            ours.stepper.layout,
            torch.bfloat16,
            threshold=threshold,
        )
        ours.step(sample)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            ours.step(sample)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [
        f"{w.filename}:{w.lineno}"
        for w in found
        if "synchronizing CUDA operation" in str(w.message)
    ]
    assert 1 <= len(syncs) <= MOST_SYNCS, syncs
