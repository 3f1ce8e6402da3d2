"""A run whose tokens the checkpoint has trained already is refused or warned of, unless it is the
same run that starts again."""

import dataclasses

import pytest

from pretrain import plan as planning
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.spent_tokens import BEGIN_ANEW
from pretrain.checkpointing.start import Start
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.load import load_config
from pretrain.plan import Plan, make_plan
from pretrain.plan_warnings import warnings_about

TRAINED = 40_960
"""Tokens behind the checkpoint."""


def trained(**fields) -> Progress:
    """Return what the checkpoint says of itself."""
    common = dict(phase={}, longest_seq_length=128, data={}, tokenizer=None)
    return Progress(step=80, clock=TRAINED, **common, **fields)


def planned(folder, tokens: int) -> Plan:
    """Plan a run of that many tokens, which would save into the folder."""
    words = (
        "--model tiny --mock-data --vocab-size 100 --seq-length 128 --global-batch-tokens 512 "
        f"--eval-iters 0 --lr-decay-style constant --train-tokens {tokens}"
    )
    return make_plan(load_config([*words.split(), "--save", str(folder)]), 1, only_print=True)


def spent(plan: Plan, folder, *, is_restart: bool, **progress) -> list[str]:
    """Return what is said of the tokens where the plan goes on from a checkpoint."""
    (folder / "config.yaml").write_text(dump_yaml(plan.config))
    start = Start(folder, is_restart=is_restart)
    resumed = trained(**progress)
    going_on = dataclasses.replace(plan, start=start, progress=resumed)
    return [text for text in warnings_about(going_on) if text.startswith("train_tokens")]


def test_a_load_of_more_tokens_than_the_run_has_is_refused(tmp_path, monkeypatch):
    resumed = trained()
    config = load_config([])

    def find(start: Start):
        monkeypatch.setattr(
            planning, "_find_origin", lambda _: planning._Origin(start, resumed, config)
        )

    find(Start(tmp_path))
    with pytest.raises(ValueError) as error:
        planned(tmp_path, 8_192)
    assert str(error.value) == (
        "train_tokens = 8,192: counts from the beginning of the checkpoint's run, which has "
        "trained 40,960. Fix: more tokens (phases that are trained stay in the YAML file, before "
        "the new ones), or --finetune to begin anew with the weights."
    )


def test_a_run_with_nothing_left_to_train_is_warned_of(tmp_path):
    shorter = planned(tmp_path, 8_192)
    (text,) = spent(shorter, tmp_path, is_restart=True)
    assert "has trained 40,960: nothing is trained. Fix: more tokens" in text
    assert text.endswith("another --save, --load of this one and " + BEGIN_ANEW)
    same = planned(tmp_path, TRAINED)
    (text,) = spent(same, tmp_path, is_restart=False)
    assert text.endswith(f"before the new ones), or {BEGIN_ANEW}")
    # A finished run that starts again, one with steps to come, an evaluation that is made up for.
    assert spent(same, tmp_path, is_restart=True) == []
    assert spent(planned(tmp_path, 2 * TRAINED), tmp_path, is_restart=False) == []
    assert spent(same, tmp_path, is_restart=False, evaluation_due="main") == []


def test_weights_alone_have_no_tokens_behind_them(tmp_path):
    plan = planned(tmp_path, 8_192)
    start = Start(tmp_path, weights_only=True)
    fresh = dataclasses.replace(plan, start=start, progress=trained())
    assert [text for text in warnings_about(fresh) if text.startswith("train_tokens")] == []
