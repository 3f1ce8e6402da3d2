"""Predicted bytes against real tensors on several layouts, and runs with `layout: auto`."""

import json
from dataclasses import fields

import pytest
import torch
import yaml
from torch.distributed.tensor import Shard

from parallel.layout import World
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.planner import layout_candidates
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import StepTime
from pretrain.planner.workload import Workload
from pretrain.step import train_step
from tests.dist.parity import VOCABULARY, Case, named
from tests.dist.training import base_arguments, losses, train, write_corpus

TIED = {"untie_embeddings_and_output_weights": False}
UNTIED = {"untie_embeddings_and_output_weights": True, "qk_layernorm": True, "add_qkv_bias": True}


def real_bytes(world: World, case: Case) -> dict:
    """Bytes of this rank's tensors after a step in bf16 over fp32, and those of its whole
    gradients."""
    layout, stages, optimizer, stepper, loader = case.build(
        world, master=torch.float32, compute=torch.bfloat16
    )
    gradients = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(size(grad) for _, grad in named(stages, "grad"))
    )

    def size(tensor) -> int:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return local.numel() * local.element_size()

    train_step(stepper, optimizer, loader.read(0), 1e-3, 1.0)
    parameters = [parameter for _, parameter in named(stages)]
    split = [layout.tp.size if isinstance(p.placements[-1], Shard) else 1 for p in parameters]
    return {
        "pp": layout.pp.rank,
        "parameters": sum(map(size, parameters)),
        "optimizer": sum(size(value) for p in parameters for value in optimizer.state[p].values()),
        "gradients": sum(gradients),
        "whole": sum(4 * p.numel() // n for p, n in zip(parameters, split, strict=True)),
    }


@pytest.mark.parametrize(
    "case",
    [
        Case(dp=3, samples=6, model=UNTIED),
        Case(tp=2, dp=2, strategy="optim", model=TIED),
        Case(tp=4, model=dict(num_query_groups=2) | UNTIED, strategy="optim_grads_params"),
        Case(tp=2, cp=2, sequence_parallel=True, model=UNTIED),
        Case(pp=2, dp=2, model=dict(num_layers=3) | TIED),
        Case(pp=2, schedule="ZBV", stages_per_rank=2, model=dict(num_layers=5) | TIED),
        Case(
            pp=2, tp=2, schedule="interleaved", stages_per_rank=2, model=dict(num_layers=5) | UNTIED
        ),
    ],
    ids=lambda case: f"tp{case.tp} pp{case.pp} cp{case.cp} dp{case.dp} {case.strategy}",
)
def test_predicted_bytes_are_those_of_the_tensors(pool, case):
    found = pool.run(real_bytes, case.world_size, case)
    count = case.samples // (case.dp * case.micro_batch_size)
    load = Workload(case.layout_config(), case.dp, case.seq_length, case.micro_batch_size, count)
    model = MemoryModel(case.model_config(), VOCABULARY)
    for pp_rank in range(case.pp):
        ranks = [result for result in found if result["pp"] == pp_rank]
        predicted = model.estimate_rank(load, pp_rank)
        # Where rows do not divide, the first rank's shard is the largest.
        assert predicted.parameters == max(rank["parameters"] for rank in ranks)
        assert predicted.optimizer == max(rank["optimizer"] for rank in ranks)
        key = "whole" if load.whole_gradients else "gradients"
        assert predicted.gradients == max(rank[key] for rank in ranks)
        assert (
            predicted.gathered == max(rank["whole"] for rank in ranks) // 2
            or case.strategy == "optim_grads_params"
        )


def phased(tmp_path, corpus, name: str, device_memory_gib: float, **changes) -> list[str]:
    """Flags of a run of two phases, the second with samples that only context parallelism can
    hold."""
    phases = [
        dict(name="short", seq_length=64, train_tokens=1024, global_batch_tokens=512),
        dict(
            name="long",
            seq_length=4096,
            train_tokens=8192,
            global_batch_tokens=4096,
            recompute_granularity="none",
        )
        | changes,
    ]
    config = tmp_path / f"{name}.yaml"
    config.write_text(
        yaml.safe_dump({"phases": phases, "layout": "auto", "device_memory_gib": device_memory_gib})
    )
    argv = base_arguments(corpus, save=str(tmp_path / "save"), ffn_hidden_size=256)
    for flag in ("--train-iters", "--seq-length", "--global-batch-size"):
        at = argv.index(flag)
        del argv[at : at + 2]
    return ["--config", str(config), *argv]


def sizes(plan) -> list[tuple]:
    return [phase.layout.sizes for phase in plan.phases]


def test_a_run_chooses_its_layouts_once(pool, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "corpus")
    argv = phased(tmp_path, corpus, "run", 0.037)
    plan = make_plan(load_config(argv), 2)
    assert sizes(plan) == [(1, 1, 1), (1, 1, 2)]
    outcomes = [pool.run(train, 2, argv) for _ in range(2)]
    assert outcomes == [["again"] * 2, ["done"] * 2]
    assert sorted(losses(tmp_path / "save")) == [1, 2, 3, 4]
    kept = Progress.read(find_published(tmp_path / "save")).layouts
    assert kept.keys() == {"short", "long"} and kept["long"]["chosen"]["context_parallel_size"] == 2

    # The stored choice wins over an estimate that has changed; another world or another phase is
    # chosen again.
    def shorter_with_tp(model, load, hardware):
        parts = dict.fromkeys((each.name for each in fields(StepTime)), 0.0)
        return StepTime(**parts | {"products": 1.0 / load.layout.sizes[0]})

    monkeypatch.setattr(layout_candidates, "estimate_step", shorter_with_tp)
    again = make_plan(load_config(argv), 2)
    assert sizes(again) == sizes(plan) and all(
        "(kept from the checkpoint)" in line for line in again.layout_lines
    )
    json.dumps(again.layouts)
    other = make_plan(load_config(argv), 4)
    assert sizes(other) == [(4, 1, 1), (4, 1, 1)]
    assert other.layout_lines[1].endswith(
        "(chosen again, since world_size was 2; it was tp 1 pp 1 cp 2)"
    )
    changed = make_plan(
        load_config(phased(tmp_path, corpus, "changed", 0.037, pipeline_model_parallel_size=1)), 2
    )
    assert sizes(changed) == [(1, 1, 1), (2, 1, 1)]
    assert "(kept from the checkpoint)" in changed.layout_lines[0]
    assert "(chosen again, since open was [" in changed.layout_lines[1]
