"""The clock, the phases and the learning rate."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.units import parse_tokens
from model.activation_memory.settings import MemorySettings
from model.rope import Rope
from parallel.config import LayoutConfig
from parallel.schedule import SCHEDULES, accepts, nearest_counts, stages_of_rank
from pretrain.config.config import Config
from pretrain.config.effects import effect_warnings
from pretrain.config.facts import problems_of
from pretrain.config.phase_config import PhaseConfig
from pretrain.planner.check_phases import check_phases, length_warnings, rope_warnings
from pretrain.schedule.learning_rate import LearningRate
from pretrain.schedule.phases import phase_at
from pretrain.schedule.resolve import resolve_phases


def config(**schedule) -> Config:
    made = Config()
    made.model.num_layers = 4
    made.model.hidden_size = 64
    made.model.ffn_hidden_size = 128
    made.model.num_attention_heads = 4
    for name, value in schedule.items():
        setattr(made.schedule, name, value)
    return made


def three_phases() -> Config:
    return config(
        phases=[
            PhaseConfig(name="a", seq_length=128, train_tokens=1000, global_batch_tokens=256),
            PhaseConfig(
                name="b",
                seq_length=512,
                train_tokens=2048,
                global_batch_tokens=1024,
                context_parallel_size=2,
            ),
            PhaseConfig(
                name="c",
                seq_length=1024,
                train_tokens=1,
                global_batch_tokens=2048,
                rotary_base=5e5,
                lr=1e-5,
            ),
        ]
    )


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("8192", 8192),
        ("64Ki", 65536),
        ("1.5B", 1_500_000_000),
        ("8Mi", 8 << 20),
        ("2T", 2 * 10**12),
        ("1_000", 1000),
        ("3e2K", 300_000),
        ("1.005M", 1_005_000),
        ("16.1K", 16_100),
    ],
)
def test_token_counts(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["8k", "1.5", "-3", "Ki", "eight", "1.0001K", "1e400"])
def test_bad_token_counts(text):
    with pytest.raises(ValueError, match="token"):
        parse_tokens(text)


def test_phase_ends_round_up_to_whole_steps_and_join():
    phases = resolve_phases(three_phases())
    assert [(p.start, p.end, p.steps) for p in phases] == [
        (0, 1024, 4),
        (1024, 3072, 2),
        (3072, 5120, 1),
    ]
    assert [p.rope for p in phases] == [Rope(), Rope(), Rope(base=5e5)]
    assert phases[0].layout_key != phases[1].layout_key


def test_the_phase_is_a_function_of_the_clock():
    phases = resolve_phases(three_phases())
    assert [phase_at(phases, clock).name for clock in (0, 1023, 1024, 3071, 3072)] == [
        "a",
        "a",
        "b",
        "b",
        "c",
    ]
    assert phase_at(phases, 5120) is None


def test_flat_settings_are_one_phase():
    phases = resolve_phases(config(seq_length=128, global_batch_size=4, train_iters=10))
    assert len(phases) == 1 and phases[0].steps == 10 and phases[0].global_batch_tokens == 512


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seq_length=None), "seq_length = None: must be given"),
        (dict(global_batch_tokens=None), "global_batch_tokens = None: must be given"),
        (dict(global_batch_tokens=0), "global_batch_tokens = 0: must be given and above 0"),
        (dict(train_tokens=None), "train_tokens = None: must be given"),
        (dict(train_tokens=0), "train_tokens = 0: must be given and above 0"),
        (
            dict(global_batch_tokens=200),
            "must be a multiple of seq_length x micro_batch_size = 128. Fix: 128 or 256",
        ),
        (dict(micro_batch_size=0), "micro_batch_size = 0: must be at least 1"),
        (
            dict(max_documents_per_sample=64),
            "max_documents_per_sample = 64: packing = concat takes the documents as they come. "
            "Fix: --packing best_fit",
        ),
        (
            dict(rampup_batch_size=[1, 1]),
            "rampup_batch_size = 1 1: must be START INCREMENT SAMPLES",
        ),
        (
            dict(rampup_batch_size=[0, 1, 9]),
            "must be START INCREMENT SAMPLES, the first two above 0",
        ),
        (
            dict(global_batch_tokens=640, rampup_batch_size=[2, 2, 9]),
            "256 tokens + n x 256 tokens must reach the full batch of 640 tokens (2 and 2 "
            "samples of 128 tokens). Fix: for example a full batch of 768 tokens",
        ),
        (
            dict(rampup_batch_size=[4, 1, 9]),
            "512 tokens + n x 128 tokens must reach the full batch of 256",
        ),
        (
            dict(rampup_batch_size=[1, 1, 9], step_batch_size_schedule="0:1"),
            "cannot be combined with step_batch_size_sche",
        ),
        (
            dict(step_batch_size_schedule="0:1 512:4"),
            "its largest batch is 512 tokens, but global_batch_size or global_batch_tokens mean "
            "256",
        ),
        (dict(step_batch_size_schedule="0:1 512"), "'512' is not TOKENS:SAMPLES. Fix: for example"),
        (dict(step_batch_size_schedule="0:1 512:0"), "'512:0' is not TOKENS:SAMPLES"),
        (dict(step_batch_size_schedule="128:1 512:2"), "must begin at 0"),
        (dict(step_batch_size_schedule="0:1 512:2 512:1"), "the token counts must rise"),
        (
            dict(
                step_batch_size_schedule="0:3 512:2", micro_batch_size=2, global_batch_tokens=None
            ),
            "step_batch_size_schedule = 0:3 512:2: its step of 3 samples: must be a multiple of "
            "micro_batch_size = 2. Fix: 2 or 4.",
        ),
    ],
)
def test_incomplete_phases_are_refused(change, message):
    entry = dict(name="a", seq_length=128, train_tokens=1000, global_batch_tokens=256) | change
    with pytest.raises(ValueError, match="phase 'a'") as error:
        resolve_phases(config(phases=[PhaseConfig(**entry)]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "batch, micro, message",
    [
        (
            dict(global_batch_size=7),
            2,
            "global_batch_size = 7: must be a multiple of micro_batch_size = 2. Fix: 6 or 8.",
        ),
        (
            dict(global_batch_tokens=7 * 128),
            2,
            "global_batch_tokens = 896: must be a multiple of seq_length x "
            "micro_batch_size = 256. Fix: 768 or 1024.",
        ),
        (
            dict(global_batch_size=6),
            1000,
            "micro_batch_size = 1000: is more than a step has, 6 samples "
            "(global_batch_size = 6). Fix: micro_batch_size 6, or global_batch_size 1000.",
        ),
        (
            dict(global_batch_tokens=128),
            1000,
            "micro_batch_size = 1000: is more than a step has, 1 sample "
            "(global_batch_tokens = 128). Fix: micro_batch_size 1, or global_batch_tokens 128000.",
        ),
        (
            dict(global_batch_tokens=64),
            1,
            "global_batch_tokens = 64: must be a multiple of seq_length x micro_batch_size = "
            "128. Fix: 128.",
        ),
    ],
)
def test_a_batch_is_spoken_of_in_the_unit_in_which_it_was_given(batch, micro, message):
    made = config(seq_length=128, train_tokens=10**6, micro_batch_size=micro, **batch)
    with pytest.raises(ValueError) as error:
        resolve_phases(made)
    assert str(error.value) == f"phase 'main': {message}"


@pytest.mark.parametrize(
    "batch, layout, message",
    [
        (
            dict(global_batch_size=7),
            {},
            "global_batch_size = 7: must be a multiple of micro_batch_size x data-parallel "
            "size = 4. Fix: 4 or 8.",
        ),
        (
            dict(global_batch_tokens=7 * 128),
            {},
            "global_batch_tokens = 896: must be a multiple of seq_length x "
            "micro_batch_size x data-parallel size = 512. Fix: 512 or 1024.",
        ),
        (
            dict(global_batch_size=2),
            dict(pipeline_model_parallel_size=4),
            "global_batch_size = 2: gives 2 microbatches: 1F1B needs at least one per stage = 4. "
            "Fix: 4 microbatches of 1 sample.",
        ),
    ],
)
def test_a_layout_speaks_of_the_batch_in_its_unit(batch, layout, message):
    made = config(seq_length=128, train_tokens=10**6, **batch)
    for name, value in layout.items():
        setattr(made.layout, name, value)
    problems = check_phases(resolve_phases(made), made, 4, 100)
    assert problems[0] == f"phase 'main': {message}", problems


def test_all_phase_problems_are_reported_at_once():
    broken = config(phases=[PhaseConfig(name="x"), PhaseConfig(name="x", seq_length=8)])
    with pytest.raises(ValueError) as error:
        resolve_phases(broken)
    text = str(error.value)
    assert "is given twice" in text
    assert "seq_length = None" in text and "global_batch_tokens = None: must be given" in text


@pytest.mark.parametrize(
    "change, world, message",
    [
        (
            dict(tensor_model_parallel_size=3),
            3,
            "must divide num_attention_heads = 4. Fix: one of [1, 2, 4]",
        ),
        (dict(tensor_model_parallel_size=2), 3, "world size = 3: must be a multiple"),
        (dict(context_parallel_size=8), 8, "Ulysses gives each rank at least one of the 4"),
        (dict(pipeline_model_parallel_size=8), 8, "each stage needs at least one of the 4 layers"),
        (
            dict(pipeline_model_parallel_size=4),
            4,
            "gives 2 microbatches: 1F1B needs at least one per stage = 4. Fix: 4 "
            "microbatches of 128 tokens",
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="interleaved",
                global_batch_tokens=640,
            ),
            2,
            "gives 5 microbatches: interleaved needs a multiple of 2, the rounds that it runs "
            "them in. Fix: 4 or 6",
        ),
        (
            dict(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3),
            2,
            "pipeline_model_parallel_size = 2 with 3 stages on each rank: each stage needs at "
            "least one of the 4 layers",
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="1F1B",
                num_virtual_stages_per_pipeline_rank=2,
            ),
            2,
            "1F1B has one stage per rank. Fix: 1 stage, or --pipeline-schedule interleaved",
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="interleaved",
                num_virtual_stages_per_pipeline_rank=1,
            ),
            2,
            "interleaved needs at least 2",
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="ZBV",
                num_virtual_stages_per_pipeline_rank=3,
            ),
            2,
            "ZBV has exactly 2",
        ),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="ZBV",
                recompute_granularity="full",
            ),
            2,
            "recompute_granularity = full: ZBV would run every forward four times",
        ),
        (
            dict(pipeline_model_parallel_size=2, pipeline_schedule="zero-bubble", mlp_tiles=4),
            2,
            "mlp_tiles = 4: zero-bubble splits the backward, and each half would go through all "
            "of them. Fix: 1, or --pipe",
        ),
        (
            dict(pipeline_model_parallel_size=2, pipeline_schedule="ZBV", attention_head_chunks=2),
            2,
            "attention_head_chunks = 2: ZBV splits the backward, and each half would go through "
            "all of them",
        ),
        (
            dict(attention_head_chunks=3),
            1,
            "attention_head_chunks = 3: the 4 query heads of a tensor-parallel rank over 1 "
            "ranks of an all-to-all allow 1, 2, 4: chunks of whole groups, or equal parts of "
            "one. Fix: 2 or 4.",
        ),
        (
            dict(attention_head_chunks=4, context_parallel_size=2, tensor_model_parallel_size=2),
            4,
            "the 2 query heads of a tensor-parallel rank over 2 ranks of an all-to-all allow 1: "
            "chunks of whole groups, or equal parts of one. Fix: 1.",
        ),
        (dict(attention_head_chunks=0), 1, "attention_head_chunks = 0: must be at least 1"),
        (dict(mlp_tiles=0), 1, "mlp_tiles = 0: must be at least 1"),
        (dict(loss_chunk_tokens=0), 1, "loss_chunk_tokens = 0: must be at least 1"),
        (
            dict(
                pipeline_model_parallel_size=2,
                pipeline_schedule="zero-bubble",
                data_parallel_sharding_strategy="optim_grads_params",
            ),
            2,
            "zero-bubble: loses gradients with",
        ),
        (
            dict(context_parallel_size=4, cp_comm_type="p2p"),
            4,
            "cp_comm_type = p2p: is not built. Fix: a2a, or for more ranks than heads "
            "a2a+allgather",
        ),
        (
            dict(context_parallel_size=4, cp_comm_type="a2a+allgather"),
            4,
            "hierarchical_context_parallel_sizes = []: must be two sizes whose product is "
            "context_parallel_size = 4",
        ),
        (
            dict(
                context_parallel_size=4,
                cp_comm_type="a2a+allgather",
                hierarchical_context_parallel_sizes=[2, 3],
            ),
            4,
            "Fix: for example 2 2",
        ),
        (
            dict(context_parallel_size=4, hierarchical_context_parallel_sizes=[2, 2]),
            4,
            "are for two levels. Fix: --cp-comm-type a2a+allgather",
        ),
        (
            dict(
                seq_length=18,
                global_batch_tokens=36,
                context_parallel_size=2,
                cp_comm_type="a2a+allgather",
                hierarchical_context_parallel_sizes=[1, 2],
            ),
            2,
            "in 2 groups: the 18 tokens of a microbatch must be a multiple of 4. Fix: for "
            "example a seq_length of 16",
        ),
        (
            dict(),
            4,
            "must be a multiple of seq_length x micro_batch_size x data-parallel size = 512",
        ),
        (dict(tensor_model_parallel_size=0), 4, "must be at least 1"),
        (
            dict(seq_length=130, global_batch_tokens=260, context_parallel_size=4),
            4,
            "the 130 tokens of a microbatch must be a multiple of 4. Fix: for example a "
            "seq_length of 128",
        ),
        (dict(rotary_base=0.0), 1, "must be above 0"),
        (
            dict(cpu_offloading_num_layers=2),
            1,
            "cpu_offloading_num_layers = 2: moves what recompute_granularity full and "
            "attention_kept keep, but that is None. Fix: give both, or 0 layers.",
        ),
        (
            dict(cpu_offloading_num_layers=2, recompute_granularity="selective"),
            1,
            "keep, but that is selective",
        ),
        (dict(cpu_offloading_num_layers=-1, recompute_granularity="full"), 1, "must be at least 0"),
        (dict(rotary_base=float("inf")), 1, "rotary_base = inf: must be a finite number"),
        (
            dict(use_rope_scaling=True, rope_type="yarn"),
            1,
            "use_rope_scaling = True: means rope_type llama3, but rope_type = yarn. Fix: remove "
            "one of them",
        ),
        (
            dict(use_rope_scaling=False, rope_type="linear"),
            1,
            "means rope_type default, but rope_type = linear",
        ),
        (
            dict(rope_type="linear"),
            1,
            "rope_scaling_factor = None: rope_type linear needs it. Fix: give it",
        ),
        (
            dict(rope_type="yarn", rope_scaling_factor=4.0),
            1,
            "original_max_position_embeddings = None: rope_type yarn needs it. Fix: give it",
        ),
        (
            dict(use_rope_scaling=True, rope_scaling_factor=0.5),
            1,
            "rope_scaling_factor = 0.5: must be at least 1",
        ),
        (dict(lr=float("nan")), 1, "must be above 0 and finite"),
        (dict(min_lr=-5.0), 1, "min_lr between 0 and lr"),
    ],
)
def test_impossible_layouts_are_refused(change, world, message):
    made = config(
        phases=[
            PhaseConfig(
                **(
                    dict(name="a", seq_length=128, train_tokens=1000, global_batch_tokens=256)
                    | change
                )
            )
        ]
    )
    problems = check_phases(resolve_phases(made), made, world, vocab_size=100)
    assert any(message in problem for problem in problems), problems
    assert all(problem.startswith("phase 'a': ") for problem in problems)


def test_head_chunks_are_refused_beside_a_norm_over_all_heads():
    made = config(
        phases=[
            PhaseConfig(
                name="a",
                seq_length=128,
                train_tokens=1000,
                global_batch_tokens=256,
                attention_head_chunks=2,
            )
        ]
    )
    assert check_phases(resolve_phases(made), made, 1, vocab_size=100) == []
    made.model.qk_layernorm_scope = "all_heads"
    assert check_phases(resolve_phases(made), made, 1, vocab_size=100) == [], "there is no norm"
    made.model.qk_layernorm = True
    problem, *_ = check_phases(resolve_phases(made), made, 1, vocab_size=100)
    assert problem == (
        "phase 'a': attention_head_chunks = 2: qk_layernorm_scope all_heads norms all heads of a "
        "token at once, and a chunk has a part of them. Fix: 1."
    )


@pytest.mark.parametrize(
    "setting", [dict(recompute_granularity="attention_kept"), dict(attention_head_chunks=2)]
)
def test_a_kernel_that_is_not_proven_to_outlive_its_inputs_is_refused(setting):
    made = config(
        phases=[
            PhaseConfig(
                name="a", seq_length=128, train_tokens=1000, global_batch_tokens=256, **setting
            )
        ]
    )
    (phase,) = resolve_phases(made)
    assert phase.attention_on_tape and check_phases([phase], made, 1, 100) == []
    made.model.attention_backend = "te"
    ((name, value),) = setting.items()
    (problem,) = check_phases([phase], made, 1, 100)
    assert problem.startswith(
        "phase 'a': attention_backend = te: is not proven to outlive its q, k and v, which "
        f"{name} = {value} makes again for backward. Fix: --attention-backend auto, or "
    )
    (plain,) = resolve_phases(
        config(
            phases=[
                PhaseConfig(
                    name="a",
                    seq_length=128,
                    train_tokens=1000,
                    global_batch_tokens=256,
                    recompute_granularity="full",
                )
            ]
        )
    )
    assert check_phases([plain], made, 1, 100) == []


def test_a_phase_changes_the_memory_settings_and_keeps_what_the_run_gives():
    made = config(
        phases=[
            PhaseConfig(name="a"),
            PhaseConfig(name="b", recompute_granularity="none", cpu_offloading_num_layers=0),
            PhaseConfig(name="c", mlp_tiles=8, attention_head_chunks=4, loss_chunk_tokens=512),
            PhaseConfig(name="d", recompute_granularity="selective", cpu_offloading_num_layers=0),
        ],
        seq_length=128,
        global_batch_tokens=256,
    )
    for phase in made.schedule.phases:
        phase.train_tokens = 256
    made.memory.recompute_granularity = "full"
    made.memory.cpu_offloading_num_layers = 3
    made.memory.mlp_tiles = 2
    whole = MemorySettings("full", 3, 2, 1)
    expected = [
        whole,
        MemorySettings(None, 0, 2, 1),
        MemorySettings("full", 3, 8, 4, 512),
        MemorySettings("selective", 0, 2, 1),
    ]
    assert [phase.memory for phase in resolve_phases(made)] == expected
    assert check_phases(resolve_phases(made), made, 1, 100) == []
    made.memory.recompute_modules = ["core_attn"]  # nothing to compute again
    assert resolve_phases(made)[3].memory == MemorySettings(None, 0, 2, 1)
    made.memory.recompute_modules = ["core_attn", "mlp"]
    assert [phase.memory for phase in resolve_phases(made)] == expected


def test_a_phase_changes_the_rope_and_keeps_what_the_run_gives():
    made = config(
        phases=[
            PhaseConfig(name="a"),
            PhaseConfig(name="b", rope_type="linear"),
            PhaseConfig(name="c", use_rope_scaling=True),
            PhaseConfig(
                name="d",
                rope_type="yarn",
                yarn_beta_fast=16.0,
                yarn_correction_range_round_to_int=False,
            ),
            PhaseConfig(name="e", use_rope_scaling=False),
            PhaseConfig(name="f", rope_scaling_factor=16.0),
        ],
        seq_length=128,
        global_batch_tokens=256,
    )
    for phase in made.schedule.phases:
        phase.train_tokens = 256
    made.model.rope_type = "yarn"
    made.model.rope_scaling_factor = 4.0
    made.model.original_max_position_embeddings = 32
    made.model.yarn_beta_fast = 8.0
    made.data.mock_data = True
    made.data.vocab_size = 100
    assert made.validate() == [] and check_phases(resolve_phases(made), made, 1, 100) == []
    yarn = Rope(
        type="yarn",
        factor=4.0,
        original_max_position_embeddings=32,
        beta_fast=8.0,
        beta_slow=1.0,
        truncate=True,
    )
    phases = resolve_phases(made)
    assert [phase.rope for phase in phases] == [
        yarn,
        Rope(type="linear", factor=4.0),
        Rope(
            type="llama3",
            factor=4.0,
            original_max_position_embeddings=32,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
        replace(yarn, beta_fast=16.0, truncate=False),
        Rope(),
        replace(yarn, factor=16.0),
    ]
    assert rope_warnings(phases) == []
    made.schedule.phases[0].seq_length = made.schedule.phases[5].seq_length = 256
    assert rope_warnings(resolve_phases(made)) == [
        "phase 'a': seq_length = 256: beyond rope_scaling_factor x "
        "original_max_position_embeddings = 128, the context that its rope is scaled for"
    ]


def test_rope_parameters_that_nothing_reads_are_refused():
    made = config(
        phases=[PhaseConfig(name="a", rope_type="yarn", rope_low_freq_factor=1.0)], seq_length=128
    )
    made.model.rope_high_freq_factor = made.model.yarn_mscale = 2.0
    assert [problem for problem in made.validate() if "does not use it" in problem] == [
        "rope_high_freq_factor = 2.0: rope_type yarn does not use it. Fix: remove it, or "
        "rope_type llama3.",
        "phase 'a': rope_low_freq_factor = 1.0: rope_type yarn does not use it. Fix: remove it, "
        "or rope_type llama3.",
    ]
    made = config()
    made.model.rope_scaling_factor = 8.0
    assert any(
        "rope_scaling_factor = 8.0: rope_type default does not use it. Fix: remove it, or "
        "rope_type linear or llama3 or yarn." in problem
        for problem in made.validate()
    )


def test_a_refused_layout_comes_with_the_nearest_that_work():
    made = config(
        phases=[
            PhaseConfig(
                name="a",
                seq_length=128,
                train_tokens=1000,
                global_batch_tokens=512,
                tensor_model_parallel_size=8,
            )
        ]
    )
    (nearest,) = [
        p for p in check_phases(resolve_phases(made), made, 8, 100) if "nearest first" in p
    ]
    assert (
        "layouts that work on 8 processes, nearest first: tp 4 pp 1 cp 1 dp 2; tp 4 pp" in nearest
    )
    made.schedule.phases[0].tensor_model_parallel_size = 1
    made.schedule.phases[0].context_parallel_size = 8
    (nearest,) = [
        p for p in check_phases(resolve_phases(made), made, 8, 100) if "nearest first" in p
    ]
    assert "nearest first: tp 1 pp 1 cp 8 (4 x 2) dp 1; " in nearest


def test_nearest_layouts_may_change_the_schedule():
    made = config(
        phases=[
            PhaseConfig(
                name="a",
                seq_length=128,
                train_tokens=1000,
                global_batch_tokens=1536,
                pipeline_model_parallel_size=3,
                pipeline_schedule="interleaved",
            )
        ]
    )
    problems = check_phases(resolve_phases(made), made, 6, 100)
    assert (
        "pipeline_model_parallel_size = 3 with 2 stages on each rank: each stage needs"
        in problems[0]
    )
    assert "nearest first: tp 1 pp 3 cp 1 dp 2; " in problems[1]


def test_a_phase_mends_what_the_run_says():
    """Combinations are checked in the phases, and each setting of the run can be taken back."""
    made = config(
        phases=[
            PhaseConfig(
                name="a",
                seq_length=128,
                train_tokens=1000,
                global_batch_tokens=512,
                pipeline_model_parallel_size=2,
                pipeline_schedule="ZBV",
                recompute_granularity="none",
                data_parallel_sharding_strategy="optim",
            )
        ]
    )
    made.layout.data_parallel_sharding_strategy = "optim_grads_params"
    made.memory.recompute_granularity = "full"
    made.layout.hierarchical_context_parallel_sizes = [2, 2]
    assert problems_of(made.layout) == [] and check_phases(resolve_phases(made), made, 2, 100) == []


def test_a_schedule_without_a_pipeline_needs_no_restart():
    made = config(
        phases=[
            PhaseConfig(
                name=name,
                seq_length=128,
                train_tokens=256,
                global_batch_tokens=256,
                pipeline_schedule=schedule,
            )
            for name, schedule in (("a", None), ("b", "ZBV"))
        ]
    )
    assert len({phase.layout_key for phase in resolve_phases(made)}) == 1
    assert (
        "phase 'b': pipeline_schedule = ZBV: has no effect without pipeline_model_parallel_size "
        "above 1" in effect_warnings(made)
    )


def test_every_count_of_microbatches_that_a_schedule_accepts():
    """torch's own rule, asked of torch: it builds the schedule or refuses."""
    for schedule in ("1F1B", "interleaved", "zero-bubble", "ZBV"):
        for pp in (2, 3, 4):
            for count in range(1, 14):
                assert accepts(schedule, pp, count) == torch_accepts(schedule, pp, count), (
                    schedule,
                    pp,
                    count,
                )
                if not accepts(schedule, pp, count):
                    assert all(
                        accepts(schedule, pp, n) for n in nearest_counts(schedule, pp, count)
                    )
    assert nearest_counts("interleaved", 4, 13) == [12, 15] and nearest_counts("1F1B", 4, 2) == [4]


