"""All 63 layouts of up to 8 processes, each with a model and settings, generated so that pairs are
covered.

A layout that no model of the table can have is refused by `check_layout`; the table says why. For
each of the others the legal combination of options is taken that covers the most pairs (option,
option) and (axis in use, option) not seen so far; then come further rows until every pair that can
be is covered.
"""

import itertools
import random

from model.build import check_layout
from model.config import ModelConfig
from model.activation_memory.settings import MemorySettings
from parallel.config import LayoutConfig, check_microbatches
from parallel.schedule import SCHEDULES, accepts
from pretrain.planner.head_counts import allowed_head_chunks
from tests.dist.parity import VOCABULARY, Case

OPTIONS = {
    "heads": (6, 8, 12),
    "kv_heads": (1, 2, 3, 8, 0),  # 0 = as many as query heads
    "tied": (True, False),
    "qk_norm": (False, True),
    "bias": (False, True),
    "strategy": ("optim", "optim_grads", "optim_grads_params"),
    "recompute": (None, "selective", "full", "attention_kept"),
    "tiles": (False, True),  # of the MLP and of the loss
    "head_chunks": (False, True),
    "masking": (True, False),
    "micro_batch_size": (1, 2),
    "microbatches": ("fewest", "more"),
    "schedule": ("1F1B", "interleaved", "zero-bubble", "zero-bubble x 2", "ZBV"),
    "context": ("a2a", "two levels"),
    "sequence_parallel": (False, True),
    "windows": ("none", "all", "some"),
    "parts": ("llama", "gemma", "olmo", "granite"),
    "scores": ("plain", "sinks", "capped"),
    "qk_clip": (False, True),
}
SCORES = {
    "plain": {},
    "sinks": dict(softmax_type="learnable", softmax_scale=0.4),
    # Low caps, so that they change much: scores and logits are about 1.
    "capped": dict(
        softmax_type="learnable", attn_logit_softcapping=0.7, final_logit_softcapping=0.9
    ),
}
"""How attention scores pairs of tokens, and what happens to the output's logits."""
PARTS = {
    "llama": {},
    "gemma": dict(
        norm_placement="both",
        apply_layernorm_1p=True,
        activation_func="gelu_tanh",
        embedding_multiplier=5.5,
        window_rotary_base=100.0,
    ),
    "olmo": dict(norm_placement="post", qk_layernorm_scope="all_heads"),
    # With muP's factors beside its own.
    "granite": dict(
        embedding_multiplier=5.5,
        residual_multiplier=0.4,
        logits_scaling=3.0,
        use_mup=True,
        mup_base_hidden_size=12,
        mup_base_ffn_hidden_size=16,
    ),
}
"""What the layers have that Llama's have not."""
NEEDS_AXIS = {"schedule": "pp", "context": "cp", "sequence_parallel": "tp"}
"""Options that mean something only where an axis is in use."""
SIZES = range(1, 9)
LAYOUTS = [
    sizes
    for sizes in itertools.product(SIZES, repeat=4)
    if sizes[0] * sizes[1] * sizes[2] * sizes[3] <= 8
]
AXES = ("tp", "pp", "cp", "dp")


def make_case(layout: tuple[int, int, int, int], options: dict) -> Case | None:
    """The parity case of a layout with these options, or None where the model or the layout
    refuses."""
    tp, pp, cp, dp = layout
    settings = make_layout_config(layout, options)
    model = make_model(options, num_stages=pp * settings.stages_per_rank)
    config = ModelConfig(**model)
    if (
        config.validate()
        or settings.combination_problems()
        or check_layout(config, VOCABULARY, settings)
    ):
        return None
    memory = make_memory(options, allowed_head_chunks(config, settings))
    splits_backward = SCHEDULES[settings.schedule].splits_backward
    if (
        memory is None
        or (options["qk_clip"] and options["qk_norm"])
        or (pp > 1 and splits_backward and memory != MemorySettings())
    ):
        return None
    count = count_microbatches(options, settings)
    if check_microbatches(settings, count):
        return None
    length = -(-32 // settings.token_multiple) * settings.token_multiple
    return Case(
        tp,
        pp,
        cp,
        dp,
        schedule=settings.schedule,
        stages_per_rank=settings.stages_per_rank,
        context_levels=tuple(settings.hierarchical_context_parallel_sizes),
        strategy=options["strategy"],
        model=model,
        seq_length=length,
        samples=dp * options["micro_batch_size"] * count,
        micro_batch_size=options["micro_batch_size"],
        document_masking=options["masking"],
        memory=memory,
        sequence_parallel=settings.sequence_parallel,
        qk_clip=0.3 if options["qk_clip"] else None,
        steps=3,
    )


def make_layout_config(layout: tuple[int, int, int, int], options: dict) -> LayoutConfig:
    """The settings of a layout with these options; nothing is checked here."""
    tp, pp, cp, _ = layout
    schedule, _, several = options.get("schedule", "1F1B").partition(" x ")
    levels: list[int] = []
    if options.get("context") == "two levels":
        levels = context_levels(tp, cp, options["heads"])
    return LayoutConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        pipeline_schedule=schedule,
        num_virtual_stages_per_pipeline_rank=int(several) if several else None,
        cp_comm_type="a2a+allgather" if levels else "a2a",
        hierarchical_context_parallel_sizes=levels,
        data_parallel_sharding_strategy=options["strategy"],
        sequence_parallel=options.get("sequence_parallel", False),
    )


