"""Every layout of up to 8 processes, legal or refused, over shapes and settings
(tests/dist/layout_table.py).

Each is compared with one process, its ranks' collectives with each other, and probed for leaks.
"""

import itertools
import random

import pytest

from parallel.layout import World
from tests.dist.layout_table import AXES, LAYOUTS, NEEDS_AXIS, OPTIONS, PARTS, SCORES
from tests.dist.layout_table import make_case, make_table
from tests.dist.leaks import probe
from tests.dist.parity import Case, check_replicas_equal, compare, run_built
from tools.plan_verify.recorder import Call, Recorder, first_difference
from tests.marks import cases

CASES, REFUSED, COVERED, POSSIBLE = make_table()
IN_EVERY_RUN = [name for index, name in enumerate(CASES) if index % 32 == 0]
"""The part of the table that runs without --all."""


def run_case(world: World, case: Case) -> tuple[dict, list[Call], list[str], bool]:
    """(what `compare` reads, collectives of the first step, leaks, whether a token reached
    anything)."""
    built = case.build(world)
    layout, _, _, stepper, loader = built
    recorder = Recorder()
    result = run_built(case, built, recorder)
    return result, recorder.calls, *probe(stepper, layout, loader)


def test_the_table_covers_all_layouts_and_the_pairs_of_options():
    names = {name.split(" (")[0] for name in CASES}
    assert len(LAYOUTS) == 63 and len(names) + len(REFUSED) == 63
    # 5 and 7 divide no head count of the table; nothing else may be refused.
    assert all({5, 7} & {layout[0]} for layout in REFUSED), REFUSED
    missing = {pair for pair in all_pairs() - COVERED if is_possible(pair)}
    assert not missing, (
        f"{len(missing)} pairs have a legal row and stand in none: {sorted(missing, key=str)[:10]}"
    )
    values = {(name, value) for name, values in OPTIONS.items() for value in values}
    assert values <= {item for pair in COVERED for item in pair}


def all_pairs() -> set[tuple]:
    items = [(name, value) for name, values in OPTIONS.items() for value in values]
    items += [(axis, "in use") for axis in AXES]
    return {
        tuple(sorted(pair, key=str))
        for pair in itertools.combinations(items, 2)
        if pair[0][0] != pair[1][0]
    }


def is_possible(pair: tuple, tries: int = 300) -> bool:
    """Does a random search find a legal row with both?"""
    draw = random.Random(str(pair))
    wanted = dict(pair)
    for _ in range(tries):
        layout = draw.choice(LAYOUTS)
        row = {name: wanted.get(name, draw.choice(values)) for name, values in OPTIONS.items()}
        used = {axis: size > 1 for axis, size in zip(AXES, layout, strict=True)}
        needed = {
            wanted_name if wanted_name in AXES else NEEDS_AXIS.get(wanted_name)
            for wanted_name in wanted
        }
        if all(used[axis] for axis in needed - {None}) and make_case(layout, row):
            return True
    return False


@pytest.mark.parametrize("name", cases(CASES, lambda name: name not in IN_EVERY_RUN))
def test_layout_equals_one_process_after_three_steps(pool, single, compared, name):
    case = CASES[name]
    results, calls, leaks, reached = zip(*pool.run(run_case, case.world_size, case), strict=True)
    compare(results, single(case))
    check_replicas_equal(results)
    assert first_difference(calls) is None
    assert not any(leaks), leaks
    assert any(reached)
    compared.append(name)


@pytest.fixture(scope="module")
def compared(show_table):
    """Rows that were compared with one process; printed after the tests."""
    rows: list[str] = []
    yield rows
    lines = [f"{len(rows)} of {len(CASES)} rows of the table of layouts compared with one process"]
    if len(rows) == len(CASES):
        lines.append(
            f"{len(LAYOUTS)} layouts of up to 8 processes, of these refused {REFUSED}; "
            f"{len(COVERED)} of {len(POSSIBLE)} pairs of options covered"
        )
        lines += ["  " + describe(name, CASES[name]) for name in rows]
    show_table("\n".join(lines))


def describe(name: str, case: Case) -> str:
    model = case.model
    notes = [
        f"{case.schedule} x {case.stages_per_rank}" if case.pp > 1 else "",
        "{} x {} levels".format(*case.context_levels) if case.context_levels else "",
        "sequence parallel" if case.sequence_parallel else "",
        "untied" if model["untie_embeddings_and_output_weights"] else "tied",
        "qk-norm" if model["qk_layernorm"] else "",
        "no rope in some layers" if model["no_rope_freq"] else "",
        "bias" if model["add_qkv_bias"] else "",
        *[name for name, parts in PARTS.items() if parts and parts.items() <= model.items()],
        *[name for name, scores in SCORES.items() if scores and scores.items() <= model.items()],
        case.strategy,
        case.memory.recompute_granularity or "",
        "tiles" if case.memory.mlp_tiles > 1 else "",
        f"{case.memory.attention_head_chunks} head chunks"
        if case.memory.attention_head_chunks > 1
        else "",
        "" if case.document_masking else "no masking",
        f"{case.samples // (case.dp * case.micro_batch_size)} microbatches of "
        f"{case.micro_batch_size}",
    ]
    return (
        f"{name:<20} heads {model['num_attention_heads']:>2} kv {model['num_query_groups']:>2}  "
        f"{', '.join(note for note in notes if note)}"
    )
