"""The parts that a GPU runs as fused kernels: the same numbers as by the plain definitions, in one
graph each."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from model import compiled, loss, norm_over_heads, pointwise
from model.loss import IGNORED_LABEL, LossSettings, fused_loss
from model.pointwise import HeadSizes, rms_norm, rotate, split_heads
from model.products import add_product, joined_linear
from parallel.layout import single_process_layout

TP = single_process_layout(torch.device("cpu")).tp
TOKENS = 24
HEADS = HeadSizes(queries=4, keys=2, size=6)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["as written", "as for fused kernels"])
def way(request, monkeypatch):
    """Run the loss once as on a CPU, and once by the functions that a GPU's kernels are made of."""
    if request.param == "as for fused kernels":
        monkeypatch.setattr(compiled, "is_fused", lambda x: True)
        monkeypatch.setattr(compiled, "_compile", lambda function: function)


def loss_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = randn(TOKENS, 8, seed=1).requires_grad_()
    weight = randn(40, 8, seed=2).requires_grad_()
    labels = torch.arange(TOKENS) % 37
    labels[3:6] = IGNORED_LABEL
    return x, weight, labels


@pytest.mark.parametrize("chunk", [5, TOKENS])
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25, dtype=torch.float64)])
def test_the_loss_is_that_of_cross_entropy(way, chunk, scale):
    x, weight, labels = loss_inputs()
    found = fused_loss(x, weight, labels, scale, LossSettings(TP, 37, chunk))
    logits = (x @ weight.T)[:, :37]
    expected = 0.25 * F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    for grad, wanted in zip(
        torch.autograd.grad(found, (x, weight)),
        torch.autograd.grad(expected, (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_a_tp_rank_with_nothing_but_padding_has_no_part(way):
    """40 rows on each of two tp ranks and 37 real tokens: all columns of the second are -inf."""
    x, weight, labels = loss_inputs()
    settings = LossSettings(replace(TP, rank=1), 37, TOKENS)
    logits = torch.full((TOKENS, 40), float("-inf"), dtype=torch.float64)
    parts = loss._Softmax(logits, labels, settings.tp)
    assert parts.sums_c.eq(0).all() and parts.chosen_c.eq(0).all()
    # The other rank's maximum and sum, as the sum over tp brings them.
    parts.tops_c = torch.zeros(TOKENS, dtype=torch.float64)
    parts.sums_c = torch.ones(TOKENS, dtype=torch.float64)
    assert parts.gradient(torch.ones(TOKENS, dtype=torch.float64)).eq(0).all()


@pytest.mark.parametrize("with_norms", [False, True])
def test_heads_that_are_split_from_one_product_are_those_of_three(with_norms):
    qkv = randn(TOKENS, 8 * HEADS.size).requires_grad_()
    angles = randn(TOKENS, HEADS.size // 2, seed=3).repeat(1, 2)
    cos = angles.cos()
    sin = angles.sin()
    norms = [
        randn(HEADS.size, seed=seed).requires_grad_() if with_norms else None for seed in (4, 5)
    ]
    found = split_heads(qkv, HEADS, tuple(norms), 1e-5, cos, sin)
    q, k, v = HEADS.split(qkv)
    if with_norms:
        q = rms_norm(q, norms[0], 1e-5)
        k = rms_norm(k, norms[1], 1e-5)
    expected = (rotate(q, cos, sin), rotate(k, cos, sin), v)
    inputs = [x for x in (qkv, *norms) if x is not None]
    weights = [randn(*x.shape, seed=6) for x in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        # As a CPU's attention kernel reads them, and the product is not kept by them.
        assert one.transpose(0, 1).is_contiguous()
        assert one.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()
    grads, wanted = (torch.autograd.grad(outputs, inputs, weights) for outputs in (found, expected))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_a_joined_product_keeps_the_weights_and_not_a_copy_of_them():
    """What the weights hold when backward comes is what it reads, as with parameters that ZeRO-3
    gathers again."""
    x = randn(TOKENS, 5).requires_grad_()
    weights = [randn(rows, 5, seed=rows).requires_grad_() for rows in (4, 2, 5)]  # 11 rows in all
    out = joined_linear(x, weights, None)
    # Not bit for bit: a library of products takes another way for other numbers of rows.
    expected = torch.cat([x @ weight.T for weight in weights], dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    for weight in weights:
        weight.data.mul_(3)
    (grad_x,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    torch.testing.assert_close(grad_x, sum(weight.sum(0) for weight in weights).expand_as(x))
    for grad in torch.autograd.grad(out.sum(), weights):
        torch.testing.assert_close(grad, x.sum(0).expand_as(grad))


def test_a_square_joined_weight_is_not_mistaken_for_its_transpose():
    x = randn(TOKENS, 6).requires_grad_()
    weights = [randn(rows, 6, seed=rows) for rows in (3, 2, 1)]
    (grad_x,) = torch.autograd.grad(
        joined_linear(x, weights, randn(6)), x, torch.ones(TOKENS, 6, dtype=x.dtype)
    )
    torch.testing.assert_close(grad_x, torch.cat(weights).sum(0).expand_as(x))


@pytest.mark.parametrize("narrow", [torch.float64, torch.bfloat16])
def test_products_are_added_in_the_dtype_of_the_sum(narrow):
    left = randn(3, 4).to(narrow)
    right = randn(4, 5, seed=1).to(narrow)
    total = torch.full((3, 5), 2.0**-20, dtype=torch.float64)
    add_product(total, left, right)
    exact = left.double() @ right.double() + 2.0**-20
    torch.testing.assert_close(
        total, exact, rtol=0, atol=1e-15 if narrow == torch.float64 else 2.0**-6
    )
    assert not torch.equal(total, total.to(narrow).double()) or narrow == torch.float64


def arguments_of_compiled_functions() -> dict[str, tuple]:
    """Every function that model/ passes to compiled.run, with arguments."""
    x, other, third = (randn(TOKENS, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    qkv = randn(TOKENS, 8 * HEADS.size, dtype=torch.float32)
    q, k, v = HEADS.split(qkv)
    # Both halves of a row are the same angles, as in every table of a rotation.
    tables = randn(2, TOKENS, HEADS.size // 2, dtype=torch.float32).repeat(1, 1, 2).unbind()
    norm = torch.ones(HEADS.size)
    scales = (torch.ones(TOKENS, HEADS.queries, 1), torch.ones(TOKENS, HEADS.keys, 1))
    ids = torch.arange(TOKENS) % 16
    rows = torch.ones(TOKENS)
    column = torch.ones(TOKENS, 1)
    return {
        "_norm": (x, torch.ones(16), 1e-5),
        "_norm_backward": (other, x, torch.ones(16), torch.ones(TOKENS, 1)),
        "_silu_gated": (x, other),
        "_silu_gated_gradients_": (x, other, third),
        "_gelu_gated": (x, other),
        "_gelu_gated_gradients_": (x, other, third),
        "_mean_square": (x,),
        "_scaled": (x, torch.ones(16), column, 1e-5),
        "_own_share": (other, x, torch.ones(16), column),
        "_scaled_backward": (other, x, torch.ones(16), column, column),
        "_turn": (q, *tables),
        "_turn_back": (q, *tables),
        "_split_and_turn": (qkv, HEADS, *tables),
        "_join_turned": (q, k, v, *tables),
        "_split_norm_and_turn": (qkv, HEADS, norm, norm, 1e-5, *tables),
        "_join_turned_and_normed": (qkv, HEADS, q, k, v, norm, norm, *scales, *tables),
        "_cap": (x, 0.7),
        "_exp_sums": (x, ids),
        "_softmax_gradient_": (x, ids, rows, rows, rows),
    }


def compiled_function(name: str):
    """Find one of them by its name."""
    modules = (pointwise, loss, norm_over_heads)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def clones(value):
    return torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, value
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", arguments_of_compiled_functions())
def test_each_compiled_function_is_one_graph_with_the_same_result(name, backend):
    function = compiled_function(name)
    given = arguments_of_compiled_functions()[name]
    plain = clones(given)
    by_compiler = clones(given)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = function(*plain)
        found = torch.compile(function, backend=backend, fullgraph=True)(*by_compiler)
    for one, other in zip(
        torch.utils._pytree.tree_leaves((found, by_compiler)),
        torch.utils._pytree.tree_leaves((expected, plain)),
        strict=True,
    ):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


SWITCHES = [("1", "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set"), ("0", "None")]
"""A value of a switch, and the obstacle that it is."""


@pytest.mark.parametrize("value, expected", SWITCHES)
def test_the_switch_that_torch_reads_as_it_is_imported_is_noticed(value, expected):
    program = (
        "from types import SimpleNamespace as N; from model import compiled; "
        "compiled.importlib = N(util=N(find_spec=lambda name: name)); print(compiled.obstacle())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCH_COMPILE_DISABLE": value},
        text=True,
        capture_output=True,
        check=True,
    )
    assert found.stdout.strip() == expected


@pytest.mark.parametrize("value, expected", SWITCHES)
def test_the_switch_that_torch_reads_at_each_call_is_noticed(monkeypatch, value, expected):
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(compiled, "importlib", found)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", value)
    assert str(compiled.obstacle.__wrapped__()) == expected


def test_other_lengths_heads_and_gradients_are_compiled_for_a_few_times_only(monkeypatch):
    """torch gives a function up after 8 versions, and runs it operator by operator from then on."""
    from torch._dynamo.testing import CompileCounterWithBackend

    from model.activation_memory.settings import MemorySettings
    from tests.unit.test_memory_savers import one_step

    versions = {}

    def count(function):
        if function.__name__ not in versions:
            found = CompileCounterWithBackend("eager")
            versions[function.__name__] = (found, torch.compile(function, backend=found))
        return versions[function.__name__][1]

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "is_fused", lambda x: True)
    monkeypatch.setattr(compiled, "_compile", count)
    for length in (12, 16, 20, 24):
        for settings in (
            MemorySettings(),
            MemorySettings("full", attention_head_chunks=2),
            MemorySettings("full", attention_head_chunks=4),
            MemorySettings(mlp_tiles=3),
        ):
            one_step(settings, [0, length])
            with torch.no_grad():
                one_step(settings, [0, length], backward=False)
    counts = {name: found.frame_count for name, (found, _) in versions.items()}
    assert counts and max(counts.values()) <= 5, counts


def test_the_table_above_has_every_compiled_function(monkeypatch):
    """Walk a layer and its loss as on a GPU, and note what is passed to the compiler."""
    from tests.unit.test_memory_savers import one_step

    names = set()

    def note(function):
        names.add(function.__name__)
        return function

    from model.activation_memory.settings import MemorySettings

    monkeypatch.setattr(compiled, "is_fused", lambda x: True)
    monkeypatch.setattr(compiled, "_compile", note)
    one_step(
        MemorySettings(),
        [0, 12],
        qk_layernorm=True,
        activation_func="gelu_tanh",
        final_logit_softcapping=9.0,
    )
    # It is used with several tensor-parallel ranks only.
    x = randn(TOKENS, 16).requires_grad_()
    tp = single_process_layout(torch.device("cpu")).tp
    norm_over_heads._NormOverHeads.apply(x, torch.ones(16), 1e-5, tp).sum().backward()
    one_step(MemorySettings("full", attention_head_chunks=2), [0, 12])
    one_step(MemorySettings(), [0, 12])
    assert names == set(arguments_of_compiled_functions())
