"""Attention backends of a GPU, on a CPU: `mixed` with stand-ins for its kernels, and each optional
kernel's call.

The kernels cannot run here. What is around them can: how documents are split, padded and written
where they belong, with which arguments each package is called, and which backend is chosen.
"""

import dataclasses
import gc
import inspect
import sys
import types

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from model.activation_memory.saved_attention import AttentionTape, free_storage
from model.attention_backends import backend, choice, flash, kernel_calls, mixed
from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.documents import KernelCall, pack_documents
from model.attention_backends.flash import flash_version
from model.attention_backends.kernel_calls import NEVER, padded_length, split_documents
from model.attention_backends.mixed import GPU_KERNELS, Kernels, mixed_attention
from model.attention_backends.sdpa import _backward as dense_backward
from model.attention_backends.sdpa import _document, _document_gradients
from model.attention_backends.sdpa import _forward as dense_forward
from model.attention_backends.varlen import varlen_options
from parallel.context import group_pieces
from tests.unit.test_model import masked_attention

CPU = torch.device("cpu")
GPU = torch.device("cuda")
TOKENS = 96
QUERY_HEADS = 4
HEAD_SIZE = 8


# ---------------------------------------------------------------- stand-ins for mixed's kernels


class StandIns:
    """Kernels of the CPU in the place of the GPU's; they write down what they are called for."""

    def __init__(self):
        self.long: list[tuple[int, int]] = []
        """(documents, tokens of each with padding) of every forward for long documents."""
        self.short: list[list[int]] = []
        """Bounds of the queries of every forward for the others."""
        self.kernels = Kernels(
            self.long_forward, self.long_backward, self.short_forward, self.short_backward
        )

    def long_forward(self, q, k, v, scoring):
        assert q.shape[2] == k.shape[2], "cuDNN's causal mask is for as many keys as queries"
        self.long.append((q.shape[0], q.shape[2]))
        out, log_sums = dense_forward(q, k, v, is_causal=True, scale=scoring.scale)
        return out, (log_sums[..., None], None, None)

    def long_backward(self, grad, q, k, v, out, kept, scoring):
        return dense_backward(grad, q, k, v, out, kept[0][..., 0], 0.0, True, scale=scoring.scale)

    def short_forward(self, q, k, v, part: KernelCall, scoring):
        self.short.append(part.cu_q.tolist())
        found = [
            _document(*(x.transpose(0, 1)[None] for x in document), scoring.scale)
            for document in self.documents(part, q, k, v)
        ]
        log_sums = torch.cat([each[0] for _, each in found], dim=1)
        return torch.cat([out[0].transpose(0, 1) for out, _ in found]), (log_sums, None, None)

    def short_backward(self, grad, q, k, v, out, kept, part: KernelCall, scoring):
        documents = zip(
            self.documents(part, q, k, v),
            grad.split(part.cu_q.diff().tolist()),
            out.split(part.cu_q.diff().tolist()),
            kept[0].split(part.cu_q.diff().tolist(), dim=1),
            strict=True,
        )
        found = [
            _document_gradients(
                *(x.transpose(0, 1)[None] for x in (g, *qkv, o)), log_sums[None], scoring.scale
            )
            for qkv, g, o, log_sums in documents
        ]
        return tuple(
            torch.cat([x[0].transpose(0, 1) for x in each]) for each in zip(*found, strict=True)
        )

    @staticmethod
    def documents(part: KernelCall, q, k, v):
        lengths_q = part.cu_q.diff().tolist()
        lengths_k = part.cu_k.diff().tolist()
        assert part.max_q == max(lengths_q)
        assert part.max_k == max(lengths_k)
        assert part.cu_q.dtype == torch.int32
        return zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)


@pytest.fixture
def small_granule(monkeypatch):
    """Padding at the size of a test: to multiples of 8 tokens."""
    monkeypatch.setattr(kernel_calls, "GRANULE_TOKENS", 8)


