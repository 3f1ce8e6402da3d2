"""Every layout gives the loss, every gradient and the updated weights of one process, in fp64."""

import dataclasses

import numpy as np
import pytest

from data.batch import IGNORE, read_batch
from model.activation_memory.settings import MemorySettings
from pretrain.checkpointing.replicas import check_replicas
from pretrain.step import train_step
from tests.dist.parity import Case, check_replicas_equal, compare, memory_stream, named, run_step
from tests.documents import windows
from tests.marks import cases

QWEN3 = dict(qk_layernorm=True, kv_channels=12)
QWEN2_TIED = dict(add_qkv_bias=True, num_query_groups=1)
UNTIED = dict(untie_embeddings_and_output_weights=True)
GEMMA3 = dict(
    norm_placement="both",
    apply_layernorm_1p=True,
    activation_func="gelu_tanh",
    embedding_multiplier=5.5,
    qk_layernorm=True,
    window_size=[4, 0],
    window_attn_skip_freq=[2],
    window_rotary_base=100.0,
)
OLMO = dict(norm_placement="post", qk_layernorm=True, qk_layernorm_scope="all_heads")
GRANITE = dict(embedding_multiplier=5.5, residual_multiplier=0.4, logits_scaling=3.0)
# Four times as wide as its base; the insides of attention and MLP have other ratios.
MUP = dict(
    use_mup=True,
    mup_base_hidden_size=8,
    mup_base_ffn_hidden_size=16,
    mup_base_num_attention_heads=2,
    mup_base_head_dim=4.0,
)
SINKS = dict(softmax_type="learnable")
# Low caps, so that they change much: scores and logits are about 1.
CAPPED = dict(attn_logit_softcapping=0.7, final_logit_softcapping=0.9)

