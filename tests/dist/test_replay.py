"""Replay finds a wrong product on one rank, and names that rank alone, on every axis."""

import contextlib
import json
from unittest import mock

import numpy as np
import pytest
import torch

from model import mlp as mlp_module
from model.activation_memory.settings import MemorySettings
from model.attention_core import AttentionCore
from model.mlp import MLP
from parallel.layout import World
from pretrain.guards.replay import Replay
from pretrain.guards.trace import Comparison, Passage, find_origins
from pretrain.guards.verdict import WrongNumbers
from tests.dist.parity import Case
from tests.dist.training import base_arguments, losses, stored, train, write_corpus
from tests.marks import cases

LAYOUTS = {
    "tp2": Case(tp=2),
    "dp2": Case(dp=2),
    "cp2": Case(cp=2),
    "pp2": Case(pp=2),
    "tp2 sequence parallel zero1": Case(tp=2, sequence_parallel=True, strategy="optim"),
    "pp2 ZBV": Case(pp=2, schedule="ZBV", model=dict(num_layers=5)),
    "pp2 interleaved dp2": Case(pp=2, dp=2, schedule="interleaved", model=dict(num_layers=4)),
    "tp2 pp2": Case(tp=2, pp=2),
    "cp2 zero3 recompute": Case(
        cp=2, strategy="optim_grads_params", memory=MemorySettings("full")
    ),
    "cp2 dp2 zero3 recompute": Case(
        cp=2, dp=2, strategy="optim_grads_params", memory=MemorySettings("full")
    ),
    "tp2 cp2 attention kept": Case(tp=2, cp=2, memory=MemorySettings("attention_kept", 2)),
}
IN_EVERY_RUN = ("tp2", "pp2", "cp2 zero3 recompute")


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same with another first element."""
    wrong = tensor.detach().clone()
    wrong.view(-1)[0] *= 1.5
    # The gradient passes as if nothing had happened.
    return tensor + (wrong - tensor).detach() if tensor.requires_grad else wrong


def spoil_call(owner, name: str, number: int, which: int | None):
    """Patch a function so that its result number `which` is wrong in call `number`."""
    function = getattr(owner, name)
    calls = []

    def wrong(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(0)
        if len(calls) != number + 1:
            return result
        if which is None:
            return spoil(result)
        return tuple(spoil(x) if i == which else x for i, x in enumerate(result))

    return mock.patch.object(owner, name, wrong)


SITES = {
    "MLP forward": (MLP, "forward", None),
    "attention forward": (AttentionCore, "attend_to", None),
    "gradient of x": (mlp_module, "_gradients", 0),
    "gradient of a weight": (mlp_module, "_gradients", 2),
}
NUMBER = 1
"""The wrong call, counted from 0: every rank of the cases makes two calls or more."""


def replay_with_faults(world: World, case: Case) -> dict:
    """Replay a step for every site and rank of a fault, in the first or the second of the two runs.

    Returns:
        (site, rank) -> the error, None where there was none; "gradients": are there any left?
    """
    layout, stages, _, stepper, loader = case.build(world)
    batch = loader.read(0)
    replay = Replay(layout, print)
    replay.run(stepper, batch, "main")  # a pipeline's first run is another
    before = [p.to_local().detach().clone() for s in stages for p in s.parameters()]
    found = {}
    plain = replay._trace
    for site in (None, *SITES):
        for rank in range(world.size) if site else (0,):
            faulty_run = rank % 2
            runs = []

            def trace(stepper, microbatches, site=site, rank=rank, at=faulty_run, runs=runs):
                runs.append(0)
                is_faulty = site is not None and world.rank == rank and len(runs) == at + 1
                owner, name, which = SITES[site or "MLP forward"]
                patch = spoil_call(owner, name, NUMBER, which)
                with patch if is_faulty else contextlib.nullcontext():
                    return plain(stepper, microbatches)

            with mock.patch.object(replay, "_trace", trace):
                try:
                    replay.run(stepper, batch, "main")
                    found[site, rank] = None
                except WrongNumbers as error:
                    found[site, rank] = str(error)
    after = [p.to_local() for s in stages for p in s.parameters()]
    found["weights changed"] = not all(map(torch.equal, before, after))
    found["gradients"] = any(p.grad is not None for s in stages for p in s.parameters())
    return found


@pytest.mark.parametrize("name", cases(LAYOUTS, lambda name: name not in IN_EVERY_RUN))
def test_a_wrong_product_names_the_rank_that_computed_it(pool, name):
    case = LAYOUTS[name]
    results = pool.run(replay_with_faults, case.world_size, case)
    for found in results:
        assert found.pop("gradients") is False
        assert found.pop("weights changed") is False
        assert found.pop((None, 0)) is None, "a healthy replay"
        assert found == results[0], "all ranks say the same"
        assert len(found) == len(SITES) * case.world_size
        for (site, rank), text in found.items():
            if text is None:
                # ZBV splits the backward: of the call for the weights nothing reads x's gradient.
                assert (case.schedule, site) == ("ZBV", "gradient of x"), (site, rank)
                continue
            named = [other for other in range(case.world_size) if f"rank {other} on" in text]
            assert named == [rank], (site, rank, text)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


@pytest.mark.parametrize(
    "layout",
    [
        {"data_parallel_sharding_strategy": "optim_grads_params", "micro_batch_size": 1},
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.long),
    ],
    ids=["zero3", "pp2"],
)
def test_a_run_with_replays_is_bit_identical_to_one_without(pool, corpus, tmp_path, layout):
    for name, extra in (("without", {}), ("with", {"replay_interval": 1})):
        argv = base_arguments(
            corpus,
            save=str(tmp_path / name),
            train_iters=3,
            eval_iters=0,
            **layout,
            **extra,
        )
        assert pool.run(train, 2, argv) == ["done"] * 2
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    one = stored(tmp_path / "with")
    other = stored(tmp_path / "without")
    assert all(np.array_equal(one[key], other[key]) for key in other)


def train_with_a_fault(world: World, argv: list[str], rank: int) -> str:
    """Train; on one rank the first MLP forward of all is wrong."""
    patch = spoil_call(MLP, "forward", 0, None)
    with patch if world.rank == rank else contextlib.nullcontext():
        try:
            return train(world, argv)
        except WrongNumbers as error:
            return str(error)


def test_a_fault_ends_the_run_on_all_ranks_and_is_an_event(pool, corpus, tmp_path):
    argv = base_arguments(
        corpus,
        save=str(tmp_path),
        train_iters=3,
        eval_iters=0,
        tensor_model_parallel_size=2,
        replay_interval=1,
    )
    texts = pool.run(train_with_a_fault, 2, argv, 1)
    assert texts[0] == texts[1] and "rank 1 on " in texts[0], texts
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    (event,) = [event for event in map(json.loads, lines) if event["event"] == "replay"]
    assert event["text"] == texts[0]


# ---------------------------------------------------------------- the search alone


def comparison(stage: int, passages: str, differs: str) -> Comparison:
    found = [Passage((name,), name) for name in passages]
    return Comparison("place", stage, found, [mark == "x" for mark in differs])


def test_who_received_something_else_is_no_origin():
    # Passage b joins all; rank 1 put something else into it, and the others differ from c on.
    ranks = [
        comparison(0, "abcd", "..xx"),
        comparison(0, "abce", ".xxx"),
        comparison(0, "abcf", "...x"),
    ]
    assert find_origins(ranks) == [1]


def test_two_that_differ_at_once_are_both_origins():
    assert find_origins([comparison(0, "ab", "xx"), comparison(0, "ab", "xx")]) == [0, 1]


def test_a_rank_that_never_met_the_wrong_values_is_an_origin_of_its_own():
    assert find_origins([comparison(0, "ab", ".x"), comparison(0, "cd", "x.")]) == [0, 1]
