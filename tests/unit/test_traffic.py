"""Bytes that a step moves, counted by operator: by hand on single operators, and on a whole toy
step."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F

from model import compiled
from tools.bench import traffic
from tools.bench.contenders import one_process
from tools.bench.fresh import run_fresh
from tools.bench.gpu.parts import Card, Scale
from tools.bench.traffic import Traffic, compiled_calls_seen, group_of, size_of


def count(run) -> dict[str, int]:
    with Traffic("cpu") as found:
        run()
    return dict(found.bytes)


X = torch.ones(10, 20)  # 800 bytes
Y = torch.ones(10, 20)
ROW = torch.ones(20)  # 80 bytes
TWO_ROWS = torch.ones(2, 20)
PLACES = torch.tensor([1, 2])


@pytest.mark.parametrize(
    "run, expected",
    [
        (lambda: X + Y, {"add": 2400}),
        (lambda: X + 1, {"add": 1600}),
        (lambda: X + ROW, {"add": 1680}),
        (lambda: X + ROW.expand(10, 20), {"add": 1680}),
        (lambda: X.clone().add_(Y), {"clone": 1600, "add_": 2400}),
        (lambda: torch.add(X, Y, out=torch.empty(10, 20)), {"add": 2400}),
        (lambda: X.view(20, 10).t()[1:].reshape(-1, 1), {"clone": 1440}),
        (lambda: torch.empty(10, 20).copy_(X), {"copy_": 1600}),
        (lambda: torch.empty_like(X).zero_(), {"zero_": 800}),
        (lambda: torch.zeros_like(X), {"zeros_like": 800}),
        (lambda: X.to(torch.bfloat16), {"_to_copy": 1200}),
        (lambda: X @ Y.t(), {"mm": 2000}),
        (lambda: F.embedding(PLACES, X), {"embedding": 2 * 160 + 16}),
        (
            lambda: X.clone().index_add_(0, PLACES, TWO_ROWS),
            {"clone": 1600, "index_add_": 3 * 160 + 16},
        ),
        (lambda: X.sum(), {"sum": 804}),
    ],
)
def test_what_an_operator_reads_and_writes_counts_once(run, expected):
    assert count(run) == expected


def test_elements_that_a_tensor_repeats_count_once():
    assert size_of(ROW.expand(10, 20)) == 80
    assert size_of(torch.empty(0, 3)) == 0


@pytest.fixture(scope="module")
def steps() -> dict:
    """What steps move that need a world, in a process of their own."""
    return run_fresh(count_steps, 1)


def count_steps() -> dict:
    return {"adamw": adamw_bytes(), "whole": toy_step()}


def test_adamw_moves_28_bytes_a_parameter_also_of_distributed_tensors(steps):
    assert steps["adamw"] == {"plain": 28 * 200, "distributed": 28 * 200}


def adamw_bytes() -> dict:
    def of(parameter: torch.Tensor) -> int:
        parameter = torch.nn.Parameter(parameter)
        parameter.grad = parameter.detach().clone()
        optimizer = torch.optim.AdamW([parameter], fused=True)
        optimizer.step()
        return count(optimizer.step)["_fused_adamw_"] - 4  # it reads the count of steps

    with one_process() as layout:
        distributed = DTensor.from_local(torch.ones(10, 20), layout.mesh["dp_cp"], [Replicate()])
        return {"plain": of(torch.ones(10, 20)), "distributed": of(distributed)}


def test_a_compiled_call_counts_its_inputs_and_outputs():
    def gate(x, y):
        return x * y

    counter = Traffic("cpu")
    counter.counted(gate, [X, ROW], X * ROW)
    assert dict(counter.bytes) == {"compiled gate": 800 + 80 + 800}
    assert counter.groups()["pointwise"] == 1680


def scale_(x, factor):
    x.mul_(factor)


def test_a_call_that_is_compiled_counts_as_one_and_what_it_runs_does_not(monkeypatch):
    monkeypatch.setattr(compiled, "is_fused", lambda x: True)
    monkeypatch.setattr(compiled, "_compile", lambda function: function)
    x = X.clone()
    with Traffic("cpu") as counter, compiled_calls_seen(counter):
        compiled.run(scale_, x, 3.0)
        x.add_(Y)
    assert dict(counter.bytes) == {"compiled scale_": 1600, "add_": 2400}
    assert float(x[0, 0]) == 4.0
    compiled.run(scale_, x, 2.0)
    assert counter.calls["compiled scale_"] == 1, "counted after the end"


@pytest.mark.parametrize(
    "name, group",
    [
        ("mm", "products"),
        ("addmm_", "products"),
        ("mkldnn::_linear_pointwise", "products"),
        ("_scaled_dot_product_cudnn_attention", "attention"),
        ("_varlen_attn_backward", "attention"),
        ("_flash_attention_forward", "attention"),
        ("_fused_adamw_", "optimizer"),
        ("_foreach_mul_", "optimizer"),
        ("_fused_rms_norm", "pointwise"),
        ("silu", "pointwise"),
    ],
)
def test_operators_are_grouped(name, group):
    assert group_of(name) == group


def test_a_whole_step_is_counted(steps):
    found = steps["whole"]
    assert found["groups"]["products"] > 0 and found["groups"]["attention"] > 0
    assert found["groups"]["optimizer"] > 28 * found["parameters"]
    assert found["optimizer_calls"] > 0
    assert found["groups"]["pointwise"] > found["logits"]


def toy_step() -> dict:
    arguments = traffic.Arguments(
        model="1b", samples=2, seq_length=65536, device="cpu", scale="toy", num_layers=1
    )
    card = Card(torch.device("cpu"))
    scale = Scale(toy=True)
    counted, syncs = traffic.count_step(arguments, card, scale)
    config, vocabulary = scale.model("1b", num_layers=1)
    from pretrain.planner.model_size import ModelSize

    return {
        "groups": counted.groups(),
        "optimizer_calls": counted.calls["_fused_adamw_"],
        "parameters": ModelSize(config, vocabulary).num_parameters,
        "logits": 128 * vocabulary * 4,
    }


@pytest.mark.parametrize(
    "changes, expected",
    [
        (dict(device="cpu"), "--device cpu --scale full: would take hours"),
        (dict(device="cpu", scale="toy", samples=0), "--samples 0"),
        (
            dict(device="cpu", scale="toy", attention_backend="nothing"),
            "nothing: there is no such backend",
        ),
        (dict(device="cpu", scale="toy", attention_backend="varlen"), "it needs a GPU"),
    ],
)
def test_bad_input_is_one_line(capsys, changes, expected):
    assert traffic.run(traffic.Arguments(**changes)) == 2
    text = capsys.readouterr().err
    assert expected in text and text.count("\n") == 1