CASES = {
    "tp2": Case(tp=2, model=UNTIED),
    "pp2 tied": Case(pp=2),
    "dp2": Case(dp=2, model=UNTIED | QWEN3),
    "cp2": Case(cp=2, model=UNTIED),
    "tp2 kv1": Case(tp=2, model=QWEN2_TIED),
    "tp4 kv2 qk-norm": Case(tp=4, model=QWEN3),
    "cp4 kv1": Case(cp=4, model=QWEN2_TIED),
    "cp4 six heads": Case(
        cp=4, model=dict(num_attention_heads=6, num_query_groups=2, hidden_size=48)
    ),
    "tp2 cp2": Case(tp=2, cp=2, model=UNTIED | QWEN3),
    "tp2 cp2 kv1": Case(tp=2, cp=2, model=QWEN2_TIED),
    "pp2 cp2": Case(pp=2, cp=2),
    "tp2 pp2": Case(tp=2, pp=2, model=QWEN3),
    "cp2 dp2 micro2": Case(cp=2, dp=2, micro_batch_size=2),
    "dp2 zero1": Case(dp=2, strategy="optim"),
    "dp2 zero3": Case(dp=2, strategy="optim_grads_params"),
    "cp2 zero3 recompute": Case(
        cp=2, strategy="optim_grads_params", memory=MemorySettings("full", 1)
    ),
    "pp2 dp2 zero3 recompute": Case(
        pp=2, dp=2, strategy="optim_grads_params", memory=MemorySettings("full"), model=QWEN2_TIED
    ),
    "cp4 no masking": Case(cp=4, document_masking=False),
    "cp4 long documents": Case(cp=4, lengths=(400,), model=UNTIED),
    "cp2 six heads three kv": Case(
        cp=2, model=dict(num_attention_heads=6, num_query_groups=3, hidden_size=48)
    ),
    "tp2 cp2 uneven heads": Case(
        tp=2, cp=2, model=dict(num_attention_heads=6, num_query_groups=2, hidden_size=48)
    ),
    "pp3 middle stage": Case(pp=3, model=UNTIED),
    "dp4 empty shards zero1": Case(
        dp=4, strategy="optim", model=dict(qk_layernorm=True, kv_channels=2)
    ),
    "tp4 padding only": Case(tp=4, model=dict(make_vocab_size_divisible_by=160) | QWEN3),
    "tp2 dp2 zero1 partial": Case(tp=2, dp=2, strategy="optim", model=QWEN2_TIED),
    "tp2 sequence parallel": Case(tp=2, sequence_parallel=True, model=UNTIED | QWEN3),
    "tp4 sequence parallel kv2 tied": Case(
        tp=4, sequence_parallel=True, model=dict(add_qkv_bias=True)
    ),
    "tp2 pp2 cp2 sequence parallel": Case(
        tp=2, pp=2, cp=2, sequence_parallel=True, memory=MemorySettings("full")
    ),
    "tp2 cp2 dp2 sequence parallel zero3": Case(
        tp=2, cp=2, dp=2, sequence_parallel=True, model=QWEN2_TIED, strategy="optim_grads_params"
    ),
    "tp2 pp2 cp2 tied": Case(tp=2, pp=2, cp=2),
    "pp2 interleaved tied": Case(pp=2, schedule="interleaved", model=dict(num_layers=5)),
    "pp2 zero-bubble tied": Case(pp=2, schedule="zero-bubble"),
    "pp2 ZBV tied": Case(pp=2, schedule="ZBV", model=dict(num_layers=5)),
    "pp2 ZBV untied": Case(pp=2, schedule="ZBV", model=UNTIED | dict(num_layers=4), samples=2),
    "pp2 interleaved 3 stages dp2 zero3 recompute": Case(
        pp=2,
        dp=2,
        schedule="interleaved",
        stages_per_rank=3,
        strategy="optim_grads_params",
        memory=MemorySettings("full"),
        model=dict(num_layers=7),
        samples=12,
    ),
    "pp2 interleaved 4 stages dp2": Case(
        pp=2, dp=2, schedule="interleaved", stages_per_rank=4, model=dict(num_layers=9)
    ),
    "pp2 zero-bubble 4 stages dp2": Case(
        pp=2, dp=2, schedule="zero-bubble", stages_per_rank=4, model=dict(num_layers=9)
    ),
    "pp4 zero-bubble 2 stages": Case(
        pp=4, schedule="zero-bubble", stages_per_rank=2, model=dict(num_layers=9)
    ),
    "tp2 pp2 cp2 ZBV tied": Case(
        tp=2, pp=2, cp=2, schedule="ZBV", model=dict(num_layers=4) | QWEN3
    ),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2)),
    "cp4 two levels yarn": Case(
        cp=4,
        context_levels=(2, 2),
        lengths=(400,),
        model=dict(rope_type="yarn", rope_scaling_factor=4.0, original_max_position_embeddings=16),
    ),
    "cp4 gather only": Case(cp=4, context_levels=(1, 4), model=QWEN2_TIED),
    "cp8 two heads": Case(
        cp=8, context_levels=(2, 4), model=dict(num_attention_heads=2, num_query_groups=1)
    ),
    "cp8 two levels long documents": Case(cp=8, context_levels=(4, 2), lengths=(400,), model=QWEN3),
    "cp6 odd groups": Case(
        cp=6,
        context_levels=(3, 2),
        seq_length=36,
        model=dict(num_attention_heads=6, num_query_groups=2, hidden_size=48),
    ),
    "tp2 cp4 two levels sequence parallel": Case(
        tp=2, cp=4, context_levels=(2, 2), sequence_parallel=True, micro_batch_size=2
    ),
    "cp4 two levels no masking": Case(
        cp=4, context_levels=(2, 2), document_masking=False, memory=MemorySettings("full")
    ),
    "tp2 cp2 windows": Case(
        tp=2, cp=2, model=dict(window_size=[4, 0]), memory=MemorySettings("selective")
    ),
    "pp2 cp2 windows in some layers": Case(
        pp=2, cp=2, model=QWEN3 | dict(window_size=[6, 0], window_attn_skip_freq=[2])
    ),
    "cp4 two levels windows attention kept": Case(
        cp=4,
        context_levels=(2, 2),
        lengths=(400,),
        model=UNTIED | dict(window_size=[9, 0]),
        memory=MemorySettings("attention_kept", attention_head_chunks=2),
    ),
    "tp2 cp2 gemma full": Case(tp=2, cp=2, model=GEMMA3, memory=MemorySettings("full", 1)),
    "tp2 sequence parallel gemma selective tiles": Case(
        tp=2,
        sequence_parallel=True,
        model=GEMMA3 | UNTIED,
        memory=MemorySettings("selective", mlp_tiles=3),
    ),
    "cp2 gemma attention kept chunks tiles": Case(
        cp=2, model=GEMMA3, memory=MemorySettings("attention_kept", 1, 3, 2, 5)
    ),
    "pp2 cp2 gemma": Case(pp=2, cp=2, model=GEMMA3, strategy="optim_grads_params"),
    "cp4 two levels gemma": Case(
        cp=4, context_levels=(2, 2), model=GEMMA3, memory=MemorySettings("selective")
    ),
    # Norms over all heads begin with equal weights: a part that is not this rank's own shows after
    # a step.
    "tp4 olmo kv2 full": Case(tp=4, model=OLMO, memory=MemorySettings("full", 1), steps=3),
    "tp2 sequence parallel olmo kv1": Case(
        tp=2,
        cp=2,
        sequence_parallel=True,
        model=OLMO | QWEN2_TIED,
        memory=MemorySettings("selective", mlp_tiles=3),
        steps=3,
        samples=4,
    ),
    "tp2 pp2 olmo attention kept": Case(
        tp=2, pp=2, model=OLMO | UNTIED, memory=MemorySettings("attention_kept", 1), steps=3
    ),
    "tp2 dp2 zero1 olmo": Case(tp=2, dp=2, strategy="optim", model=OLMO, steps=3),
    "tp2 pp2 granite full": Case(
        tp=2, pp=2, model=GRANITE, memory=MemorySettings("full", 1, mlp_tiles=3)
    ),
    "tp2 cp2 sequence parallel granite attention kept": Case(
        tp=2,
        cp=2,
        sequence_parallel=True,
        model=GRANITE | UNTIED | dict(num_attention_heads=8, hidden_size=64),
        memory=MemorySettings("attention_kept", 1, attention_head_chunks=2),
    ),
    "tp2 pp2 muP tied": Case(tp=2, pp=2, model=MUP | QWEN2_TIED),
    "cp2 dp2 muP zero3": Case(cp=2, dp=2, model=MUP | UNTIED, strategy="optim_grads_params"),
    "pp2 ZBV granite": Case(pp=2, schedule="ZBV", model=GRANITE | dict(num_layers=4)),
    "pp2 cp2 two ropes and none": Case(
        pp=2,
        cp=2,
        model=dict(
            num_layers=4,
            window_size=[6, 0],
            window_attn_skip_freq=[1, 0, 1, 0],
            window_rotary_base=100.0,
            no_rope_freq=[0, 0, 1, 0],
        ),
    ),
    "cp4 none of the layers has a rope": Case(
        cp=4,
        model=dict(no_rope_freq=[1], num_attention_heads=8, hidden_size=64),
        memory=MemorySettings("full", attention_head_chunks=2),
    ),
    "tp2 cp2 sinks": Case(
        tp=2, cp=2, model=SINKS | dict(window_size=[4, 0], window_attn_skip_freq=[2])
    ),
    "pp2 cp2 capped scores and logits": Case(
        pp=2, cp=2, model=CAPPED | dict(softmax_scale=0.5), memory=MemorySettings("full")
    ),
    "cp4 two levels sinks capped windows attention kept": Case(
        cp=4,
        context_levels=(2, 2),
        lengths=(400,),
        model=UNTIED | SINKS | CAPPED | dict(window_size=[9, 0]),
        memory=MemorySettings("attention_kept", 1, attention_head_chunks=2),
    ),
    "cp3 sinks of uneven heads selective": Case(
        cp=3,
        seq_length=36,
        model=SINKS | dict(num_attention_heads=8, num_query_groups=2, hidden_size=64),
        memory=MemorySettings("selective"),
    ),
    "tp2 cp2 sinks head chunks full zero3": Case(
        tp=2,
        cp=2,
        strategy="optim_grads_params",
        model=SINKS | dict(num_attention_heads=8, num_query_groups=4, hidden_size=64),
        memory=MemorySettings("full", attention_head_chunks=2),
    ),
    "tp2 cp2 sinks attention kept zero3": Case(
        tp=2,
        cp=2,
        strategy="optim_grads_params",
        model=SINKS | CAPPED,
        memory=MemorySettings("attention_kept", loss_chunk_tokens=5),
    ),
    "cp4 one-token documents": Case(cp=4, lengths=(1,) * 40 + (30,)),
    "cp8 two levels one-token documents": Case(
        cp=8, context_levels=(2, 4), lengths=(1,) * 40 + (30,)
    ),
    "cp2 selective": Case(cp=2, memory=MemorySettings("selective"), model=QWEN3),
    "cp2 zero3 attention kept": Case(
        cp=2,
        strategy="optim_grads_params",
        samples=4,
        micro_batch_size=2,
        memory=MemorySettings("attention_kept", 2),
    ),
    "pp2 cp2 attention kept tiles": Case(
        pp=2, cp=2, memory=MemorySettings("attention_kept", 1, 3, 2, 5)
    ),
    "tp2 sequence parallel tiles": Case(
        tp=2,
        cp=2,
        sequence_parallel=True,
        model=QWEN2_TIED,
        memory=MemorySettings("selective", mlp_tiles=5, loss_chunk_tokens=3),
    ),
    "tp2 cp2 tiles full": Case(
        tp=2, cp=2, sequence_parallel=True, memory=MemorySettings("full", 0, 2, 1, 7)
    ),
    "head chunks of whole groups": Case(
        dp=2, memory=MemorySettings(attention_head_chunks=2), model=QWEN3 | dict(add_qkv_bias=True)
    ),
    "cp2 head chunks share keys": Case(
        cp=2,
        memory=MemorySettings("full", attention_head_chunks=4),
        model=dict(num_attention_heads=8, num_query_groups=2, hidden_size=64) | QWEN3,
    ),
    "cp4 head chunks of keys on two ranks": Case(
        cp=4,
        memory=MemorySettings("attention_kept", attention_head_chunks=2),
        model=dict(num_attention_heads=8, num_query_groups=2, hidden_size=64),
    ),
    "tp2 cp4 two levels head chunks": Case(
        tp=2,
        cp=4,
        context_levels=(2, 2),
        memory=MemorySettings("attention_kept", 1, attention_head_chunks=4),
        model=dict(num_attention_heads=16, num_query_groups=4, hidden_size=64),
    ),
    "tp2 cp2 kv1 head chunks": Case(
        tp=2,
        cp=2,
        memory=MemorySettings("selective", attention_head_chunks=2),
        model=QWEN2_TIED | dict(num_attention_heads=8, hidden_size=64),
    ),
    "tp2 pp2 cp2 untied": Case(tp=2, pp=2, cp=2, model=UNTIED | QWEN3),
    "tp4 kv2 QK-clip zero3": Case(
        tp=4,
        qk_clip=0.5,
        steps=3,
        samples=4,
        strategy="optim_grads_params",
        model=dict(add_qkv_bias=True),
    ),
    "cp4 two levels QK-clip windows head chunks full": Case(
        cp=4,
        context_levels=(2, 2),
        qk_clip=0.5,
        steps=3,
        samples=4,
        lengths=(400,),
        model=dict(window_size=[9, 0], window_attn_skip_freq=[2], num_query_groups=4),
        memory=MemorySettings("full", attention_head_chunks=2),
    ),
    "pp2 dp2 QK-clip zero1": Case(pp=2, dp=2, qk_clip=0.5, steps=3, samples=4, strategy="optim"),
    "tp2 cp2 QK-clip uneven heads Muon": Case(
        tp=2,
        cp=2,
        qk_clip=0.5,
        optimizer=dict(optimizer="muon"),
        steps=3,
        samples=4,
        model=dict(num_attention_heads=6, num_query_groups=2, hidden_size=48),
    ),
    "cp2 QK-clip attention kept": Case(
        cp=2,
        qk_clip=0.5,
        steps=3,
        model=dict(num_query_groups=4, attn_logit_softcapping=0.7),
        memory=MemorySettings("attention_kept"),
    ),
    "cp2 QK-clip head chunks": Case(
        cp=2,
        qk_clip=0.5,
        steps=3,
        model=dict(num_attention_heads=8, num_query_groups=2, hidden_size=64),
        memory=MemorySettings(attention_head_chunks=4),
    ),
    "pp2 ZBV QK-clip": Case(pp=2, schedule="ZBV", qk_clip=0.5, steps=3, model=dict(num_layers=4)),
    "tp2 cp2 dp2 QK-clip kv1 micro2": Case(
        tp=2, cp=2, dp=2, qk_clip=0.5, steps=3, micro_batch_size=2, model=QWEN2_TIED
    ),
}


