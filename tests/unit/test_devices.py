"""Everything that a stage computes is on the layout's device: on meta, forward and backward.

Device meta has shapes and no values. A tensor of the host that meets one of meta is an error here,
as it is on a GPU; so is a value that is read back, since the host would have to wait for a GPU.

What a file does only where `is_cuda` holds is not seen here; test_factories.py reads the source.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention import bias
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from data.source_runs import SourceRun
from model import gpt
from model.activation_memory.settings import KEEPS_INPUT_ONLY, MemorySettings
from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.documents import pack_documents
from model.config import ModelConfig
from model.gpt import GPTStage
from model.sharding import shardings_for
from parallel.layout import Axis, Layout, free_memory, single_process_layout
from pretrain.qk_clip import LogitWatch
from tests.unit.test_model import masked_attention

META = torch.device("meta")
DTYPE = torch.bfloat16
VOCABULARY = 500
TOKENS = 35
"""Tokens of a microbatch; no number of parts below divides it."""


class MixedDevices(RuntimeError):
    """An operator got tensors of two devices."""


class OneDevice(TorchDispatchMode):
    """Raises where an operator gets tensors of two devices; notes the shapes of what is copied.

    torch itself lets the host's tensors of no dims meet any device, and the host's tensors index a
    GPU's; the second is a copy that blocks.
    """

    def __init__(self):
        super().__init__()
        self.copied: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = _tensors((args, kwargs))
        devices = {x.device.type for x in given}
        if len(devices) > 1:
            shapes = ", ".join(f"{x.device.type} {list(x.shape)}" for x in given)
            raise MixedDevices(f"{operator}: tensors of two devices: {shapes}")
        result = operator(*args, **(kwargs or {}))
        if devices and {x.device.type for x in _tensors(result)} - devices:
            self.copied += [tuple(x.shape) for x in given]
        return result


def _tensors(tree: object) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.fixture(autouse=True)
def causal_biases_outside_of_modes(monkeypatch):
    """Let torch make its causal bias while a mode watches: no mode makes tensors of its class."""
    original = bias.CausalBias

    def make(*given):
        with _disable_current_modes():
            return original(*given)

    monkeypatch.setattr(bias, "CausalBias", make)


# ---------------------------------------------------------------- stages

MODELS = {
    "tied": {},
    "untied, grouped, qk-norm, bias": dict(
        untie_embeddings_and_output_weights=True,
        num_query_groups=2,
        qk_layernorm=True,
        add_qkv_bias=True,
    ),
    "one key/value head, yarn, other parts than Llama's": dict(
        num_query_groups=1,
        rope_type="yarn",
        rope_scaling_factor=4.0,
        original_max_position_embeddings=4096,
        norm_placement="both",
        apply_layernorm_1p=True,
        activation_func="gelu_tanh",
        embedding_multiplier=5.5,
        residual_multiplier=0.4,
        logits_scaling=3.0,
        no_rope_freq=[2],
        softmax_type="learnable",
        final_logit_softcapping=9.0,
    ),
}
BOUNDARIES = {
    "one document": (0, TOKENS),
    "several documents": (0, 1, 12, TOKENS),
    "one token": (0, 1),
}
"""Where the documents of a microbatch begin and end."""
PARTS = {
    "whole": {},
    "parts": dict(mlp_tiles=3, attention_head_chunks=2, loss_chunk_tokens=16),
    "many parts": dict(mlp_tiles=9, attention_head_chunks=4, loss_chunk_tokens=8),
}


LEVELS = (None, "selective", "full", "attention_kept")


def memory_settings() -> Iterator:
    """Yield every level as a parameter, with and without offload; in many parts with --all only."""
    for level in LEVELS:
        for offloaded in (0, 1) if level in KEEPS_INPUT_ONLY else (0,):
            for name, parts in PARTS.items():
                settings = MemorySettings(level, offloaded, **parts)
                yield pytest.param(settings, marks=pytest.mark.long if name == "many parts" else ())


def name_of(settings: MemorySettings) -> str:
    return "-".join(
        [
            settings.recompute_granularity or "none",
            f"offload{settings.cpu_offloading_num_layers}",
            f"tiles{settings.mlp_tiles}",
            f"heads{settings.attention_head_chunks}",
            f"loss{settings.loss_chunk_tokens}",
        ]
    )


ALL_SETTINGS = pytest.mark.parametrize("settings", [*memory_settings()], ids=name_of)
SETTINGS_IN_PARTS = pytest.mark.parametrize(
    "settings", [MemorySettings(level, **PARTS["parts"]) for level in LEVELS], ids=name_of
)


def model_config(**fields) -> ModelConfig:
    shape = dict(num_layers=1, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)
    return ModelConfig(**(shape | fields))


def make_stage(
    config: ModelConfig, layout: Layout, settings: MemorySettings, number: int = 0
) -> GPTStage:
    attend, _ = choose_attention("sdpa", layout.device, DTYPE)
    stage = GPTStage(config, VOCABULARY, layout, attend, number).to(DTYPE)
    stage.memory = settings
    return stage


def microbatch(boundaries: tuple[int, ...], ranks: int = 1) -> SimpleNamespace:
    """What one of `ranks` context-parallel ranks gets: a slice on meta, boundaries on the host."""
    ids = torch.zeros(boundaries[-1] // ranks, dtype=torch.int64, device=META)
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return SimpleNamespace(
        tokens=ids, labels=ids.clone(), positions=ids.clone(), cu_seqlens=cu_seqlens
    )


def forward_and_backward(
    stage: GPTStage, batch: SimpleNamespace, x: torch.Tensor | None = None
) -> OneDevice:
    """One microbatch through the stage and back, watched.

    Args:
        x: what the previous stage would give; None on the first stage.
    """
    stage.begin_step([batch], 1)
    with OneDevice() as watch:
        out = stage(torch.empty(0, device=META) if x is None else x)
        out.backward(torch.empty_like(out))
    assert out.device == META
    missing = [name for name, parameter in stage.named_parameters() if parameter.grad is None]
    assert not missing, f"parameters without a gradient: {missing}"
    return watch


@pytest.mark.parametrize("model", MODELS)
@ALL_SETTINGS
def test_a_stage_computes_on_its_device(settings, model):
    stage = make_stage(model_config(**MODELS[model]), single_process_layout(META), settings)
    for boundaries in BOUNDARIES.values():
        forward_and_backward(stage, microbatch(boundaries))


@pytest.mark.parametrize("level", KEEPS_INPUT_ONLY)
def test_layers_of_which_one_is_offloaded_compute_on_their_device(level):
    settings = MemorySettings(level, cpu_offloading_num_layers=1)
    stage = make_stage(model_config(num_layers=2), single_process_layout(META), settings)
    forward_and_backward(stage, microbatch((0, 12, TOKENS)))


@SETTINGS_IN_PARTS
def test_scores_are_made_on_their_device(settings):
    stage = make_stage(model_config(), single_process_layout(META), settings)
    scores = []
    stage.begin_step([microbatch((0, 1, 12, TOKENS))], 1, scores)
    with torch.no_grad(), OneDevice():
        stage(torch.empty(0, device=META))
    (score,) = scores
    assert score.device == META and score.shape == (3,), score


@SETTINGS_IN_PARTS
def test_losses_by_source_are_summed_on_their_device(settings):
    stage = make_stage(model_config(), single_process_layout(META), settings)
    batch = microbatch((0, 1, 12, TOKENS))
    batch.source_runs = (SourceRun(0, 12, 0, 10), SourceRun(12, TOKENS, 1, TOKENS - 13))
    sums = torch.zeros(2, dtype=torch.float64, device=META)
    stage.begin_step([batch], 1, source_losses=sums)
    with OneDevice():
        loss = stage(torch.empty(0, device=META))
        loss.backward()
    assert loss.device == META, loss


def test_logits_are_made_on_their_device():
    stage = make_stage(model_config(), single_process_layout(META), MemorySettings())
    with torch.no_grad(), OneDevice():
        logits = stage.logits(stage.hidden(torch.empty(0, device=META), microbatch((0, TOKENS))))
    assert logits.device == META and logits.shape[0] == TOKENS, logits


@SETTINGS_IN_PARTS
@pytest.mark.parametrize("windows", [{}, dict(window_size=[4, 0])])
def test_the_largest_logits_are_measured_and_judged_on_their_device(settings, windows):
    config = model_config(num_query_groups=2, **windows)
    layout = single_process_layout(META)
    stage = make_stage(config, layout, settings)
    watch = LogitWatch([], config, layout, DTYPE, threshold=1.0)
    stage.begin_step([microbatch((0, 1, 12, TOKENS))], 1, largest_logits=watch.largest)
    with OneDevice():
        stage(torch.empty(0, device=META)).backward()
        found = watch.after_update(torch.ones((), dtype=torch.bool, device=META))
    assert [value.device for value in found] == [META, META]


@SETTINGS_IN_PARTS
@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_stage_of_a_pipeline_computes_on_its_device(settings, number):
    layout = replace(single_process_layout(META), num_stages=3)
    stage = make_stage(model_config(num_layers=3), layout, settings, number)
    x = torch.empty(TOKENS, 64, dtype=DTYPE, device=META, requires_grad=True)
    forward_and_backward(stage, microbatch((0, 12, TOKENS)), x)
    assert number == 0 or x.grad is not None


# ---------------------------------------------------------------- one rank of several


@dataclass(frozen=True)
class Ranks:
    """How many ranks each axis has; this process is the last of them."""

    tp: int = 1
    a2a: int = 1
    gather: int = 1
    sequence_parallel: bool = False
    heads: int = 4
    kv_heads: int = 2
    head_chunks: int = 1


RANKS = {
    "tp 2": Ranks(tp=2),
    "tp 2, sequence parallel, shared key/value head": Ranks(
        tp=2, sequence_parallel=True, kv_heads=1
    ),
    "Ulysses 2": Ranks(a2a=2),
    "Ulysses 2 in head chunks": Ranks(a2a=2, heads=8, head_chunks=2),
    "Ulysses 4, uneven heads": Ranks(a2a=4, heads=6),
    "two levels": Ranks(a2a=2, gather=2),
    "tp 2, two levels, head chunks": Ranks(tp=2, a2a=2, gather=2, heads=8, head_chunks=2),
}


@contextmanager
def one_rank_of(ranks: Ranks) -> Iterator[Layout]:
    """The layout of the last rank of each axis; collectives give results of the right shapes."""
    cp = ranks.a2a * ranks.gather
    world = ranks.tp * cp
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)

    def axis(name: str, size: int) -> Axis:
        members = tuple(range(world - size, world))
        return Axis(name, size - 1, size, members, dist.new_group(list(members)))

    try:
        yield replace(
            single_process_layout(META),
            tp=axis("tp", ranks.tp),
            cp=axis("cp", cp),
            cp_a2a=axis("cp_a2a", ranks.a2a),
            cp_gather=axis("cp_gather", ranks.gather),
            dp_cp=axis("dp_cp", cp),
            sequence_parallel=ranks.sequence_parallel,
        )
    finally:
        dist.destroy_process_group()


def keep_own_part(stage: GPTStage, config: ModelConfig, layout: Layout) -> None:
    """Cut the parameters over tp as `distribute_parameters` does, but without DTensors.

    A DTensor's mesh cannot be on meta.
    """
    names = [name for name, _ in stage.named_parameters()]
    shardings = shardings_for(names, config, layout.tp.size, layout.sequence_parallel)
    for name, sharding in shardings.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = stage.get_submodule(owner_name)
        if sharding.dim is not None:
            part = getattr(owner, leaf).data.chunk(layout.tp.size, sharding.dim)[layout.tp.rank]
            setattr(owner, leaf, nn.Parameter(part))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", RANKS)
def test_a_rank_of_several_computes_on_its_device(name, level):
    ranks = RANKS[name]
    config = model_config(
        num_attention_heads=ranks.heads,
        num_query_groups=ranks.kv_heads,
        hidden_size=16 * ranks.heads,
        qk_layernorm=True,
    )
    with one_rank_of(ranks) as layout:
        settings = MemorySettings(
            level, mlp_tiles=3, attention_head_chunks=ranks.head_chunks, loss_chunk_tokens=8
        )
        stage = make_stage(config, layout, settings)
        keep_own_part(stage, config, layout)
        forward_and_backward(stage, microbatch((0, 1, 20, 64), layout.cp.size))


# ---------------------------------------------------------------- parts by themselves


@pytest.mark.parametrize("name, kv_heads", [("sdpa", 1), ("sdpa", 4), ("varlen", 4)])
def test_attention_computes_on_its_device(name, kv_heads):
    """Also where a document has more keys than queries."""
    attend = BACKENDS[name].make(2048)
    q, k, v = (
        torch.empty(64, heads, 64, dtype=DTYPE, device=META, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    segments = pack_documents(
        torch.tensor([0, 20, 64], dtype=torch.int32), [(16, 32), (32, 48)], META
    )
    with OneDevice():
        for part in segments:
            out = attend(q[part.queries], k[part.keys], v[part.keys], part)
            out.backward(torch.empty_like(out))
    assert out.device == META and out.shape == (16, 4, 64), out


def test_the_definition_of_attention_is_computed_on_its_device():
    q, k = (torch.empty(64, heads, 16, device=META) for heads in (4, 2))
    with OneDevice():
        out = masked_attention(q, k, k, torch.empty(3, dtype=torch.int32, device=META))
    assert out.device == META


@pytest.mark.parametrize("boundaries", BOUNDARIES.values(), ids=BOUNDARIES)
def test_a_microbatch_copies_only_boundaries_and_frequencies_to_the_device(boundaries):
    """A copy per layer, or of the size of the tokens, would show."""
    config = model_config()
    stage = make_stage(
        config, single_process_layout(META), MemorySettings("attention_kept", 0, **PARTS["parts"])
    )
    copied = forward_and_backward(stage, microbatch(boundaries)).copied
    allowed = [(len(boundaries),), (len(boundaries),), (config.head_size // 2,)]
    assert len(copied) <= len(allowed) and set(copied) <= set(allowed), copied


# ---------------------------------------------------------------- these tests can fail


def run_with(monkeypatch, name: str, value: object, settings: MemorySettings) -> OneDevice:
    """The stage's step with `value` in the place of `model.gpt.name`."""
    monkeypatch.setattr(gpt, name, value)
    return forward_and_backward(
        make_stage(model_config(), single_process_layout(META), settings),
        microbatch((0, 12, TOKENS)),
    )