def torch_schedule(schedule: str, pp: int, count: int, per_rank: int):
    from parallel import pipeline

    stages = [
        SimpleNamespace(
            num_stages=pp * per_rank,
            group_size=pp,
            group_rank=0,
            stage_index=number,
            is_first=number == 0,
            is_last=False,
            submod=None,
        )
        for number in stages_of_rank(schedule, 0, pp, per_rank)
    ]
    is_single = SCHEDULES[schedule].takes_one_stage
    return pipeline.torch_schedule(schedule)(stages[0] if is_single else stages, count)


def torch_accepts(schedule: str, pp: int, count: int) -> bool:
    try:
        torch_schedule(schedule, pp, count, 1 if schedule == "1F1B" else 2)
        return True
    except ValueError:
        return False


def test_stages_of_a_rank():
    assert [stages_of_rank("interleaved", rank, 2, 3) for rank in range(2)] == [
        (0, 2, 4),
        (1, 3, 5),
    ]
    assert [stages_of_rank("ZBV", rank, 3, 2) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]


def test_possible_layouts_pass():
    made = three_phases()
    assert check_phases(resolve_phases(made), made, 2, vocab_size=100) == []


def ramped(entry: dict) -> list[tuple[int, int, int]]:
    """Stretches of a phase that begins at 640."""
    made = config(
        phases=[
            PhaseConfig(name="first", seq_length=64, train_tokens=640, global_batch_tokens=64),
            PhaseConfig(**(dict(name="a", seq_length=128, train_tokens=4000) | entry)),
        ]
    )
    return [tuple(stretch) for stretch in resolve_phases(made)[1].stretches]