WITH_ALL = {
    "cp2 QK-clip attention kept",
    "cp2 QK-clip head chunks",
    "pp2 ZBV QK-clip",
    "tp2 cp2 dp2 QK-clip kv1 micro2",
    # Each differs from a case above that always runs in a setting that another such case has.
    "dp2",
    "cp4 kv1",
    "tp2 cp2",
    "pp2 cp2",
    "tp2 pp2",
    "cp2 zero3 recompute",
    "cp4 long documents",
    "cp2 six heads three kv",
    "pp3 middle stage",
    "tp2 dp2 zero1 partial",
    "tp4 sequence parallel kv2 tied",
    "tp2 pp2 cp2 sequence parallel",
    "tp2 cp2 dp2 sequence parallel zero3",
    "pp2 ZBV untied",
    "pp2 interleaved 4 stages dp2",
    "pp2 zero-bubble 4 stages dp2",
    "pp4 zero-bubble 2 stages",
    "tp2 pp2 cp2 ZBV tied",
    "cp4 two levels yarn",
    "cp8 two levels long documents",
    "cp6 odd groups",
    "tp2 cp4 two levels sequence parallel",
    "cp4 two levels no masking",
    "cp8 two levels one-token documents",
    "tp2 cp2 tiles full",
    "cp4 head chunks of keys on two ranks",
    "tp2 cp2 kv1 head chunks",
    "tp2 pp2 cp2 untied",
    "cp8 two heads",
    "tp4 kv2 qk-norm",
    "cp4 no masking",
    "tp2 cp2 kv1",
    "cp4 one-token documents",
    "head chunks of whole groups",
    "pp2 interleaved 3 stages dp2 zero3 recompute",
    "cp4 gather only",
    "tp2 cp2 gemma full",
    "tp2 sequence parallel gemma selective tiles",
    "pp2 cp2 gemma",
    "cp4 two levels gemma",
    "tp4 olmo kv2 full",
    "tp2 pp2 olmo attention kept",
    "tp2 pp2 granite full",
    "tp2 dp2 zero1 olmo",
    "tp2 cp2 sequence parallel granite attention kept",
    "pp2 ZBV granite",
    "cp2 dp2 muP zero3",
    "cp4 none of the layers has a rope",
    "cp3 sinks of uneven heads selective",
    "tp2 cp2 sinks head chunks full zero3",
    "tp2 cp2 sinks attention kept zero3",
}
assert set(CASES) > WITH_ALL


