"""pretrain/logs/step_record.py and measured.py: what a line of metrics.jsonl says, by hand."""

import dataclasses

import pytest
import torch

from data.batch import Batch
from data.source_runs import SourceRun
from model.config import ModelConfig
from parallel.layout import single_process_layout
from pretrain.logs.step_record import communication_share, flops_utilization, mean_losses
from pretrain.planner.model_size import ModelSize
from tests.measuring import measured

CPU = single_process_layout(torch.device("cpu"))
GPU = single_process_layout(torch.device("cuda:0"))


def batch(edges: list[int], runs: tuple[SourceRun, ...] = ()) -> Batch:
    """A microbatch of documents with these edges."""
    tokens = torch.zeros(edges[-1], dtype=torch.int64)
    return Batch(tokens, tokens, tokens, torch.tensor(edges, dtype=torch.int32), source_runs=runs)


def test_mfu_counts_the_causal_pairs_inside_documents(monkeypatch):
    # Documents of 3 and 7 tokens, and one of 10: 6 + 28 + 55 pairs, not the 55 + 55 of whole rows.
    found = measured([batch([0, 3, 10]), batch([0, 10])], CPU)
    assert found.causal_pairs == 89
    config = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
    )
    # By hand, per layer: Q 8x8, K and V 8x4 each, output 8x8, three MLP matrices 8x16; logits 50x8.
    weights = 2 * (64 + 32 + 32 + 64 + 3 * 128) + 400
    by_hand = 6 * weights * 20 + 3 * (2 * (2 * 2 * 8) * 89)
    flops = ModelSize(config, 50).step_flops(20, found.causal_pairs)
    assert flops == by_hand
    # An H100's data sheet has 989 TFLOP/s for dense bf16.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert flops_utilization(flops, 2e-9, GPU) == pytest.approx(by_hand / (2e-9 * 989e12))
    assert flops_utilization(flops, 1.0, CPU) is None


def test_pairs_are_those_that_a_layer_sees_on_average():
    # Windows of 2 tokens in one of two layers: 3 tokens see 1 + 2 + 2, 7 see 13, 10 see 19.
    found = measured([batch([0, 3, 10]), batch([0, 10])], CPU, windows=(None, 2))
    assert found.causal_pairs == (89 + 5 + 13 + 19) / 2


def test_losses_are_means_over_the_targets_that_each_source_gave():
    runs = (SourceRun(0, 4, 0, 3), SourceRun(4, 10, 2, 5))
    losses = torch.tensor([6.0, 0.0, 20.0]).double()
    found = measured([batch([0, 10], runs)], CPU, source_losses=losses)
    assert found.targets_by_source == [3, 0, 5]
    assert mean_losses(["a", "b", "c"], found) == {"a": 2.0, "b": None, "c": 4.0}
    assert mean_losses([], measured([batch([0, 10], runs)], CPU)) is None


def test_waiting_is_averaged_over_the_ranks_and_not_known_on_gpus():
    found = dataclasses.replace(measured([batch([0, 10])], CPU), busy_seconds=[10.0, 6.0, 5.0, 5.0])
    assert communication_share(found, 10.0, CPU) == pytest.approx(0.35)
    assert communication_share(found, 10.0, GPU) is None
    # Ranks do not end a step at the same moment: a share stays a share.
    assert communication_share(found, 6.0, CPU) == 0.0


def test_memory_of_the_host_is_what_the_process_has_now():
    before = measured([batch([0, 10])], CPU).host_memory_bytes
    held = torch.ones(2**25)  # 128 MiB that are touched
    assert measured([batch([0, 10])], CPU).host_memory_bytes - before > 100 * 2**20
    del held