def test_a_scheduled_batch_changes_at_whole_steps():
    """Thresholds count from the phase's start (640); steps that began keep their size; ends
    join."""
    assert ramped(dict(step_batch_size_schedule="0:1 300:2 1K:4")) == [
        (640, 640 + 384, 128),
        (1024, 1024 + 768, 256),
        (1792, 1792 + 6 * 512, 512),
    ]
    assert ramped(dict(step_batch_size_schedule="0:4 100:2 200:8")) == [
        (640, 1152, 512),
        (1152, 1152 + 4096, 1024),
    ], "a size whose time is over before a step begins is left out"
    assert ramped(dict(global_batch_tokens=512, rampup_batch_size=[1, 1, 9]))[:3] == [
        (640, 640 + 384, 128),
        (1024, 1024 + 512, 256),
        (1536, 1536 + 384, 384),
    ]
    assert ramped(dict(global_batch_tokens=512, rampup_batch_size=[4, 1, 9])) == [
        (640, 640 + 4096, 512)
    ]
    assert ramped(dict(global_batch_tokens=512, rampup_batch_size=[1, 1, 0])) == [
        (640, 640 + 4096, 512)
    ]


def test_the_runs_schedule_is_on_the_runs_clock():
    """Phases that say nothing of their own follow it, with samples of their own length."""
    made = config(
        step_batch_size_schedule="0:2 600:4",
        seq_length=64,
        phases=[
            PhaseConfig(name="a", train_tokens=512),
            PhaseConfig(name="b", train_tokens=512),
            PhaseConfig(name="c", train_tokens=512, seq_length=128),
            PhaseConfig(name="d", train_tokens=512, global_batch_tokens=64),
        ],
    )
    assert [[tuple(stretch) for stretch in phase.stretches] for phase in resolve_phases(made)] == [
        [(0, 512, 128)],
        [(512, 640, 128), (640, 1152, 256)],
        [(1152, 1664, 512)],
        [(1664, 2176, 64)],
    ]
    made = config(
        rampup_batch_size=[1, 1, 16],
        global_batch_size=3,
        phases=[
            PhaseConfig(name="a", seq_length=64, train_tokens=256),
            PhaseConfig(name="b", seq_length=128, train_tokens=2048),
        ],
    )
    assert [stretch.batch for phase in resolve_phases(made) for stretch in phase.stretches] == [
        64,
        128,
        256,
        384,
    ]
    assert [phase.end for phase in resolve_phases(made)] == [256, 256 + 2304]