@pytest.mark.parametrize("name", cases(CASES, WITH_ALL.__contains__))
def test_equals_one_process(pool, single, name):
    case = CASES[name]
    results = pool.run(run_step, case.world_size, case)
    compare(results, single(case))
    check_replicas_equal(results)


def bf16_step(world, case: Case) -> dict:
    """One step in the precision that runs on GPUs: bf16 compute, fp32 weights, fp32
    accumulation."""
    import torch

    _, stages, optimizer, stepper, loader = case.build(
        world, master=torch.float32, compute=torch.bfloat16
    )
    gradients = {}
    optimizer.register_step_pre_hook(
        lambda *_: gradients.update(
            {name: grad.full_tensor().numpy() for name, grad in named(stages, "grad")}
        )
    )
    result = train_step(stepper, optimizer, loader.read(0), lr=1e-3, clip_grad=0.0)
    assert all(p.dtype == torch.float32 for _, p in named(stages))
    return {"loss": result.loss, "gradients": gradients}


@pytest.mark.parametrize(
    "case",
    [
        Case(tp=2, pp=2, model=QWEN2_TIED | dict(qk_layernorm=True)),
        Case(cp=2, dp=2, strategy="optim"),
        Case(tp=2, dp=2, strategy="optim_grads_params"),
        Case(
            cp=2,
            dp=2,
            memory=MemorySettings("attention_kept", 1, 3, 2, 5),
            model=SINKS | CAPPED | dict(window_size=[9, 0]),
        ),
        Case(
            tp=2,
            model=GEMMA3 | dict(qk_layernorm_scope="all_heads", residual_multiplier=0.4),
            memory=MemorySettings("full"),
        ),
    ],
    ids=[
        "tp2 pp2",
        "cp2 dp2 zero1",
        "tp2 dp2 zero3",
        "attention kept, chunks and tiles, sinks, caps",
        "tp2 other parts than Llama's",
    ],
)
def test_bf16_with_fp32_master_is_close_to_fp64(pool, single, case):
    """bf16 rounds to 3 digits: a wrong or missing reduction shows as tens of percent, rounding as a
    few."""
    expected = single(dataclasses.replace(case, clip_grad=0.0))
    for result in pool.run(bf16_step, case.world_size, case):
        assert abs(result["loss"] - expected["loss"]) < 0.02 * expected["loss"]
        for name, gradient in result["gradients"].items():
            reference = expected["gradients"][name]
            error = np.linalg.norm(gradient - reference) / np.linalg.norm(reference)
            assert error < 0.15, f"{name}: {error:.2f}"