@pytest.fixture
def nothing_is_zero():
    """Memory that nobody wrote to is not a number, so that a result that read it is none."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def inputs(kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(TOKENS, heads, HEAD_SIZE, generator=generator, dtype=dtype).requires_grad_()
        for heads in (QUERY_HEADS, kv_heads, kv_heads)
    ]


def segments_of(bounds: list[int], pieces: list[tuple[int, int]] | None = None):
    return pack_documents(torch.tensor(bounds, dtype=torch.int32), pieces or [(0, bounds[-1])], CPU)


BOUNDS = {
    "one": [0, 96],
    "one, padded": [0, 91, 96],
    "padded by rows that follow and by zeros": [0, 1, 22, 30, 71, 96],
    "equal": [0, 24, 48, 72, 96],
    "short ones between": [0, 24, 27, 30, 54, 56, 80, 96],
    "only short": list(range(0, 97, 6)),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("from_tokens", [1, 20, 24, NEVER])
@pytest.mark.parametrize("name", BOUNDS)
def test_mixed_equals_the_definition(name, from_tokens, kv_heads, small_granule, nothing_is_zero):
    qkv = inputs(kv_heads)
    bounds = BOUNDS[name]
    expected = masked_attention(*qkv, torch.tensor(bounds, dtype=torch.int32))
    weight = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    (segments,) = segments_of(bounds)
    found = mixed_attention(from_tokens, StandIns().kernels)(*qkv, segments)
    assert (found - expected).abs().max() < 1e-12
    grads = torch.autograd.grad((found * weight).sum(), qkv)
    for grad, wanted in zip(
        grads, torch.autograd.grad((expected * weight).sum(), qkv), strict=True
    ):
        assert (grad - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("name", BOUNDS)
def test_mixed_equals_the_definition_where_queries_continue_a_document(
    name, groups, small_granule, nothing_is_zero
):
    qkv = inputs()
    bounds = BOUNDS[name]
    attend = mixed_attention(10, StandIns().kernels)
    expected = masked_attention(*qkv, torch.tensor(bounds, dtype=torch.int32))
    weight = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    grads = [torch.zeros_like(x) for x in qkv]
    for group in range(groups):
        pieces = group_pieces(TOKENS, group, groups)
        rows = torch.cat([torch.arange(a, b) for a, b in pieces])
        q = qkv[0][rows]
        found = torch.cat(
            [
                attend(q[part.queries], qkv[1][part.keys], qkv[2][part.keys], part)
                for part in segments_of(bounds, pieces)
            ]
        )
        assert (found - expected[rows]).abs().max() < 1e-12
        for total, grad in zip(
            grads, torch.autograd.grad((found * weight[rows]).sum(), qkv), strict=True
        ):
            total += grad
    for grad, wanted in zip(
        grads, torch.autograd.grad((expected * weight).sum(), qkv), strict=True
    ):
        assert (grad - wanted).abs().max() < 1e-12


@pytest.mark.parametrize(
    "from_tokens, long, short",
    [
        (1, [(1, 24), (1, 8), (1, 8), (1, 24), (1, 8), (1, 24), (1, 16)], []),
        (16, [(1, 24), (1, 24), (1, 24), (1, 16)], [[0, 3, 6], [0, 2]]),
        (24, [(1, 24), (1, 24), (1, 24)], [[0, 3, 6], [0, 2], [0, 16]]),
        (25, [], [[0, 24, 27, 30, 54, 56, 80, 96]]),
    ],
)
def test_documents_go_to_cudnn_from_the_crossover_on(from_tokens, long, short, small_granule):
    stand_ins = StandIns()
    (segments,) = segments_of(BOUNDS["short ones between"])
    mixed_attention(from_tokens, stand_ins.kernels)(*inputs(), segments)
    assert stand_ins.long == long
    assert stand_ins.short == short


def test_an_empty_document_launches_no_kernel(small_granule):
    stand_ins = StandIns()
    (segments,) = segments_of([0, 40, 40, 96])
    out = mixed_attention(30, stand_ins.kernels)(*inputs(), segments)
    assert (stand_ins.long, stand_ins.short) == ([(1, 40), (1, 56)], [])
    (without,) = segments_of([0, 40, 96])
    assert torch.equal(out, mixed_attention(30, stand_ins.kernels)(*inputs(), without))


def test_the_backend_that_is_chosen_keeps_to_the_crossover_it_is_given(monkeypatch, small_granule):
    stand_ins = StandIns()
    monkeypatch.setattr(mixed, "GPU_KERNELS", stand_ins.kernels)
    monkeypatch.setattr(backend.Backend, "missing", lambda *args, **options: None)
    (segments,) = segments_of([0, 40, 96])
    for from_tokens, expected in ((50, [(1, 56)]), (40, [(1, 40), (1, 56)])):
        stand_ins.long.clear()
        attend, line = choose_attention("mixed", CPU, torch.float64, crossover=from_tokens)
        attend(*inputs(), segments)
        assert stand_ins.long == expected
        assert line == "attention: mixed (asked for)"


def test_the_gradient_comes_to_cudnn_in_one_layout_whatever_it_had(small_granule):
    """torch finds cuDNN's plan by the layout of q, k and v, and would take that of another
    gradient."""
    stand_ins = StandIns()
    qkv = inputs()
    layouts = []

    def long_backward(grad, *args):
        layouts.append(grad.stride())
        return stand_ins.long_backward(grad, *args)

    attend = mixed_attention(
        10, dataclasses.replace(stand_ins.kernels, long_backward=long_backward)
    )
    (segments,) = segments_of([0, 96])
    rows = torch.ones(TOKENS, QUERY_HEADS, HEAD_SIZE, dtype=torch.float64)
    for grad in (
        rows,
        torch.ones(QUERY_HEADS, TOKENS, HEAD_SIZE, dtype=torch.float64).transpose(0, 1),
        rows[:1, :1, :1].expand_as(rows),
    ):
        torch.autograd.grad(attend(*qkv, segments), qkv, grad)
    assert len(set(layouts)) == 1, layouts


def test_neighbours_of_one_length_are_one_call_where_none_is_padded(small_granule):
    (segments,) = segments_of([0, 24, 48, 59, 70, 96])
    parts = split_documents(segments, 10)
    assert [(part.documents, part.length, part.padded) for part in parts] == [
        (2, 24, 24),
        (1, 11, 16),
        (1, 11, 16),
        (1, 26, 32),
    ]


def test_parts_are_made_once_for_all_layers(monkeypatch):
    calls = []
    monkeypatch.setattr(kernel_calls, "_split", lambda *args: calls.append(args) or [])
    (segments,) = segments_of([0, 10, 96])
    for _ in range(3):
        split_documents(segments, 20)
    assert len(calls) == 1
    split_documents(segments, 30)
    assert len(calls) == 2, "another crossover has other parts"


class Operators(TorchDispatchMode):
    """The names of the operators that run, but for views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        if not function.is_view:
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bounds", [[0, 96], [0, 48, 96]])
def test_documents_that_fill_the_call_are_not_copied(bounds, small_granule):
    """A million-token document, or several of one length, costs the kernel and nothing else."""
    stand_ins = StandIns()
    qkv = inputs()
    (segments,) = segments_of(bounds)
    grad = torch.ones(TOKENS, QUERY_HEADS, HEAD_SIZE, dtype=torch.float64)
    with Operators() as operators:
        out = mixed_attention(10, stand_ins.kernels)(*qkv, segments)
        torch.autograd.grad(out, qkv, grad)
    assert operators.names == [
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ]
    assert stand_ins.long == [(len(bounds) - 1, 96 // (len(bounds) - 1))]


def test_rows_that_follow_a_document_serve_as_its_padding(small_granule):
    """q, k and v are copied only where the call ends before the padding: here in the last
    document."""
    (segments,) = segments_of([0, 50, 91])
    q, k, v = (x[:91].detach() for x in inputs())
    first, last = split_documents(segments, 10)
    assert (
        mixed._long_rows(q, first.rows_q, first).untyped_storage().data_ptr()
        == q.untyped_storage().data_ptr()
    )
    copy = mixed._long_rows(q, last.rows_q, last)
    assert copy.untyped_storage().data_ptr() != q.untyped_storage().data_ptr()
    assert copy.shape == (1, QUERY_HEADS, 48, HEAD_SIZE)
    assert not copy[:, :, 41:].any()


@pytest.mark.parametrize("bounds", [[0, 96], [0, 1, 22, 30, 71, 96]])
def test_mixed_outlives_its_q_k_and_v_and_keeps_its_output_once(
    bounds, small_granule, nothing_is_zero
):
    qkv = inputs()
    attend = mixed_attention(20, StandIns().kernels)
    (segments,) = segments_of(bounds)
    expected = masked_attention(*qkv, torch.tensor(bounds, dtype=torch.int32))
    weight = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    tape = AttentionTape()
    copies = [x.detach().clone() for x in qkv]
    with MemTracker() as tracker:
        out = tape.attend(lambda q, k, v: [attend(q, k, v, segments)], *copies)
        free_storage(*copies)
        gc.collect()
    kept = sum(parts["Total"] for parts in tracker.get_tracker_snapshot("current").values())
    parts = split_documents(segments, 20)
    rows = sum(
        part.padded if part.is_long else part.rows_q.stop - part.rows_q.start for part in parts
    )
    of_bounds = sum(
        x.nbytes
        for x in (
            segments.cu_q,
            segments.cu_k,
            *(cu for part in parts if part.rows_q.start > 0 for cu in (part.cu_q, part.cu_k)),
        )
    )
    assert kept == out.nbytes + rows * QUERY_HEADS * 8 + of_bounds, (
        "the output and its log-sum-exps"
    )

    tape.play()
    again = [x.detach().clone().requires_grad_() for x in qkv]
    found = tape.attend(None, *(x * 1 for x in again))
    assert (found - expected).abs().max() < 1e-12
    for grad, wanted in zip(
        torch.autograd.grad((found * weight).sum(), again),
        torch.autograd.grad((expected * weight).sum(), qkv),
        strict=True,
    ):
        assert (grad - wanted).abs().max() < 1e-12


def test_padded_lengths_are_few_and_near():
    lengths = range(1, 2**17)
    padded = [padded_length(tokens) for tokens in lengths]
    assert all(long >= tokens for tokens, long in zip(lengths, padded, strict=True))
    assert [padded_length(tokens) for tokens in set(padded)] == list(set(padded)), (
        "what is padded needs no more"
    )
    assert len(set(padded)) <= 16 * 17
    wasted = [
        long / tokens - 1 for tokens, long in zip(lengths, padded, strict=True) if tokens >= 4096
    ]
    assert max(wasted) <= 1 / 16
    assert sum(wasted) / len(wasted) < 0.025
    assert padded_length(1 << 20) == 1 << 20


# ---------------------------------------------------------------- the calls of optional packages
# Signatures as published: what is called with other arguments on a machine that has the package
# fails there at once.


def flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """flash-attn 2.8.3, flash_attn/flash_attn_interface.py: flash_attn_varlen_func."""


def flash_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Dao-AILab/flash-attention, hopper/flash_attn_interface.py: flash_attn_varlen_func, at
    01afd16d."""


def flash_4(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    gather_kv_indices=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    block_sparse_tensors=None,
    aux_tensors=None,
    aux_scalars=None,
    return_lse=False,
    scheduler_metadata=None,
    seqlen_k_per_split=None,
    disable_scheduler_metadata=False,
    gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    """flash-attn-4 4.0.0b36, flash_attn/cute/interface.py: flash_attn_varlen_func."""


def flash_4_early(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
):
    """flash-attn 2.8.3, flash_attn/cute/interface.py: flash_attn_varlen_func."""


def te_init(
    num_attention_heads,
    kv_channels,
    num_gqa_groups=None,
    attention_dropout=0.0,
    qkv_format="sbhd",
    attn_mask_type="causal",
    window_size=None,
    sequence_parallel=False,
    tp_size=1,
    get_rng_state_tracker=None,
    tp_group=None,
    layer_number=None,
    attention_type="self",
    cp_group=None,
    cp_global_ranks=None,
    cp_stream=None,
    cp_comm_type="p2p",
    softmax_scale=None,
):
    """transformer-engine 2, transformer_engine/pytorch: DotProductAttention.__init__."""


def te_forward(
    query_layer,
    key_layer,
    value_layer,
    attention_mask=None,
    qkv_format=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_kv_padded=None,
    max_seqlen_q=None,
    max_seqlen_kv=None,
    attn_mask_type=None,
    window_size=None,
    checkpoint_core_attention=False,
    core_attention_bias_type="no_bias",
    core_attention_bias=None,
    alibi_slopes=None,
    fast_zero_fill=True,
    inference_params=None,
    pad_between_seqs=None,
):
    """transformer-engine 2, transformer_engine/pytorch: DotProductAttention.forward."""


def varlen_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """torch 2.11, torch/nn/attention/varlen.py: varlen_attn."""


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """torch 2.13, torch/nn/attention/varlen.py: varlen_attn."""


def cudnn_sdpa(
    query,
    key,
    value,
    *,
    scale=None,
    is_causal=False,
    causal_bottom_right=False,
    window_left=-1,
    window_right=-1,
    sinks=None,
    seq_len_q=None,
    seq_len_kv=None,
    cu_seqlens_q=None,
    cu_seqlens_kv=None,
    max_seqlen_q=0,
    max_seqlen_kv=0,
    return_lse=False,
):
    """nvidia-cudnn-frontend 1.32.0, cudnn/sdpa/fwd/torch_op.py: sdpa (cudnn.sdpa_torch)."""


def recording(signature, result):
    """A function of this signature that notes its arguments by name -> (the function, its
    notes)."""
    calls = []

    def function(*args, **kwargs):
        bound = inspect.signature(signature).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return result(bound.arguments)

    function.__signature__ = inspect.signature(signature)
    return function, calls


def module(monkeypatch, name: str, **members) -> None:
    """Put a module of this name, with its packages, where `import` finds it."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(
            sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end]))
        )
    vars(sys.modules[name]).update(members)


