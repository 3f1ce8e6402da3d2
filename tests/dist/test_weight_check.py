"""Weights and moments that change by themselves: found before the next update, and the rank named."""

import json
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

from parallel.layout import World
from pretrain.checkpointing.folders import find_published
from pretrain.guards.weight_check import WeightCheck
from pretrain.optimizer import state_of
from tests.dist.training import base_arguments, train, write_corpus

FLAG = "check_weight_hash_across_dp_replicas_interval"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def arguments(corpus: str, save, **overrides) -> list[str]:
    return base_arguments(
        corpus, save=str(save), train_iters=4, eval_iters=0, **{FLAG: 2}, **overrides
    )


def flip_lowest_bit(tensor: torch.Tensor) -> None:
    shard = tensor.detach()
    shard = shard.to_local() if isinstance(shard, DTensor) else shard
    shard.view(-1).view(torch.uint8)[0] ^= 1


def train_with_a_flip(
    world: World, argv: list[str], rank: int, name: str, moment: str | None, when: str
) -> str:
    """Train, with a bit of a tensor flipped on one rank around an update of step 3.

    Args:
        when: "between" = after the fingerprints were taken, "in" = with the update of step 2.
    """
    take = WeightCheck.after_update

    def flip(check: WeightCheck) -> None:
        for stage in check.state.stages:
            for own, parameter in stage.named_parameters():
                if own != name:
                    continue
                state = state_of(check.state.optimizer, parameter)
                flip_lowest_bit(state[moment] if moment else parameter)

    def after_update(check: WeightCheck) -> None:
        if world.rank == rank and when == "in":
            flip(check)
        take(check)
        if world.rank == rank and when == "between":
            flip(check)

    with mock.patch.object(WeightCheck, "after_update", after_update):
        try:
            return train(world, argv)
        except RuntimeError as error:
            return str(error)


def found_event(save) -> str:
    lines = (save / "events.jsonl").read_text().splitlines()
    (event,) = [event for event in map(json.loads, lines) if event["event"] == "flip"]
    assert event["step"] == 2, "noticed before the update of step 3"
    return event["text"]


SHARDED = "layers.1.mlp.gate.weight"
REPLICATED = "layers.0.attention_norm.weight"


@pytest.mark.parametrize(
    "layout, rank, name, moment",
    [
        ({}, 1, SHARDED, None),
        ({"tensor_model_parallel_size": 2}, 1, REPLICATED, "exp_avg_sq"),
    ],
    ids=["sharded over dp", "moment, replicated over tp"],
)
def test_what_changes_between_two_updates_names_the_rank(
    pool, corpus, tmp_path, layout, rank, name, moment
):
    argv = arguments(corpus, tmp_path, save_interval=2, **layout)
    texts = pool.run(train_with_a_flip, 2, argv, rank, name, moment, "between")
    tensor = f"optimizer.{name}.{moment}" if moment else f"model.{name}"
    for text in texts:
        assert f"rank {rank} on " in text, text
        assert f": {tensor} changed since the last update wrote it" in text, text
        assert f"rank {1 - rank} on" not in text, text
    assert found_event(tmp_path) == texts[0]
    assert find_published(tmp_path) is None, "a start would go on with the flip"


def test_copies_that_differ_are_voted_on_and_two_are_both_named(pool, corpus, tmp_path):
    """An update that wrote something else on one rank: its fingerprints are those of its own."""
    argv = arguments(corpus, tmp_path / "four", tensor_model_parallel_size=4)
    for text in pool.run(train_with_a_flip, 4, argv, 2, REPLICATED, None, "in"):
        assert "rank 2 on " in text and f": model.{REPLICATED} is not the same" in text, text
        assert not any(f"rank {other} on" in text for other in (0, 1, 3)), text
    argv = arguments(corpus, tmp_path / "two", tensor_model_parallel_size=2)
    for text in pool.run(train_with_a_flip, 2, argv, 1, REPLICATED, None, "in"):
        assert "rank 0 on " in text and "rank 1 on " in text, text


def test_a_copy_of_a_tied_embedding_is_compared_over_the_pipeline(pool, corpus, tmp_path):
    argv = arguments(
        corpus,
        tmp_path,
        pipeline_model_parallel_size=2,
        untie_embeddings_and_output_weights=False,
    )
    for text in pool.run(train_with_a_flip, 2, argv, 1, "embedding.weight", None, "in"):
        assert "rank 1 on " in text and ": model.embedding.weight is not the same" in text, text


@pytest.mark.parametrize(
    "layout",
    [{}, {"pipeline_model_parallel_size": 2, "untie_embeddings_and_output_weights": True}],
    ids=["dp2", "pp2 untied"],
)
def test_a_healthy_run_is_never_stopped(pool, corpus, tmp_path, layout):
    argv = base_arguments(
        corpus,
        save=str(tmp_path),
        train_iters=3,
        eval_iters=1,
        tensor_model_parallel_size=2,
        save_interval=2,
        **layout,
        **{FLAG: 1},
    )
    assert pool.run(train, 4, argv) == ["done"] * 4