def test_a_ramp_that_is_over_binds_no_later_phase():
    """64 samples of the long phase are more than the full batch; they are never asked for."""
    made = config(
        rampup_batch_size=[4, 4, 20],
        global_batch_tokens=1024,
        phases=[
            PhaseConfig(name="a", seq_length=64, train_tokens=20 * 64),
            PhaseConfig(name="b", seq_length=512, train_tokens=2048),
        ],
    )
    assert [stretch.batch for stretch in resolve_phases(made)[1].stretches] == [1024]
    made.schedule.phases[0].train_tokens = 512
    with pytest.raises(ValueError, match="phase 'b': rampup_batch_size = 4 4 20: 2048 tokens"):
        resolve_phases(made)


def test_a_schedule_that_no_phase_follows_is_named():
    made = three_phases()
    made.schedule.rampup_batch_size = [1, 1, 16]
    message = (
        "rampup_batch_size = 1 1 16: has no effect, since every phase gives a batch of its own"
    )
    assert message in effect_warnings(made)
    made.schedule.phases[1].global_batch_tokens = None
    assert message not in effect_warnings(made)


@pytest.mark.parametrize(
    "ramp, full, samples",
    [([2, 2, 100], 8, 400), ([1, 3, 77], 16, 300), ([4, 4, 1000], 40, 1500), ([3, 1, 10], 13, 200)],
)
def test_the_ramp_is_megatrons(ramp, full, samples):
    """Its own calculator, asked before each step."""
    import torch  # noqa: F401  (megatron needs it loaded)
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    (phase,) = resolve_phases(
        config(seq_length=16, global_batch_size=full, rampup_batch_size=ramp, train_samples=samples)
    )
    theirs = RampupBatchsizeNumMicroBatchesCalculator(full, 1, 1, False, 0, *ramp)
    clock = 0
    while clock < phase.end:
        theirs.update(clock // 16, False)
        assert phase.batch_at(clock) == 16 * theirs.get_current_global_batch_size(), clock
        clock += phase.batch_at(clock)
    assert clock == phase.end


def test_places_of_steps():
    (phase,) = resolve_phases(
        config(seq_length=10, step_batch_size_schedule="0:1 25:2 60:5", train_tokens=100)
    )
    starts = []
    clock = 0
    while clock < phase.end:
        starts.append(clock)
        clock += phase.batch_at(clock)
    assert starts == [0, 10, 20, 30, 50, 70] and phase.end == 120 and phase.steps == 6
    assert [phase.start_of_step(number) for number in range(6)] == starts
    assert [phase.first_step_from(at) for at in (0, 1, 21, 31, 51, 70, 71)] == [
        0,
        10,
        30,
        50,
        70,
        70,
        120,
    ]
    assert [phase.end_of_steps(at) for at in (0, 30, 40, 60, 110)] == [120, 120, 130, 130, 160], (
        "off the places, too"
    )


def test_iterations_need_a_constant_batch():
    with pytest.raises(
        ValueError, match="train_tokens = None: must be given.* .not with a batch that changes"
    ):
        resolve_phases(config(seq_length=10, step_batch_size_schedule="0:1 25:2", train_iters=10))


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(train_tokens=3050),
            "train_tokens = 3,050: the phases make 1,000 + 2,048 + 1 = 3,049, which is 1 less",
        ),
        (dict(train_iters=6), "train_iters = 6: the phases make 4 + 2 + 1 = 7, which is 1 more"),
        (
            dict(train_samples=20),
            "train_samples = 20: the phases make 7 + 4 + 0 = 11, which is 9 less",
        ),
        (
            dict(lr_decay_tokens=2000),
            "lr_decay_tokens = 2,000: must be where a phase ends: a at 1,000 (whole steps: "
            "1,024), b at 3,048 (whole steps: 3,072), c at 3,049 (whole steps: 5,120). Fix: "
            "remove it",
        ),
        (
            dict(lr_decay_iters=7),
            "lr_decay_iters = 7: phases have steps and samples of several sizes",
        ),
    ],
)
def test_phases_that_do_not_add_up_are_refused_with_the_arithmetic(given, message):
    made = three_phases()
    for name, value in given.items():
        setattr(made.optimizer if name.startswith("lr") else made.schedule, name, value)
    with pytest.raises(ValueError) as error:
        resolve_phases(made)
    assert message in str(error.value)