@SETTINGS_IN_PARTS
def test_tables_that_forget_their_device_are_noticed(settings, monkeypatch):
    original = gpt.rotary_tables

    def forgetful(positions_t, *rest):
        return original(torch.zeros(positions_t.shape, dtype=torch.int64), *rest)

    with pytest.raises(MixedDevices, match=r"meta \[35, \d, 16\].*cpu \[35, 1, 16\]"):
        run_with(monkeypatch, "rotary_tables", forgetful, settings)


@SETTINGS_IN_PARTS
def test_a_number_in_a_tensor_of_the_host_is_noticed(settings, monkeypatch):
    """torch itself takes it: on a GPU it would pass as well."""
    original = gpt.vocab_parallel_embedding
    with pytest.raises(MixedDevices, match=r"mul.*cpu \[\]"):
        run_with(
            monkeypatch,
            "vocab_parallel_embedding",
            lambda *given: original(*given) * torch.tensor(1.0),
            settings,
        )


@SETTINGS_IN_PARTS
def test_a_tensor_of_the_host_in_backward_is_noticed(settings, monkeypatch):
    original = gpt.vocab_parallel_embedding

    def hooked(*given):
        x_tD = original(*given)
        x_tD.register_hook(lambda grad: grad * torch.tensor(1.0))
        return x_tD

    with pytest.raises(MixedDevices, match=r"mul.*cpu \[\]"):
        run_with(monkeypatch, "vocab_parallel_embedding", hooked, settings)


def test_an_index_on_the_host_is_noticed():
    """torch itself takes it: on a GPU it is a copy that blocks."""
    with OneDevice(), pytest.raises(MixedDevices, match="index"):
        torch.empty(4, device=META)[torch.tensor([0, 2])]


def test_tables_that_are_copied_to_the_device_are_noticed(monkeypatch):
    original = gpt.rotary_tables

    def detour(positions_t, *rest):
        tables = original(torch.zeros(positions_t.shape, dtype=torch.int64), *rest)
        return [table.to(META) for table in tables]

    assert (TOKENS, 16) in run_with(monkeypatch, "rotary_tables", detour, MemorySettings()).copied


def test_a_value_that_is_read_back_is_noticed(monkeypatch):
    original = gpt.fused_loss
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensors?"):
        run_with(
            monkeypatch,
            "fused_loss",
            lambda *given: original(*given) * original(*given).item(),
            MemorySettings(),
        )


def test_what_torch_keeps_for_later_tensors_is_free_memory(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 700)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 300)
    assert free_memory(torch.device("cuda")) == 500
