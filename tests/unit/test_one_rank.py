"""FSDP2 on one rank: which copies are left, and that a parameter is the one that is stored.

These tests pin what parallel/one_rank.py relies on in FSDP2.
"""

from collections import Counter

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from parallel.shard import own_shard, reshard
from tools.bench.contenders import BenchModel, Ours, make_sample, one_process

VOCABULARY = 64
CONFIG = BenchModel(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)
SMALLEST = 64 * 64
"""Elements of the smallest matrix of the model: more than any activation has."""
UNITS = CONFIG.num_layers + 1
"""What FSDP2 gathers as one: the layers, and what is around them."""
STRATEGIES = ("optim", "optim_grads", "optim_grads_params")


class Copies(TorchDispatchMode):
    """Counts copies of tensors as large as a matrix, by operator and dtypes from and to."""

    def __init__(self):
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in ("copy_", "_to_copy", "clone", "div", "div_"):
            source = args[1] if name == "copy_" else args[0]
            if source.numel() >= SMALLEST and not self._is_itself(name, args):
                self.found[name, _show(source), _show(result)] += 1
        elif name in ("chunk_cat", "split_with_sizes_copy", "_foreach_copy_"):
            self.found[(name,)] += 1
        return result

    @staticmethod
    def _is_itself(name, args):
        """Tell whether a tensor is copied to itself, which torch leaves out."""
        return name == "copy_" and args[0] is args[1]


def _show(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def make_trainer(layout, dtype, strategy="optim_grads"):
    return Ours(CONFIG, VOCABULARY, dtype, layout, seed=1, strategy=strategy)


def count_matrices(trainer):
    return sum(p.numel() >= SMALLEST for p in trainer.stages[0].parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_in_their_stored_dtype_are_not_copied(strategy):
    """A gradient is copied once, to its unit's buffer."""
    sample = make_sample([6, 4], VOCABULARY, 1)
    with one_process() as layout:
        trainer = make_trainer(layout, "float32", strategy)
        trainer.step(sample)  # what is made once
        with Copies() as copies:
            trainer.forward_backward(sample)
    assert copies.found == {("chunk_cat",): UNITS}


def test_parameters_are_cast_by_one_pass():
    sample = make_sample([6, 4], VOCABULARY, 1)
    with one_process() as layout:
        trainer = make_trainer(layout, "bfloat16")
        trainer.step(sample)
        matrices = count_matrices(trainer)
        with Copies() as copies:
            trainer.forward_backward(sample)
    assert copies.found == {("copy_", "float32", "bfloat16"): matrices, ("chunk_cat",): UNITS}


def test_what_is_added_to_a_gradient_has_a_buffer_of_its_own():
    """A GPU adds it on another stream than the one that computes (ZeRO-2 and 3)."""
    samples = [make_sample([6, 4], VOCABULARY, seed) for seed in (1, 2, 3)]
    with one_process() as layout:
        trainer = make_trainer(layout, "float32")
        trainer.step(samples[0])
        with Copies() as copies:
            trainer.stepper.run(samples, train=True)
    assert copies.found == {("chunk_cat",): 3 * UNITS, ("copy_", "float32", "float32"): 2 * UNITS}


def test_a_gradient_that_goes_to_the_host_has_a_buffer_of_its_own():
    """A GPU copies it to the host on another stream than the one that computes."""
    sample = make_sample([6, 4], VOCABULARY, 1)
    with one_process() as layout:
        trainer = make_trainer(layout, "float32")
        for unit in trainer.stages[0].modules():
            if isinstance(unit, FSDPModule):
                for parameter in unit._get_fsdp_state()._fsdp_param_group.fsdp_params:
                    parameter.offload_to_cpu = True
        trainer.step(sample)
        matrices = count_matrices(trainer)
        with Copies() as copies:
            trainer.forward_backward(sample)
    # A weight is copied from the host, and a gradient to its own buffer.
    copied = ("copy_", "float32", "float32")
    assert copies.found == {("chunk_cat",): UNITS, copied: matrices + UNITS}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_that_are_put_in_place_of_others_are_used(dtype, strategy):
    """FSDP2 notices them, whether values are overwritten or other tensors take their place."""
    sample = make_sample([6, 4], VOCABULARY, 1)
    with one_process() as layout:
        trainer = make_trainer(layout, dtype, strategy)
        other = make_trainer(layout, dtype, strategy)
        stage = trainer.stages[0]
        # A step of other weights: the second loss is another one than the first.
        first = other.step(sample)
        assert trainer.step(sample) == first
        second = other.forward_backward(sample)
        assert second != first
        kept = {name: own_shard(p).clone() for name, p in stage.named_parameters()}
        trainer.step(sample)
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                own_shard(parameter).copy_(kept[name])
        trainer.clear()
        assert trainer.forward_backward(sample) == second
        # Now with memory of its own.
        trainer.step(sample)
        reshard([stage])
        stage._apply(torch.clone)
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                own_shard(parameter).copy_(kept[name])
        # FSDP2 looks for it when a state is loaded.
        stage.load_state_dict(stage.state_dict())
        trainer.clear()
        assert trainer.forward_backward(sample) == second


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_microbatches_are_added_up(strategy):
    """The buffer of a reduction is a gradient: the next reduction must not write to it."""
    samples = [make_sample([6, 4], VOCABULARY, seed) for seed in (1, 2, 3)]
    with one_process() as layout:
        trainer = make_trainer(layout, "float32", strategy)
        parameters = dict(trainer.stages[0].named_parameters())
        sums = {name: torch.zeros_like(own_shard(p)) for name, p in parameters.items()}
        targets = [sample.num_targets for sample in samples]
        for sample, count in zip(samples, targets, strict=True):
            trainer.clear()
            trainer.forward_backward(sample)
            for name, parameter in parameters.items():
                sums[name] += own_shard(parameter.grad) * (count / sum(targets))
        trainer.clear()
        trainer.stepper.run(samples, train=True)
        for name, parameter in parameters.items():
            torch.testing.assert_close(own_shard(parameter.grad), sums[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_shard_that_is_a_part_of_other_memory_is_refused(is_first):
    """FSDP2 cuts the memory of what it gathers into to its size, and reads from the beginning."""
    sample = make_sample([6, 4], VOCABULARY, 1)
    with one_process() as layout:
        trainer = make_trainer(layout, "float32")
        weight = trainer.stages[0].final_norm.weight
        shard = own_shard(weight)
        memory = torch.ones(3 * shard.numel())
        number = 0 if is_first else 1
        weight._local_tensor = memory.view(3, -1)[number]
        with pytest.raises(AssertionError) as refused:
            trainer.forward_backward(sample)
        assert memory.untyped_storage().nbytes() == 3 * shard.nbytes, "nothing is cut"
    said = (
        "final_norm.weight: its shard is 256 of 768 bytes of one memory, and FSDP2 would cut that"
    )
    assert said in str(refused.value) and "Fix: " in str(refused.value)