def call(attend) -> tuple[torch.Tensor, object]:
    """A call whose second document has more keys than queries -> (the output, its segments)."""
    (segments,) = segments_of([0, 10, 96], [(60, 96)])
    q, k, v = (x.detach() for x in inputs())
    rows = len(q[segments.queries])
    return attend(q[:rows], k[segments.keys], v[segments.keys], segments), segments


@pytest.mark.parametrize(
    "version, signature, result",
    [
        (2, flash_2, lambda given: given["q"]),
        (3, flash_3, lambda given: given["q"]),
        (4, flash_4, lambda given: (given["q"], None)),
        (4, flash_4_early, lambda given: (given["q"], None)),
    ],
)
def test_the_call_of_flash_attn_fits(monkeypatch, version, signature, result):
    function, calls = recording(signature, result)
    module(monkeypatch, flash.FLASH[version], flash_attn_varlen_func=function)
    monkeypatch.setattr(flash, "installed_flash_version", lambda device: version)
    out, segments = call(BACKENDS["flash"].make(NEVER))
    assert isinstance(out, torch.Tensor)
    (given,) = calls
    assert given["causal"] is True
    assert given["cu_seqlens_q"] is segments.cu_q
    assert given["cu_seqlens_k"] is segments.cu_k
    assert given.get("max_seqlen_q", 36) == 36
    assert given.get("max_seqlen_k", 86) == 86