def test_a_sum_that_is_right_is_accepted_and_the_decay_ends_with_its_phase():
    made = three_phases()
    made.schedule.train_tokens = 3049
    made.schedule.train_iters = 7
    made.optimizer.lr_decay_style = "linear"
    for asked, end in ((1000, 1024), (1024, 1024), (3048, 3072), (3049, 5120), (None, 5120)):
        made.optimizer.lr_decay_tokens = asked
        (arc,) = LearningRate.make(made.optimizer, resolve_phases(made)).arcs
        assert arc.end == end


def rates(config_changes: dict, clocks) -> list[float]:
    made = config(seq_length=10, global_batch_tokens=10, train_tokens=1000)
    for name, value in config_changes.items():
        setattr(made.optimizer, name, value)
    made.optimizer.lr = 1.0
    made.optimizer.min_lr = 0.1
    schedule = LearningRate.make(made.optimizer, resolve_phases(made))
    return [schedule.at(clock, 1.0, 0.1) for clock in clocks]


def test_learning_rate_shapes():
    close = pytest.approx
    assert rates(dict(lr_decay_style="constant", lr_warmup_iters=10), (0, 50, 100, 999)) == [
        0.0,
        0.5,
        1.0,
        1.0,
    ]
    assert rates(dict(lr_decay_style="linear"), (0, 500, 1000)) == close([1.0, 0.55, 0.1])
    assert rates(
        dict(lr_decay_style="inverse-square-root", lr_warmup_iters=4), (20, 40, 160, 999999)
    ) == close([0.5, 1.0, 0.5, 0.1])
    assert rates(dict(lr_decay_style="inverse-square-root"), (0, 10, 40)) == close([1.0, 1.0, 0.5])
    assert rates(dict(lr_decay_style="inverse-square-root", lr_decay_iters=4), (40, 50)) == close(
        [0.5, 0.1]
    )
    assert rates(dict(lr_decay_style="constant", lr_warmup_iters=10, lr_decay_iters=4), (50,)) == [
        0.5
    ]
    assert rates(
        dict(lr_decay_style="cosine", lr_warmup_fraction=0.5), (250, 500, 750, 1000)
    ) == close([0.5, 1.0, 0.55, 0.1])
    wsd = dict(lr_decay_style="WSD", lr_wsd_decay_samples=20)
    for style, middle in (
        ("linear", 0.5),
        ("cosine", 0.5),
        ("exponential", 2 * 0.5**0.5 - 1),
        ("minus_sqrt", 1 - 0.5**0.5),
    ):
        assert rates(wsd | dict(lr_wsd_decay_style=style), (0, 800, 900, 1000)) == close(
            [1.0, 1.0, 0.1 + 0.9 * middle, 0.1]
        )


