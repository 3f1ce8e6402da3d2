"""FROM_DEEPSPEED.md answers each key of DeepSpeed's file, with flags that exist."""

import re
from pathlib import Path

import pytest

from pretrain.config.deepspeed_page import (
    DEEPSPEED_PAGE,
    TITLES,
    counterparts,
    find_counterpart,
    make_deepspeed_page,
)
from pretrain.config.flags import spell
from pretrain.config.flat import field_table
from pretrain.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
KEYS = Path(__file__).with_name("deepspeed_keys.txt")
RUN = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 8 --global-batch-size 1 --train-iters 1"
).split()


def test_the_page_is_up_to_date():
    assert DEEPSPEED_PAGE.read_text() == make_deepspeed_page(), (
        "make it again: python -m pretrain.config.flags_page"
    )


def test_every_key_of_deepspeed_has_an_answer():
    lines = KEYS.read_text().splitlines()
    keys = [line for line in lines if not line.startswith("#")]
    assert len(keys) > 100, "the list of keys is whole"
    assert [key for key in keys if find_counterpart(key) is None] == []


def test_a_key_that_deepspeed_does_not_have_has_none():
    assert find_counterpart("train_batch") is None


def test_every_entry_says_something_under_a_heading():
    assert {found.section for found in counterparts()} == set(TITLES)
    silent = [
        found.keys for found in counterparts() if not (found.flags or found.variables or found.note)
    ]
    assert silent == []


def test_every_flag_that_is_named_is_a_setting():
    known = {f"--{name.replace('_', '-')}" for name in field_table()} | {
        "--config",
        "--print-config",
    }
    named = {flag[0] for found in counterparts() for flag in found.flags}
    assert len(named) > 25
    assert named <= known, named - known
    in_notes = {
        word for found in counterparts() for word in re.findall(r"`(--[\w-]+)`", found.note)
    }
    assert in_notes <= known, in_notes - known


@pytest.mark.parametrize(
    "words",
    sorted({flag for found in counterparts() for flag in found.flags if len(flag) > 1}),
)
def test_every_value_that_is_named_is_accepted(words):
    load_config(spell([*RUN, *words]))


def test_every_variable_is_one_of_the_launcher():
    page = (ROOT / "launch" / "README.md").read_text()
    named = [name for found in counterparts() for name in found.variables]
    assert named and [name for name in named if f"`{name}`" not in page] == []
