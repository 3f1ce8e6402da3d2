"""Muon on every layout: the weights of one process that holds whole matrices, in fp64."""

import dataclasses

import pytest

from tests.dist.layout_table import make_table
from tests.dist.parity import Case, check_replicas_equal, compare, run_step
from tests.marks import cases

MUON = dict(optimizer="muon")
TABLE = {
    name: dataclasses.replace(case, optimizer=MUON | dict(muon_per_head=bool(number % 2)))
    for number, (name, case) in enumerate(make_table()[0].items())
}
"""Every row of the table of layouts; in every second one q, k and v are cut into heads."""
CASES = {
    # Rows and columns cut over both axes, in whole and in uneven shards; key/value heads copied.
    "tp2 dp2": Case(tp=2, dp=2, optimizer=MUON),
    "tp2 cp3 kv1 uneven": Case(
        tp=2,
        cp=3,
        seq_length=36,
        model=dict(
            hidden_size=40,
            ffn_hidden_size=46,
            num_attention_heads=8,
            kv_channels=10,
            num_query_groups=1,
        ),
        optimizer=MUON | dict(muon_per_head=True),
    ),
    # More ranks than a shard has rows.
    "dp4 empty shards zero1": Case(
        dp=4, strategy="optim", model=dict(kv_channels=2), optimizer=MUON
    ),
    "pp2 cp2 zero3 tied": Case(
        pp=2, cp=2, strategy="optim_grads_params", optimizer=MUON | dict(muon_nesterov=False)
    ),
    "pp2 ZBV": Case(
        pp=2, schedule="ZBV", model=dict(num_layers=4), optimizer=MUON | dict(muon_momentum=0.5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_muon_equals_one_process_after_three_steps(pool, single, name):
    check(pool, single, dataclasses.replace(CASES[name], steps=3))


@pytest.mark.parametrize("name", cases(TABLE, lambda name: True))
def test_muon_equals_one_process_on_every_layout(pool, single, name):
    check(pool, single, TABLE[name])


def check(pool, single, case: Case) -> None:
    results = pool.run(run_step, case.world_size, case)
    compare(results, single(case))
    check_replicas_equal(results)