def test_learning_rate_pieces_longer_than_the_run_are_refused():
    with pytest.raises(
        ValueError,
        match="lr_warmup_tokens = 200 .200 tokens., lr_wsd_decay_tokens = 900 .900 "
        "tokens.: together they must not exceed the schedule's 1,000 tokens",
    ):
        rates(dict(lr_decay_style="WSD", lr_wsd_decay_tokens=900, lr_warmup_tokens=200), ())
    with pytest.raises(ValueError, match="needs the length of its final decay"):
        rates(dict(lr_decay_style="WSD"), ())


def arcs_of(style: str, *changes: dict, **optimizer) -> LearningRate:
    """Three phases of 100 tokens each, with changes to them."""
    made = config(
        phases=[
            PhaseConfig(
                **(
                    dict(name=name, seq_length=10, train_tokens=100, global_batch_tokens=10)
                    | change
                )
            )
            for name, change in zip("abc", changes, strict=True)
        ]
    )
    made.optimizer.lr = 1.0
    made.optimizer.min_lr = 0.1
    made.optimizer.lr_decay_style = style
    for name, value in optimizer.items():
        setattr(made.optimizer, name, value)
    phases = resolve_phases(made)
    assert check_phases(phases, made, 1, 100) == []
    return LearningRate.make(made.optimizer, phases)