@pytest.mark.parametrize("schedule, stages", [("ZBV", 2), ("zero-bubble", 2), ("interleaved", 2)])
def test_bf16_gradients_are_accumulated_in_fp32_by_every_schedule(pool, schedule, stages):
    """The same products in the same order as 1F1B: only a sum over microbatches in bf16 could
    differ."""
    case = Case(pp=2, model=dict(num_layers=4), samples=16)
    expected = {
        name: tensor
        for result in pool.run(bf16_step, 2, case)
        for name, tensor in result["gradients"].items()
    }
    case = dataclasses.replace(case, schedule=schedule, stages_per_rank=stages)
    for result in pool.run(bf16_step, 2, case):
        for name, gradient in result["gradients"].items():
            error = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
            assert error < 1e-5, f"{name}: {error:.1e}"


def drift(world, case: Case, name: str) -> list[str]:
    """Change one element of one rank's copy -> what `check_replicas` says before and after."""
    import torch

    layout, stages, *_ = case.build(world)
    said = []
    for change in (0.0, 1e-7):
        if world.rank == 1:
            with torch.no_grad():
                dict(named(stages))[name].to_local().view(-1)[:1] += change
        try:
            check_replicas(stages, layout)
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(
    "case, name",
    [
        (Case(tp=2, model=QWEN2_TIED), "layers.1.attention.k.weight"),
        (Case(pp=2), "embedding.weight"),
    ],
    ids=["tp", "tied"],
)
def test_copies_that_drift_apart_are_noticed(pool, case, name):
    for before, after in pool.run(drift, 2, case, name):
        assert before == "" and f"are no longer the same: {name} over" in after


def test_packed_documents_cross_slice_edges():
    """The batch of the parity cases does what it is meant to: boundaries on and off slice edges,
    empty slices."""
    stream = memory_stream(Case().lengths, 1234)
    batches = [read_batch(windows(stream, [sample * 32], 32), 32) for sample in range(8)]
    edges = {int(edge) for batch in batches for edge in batch.cu_seqlens[1:-1]}
    assert edges - set(range(0, 32, 8)), "some document must begin inside a slice of cp 4"
    assert any(len(batch.cu_seqlens) == 2 for batch in batches), (
        "some document must span all slices"
    )
    assert any((batch.labels == IGNORE).any() for batch in batches)
