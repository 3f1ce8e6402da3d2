"""All 63 layouts of up to 8 processes, each with a model and settings, generated so that pairs are covered.

A layout that no model of the table can have is refused by `check_layout`; the table says why. For the
others a greedy covering array picks, layout by layout, the legal combination of options that covers
the most pairs (option, option) and (axis in use, option) not seen so far.
"""

import itertools
import random

from model.build import check_layout
from model.config import ModelConfig
from tests.dist.parity import VOCABULARY, Case

OPTIONS = {
    "heads": (6, 8, 12),
    "kv_heads": (1, 2, 3, 8, 0),  # 0 = as many as query heads
    "tied": (True, False),
    "qk_norm": (False, True),
    "bias": (False, True),
    "strategy": ("optim", "optim_grads", "optim_grads_params"),
    "recompute": (None, "full"),
    "masking": (True, False),
    "micro_batch_size": (1, 2),
}
SIZES = range(1, 9)
LAYOUTS = [sizes for sizes in itertools.product(SIZES, repeat=4) if sizes[0] * sizes[1] * sizes[2] * sizes[3] <= 8]
AXES = ("tp", "pp", "cp", "dp")


def make_case(layout: tuple[int, int, int, int], options: dict) -> Case | None:
    """The parity case of a layout with these options, or None where the model or the layout refuses."""
    tp, pp, cp, dp = layout
    model = dict(num_layers=max(3, pp), hidden_size=48, ffn_hidden_size=48, num_attention_heads=options["heads"],
                 num_query_groups=options["kv_heads"] or options["heads"], init_method_std=0.15,
                 make_vocab_size_divisible_by=120, untie_embeddings_and_output_weights=not options["tied"],
                 qk_layernorm=options["qk_norm"], add_qkv_bias=options["bias"])
    config = ModelConfig(**model)
    if config.validate() or check_layout(config, VOCABULARY, tp, pp, cp):
        return None
    length = -(-32 // cp) * cp
    samples = dp * options["micro_batch_size"] * max(pp, 2)
    return Case(tp, pp, cp, dp, strategy=options["strategy"], model=model, seq_length=length, samples=samples,
                micro_batch_size=options["micro_batch_size"], document_masking=options["masking"],
                recompute=options["recompute"], steps=3)


def pairs_of(layout: tuple[int, ...], options: dict) -> set[tuple]:
    """What a row covers: each two options, and each axis in use with each option."""
    items = sorted(options.items(), key=str)
    in_use = [(axis, "in use") for axis, size in zip(AXES, layout, strict=True) if size > 1]
    return set(itertools.combinations(items, 2)) | set(itertools.product(in_use, items)) | set(
        itertools.combinations(in_use, 2))


def make_table(candidates: int = 200, seed: int = 1) -> tuple[dict[str, Case], list[tuple], set]:
    """(name -> case, refused layouts, pairs covered)."""
    draw = random.Random(seed)
    cases, refused, covered = {}, [], set()
    for layout in LAYOUTS:
        rows = [{name: draw.choice(values) for name, values in OPTIONS.items()} for _ in range(candidates)]
        legal = [(row, case) for row in rows if (case := make_case(layout, row)) is not None]
        if not legal:
            refused.append(layout)
            continue
        row, case = max(legal, key=lambda pair: len(pairs_of(layout, pair[0]) - covered))
        covered |= pairs_of(layout, row)
        name = " ".join(f"{axis}{size}" for axis, size in zip(AXES, layout, strict=True) if size > 1) or "one"
        cases[name] = case
    return cases, refused, covered


def possible_pairs() -> set[tuple]:
    """Pairs of options that some model can have: a kv head count must divide the query heads."""
    found = set()
    names = sorted(OPTIONS)
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b]):
            row = {name: values[0] for name, values in OPTIONS.items()} | {"heads": 12, "kv_heads": 1} | {a: x, b: y}
            if a != "heads" and b != "heads" and 8 in (x, y) and "kv_heads" in (a, b):
                row["heads"] = 8
            if row["kv_heads"] == 3 and "heads" not in (a, b):
                row["heads"] = 6
            if make_case((1, 1, 1, 1), row) is not None:
                found.add(tuple(sorted(((a, x), (b, y)), key=str)))
    return found