def test_the_call_of_transformer_engine_fits(monkeypatch):
    init, made = recording(te_init, lambda given: None)
    forward, calls = recording(te_forward, lambda given: given["query_layer"].flatten(1))

    class DotProductAttention:
        def __init__(self, *args, **kwargs):
            init(*args, **kwargs)

        def __call__(self, *args, **kwargs):
            return forward(*args, **kwargs)

    module(monkeypatch, "transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    attend = BACKENDS["te"].make(NEVER)
    out, segments = call(attend)
    call(attend)
    assert out.shape == (36, QUERY_HEADS, HEAD_SIZE)
    (layer,) = made
    assert layer["num_gqa_groups"] == 2
    assert layer["qkv_format"] == "thd"
    assert layer["attn_mask_type"] == "padding_causal_bottom_right"
    assert calls[0]["cu_seqlens_kv"] is segments.cu_k
    assert calls[0]["max_seqlen_kv"] == 86


@pytest.mark.parametrize(
    "signature, is_told_of_groups", [(varlen_2_11, False), (varlen_2_13, True)]
)
def test_the_call_of_torchs_varlen_attention_fits(monkeypatch, signature, is_told_of_groups):
    """Grouped heads go in as they are: torch 2.11 has no flag for them, and its operator takes
    them."""
    function, calls = recording(signature, lambda given: given["query"])
    monkeypatch.setattr(varlen, "varlen_attn", function)
    _, segments = call(BACKENDS["varlen"].make(NEVER))
    (given,) = calls
    assert given["key"].shape[1] == 2
    assert given["window_size"] == (-1, 0)
    assert given.get("enable_gqa", False) is is_told_of_groups
    assert given["cu_seq_k"] is segments.cu_k


def test_the_recorded_signature_is_that_of_this_torch():
    recorded = (
        varlen_2_13
        if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
        else varlen_2_11
    )
    assert list(inspect.signature(recorded).parameters) == list(
        inspect.signature(varlen.varlen_attn).parameters
    )
    assert varlen_options(varlen.varlen_attn) == varlen_options(recorded)


@pytest.mark.parametrize("pieces, is_bottom_right", [([(0, 96)], False), ([(60, 96)], True)])
def test_the_call_of_cudnns_frontend_fits(monkeypatch, pieces, is_bottom_right):
    function, calls = recording(cudnn_sdpa, lambda given: (given["query"], None))
    module(monkeypatch, "cudnn", sdpa_torch=function)
    (segments,) = segments_of([0, 10, 96], pieces)
    q, k, v = (x.detach() for x in inputs())
    BACKENDS["cudnn"].make(NEVER)(q[segments.queries], k[segments.keys], v[segments.keys], segments)
    (given,) = calls
    assert given["is_causal"] is True
    assert given["causal_bottom_right"] is is_bottom_right
    assert given["cu_seqlens_kv"] is segments.cu_k
    assert given["max_seqlen_kv"] == segments.max_k


OPERATORS = {
    "_scaled_dot_product_cudnn_attention": "(Tensor query, Tensor key, Tensor value, Tensor? "
    "attn_bias, bool compute_log_sumexp, float "
    "dropout_p=0., bool is_causal=False, bool "
    "return_debug_mask=False, *, float? scale=None) -> "
    "(Tensor, Tensor)",
    "_scaled_dot_product_cudnn_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor philox_seed, Tensor philox_offset, "
    "Tensor attn_bias, Tensor cum_seq_q, Tensor "
    "cum_seq_k, SymInt max_q, SymInt max_k, "
    "float dropout_p, bool is_causal, *, float? "
    "scale=None) -> (Tensor, Tensor)",
    "_flash_attention_forward": "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, "
    "Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None) "
    "-> (Tensor, Tensor)",
    "_flash_attention_backward": "(Tensor grad_out, Tensor query, Tensor key, Tensor value, "
    "Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor "
    "cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool "
    "is_causal, Tensor rng_state, Tensor unused, *, float? "
    "scale=None, SymInt? window_size_left=None, SymInt? "
    "window_size_right=None) -> (Tensor, Tensor)",
}
"""Arguments of the operators under `mixed`, in torch 2.11 and 2.13; what one of them has beyond is
left out."""


class OperatorCalls(TorchDispatchMode):
    """The calls of the recorded operators: name -> arguments by name."""

    def __init__(self):
        super().__init__()
        self.given: dict[str, dict] = {}

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in OPERATORS:
            known = torch._C.parse_schema(f"aten::{name}{OPERATORS[name]}").arguments
            assert len(args) <= len([argument for argument in known if not argument.kwarg_only])
            assert set(kwargs or {}) <= {argument.name for argument in known}
            self.given[name] = dict(
                zip([argument.name for argument in known], args, strict=False)
            ) | (kwargs or {})
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    "from_tokens, operators", [(1, "_scaled_dot_product_cudnn"), (NEVER, "_flash")]
)
def test_the_operators_under_mixed_take_what_they_are_given(from_tokens, operators):
    """On device meta torch checks arguments and shapes, and runs nothing."""
    (segments,) = segments_of([0, 512])
    segments = dataclasses.replace(
        segments, cu_q=segments.cu_q.to("meta"), cu_k=segments.cu_k.to("meta"), kernel_calls={}
    )
    q, k, v = (
        torch.empty(512, heads, 64, device="meta", dtype=torch.bfloat16).requires_grad_()
        for heads in (QUERY_HEADS, 2, 2)
    )
    with OperatorCalls() as calls:
        out = mixed_attention(from_tokens, GPU_KERNELS)(q, k, v, segments)
        grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert sorted(calls.given) == sorted(name for name in OPERATORS if name.startswith(operators))
    for name, given in calls.given.items():
        assert given["is_causal"] is True, name
        assert given["dropout_p"] == 0.0, name
        if operators == "_flash":
            assert (given["window_size_left"], given["window_size_right"]) == (-1, 0), name