def test_a_phase_warms_up_again_from_where_the_last_one_ended():
    rate = arcs_of(
        "cosine", {}, dict(lr_schedule="rewarm", lr_warmup_tokens=20), {}, lr_warmup_tokens=10
    )
    values = [rate.at(clock, 1.0, 0.1) for clock in (0, 5, 10, 99, 100, 110, 120, 210, 300)]
    assert values == pytest.approx([0, 0.5, 1.0, 0.1, 0.1, 0.55, 1.0, 0.55, 0.1], abs=1e-3)
    rate = arcs_of("WSD", {}, dict(lr_schedule="rewarm"), {}, lr_wsd_decay_tokens=50)
    assert [rate.at(clock, 1.0, 0.1) for clock in (99, 100, 249)] == [1.0, 1.0, 1.0] and rate.at(
        300, 1.0, 0.1
    ) == 0.1


def test_wsd_decays_over_the_last_phases():
    rate = arcs_of(
        "WSD", {}, dict(lr_schedule="decay"), dict(lr_schedule="decay"), lr_wsd_decay_style="linear"
    )
    assert [
        rate.at(clock, 1.0, 0.0) for clock in (0, 99, 100, 150, 200, 290, 300)
    ] == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.05, 0.0])


@pytest.mark.parametrize(
    "style, changes, optimizer, message",
    [
        (
            "cosine",
            ({}, {}, dict(lr_schedule="decay")),
            {},
            "is WSD's final decay, but lr_decay_style = cosine",
        ),
        (
            "WSD",
            ({}, {}, dict(lr_schedule="decay")),
            dict(lr_wsd_decay_tokens=5),
            "length is also given, 5 tokens",
        ),
        (
            "WSD",
            ({}, dict(lr_schedule="decay"), {}),
            {},
            "phase 'c': lr_schedule = continue: the decay that begins with phase 'b' goes on to "
            "the end",
        ),
        (
            "WSD",
            ({}, dict(lr_schedule="rewarm", lr_warmup_tokens=180), {}),
            dict(lr_wsd_decay_tokens=50),
            "phase 'b': lr_warmup_tokens (180 tokens), lr_wsd_decay_tokens = 50 (50 tokens): "
            "together they must not exceed the schedule's 200",
        ),
        (
            "cosine",
            ({}, dict(lr_schedule="rewarm"), {}),
            dict(lr_decay_tokens=100),
            "phase 'b': lr_schedule = rewarm: begins at 100 tokens, but lr_decay_tokens ends the "
            "decay at 100",
        ),
        (
            "WSD",
            ({}, {}, dict(lr_schedule="decay")),
            dict(lr_decay_tokens=100),
            "phase 'c': lr_schedule = decay: begins at 200 tokens, but lr_decay_tokens ends the "
            "decay at 100. Fix: leave lr_decay_tokens out",
        ),
    ],
)
def test_learning_rates_of_phases_that_make_no_sense(style, changes, optimizer, message):
    with pytest.raises(ValueError) as error:
        arcs_of(style, *changes, **optimizer)
    assert message in str(error.value)


