"""Parts of the model by themselves: attention backends, initial weights, head splits."""

import re
from dataclasses import replace

import pytest
import torch

from data.batch import IGNORE
from model import build, gpt
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from model.config import ModelConfig
from model.init import BLOCK_ELEMENTS, normal_rows
from model.sharding import role_of, shardings_for
from parallel.context import group_pieces
from parallel.schedule import layers_of_stage
from parallel.ulysses import HeadSplit
from pretrain.planner.model_size import ModelSize

CPU = torch.device("cpu")


def masked_attention(q, k, v, cu_seqlens):
    """The definition: one softmax over a full mask."""
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    order = torch.arange(q.shape[0], device=q.device)
    document = torch.bucketize(order, cu_seqlens[1:].long(), right=True)
    allowed = (document[:, None] == document[None]) & (order[:, None] >= order[None])
    scores = torch.einsum("qnh,knh->nqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def test_the_definition_makes_its_tensors_where_its_inputs_are():
    """The tests on a GPU compare with it there; device meta raises where it meets a tensor of the
    CPU."""
    q, k, v = (torch.empty(40, heads, 8, device="meta") for heads in (6, 2, 2))
    assert (
        masked_attention(q, k, v, torch.empty(3, dtype=torch.int32, device="meta")).device.type
        == "meta"
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("bounds", [[0, 40], [0, 1, 2, 17, 39, 40]])
def test_sdpa_equals_the_definition(kv_heads, bounds):
    torch.manual_seed(0)
    inputs = [
        torch.randn(40, heads, 8, dtype=torch.float64, requires_grad=True)
        for heads in (6, kv_heads, kv_heads)
    ]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    attend, _ = choose_attention("sdpa", CPU, torch.float64)
    weight = torch.randn(40, 6, 8, dtype=torch.float64)
    (segments,) = pack_documents(cu_seqlens, [(0, 40)], CPU)
    found = attend(*inputs, segments)
    expected = masked_attention(*inputs, cu_seqlens)
    assert torch.allclose(found, expected, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "bounds", [[0, 48], [0, 1, 2, 17, 39, 48], [0, 8, 16, 24, 48], list(range(49))]
)
@pytest.mark.parametrize("groups", [2, 3])
def test_queries_of_some_pieces_see_all_earlier_keys_of_their_documents(
    bounds, groups, dtype, tolerance
):
    torch.manual_seed(0)
    inputs = [torch.randn(48, heads, 8, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    attend, _ = choose_attention("sdpa", CPU, dtype)
    weight = torch.randn(48, 6, 8, dtype=dtype)
    expected = masked_attention(*inputs, cu_seqlens)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    grads = [torch.zeros_like(x) for x in inputs]
    for group in range(groups):
        pieces = group_pieces(48, group, groups)
        rows = torch.cat([torch.arange(a, b) for a, b in pieces])
        q = inputs[0][rows]
        parts = [
            attend(q[part.queries], inputs[1][part.keys], inputs[2][part.keys], part)
            for part in pack_documents(cu_seqlens, pieces, CPU)
        ]
        found = torch.cat(parts)
        assert torch.allclose(found, expected[rows], atol=tolerance)
        for total, grad in zip(
            grads, torch.autograd.grad((found * weight[rows]).sum(), inputs), strict=True
        ):
            total += grad
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert torch.allclose(found, wanted, atol=tolerance)


def test_a_token_changes_nothing_in_other_documents():
    torch.manual_seed(0)
    q, k, v = (torch.randn(32, 2, 8) for _ in range(3))
    cu_seqlens = torch.tensor([0, 10, 11, 32], dtype=torch.int32)
    attend, _ = choose_attention("sdpa", CPU, torch.float32)
    (segments,) = pack_documents(cu_seqlens, [(0, 32)], CPU)
    before = attend(q, k, v, segments).clone()
    for x in (q, k, v):
        x[3] += 1.0
    after = attend(q, k, v, segments)
    assert torch.equal(before[10:], after[10:]) and not torch.equal(before[3:10], after[3:10])


@pytest.mark.parametrize("name", ["flash", "te", "varlen", "mixed", "cudnn"])
def test_a_named_backend_that_cannot_run_is_refused(name):
    with pytest.raises(ValueError, match=f"attention_backend = {name}: it needs a GPU"):
        choose_attention(name, CPU, torch.float32)
    assert choose_attention("auto", CPU, torch.float32)[1].startswith(
        "attention: sdpa (flash: it needs a GPU"
    )


def test_initial_rows_do_not_depend_on_who_draws_them():
    shape = torch.Size([5000, 512])  # three blocks of rows
    assert BLOCK_ELEMENTS // 512 < 2500
    whole = normal_rows(1, "layers.0.mlp.up.weight", shape, 0, 5000)
    for start, stop in ((0, 1), (2000, 2100), (2047, 2049), (4999, 5000), (1000, 5000)):
        assert torch.equal(
            normal_rows(1, "layers.0.mlp.up.weight", shape, start, stop), whole[start:stop]
        )
    assert abs(float(whole.std()) - 1) < 0.01 and abs(float(whole.mean())) < 0.01
    for other in (
        normal_rows(2, "layers.0.mlp.up.weight", shape, 0, 10),
        normal_rows(1, "layers.1.mlp.up.weight", shape, 0, 10),
        whole[2048:2058],
    ):
        assert not torch.equal(other, whole[:10])


@pytest.mark.parametrize(
    "heads, kv_heads, cp", [(8, 8, 4), (8, 2, 4), (8, 1, 8), (6, 2, 4), (12, 3, 5), (7, 7, 3)]
)
def test_every_head_is_attended_once_with_its_own_key_value_head(heads, kv_heads, cp):
    split = HeadSplit.make(heads, kv_heads, cp)
    attended = []
    for rank in range(cp):
        q0, q1 = split.query[rank]
        k0, k1 = split.kv[rank]
        assert q1 > q0
        pairing = split.kv_of_query(rank)
        assert [k0 + i for i in pairing] == [head // (heads // kv_heads) for head in range(q0, q1)]
        assert set(pairing) == set(range(k1 - k0)), (
            "a key/value head that nobody reads travels for nothing"
        )
        attended += range(q0, q1)
    assert attended == list(range(heads))
    sizes = [q1 - q0 for q0, q1 in split.query]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("layers, stages", [(8, 2), (7, 3), (3, 3), (80, 16)])
def test_stages_cover_the_layers_in_order(layers, stages):
    parts = [layers_of_stage(layers, stage, stages) for stage in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers)) and min(
        map(len, parts)
    ) >= 1


# Each option that adds a parameter or changes how one is split.
MODELS = {
    "tied": ModelConfig(num_layers=2, num_attention_heads=8, num_query_groups=8),
    "untied": ModelConfig(
        num_layers=2,
        num_attention_heads=8,
        num_query_groups=2,
        untie_embeddings_and_output_weights=True,
        add_qkv_bias=True,
        qk_layernorm=True,
    ),
}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_a_sharding(model, tp):
    config = MODELS[model]
    shapes = build.parameter_shapes(config, 1000)
    assert len(shapes) == (20 if model == "tied" else 31)
    found = shardings_for(list(shapes), config, tp)
    assert found.keys() == shapes.keys()
    uneven = [
        name
        for name, sharding in found.items()
        if sharding.dim is not None and shapes[name][sharding.dim] % tp
    ]
    assert uneven == []
    # Matrices of attention and MLP are never held whole, but for key/value heads fewer than ranks.
    whole = {name for name, sharding in found.items() if sharding.dim is None}
    shared = r"layers\.\d+\.attention\.[kv]\.(weight|bias)" if config.num_kv_heads < tp else "(?!)"
    assert all("norm.weight" in name or re.fullmatch(shared, name) for name in whole), whole


def test_each_kind_of_parameter_is_split_as_the_table_says():
    expected = {
        "embedding.weight": 0,
        "layers.31.attention.q.bias": 0,
        "layers.31.attention.o.weight": 1,
        "layers.0.mlp.down.weight": 1,
        "layers.0.attention.k_norm.weight": None,
        "final_norm.weight": None,
    }
    config = MODELS["untied"]
    found = shardings_for(list(expected), config, 2)
    assert {name: sharding.dim for name, sharding in found.items()} == expected


@pytest.mark.parametrize("model", MODELS)
def test_each_parameter_has_a_role_and_vectors_are_those_with_one_dim(model):
    config = MODELS[model]
    shapes = build.parameter_shapes(config, 1000)
    roles = {name: role_of(name, config) for name in shapes}
    assert all((roles[name] == "vector") == (len(shape) == 1) for name, shape in shapes.items())
    others = {name: role for name, role in roles.items() if not name.startswith("layers.")}
    ends = {"embedding.weight": "embedding", "final_norm.weight": "vector"}
    if config.untie_embeddings_and_output_weights:
        ends["output.weight"] = "output"
    assert others == ends


def test_key_value_heads_fewer_than_ranks_are_held_by_all():
    name = "layers.0.attention.k.weight"
    config = MODELS["untied"]
    assert shardings_for([name], config, 2)[name].dim == 0
    replicated = shardings_for([name], config, 4)[name]
    assert replicated.dim is None and replicated.partial_gradient


def test_a_parameter_that_the_table_does_not_know_is_an_error():
    with pytest.raises(AssertionError, match="no row of the sharding table"):
        shardings_for(["layers.0.unknown.weight"], MODELS["tied"], 2)


def test_flops_count_the_causal_half_of_each_document():
    config = ModelConfig(num_layers=2, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2)
    weights = 2 * (4 * 64 + 3 * 128) + 10 * 8
    size = ModelSize(config, 10)
    assert size.step_flops(100, 0) == 6 * weights * 100
    # q k and p v for each pair: 2 products x 2 operations x 8 channels x 2 layers, forward and
    # twice backward
    assert size.step_flops(100, 50) - size.step_flops(100, 0) == 3 * 2 * 2 * 8 * 2 * 50
    assert size.num_parameters == weights + 2 * 2 * 8 + 8


@pytest.mark.parametrize("untied", [False, True])
def test_parameters_are_counted_as_the_modules_have_them(untied):
    config = ModelConfig(
        num_layers=3,
        hidden_size=8,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=1,
        qk_layernorm=True,
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=untied,
        make_vocab_size_divisible_by=1,
    )
    shapes = build.parameter_shapes(config, 10)
    assert ModelSize(config, 10).num_parameters == sum(shape.numel() for shape in shapes.values())
    # Padded rows of the vocabulary are no parameters of the model.
    padded = replace(config, make_vocab_size_divisible_by=16)
    assert ModelSize(padded, 10).num_parameters == ModelSize(config, 10).num_parameters


def test_both_folders_ignore_the_same_label():
    assert gpt.IGNORED_LABEL == IGNORE
