"""Every layout of up to 8 processes, legal or refused, over shapes and settings (tests/dist/layout_table.py)."""

import pytest

from tests.dist.layout_table import LAYOUTS, make_table, possible_pairs
from tests.dist.parity import compare, run_step

CASES, REFUSED, COVERED = make_table()


def test_the_table_covers_all_layouts_and_the_pairs_of_options():
    assert len(LAYOUTS) == 63 and len(CASES) + len(REFUSED) == 63
    # 5 and 7 divide no head count of the table; nothing else may be refused.
    assert all({5, 7} & {layout[0]} for layout in REFUSED), REFUSED
    pairs = possible_pairs()
    missing = pairs - COVERED
    assert len(missing) <= 0.03 * len(pairs), f"{len(missing)} of {len(pairs)}: {sorted(missing, key=str)[:10]}"


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_layout_equals_one_process_after_three_steps(pool, single, name):
    case = CASES[name]
    compare(pool.run(run_step, case.world_size, case), single(case))


@pytest.mark.long
def test_print_coverage(capsys):
    pairs = possible_pairs()
    with capsys.disabled():
        print(f"\n{len(CASES)} layouts compared with one process, {len(REFUSED)} refused {REFUSED}; "
              f"{len(pairs & COVERED)} of {len(pairs)} pairs of options covered")
        for name, case in CASES.items():
            model = case.model
            print(f"  {name:<16} heads {model['num_attention_heads']:>2} kv {model['num_query_groups']:>2} "
                  f"{'untied' if model['untie_embeddings_and_output_weights'] else 'tied':<6} "
                  f"{'qk-norm ' if model['qk_layernorm'] else ''}{'bias ' if model['add_qkv_bias'] else ''}"
                  f"{case.strategy} {'recompute ' if case.recompute else ''}micro {case.micro_batch_size} "
                  f"{'' if case.document_masking else 'no masking'}")
    assert CASES