def test_phases_that_get_shorter_are_named():
    made = three_phases()
    assert length_warnings(resolve_phases(made)) == []
    made.schedule.phases[2].seq_length = 256
    assert length_warnings(resolve_phases(made)) == [
        "phase 'c': seq_length = 256: is shorter than 512, that of phase 'b' before it"
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lr_schedule="rewarm"), "lr_schedule = rewarm: is for a later phase"),
        (
            dict(lr_warmup_tokens=5),
            "lr_warmup_tokens = 5: is for lr_schedule = rewarm, not continue",
        ),
    ],
)
def test_warmups_that_would_not_act_are_refused(change, message):
    made = config(
        phases=[
            PhaseConfig(
                **(
                    dict(name="a", seq_length=128, train_tokens=256, global_batch_tokens=256)
                    | change
                )
            )
        ]
    )
    assert any(message in problem for problem in check_phases(resolve_phases(made), made, 1, 100))


@pytest.mark.parametrize(
    "release, is_refused", [("2.11.0+cu130", True), ("2.13.0+cpu", False), ("2.14.1", False)]
)
@pytest.mark.parametrize("schedule", ["zero-bubble", "ZBV", "1F1B"])
def test_a_torch_that_splits_the_backward_wrongly_is_refused(
    monkeypatch, release, is_refused, schedule
):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(release))
    layout = LayoutConfig(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
    problems = layout.combination_problems()
    if is_refused and schedule != "1F1B":
        (problem,) = problems
        assert problem == (
            f"pipeline_schedule = {schedule}: torch 2.11.0+cu130 splits a stage's backward "
            "wrongly. Fix: torch 2.13 or later, or --pipeline-schedule 1F1B or interleaved."
        )
    else:
        assert problems == []