# ---------------------------------------------------------------- which backend is chosen


def pretend_installed(monkeypatch, *names: str) -> None:
    for module in (backend, flash):
        monkeypatch.setattr(module, "is_installed", lambda name: name in names)


def obstacle_of_mixed(monkeypatch, reason: str | None) -> None:
    changed = dataclasses.replace(BACKENDS["mixed"], obstacle=lambda *args: reason)
    monkeypatch.setitem(choice.BACKENDS, "mixed", changed)


def test_the_release_of_flash_attention_is_the_one_for_the_gpu():
    def chosen(capability, *installed):
        return flash_version(
            capability, lambda name: name in {flash.FLASH[version] for version in installed}
        )

    assert [chosen((9, 0), 2, 3, 4), chosen((9, 0), 2, 4), chosen((9, 0), 2)] == [3, 4, 2]
    assert [
        chosen((10, 0), 2, 3, 4),
        chosen((10, 0), 3),
        chosen((8, 0), 2, 4),
        chosen((8, 0), 4),
    ] == [4, None, 2, None]


@pytest.mark.parametrize("capability, expected", [((8, 0), None), ((9, 0), 4), ((10, 0), 4)])
def test_flash_attention_4_alone_is_not_taken_for_2(tmp_path, monkeypatch, capability, expected):
    """Its package is a folder in a folder without code, which `import flash_attn` takes for a
    package."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    try:
        assert flash.installed_flash_version(GPU) == expected
        reason = BACKENDS["flash"].missing(GPU, torch.bfloat16)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
            del sys.modules[name]
    assert reason == (
        None if expected else "the release of flash-attn that is installed is not for this GPU"
    )


@pytest.mark.parametrize(
    "capability, installed, expected",
    [
        ((9, 0), [], "mixed"),
        ((9, 0), ["flash_attn"], "mixed"),
        ((9, 0), ["transformer_engine"], "mixed"),
        ((9, 0), ["flash_attn_interface"], "flash"),
        ((10, 0), ["flash_attn.cute"], "flash"),
        ((10, 0), [], "mixed"),
        ((8, 0), [], "varlen"),
        ((8, 0), ["flash_attn"], "flash"),
        ((8, 0), ["transformer_engine"], "te"),
        ((9, 0), ["cudnn.sdpa.fwd.torch_op"], "mixed"),
    ],
)
def test_auto_takes_what_is_fast_on_the_card(monkeypatch, capability, installed, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    pretend_installed(monkeypatch, "torch.nn.attention.varlen", *installed)
    obstacle_of_mixed(monkeypatch, None)
    assert choice.pick_backend("auto", GPU, torch.bfloat16)[0].name == expected


def test_a_cudnn_that_does_not_run_is_said_in_one_line(monkeypatch):
    """The line names the heads that were tried: cuDNN has no kernel for some head sizes."""

    def fails(*args):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\nException raised from ...")

    heads = (4, 2, 200)
    monkeypatch.setattr(
        mixed, "GPU_KERNELS", dataclasses.replace(StandIns().kernels, long_forward=fails)
    )
    reason = mixed.why_mixed_cannot_run(CPU, torch.float32, heads)
    assert reason == (
        "cuDNN does not run here with 4 query and 2 key/value heads of size 200: cuDNN error: "
        "CUDNN_STATUS_NOT_SUPPORTED"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    obstacle_of_mixed(monkeypatch, reason)
    with pytest.raises(ValueError, match="attention_backend = mixed: cuDNN does not run here"):
        choose_attention("mixed", GPU, torch.bfloat16, heads=heads)
    pretend_installed(monkeypatch, "torch.nn.attention.varlen")
    assert choice.pick_backend("auto", GPU, torch.bfloat16)[0].name == "varlen"


def test_both_kernels_are_tried_forward_and_backward_before_mixed_is_taken(monkeypatch):
    stand_ins = StandIns()
    monkeypatch.setattr(mixed, "GPU_KERNELS", stand_ins.kernels)
    assert mixed.why_mixed_cannot_run(CPU, torch.float32, (4, 2, 8)) is None
    assert stand_ins.long == [(1, mixed.GRANULE_TOKENS)]
    assert stand_ins.short == [[0, mixed.GRANULE_TOKENS]]