def context_levels(tp: int, cp: int, heads: int) -> list[int]:
    """The two levels of a context of `cp` ranks: the most head ranks below cp that the heads of a
    tp rank allow, or one."""
    divisors = [
        n for n in range(1, cp + 1) if cp % n == 0 and heads % tp == 0 and n <= heads // tp
    ]
    a2a = next((n for n in reversed(divisors) if n < cp), 1)
    return [a2a, cp // a2a]


def make_model(options: dict, num_stages: int) -> dict:
    """The model's fields by these options, with a layer or more for each stage."""
    heads = options["heads"]
    return dict(
        num_layers=max(3, num_stages + (1 < num_stages < 8)),
        hidden_size=48,
        ffn_hidden_size=48,
        num_attention_heads=heads,
        num_query_groups=options["kv_heads"] or heads,
        init_method_std=0.15,
        make_vocab_size_divisible_by=120,
        untie_embeddings_and_output_weights=not options["tied"],
        qk_layernorm=options["qk_norm"],
        add_qkv_bias=options["bias"],
        # Shorter than the documents; layers of both kinds on every stage that has two.
        window_size=[] if options["windows"] == "none" else [4, 0],
        window_attn_skip_freq=[2] if options["windows"] == "some" else [],
        # Without a rope and a norm, a bias of the keys changes no softmax: its gradient is noise.
        no_rope_freq=[3] if options["parts"] == "olmo" and not options["bias"] else [],
        **PARTS[options["parts"]],
        **SCORES[options["scores"]],
    )


def count_microbatches(options: dict, settings: LayoutConfig) -> int:
    """The microbatches of a step: the fewest that the schedule accepts, or more."""
    pp = settings.pipeline_model_parallel_size
    if options["microbatches"] == "more":
        return max(2, pp) + 1
    return next(n for n in itertools.count(1) if accepts(settings.schedule, pp, n))


def make_memory(options: dict, chunk_counts: list[int]) -> MemorySettings | None:
    chunks = max(chunk_counts) if options["head_chunks"] else 1
    if options["head_chunks"] and chunks == 1:
        return None
    return MemorySettings(
        options["recompute"],
        attention_head_chunks=chunks,
        **(dict(mlp_tiles=3, loss_chunk_tokens=5) if options["tiles"] else {}),
    )


def draw_row(draw: random.Random, names: list[str]) -> dict:
    """A random value of each option; schedules that split the backward keep everything, so that
    some are legal."""
    row = {name: draw.choice(OPTIONS[name]) for name in names}
    is_split = SCHEDULES[row.get("schedule", "1F1B").partition(" x ")[0]].splits_backward
    return row | ({"recompute": None, "tiles": False, "head_chunks": False} if is_split else {})


def pairs_of(layout: tuple[int, ...], options: dict) -> set[tuple]:
    """What a row covers: each two options, and each axis in use with each option and each other
    axis."""
    in_use = [(axis, "in use") for axis, size in zip(AXES, layout, strict=True) if size > 1]
    return set(itertools.combinations(sorted([*options.items(), *in_use], key=str), 2))


def make_table(
    candidates: int = 60, seed: int = 1
) -> tuple[dict[str, Case], list[tuple], set, set]:
    """(name -> case, refused layouts, pairs covered, pairs that some legal candidate has)."""
    draw = random.Random(seed)
    cases = {}
    refused = []
    covered = set()
    possible = set()
    pool = []

    def take(layout, row, case, pairs):
        covered.update(pairs)
        name = (
            " ".join(f"{axis}{size}" for axis, size in zip(AXES, layout, strict=True) if size > 1)
            or "one"
        )
        same = sum(known.split(" (")[0] == name for known in cases)
        cases[f"{name} ({same + 1})" if same else name] = case

    for layout in LAYOUTS:
        used = dict(zip(AXES, layout, strict=True))
        names = [name for name in OPTIONS if used.get(NEEDS_AXIS.get(name), 2) > 1]
        rows = [draw_row(draw, names) for _ in range(candidates)]
        legal = [
            (layout, row, case, pairs_of(layout, row))
            for row in rows
            if (case := make_case(layout, row)) is not None
        ]
        if not legal:
            refused.append(layout)
            continue
        pool += legal
        possible.update(*(pairs for *_, pairs in legal))
        take(*max(legal, key=lambda entry: len(entry[3] - covered)))
    while covered != possible:
        take(*max(pool, key=lambda entry: (len(entry[3] - covered), -entry[2].world_size)))
    return cases, refused, covered, possible
