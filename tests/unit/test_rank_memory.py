"""The memory model against what autograd really keeps, and torch's own schedules."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD

from model.config import ModelConfig
from model.cost import Axis, step_seconds
from model.gpt import GPTStage
from model.hardware import TABLE, find_hardware, peak_flops
from model.kernels import choose_attention
from model.rank_memory import Load, MemoryModel
from parallel.config import LayoutConfig
from parallel.layout import single_process_layout
from parallel.schedule import accepts, chunks_in_flight, idle_share
from tests.unit.test_phases import torch_schedule

VOCABULARY = 101


class Batch:
    """384 tokens in the given documents."""

    def __init__(self, *bounds: int):
        self.tokens = self.labels = torch.arange(bounds[-1]) % VOCABULARY
        self.positions = torch.arange(bounds[-1])
        self.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)


def saved_bytes(config: ModelConfig, dtype: torch.dtype, batch: Batch) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, parameters left out."""
    device = torch.device("cpu")
    stage = GPTStage(config, VOCABULARY, single_process_layout(device), choose_attention("sdpa", device, dtype)[0])
    stage = stage.to_empty(device=device).to(dtype)
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    stage.begin_step([batch], 10)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(torch.empty(0))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [
    dict(), dict(num_query_groups=2, ffn_hidden_size=96), dict(num_layers=1, qk_layernorm=True, num_query_groups=1),
    dict(kv_channels=64, untie_embeddings_and_output_weights=True, ffn_hidden_size=512)])
def test_activations_are_what_autograd_keeps(dtype, model):
    config = ModelConfig(**dict(num_layers=4, hidden_size=64, ffn_hidden_size=176, num_attention_heads=4) | model)
    predicted = MemoryModel(config, VOCABULARY, compute_bytes=dtype.itemsize, on_gpu=False).worst(
        Load(LayoutConfig(), 1, 384, 1, 1, None))
    measured = saved_bytes(config, dtype, Batch(0, 100, 250, 384))
    assert abs(predicted.activations + predicted.loss - measured) <= 0.1 * measured, (predicted, measured)


def pipeline_orders():
    """(schedule, pp, stages per rank, microbatches, torch's order of one rank's actions, rank)."""
    for schedule, per_rank in (("interleaved", 2), ("interleaved", 3), ("zero-bubble", 1), ("zero-bubble", 2),
                               ("ZBV", 2)):
        for pp in (2, 3, 4, 8):
            for count in (1, 2, pp, 2 * pp, 4 * pp):
                if accepts(schedule, pp, count):
                    order = torch_schedule(schedule, pp, count, per_rank).pipeline_order
                    yield from ((schedule, pp, per_rank, count, order[rank], rank) for rank in range(pp))


def test_chunks_in_flight_are_those_of_torchs_schedules():
    exact = 0
    for schedule, pp, per_rank, count, actions, rank in pipeline_orders():
        kept, most = set(), 0
        for action in filter(None, actions):
            chunk = (action.stage_index, action.microbatch_index)
            if action.computation_type == FORWARD:
                kept.add(chunk)
            elif action.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
                kept.discard(chunk)
            most = max(most, len(kept))
        predicted = chunks_in_flight(schedule, rank, pp, per_rank, count)
        case = (schedule, pp, per_rank, count, rank)
        # With few microbatches, ZBV's first ranks keep fewer than its last.
        assert predicted == most or schedule == "ZBV" and count <= pp and most < predicted, (case, predicted, most)
        exact += predicted == most
    assert exact > 200
    assert [chunks_in_flight("1F1B", rank, 4, 1, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight("1F1B", 0, 1, 1, 8) == 1


def test_the_bubble_shrinks_with_microbatches_and_better_schedules():
    assert idle_share("1F1B", 1, 1, 4) == 0 and idle_share("1F1B", 4, 1, 12) == pytest.approx(0.25)
    shares = [idle_share("1F1B", 4, 1, 8), idle_share("interleaved", 4, 2, 8), idle_share("zero-bubble", 4, 1, 8),
              idle_share("ZBV", 4, 2, 8)]
    assert shares == sorted(shares, reverse=True) and idle_share("ZBV", 4, 2, 1) > 1


MODEL = ModelConfig(num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
                    untie_embeddings_and_output_weights=True)


def load(recompute=None, count=4, dp=8, seq_length=8192, **layout) -> Load:
    return Load(LayoutConfig(**layout), dp, seq_length, 1, count, recompute)


def test_each_setting_saves_what_it_is_for():
    model = MemoryModel(MODEL, 128256)
    plain = model.worst(load())
    assert model.worst(load("full")).activations < plain.activations / 8
    offloaded = model.worst(replace(load("full"), offloaded_layers=16)).activations
    assert offloaded == model.worst(load("full")).activations - 16 * 8192 * 4096 * 2
    sharded = model.worst(load(data_parallel_sharding_strategy="optim_grads_params"))
    assert sharded.gathered < plain.gathered / 4 and sharded.parameters == plain.parameters
    once = model.worst(load(data_parallel_sharding_strategy="optim"))
    assert once.gradients == 8 * plain.gradients
    assert model.worst(load(count=1, data_parallel_sharding_strategy="optim")).gradients == plain.gradients
    split = model.worst(load(context_parallel_size=8, dp=1))
    assert split.parameters == plain.parameters and split.activations < 1.2 * plain.activations / 8
    tp = dict(tensor_model_parallel_size=8, dp=1)
    with_sp, without = model.worst(load(sequence_parallel=True, **tp)), model.worst(load(**tp))
    assert with_sp.activations < without.activations < plain.activations / 2 and without.loss < plain.loss / 4
    staged = model.worst(load(pipeline_model_parallel_size=4, dp=2))
    assert plain.gathered / 5 < staged.gathered < plain.gathered / 2.5
    assert plain.activations * 0.9 < staged.activations < plain.activations * 1.1  # a quarter, four times


def test_bytes_of_a_known_model():
    """Llama-3 8B on one rank: 8.03B parameters, fp32 master, two moments, bf16 copy."""
    memory = MemoryModel(MODEL, 128256).worst(load(dp=1, count=1))
    assert memory.parameters == 4 * 8_030_261_248 and memory.gathered == memory.parameters // 2
    assert memory.optimizer == 2 * memory.parameters + 4 * 291


def test_time_follows_the_links():
    hardware = TABLE["H200"]
    inside, across = Axis(8, 1).ring_seconds(1e9, hardware), Axis(16, 1).ring_seconds(1e9, hardware)
    one_card = Axis(8, 8).ring_seconds(1e9, hardware)
    assert inside < across < one_card and one_card == pytest.approx(8 * across, rel=0.1)
    assert Axis(8, 1).exchange_seconds(1e9, hardware) < Axis(8, 4).exchange_seconds(1e9, hardware) < \
        Axis(8, 8).exchange_seconds(1e9, hardware)
    model = MemoryModel(MODEL, 128256)
    plain = step_seconds(model, load(), hardware)
    assert 1.2 < step_seconds(model, load("full"), hardware) / plain < 1.34
    assert step_seconds(model, load(tensor_model_parallel_size=8, dp=1), hardware) > plain / 8
    slow = replace(hardware, node_bytes_per_second=1e9, network_bytes_per_second=1e9)
    assert step_seconds(model, load(), slow) > 2 * plain


def test_hardware_is_found_by_a_part_of_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("Some GPU") is None
    assert find_hardware("h200").memory_bytes == 141 * 10**9
