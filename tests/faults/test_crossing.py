"""Phases over several layouts through launch/train.sh, workers killed at random: nothing of it
shows in the result."""

import dataclasses
import json

import pytest
import yaml

from parallel.config import LayoutConfig
from tests.dist.training import base_arguments, losses, train, write_corpus
from tools.audit_data import audit
from tools.faults.comparison import differences
from tools.faults.kills import Killer, other_losses, wrong_starts
from tools.faults.launched_run import LaunchedRun

PHASES = [
    dict(seq_length=32, step_batch_size_schedule="0:4 512:8", tensor_model_parallel_size=2),
    dict(seq_length=64, global_batch_tokens=256, tensor_model_parallel_size=2, packing="best_fit"),
    dict(
        seq_length=64, global_batch_tokens=512, pipeline_model_parallel_size=2, rotary_base=20000.0
    ),
    dict(
        seq_length=128,
        global_batch_tokens=512,
        pipeline_model_parallel_size=2,
        lr_schedule="rewarm",
        lr_warmup_tokens=512,
        document_masking=False,
    ),
    dict(
        seq_length=128,
        global_batch_tokens=512,
        context_parallel_size=2,
        packing="best_fit",
        data_parallel_sharding_strategy="optim_grads_params",
    ),
    dict(
        seq_length=256,
        global_batch_tokens=512,
        context_parallel_size=4,
        recompute_granularity="full",
        rope_type="yarn",
        rope_scaling_factor=4.0,
        original_max_position_embeddings=64,
    ),
]
SAVE_INTERVAL = 3
LAYOUT_KEYS = {field.name for field in dataclasses.fields(LayoutConfig)}


def write_config(path, chosen: list[dict], tokens: int, keep_layout: bool = True) -> str:
    phases = [
        {"name": f"p{number}", "train_tokens": tokens}
        | {key: value for key, value in phase.items() if keep_layout or key not in LAYOUT_KEYS}
        for number, phase in enumerate(chosen)
    ]
    path.write_text(
        yaml.safe_dump({"phases": phases, "lr_decay_style": "linear", "lr": 3e-3, "min_lr": 1e-4})
    )
    return str(path)


def arguments(corpus: str, **overrides) -> list[str]:
    argv = base_arguments(corpus, save_interval=SAVE_INTERVAL, log_interval=10, **overrides)
    for flag in (
        "--train-iters",
        "--seq-length",
        "--global-batch-size",
        "--lr",
        "--lr-decay-style",
    ):
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv


# Two processes start in half the time of four, and cross from one layout to another, too.
SHORT = (
    [PHASES[0], PHASES[5] | {"context_parallel_size": 2}],
    2,
    1024,
    1,
    ["crossing"],
)
LONG = PHASES, 4, 8192, 20, ["step", "write", "publish", "crossing"]
"""Phases, processes, tokens of each phase, kills, and in what."""


@pytest.mark.parametrize(
    "phases, processes, tokens, count, kinds",
    [SHORT, pytest.param(*LONG, marks=pytest.mark.long)],
    ids=["short", "20 kills"],
)
def test_kills_at_random_steps_saves_and_crossings_change_nothing(
    pool, tmp_path, phases, processes, tokens, count, kinds
):
    corpus = write_corpus(tmp_path / "corpus", documents=600)
    config = write_config(tmp_path / "run.yaml", phases, tokens)
    alone = ["--config", config, *arguments(corpus, save=str(tmp_path / "alone"))]
    changes = count_changes(phases)
    # The run that nothing disturbs: one start for each layout.
    outcomes = [pool.run(train, processes, alone)[0] for _ in range(changes + 1)]
    assert outcomes == ["again"] * changes + ["done"]
    # The same run through launch/train.sh, killed again and again.
    run = LaunchedRun(
        ["--config", config, *arguments(corpus)], tmp_path / "disturbed", processes=processes
    )
    try:
        killer = Killer(run, kinds, seed=count, cache=None, save_interval=SAVE_INTERVAL)
        kills = killer.kill_all(count)
        killer.revive()
        run.wait_until_done()
    finally:
        run.end()
    assert len(kills) == count, kills
    assert {kill.hit for kill in kills} >= {"crossing"}, kills
    assert not run.workers(), "a worker was left behind"
    assert differences(tmp_path / "alone", tmp_path / "disturbed") == []
    assert other_losses(killer.seen, tmp_path / "alone") == []
    assert wrong_starts(kills, run.events()) == []
    found, well = audit(str(tmp_path / "disturbed"))
    assert well, found
    check_first_losses(pool, corpus, tmp_path, phases, tokens)


def count_changes(phases: list[dict]) -> int:
    """Count the changes of layout, each of which is a restart."""
    layouts = [
        {key: value for key, value in phase.items() if key in LAYOUT_KEYS} for phase in phases
    ]
    return sum(before != after for before, after in zip(layouts, layouts[1:], strict=False))


def check_first_losses(pool, corpus, folder, phases, tokens):
    """The first loss after each crossing is that of one process from the same checkpoint, in
    fp32."""
    lines = [
        json.loads(line) for line in (folder / "alone" / "metrics.jsonl").read_text().splitlines()
    ]
    firsts = [
        line
        for before, line in zip(lines, lines[1:], strict=False)
        if before["phase"] != line["phase"]
    ]
    assert len(firsts) == len(phases) - 1
    config = write_config(folder / "one.yaml", phases, tokens, keep_layout=False)
    for line in firsts:
        save = folder / f"one{line['step']}"
        argv = arguments(
            corpus,
            save=str(save),
            load=str(folder / "alone"),
            ckpt_step=line["step"] - 1,
            exit_interval=line["step"],
            eval_iters=0,
        )
        assert pool.run(train, 1, ["--config", config, *argv])[0] in ("stopped", "done")
        (found,) = losses(save).values()
        assert abs(found - line["loss"]) <= 1e-6 * line["loss"], line["phase"]
