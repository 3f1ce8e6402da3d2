"""Stopping, continuing and changing the layout leave the run what it was."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

from model.rope import Rope
from parallel.config import LayoutConfig
from pretrain.checkpointing.folder_lock import FolderLock, same_start_on_all_ranks
from pretrain.checkpointing.folders import LATEST, find_published
from pretrain.checkpointing.progress import Progress
from pretrain.config.load import load_config
from pretrain.guards.rewinds import Rewind, write_rewinds
from pretrain.plan import make_plan
from pretrain.plan_warnings import warnings_about
from tools.audit_data import audit
from tests.dist.training import base_arguments, losses, refusal, stored, train, write_corpus
from tests.marks import cases


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


TIED = {"num_layers": 5, "untie_embeddings_and_output_weights": False}


@pytest.mark.parametrize(
    "world, layout",
    [
        pytest.param(1, {}, marks=pytest.mark.long),
        pytest.param(
            4,
            {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
            marks=pytest.mark.long,
        ),
        (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "ZBV", **TIED}),
        pytest.param(
            2, {"tensor_model_parallel_size": 2, "optimizer": "muon", "bf16": True, **TIED}
        ),
        pytest.param(
            4,
            {"context_parallel_size": 2, "data_parallel_sharding_strategy": "optim_grads_params"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_resume_is_bit_identical(pool, corpus, tmp_path, world, layout):
    straight = str(tmp_path / "straight")
    stopped = str(tmp_path / "stopped")
    common = layout
    assert (
        pool.run(train, world, base_arguments(corpus, save=straight, **common)) == ["done"] * world
    )
    interrupted = base_arguments(corpus, save=stopped, exit_interval=3, **common)
    assert [pool.run(train, world, interrupted)[0] for _ in range(2)] == ["stopped", "done"]
    assert losses(straight) == losses(stopped) and len(losses(straight)) == 6
    expected = stored(straight)
    found = stored(stopped)
    assert expected.keys() == found.keys() and len(expected) > 30
    assert ("model.output.weight" in expected) == (
        "untie_embeddings_and_output_weights" not in layout
    )
    for name, tensor in expected.items():
        assert np.array_equal(tensor, found[name]), name
    # A finished run says so and changes nothing.
    assert pool.run(train, world, interrupted)[0] == "done"
    assert len(losses(stopped)) == 6


def test_a_step_done_again_stands_once(pool, corpus, tmp_path):
    """A kill after step 5 with the last checkpoint at step 3: steps 4 and 5 are written again,
    once."""
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, save_interval=3))
    first = losses(save)
    (tmp_path / "save" / LATEST).write_text("3")
    with open(tmp_path / "save" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # what a kill in the middle of a write leaves
    assert pool.run(train, 1, base_arguments(corpus, save=save, save_interval=3)) == ["done"]
    assert losses(save) == first


OTHER_LAYOUTS = {
    "cp4": dict(context_parallel_size=4),
    "dp4": {},
    "zbv": dict(pipeline_model_parallel_size=2, pipeline_schedule="ZBV"),
}


@pytest.mark.parametrize("name", cases(OTHER_LAYOUTS, lambda name: name != "cp4"))
def test_tp2_pp2_continues_on_another_layout_with_the_same_next_loss(
    pool, corpus, tmp_path, name
):
    save = str(tmp_path / "save")
    tp2_pp2 = dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    pool.run(
        train, 4, base_arguments(corpus, save=save, fp64=True, exit_interval=3, **tp2_pp2, **TIED)
    )
    for folder, layout in (("same", tp2_pp2), ("other", OTHER_LAYOUTS[name])):
        argv = base_arguments(
            corpus, save=str(tmp_path / folder), load=save, fp64=True, **layout, **TIED
        )
        assert pool.run(train, 4, argv) == ["done"] * 4
    expected = losses(tmp_path / "same")
    found = losses(tmp_path / "other")
    assert sorted(expected) == [4, 5, 6] and found.keys() == expected.keys()
    worst = max(abs(found[step] / expected[step] - 1) for step in expected)
    assert worst <= 1e-10, worst


PHASES = [
    dict(
        name="short",
        seq_length=64,
        train_tokens=512,
        step_batch_size_schedule="0:2 128:4",
        tensor_model_parallel_size=2,
    ),
    dict(
        name="same-layout",
        seq_length=128,
        train_tokens=512,
        global_batch_tokens=256,
        rotary_base=30000.0,
        document_masking=False,
        tensor_model_parallel_size=2,
        packing="best_fit",
    ),
    dict(
        name="pipeline",
        seq_length=128,
        train_tokens=512,
        global_batch_tokens=512,
        context_parallel_size=2,
        rope_type="linear",
        rope_scaling_factor=2.0,
        pipeline_model_parallel_size=2,
        pipeline_schedule="ZBV",
    ),
    dict(
        name="long",
        seq_length=256,
        train_tokens=1000,
        global_batch_tokens=512,
        context_parallel_size=4,
        cp_comm_type="a2a+allgather",
        hierarchical_context_parallel_sizes=[2, 2],
        lr=1e-3,
        packing="best_fit",
    ),
]
LAYOUT_KEYS = {field.name for field in dataclasses.fields(LayoutConfig)}


@pytest.mark.long
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_phases_with_changing_layouts_equal_one_process(pool, corpus, tmp_path, optimizer):
    """Growing context over three layouts (restarts), blends and packings equals the same phases in
    one process."""
    other = write_corpus(tmp_path / "other", documents=20, seed=8)

    def arguments(name, keep_layout):
        phases = [
            {k: v for k, v in phase.items() if keep_layout or k not in LAYOUT_KEYS}
            for phase in PHASES
        ]
        phases[0]["data_path"] = [0.7, corpus, 0.3, other]
        phases[2]["data_path"] = [1, other]
        phases[3]["data_path"] = [corpus, f"{other}[30:]"]
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"phases": phases, "fp64": True}))
        argv = base_arguments(
            corpus, save=str(tmp_path / name), num_layers=5, optimizer=optimizer
        )
        for flag in ("--train-iters", "--seq-length", "--global-batch-size"):
            at = argv.index(flag)
            del argv[at : at + 2]
        return ["--config", str(config), *argv]

    assert pool.run(train, 1, arguments("one", False)) == ["done"]
    outcomes = [pool.run(train, 4, arguments("four", True)) for _ in range(3)]
    assert outcomes == [["again"] * 4, ["again"] * 4, ["done"] * 4]
    expected = losses(tmp_path / "one")
    found = losses(tmp_path / "four")
    assert sorted(found) == list(range(1, 9)) and found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) <= 1e-10 * expected[step] for step in expected)
    lines = [
        json.loads(line) for line in (tmp_path / "four" / "metrics.jsonl").read_text().splitlines()
    ]
    one = [
        json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["data_digest"] for line in lines] == [line["data_digest"] for line in one]
    assert len({line["data_digest"] for line in lines}) == 8
    assert [line["tokens"] for line in lines] == [128, 384, 640, 896, 1152, 1664, 2176, 2688]
    for line in lines:
        assert line["real_tokens"] == sum(line["sources"].values()) <= line["tokens"]
    assert lines[-1]["real_tokens"] < lines[-1]["tokens"], "best_fit must have padded"
    assert lines[1]["sources"] == {corpus: 256, other: 128}  # 4.2 and 1.8 of 6 samples
    rows = Progress.read(find_published(tmp_path / "four")).data["account"]
    assert {(row["phase"], row["source"]) for row in rows} == {
        ("short", corpus),
        ("short", other),
        ("same-layout", corpus),
        ("pipeline", other),
        ("long", corpus),
        ("long", f"{other}[30:]"),
    }
    assert sum(row["tokens"] for row in rows) == lines[-1]["real_tokens"]
    saves = [
        json.loads(line) for line in (tmp_path / "four" / "ledger.jsonl").read_text().splitlines()
    ]
    assert [save["step"] for save in saves] == [3, 5, 6, 8] and saves[-1]["account"] == rows
    assert [line["phase"] for line in lines] == ["short"] * 3 + ["same-layout"] * 2 + [
        "pipeline"
    ] + ["long"] * 2
    one = stored(tmp_path / "one")
    four = stored(tmp_path / "four")
    for name, tensor in one.items():
        assert np.abs(four[name] - tensor).max() <= 1e-9 * max(np.abs(tensor).max(), 1e-30), name
    check_audit(tmp_path / "four")


def check_audit(folder):
    """The account of the run is right, and a wrong one would be noticed."""
    found, well = audit(str(folder))
    assert well and all(", 0 repeated, 0 lost, " in line for line in found[1:]), found
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    lines = text.splitlines(keepends=True)
    tokens = json.loads(lines[2])["sources"]
    drawn = sum(tokens.values()) - sum(json.loads(lines[1])["sources"].values())
    for changed, what in ((lines[:2] + lines[3:], "lost"), ([*lines, lines[2]], "repeated")):
        metrics.write_text("".join(changed))
        found, well = audit(str(folder))
        counts = [int(line.split(f" {what}")[0].split()[-1].replace(",", "")) for line in found[1:]]
        assert not well and sum(counts) == drawn, found
    metrics.write_text(text.replace(json.loads(lines[2])["data_digest"], "0123456789"))
    found, well = audit(str(folder))
    assert not well and found[0].endswith(
        "the data of 1 differs from metrics.jsonl, first of step 3"
    ), found
    metrics.write_text(text)


def test_a_phase_trains_with_its_own_rope(pool, corpus, tmp_path):
    found = {}
    for kind in ("default", "yarn"):
        scaled = dict(rope_type="yarn", rope_scaling_factor=4.0) if kind == "yarn" else {}
        phases = [dict(name="a", train_tokens=256), dict(name="b", train_tokens=256) | scaled]
        run = {"phases": phases} | ({"original_max_position_embeddings": 32} if scaled else {})
        config = tmp_path / f"{kind}.yaml"
        config.write_text(yaml.safe_dump(run))
        argv = base_arguments(corpus, save=str(tmp_path / kind), init_method_std=0.2)
        at = argv.index("--train-iters")
        assert pool.run(train, 1, ["--config", str(config), *argv[:at], *argv[at + 2 :]]) == [
            "done"
        ]
        found[kind] = losses(tmp_path / kind)
        rope = Progress.read(find_published(tmp_path / kind)).phase["rope"]
        assert Rope(**rope) == Rope.make(
            10000.0, kind, dict(factor=4.0, original_max_position_embeddings=32)
        )
    assert found["default"][1] == found["yarn"][1] and found["default"][2] != found["yarn"][2]


def test_another_name_for_a_phase_changes_no_token(pool, corpus, tmp_path):
    """A flat run goes on as the first of several phases, and its blend with it."""
    other = write_corpus(tmp_path / "other", documents=20, seed=8)
    common = dict(global_batch_size=1, train_iters=8)
    argv = base_arguments(corpus, save=str(tmp_path / "straight"), **common)
    at = argv.index("--data-path")
    argv[at + 1 : at + 2] = ["0.7", corpus, "0.3", other]
    assert pool.run(train, 1, argv) == ["done"]
    save = argv.index("--save") + 1
    argv[save] = str(tmp_path / "renamed")
    assert pool.run(train, 1, [*argv, "--exit-interval", "3"]) == ["stopped"]
    config = tmp_path / "phases.yaml"
    config.write_text(yaml.safe_dump({"phases": [{"name": "base", "train_tokens": 512}]}))
    at = argv.index("--train-iters")
    assert pool.run(train, 1, ["--config", str(config), *argv[:at], *argv[at + 2 :]]) == ["done"]
    digests = [
        [
            json.loads(line)["data_digest"]
            for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("straight", "renamed")
    ]
    assert digests[0] == digests[1] and len(digests[0]) == 8
    (segment,) = Progress.read(find_published(tmp_path / "renamed")).data[
        "segments"
    ]
    assert segment["phase"] == "base"


def test_a_run_that_went_on_in_another_folder_is_audited(pool, corpus, tmp_path):
    pool.run(train, 1, base_arguments(corpus, save=str(tmp_path / "base"), train_iters=2))
    pool.run(
        train,
        1,
        base_arguments(
            corpus, save=str(tmp_path / "new"), load=str(tmp_path / "base"), train_iters=4
        ),
    )
    found, well = audit(str(tmp_path / "new"))
    assert (
        well
        and found[0].startswith("2 steps read again")
        and found[1].startswith("the 512 tokens before them")
    ), found
    other = write_corpus(tmp_path / "other", seed=8)
    argv = base_arguments(
        other, save=str(tmp_path / "gone"), load=str(tmp_path / "base"), train_iters=4
    )
    assert pool.run(train, 1, [*argv, "--accept-changes", "data"]) == ["done"]
    with pytest.raises(
        ValueError, match=f"drew from {corpus}, which its latest configuration does not name"
    ):
        audit(str(tmp_path / "gone"))


def test_finetune_takes_the_weights_only(pool, corpus, tmp_path):
    pool.run(train, 1, base_arguments(corpus, save=str(tmp_path / "base"), train_iters=2))
    argv = base_arguments(
        corpus,
        save=str(tmp_path / "new"),
        load=str(tmp_path / "base"),
        finetune=True,
        train_iters=1,
        lr=1e-12,
        seed=99,
    )
    assert pool.run(train, 1, argv) == ["done"]
    before = stored(tmp_path / "base")
    after = stored(tmp_path / "new")
    assert sorted(losses(tmp_path / "new")) == [1]
    weights = [name for name in before if name.startswith("model.")]
    assert weights and all(
        np.allclose(before[name], after[name], rtol=1e-6, atol=1e-9) for name in weights
    )


def test_another_batch_size_on_continuing_keeps_the_step_count(pool, corpus, tmp_path):
    """The same clock is another number of steps; no line and no checkpoint of real steps is
    lost."""
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=4))
    longer = base_arguments(corpus, save=save, train_iters=4, global_batch_size=8)
    assert (
        "phase 'main': global_batch_tokens from token 1,024 on: checkpoint 256, run 512"
        in refusal(pool, longer)
    )
    assert pool.run(train, 1, [*longer, "--accept-changes", "optimization"]) == ["done"]
    assert sorted(losses(save)) == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (tmp_path / "save").glob("iter_*")) == [
        "iter_0000004",
        "iter_0000006",
    ]


def test_a_stop_on_a_phases_last_step_is_a_stop(pool, corpus, tmp_path):
    phases = [
        dict(name=name, seq_length=64, train_tokens=512, global_batch_tokens=256) for name in "ab"
    ]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"phases": phases}))
    argv = base_arguments(corpus, save=str(tmp_path / "save"), exit_interval=2)
    for flag in ("--train-iters", "--seq-length", "--global-batch-size"):
        at = argv.index(flag)
        del argv[at : at + 2]
    argv = ["--config", str(config), *argv]
    assert [pool.run(train, 1, argv) for _ in range(2)] == [["stopped"], ["done"]]
    lines = [
        json.loads(line)
        for line in (tmp_path / "save" / "validation.jsonl").read_text().splitlines()
    ]
    assert [(line["step"], line["phase"]) for line in lines] == [
        (0, "a"),
        (2, "a"),
        (2, "b"),
        (4, "b"),
    ]


def test_no_load_optim_acts_on_the_first_launch_only(pool, corpus, tmp_path):
    pool.run(train, 1, base_arguments(corpus, save=str(tmp_path / "base"), train_iters=2))
    argv = base_arguments(
        corpus,
        save=str(tmp_path / "new"),
        load=str(tmp_path / "base"),
        no_load_optim=True,
        train_iters=6,
        exit_interval=4,
    )
    assert [pool.run(train, 1, argv)[0] for _ in range(2)] == ["stopped", "done"]
    steps = {
        name: tensor for name, tensor in stored(tmp_path / "new").items() if name.endswith(".step")
    }
    assert steps and all(step == 4 for step in steps.values()), (
        "2 steps before the stop, 2 after, none forgotten"
    )


def test_flags_that_a_restart_ignores_are_named(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=4, save_interval=2))
    again = base_arguments(
        corpus, save=save, load=save, ckpt_step=2, train_iters=5, sequence_parallel=True
    )
    found = warnings_about(make_plan(load_config(again), 1))
    assert [text.split(":")[0] for text in found] == ["sequence_parallel = True", "ckpt_step"]
    assert all("has no effect" in text for text in found)


def start_changes(world, root) -> list[bool]:
    from parallel.config import LayoutConfig
    from parallel.layout import build_layout

    axis = build_layout(LayoutConfig(), world).world
    current = find_published(root)
    found = [
        same_start_on_all_ranks(root, planned, axis)
        for planned in (current, None if axis.rank == 1 else current, None)
    ]
    # The run that held the folder until now went back for a spike.
    rewind = Rewind(number=1, start=0, end=64, step=1, reason="spike")
    if axis.rank == 0:
        write_rewinds(root, [rewind])
    found.append(same_start_on_all_ranks(root, current, axis))
    found.append(same_start_on_all_ranks(root, current, axis, [rewind]))
    return found


def test_a_checkpoint_or_rewind_that_comes_while_starting_is_noticed_on_all_ranks(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=2))
    assert pool.run(start_changes, 2, save) == [[True, False, False, False, True]] * 2


def hold_lock(world, root) -> str:
    from parallel.config import LayoutConfig
    from parallel.layout import build_layout

    axis = build_layout(LayoutConfig(), world).world
    first = FolderLock(root, axis)
    try:
        FolderLock(root, axis)
        return "both"
    except ValueError as error:
        return str(error)
    finally:
        first.release()
        FolderLock(root, axis).release()


def test_a_save_folder_takes_one_run_at_a_time(pool, tmp_path):
    for text in pool.run(hold_lock, 2, str(tmp_path / "save")):
        assert "is training into it. Fix: stop that run" in text


def test_damaged_checkpoints_are_refused(pool, corpus, tmp_path):
    save = tmp_path / "save"
    argv = base_arguments(corpus, save=str(save), train_iters=2)
    pool.run(train, 1, argv)
    folder = find_published(save)
    longer = base_arguments(corpus, save=str(save), train_iters=4)
    data = next(folder.glob("*.distcp"))
    original = data.read_bytes()
    flipped = bytearray(original)
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    assert "differs from its checksum" in refusal(pool, longer)
    data.unlink()
    assert "is missing" in refusal(pool, longer)
    data.write_bytes(original)
    assert pool.run(train, 1, longer) == ["done"]


@pytest.mark.long
def test_data_may_change_where_it_is_said(pool, corpus, tmp_path):
    """Another blend or a changed corpus needs a flag, a window of data can be passed over."""
    save = str(tmp_path / "save")
    other = write_corpus(tmp_path / "other", seed=4)
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=1))
    blended = base_arguments(other, save=save, train_iters=2)
    assert "phase 'main': blend: checkpoint [[" in refusal(pool, blended)
    assert pool.run(train, 1, [*blended, "--accept-changes", "data"]) == ["done"]
    write_corpus(tmp_path / "other", seed=5)
    changed = base_arguments(other, save=save, train_iters=3)
    assert f"{other}: is not the data that the checkpoint was trained on (corpus " in refusal(
        pool, changed
    )
    assert losses(save).keys() == {1, 2}
    assert pool.run(train, 1, [*changed, "--accept-changes", "data"]) == ["done"]
    skipping = [
        *base_arguments(other, save=save, train_iters=6),
        "--accept-changes",
        "data",
        "--skip-data",
    ]
    assert "skip_data = 256:512: the run is at 768 already" in refusal(pool, [*skipping, "256:512"])
    assert "skip_data = 1030:1100: no step begins in it; the next one begins at 1,280" in refusal(
        pool, [*skipping, "1030:1100"]
    )
    assert "skip_data = 2000:3000: the run ends at 1,536" in refusal(pool, [*skipping, "2000:3000"])
    # Before it is skipped
    assert pool.run(train, 1, [*skipping, "1000:1536", "--exit-interval", "4"]) == ["stopped"]
    assert pool.run(train, 1, [*skipping, "1000:1536"]) == ["done"]
    (row,) = [
        row
        for row in Progress.read(find_published(save)).data["account"]
        if row["skipped"]
    ]
    assert row["tokens"] == 512 and sorted(losses(save)) == [1, 2, 3, 4, 5, 6]


def test_moments_are_kept_where_the_data_is_new(pool, corpus, tmp_path):
    """--load with accepted data goes on with clock and optimizer; another seed or corpus is drawn
    from its beginning."""
    base = str(tmp_path / "base")
    other = write_corpus(tmp_path / "other", seed=4)
    pool.run(train, 1, base_arguments(corpus, save=base, train_iters=2))
    argv = base_arguments(other, save=str(tmp_path / "new"), load=base, train_iters=3, seed=5)
    text = refusal(pool, argv)
    assert "seed: checkpoint 1234, run 5" in text and "phase 'main': blend: checkpoint [[" in text
    assert pool.run(train, 1, [*argv, "--accept-changes", "data"]) == ["done"]
    assert losses(tmp_path / "new").keys() == {3}
    steps = [tensor for name, tensor in stored(tmp_path / "new").items() if name.endswith(".step")]
    assert steps and all(step == 3 for step in steps)
    account = Progress.read(find_published(tmp_path / "new")).data["account"]
    assert {(row["source"], row["samples"]) for row in account} == {(corpus, 8), (other, 4)}
    # The same corpus in the order of another seed: nothing of it counts as read.
    argv = base_arguments(corpus, save=str(tmp_path / "seed"), load=base, train_iters=3, seed=5)
    assert pool.run(train, 1, [*argv, "--accept-changes", "data"]) == ["done"]
    account = Progress.read(find_published(tmp_path / "seed")).data["account"]
    assert [
        (row["source"].startswith(f"{corpus} before it changed"), row["samples"]) for row in account
    ] == [(True, 8), (False, 4)]
    assert account[1]["epochs"] < account[0]["epochs"]


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), pytest.param(2, {"tensor_model_parallel_size": 2}, marks=pytest.mark.long)],
)
def test_learning_rate_and_weight_decay_act_from_the_first_step(
    pool, corpus, tmp_path, world, layout
):
    """A step continued with another learning rate and weight decay is torch's AdamW step with
    them."""
    base = str(tmp_path / "base")
    new = str(tmp_path / "new")
    common = dict(layout, fp64=True)
    pool.run(train, world, base_arguments(corpus, save=base, train_iters=2, **common))
    argv = base_arguments(
        corpus, save=new, load=base, train_iters=3, lr=3e-3, weight_decay=0.4, **common
    )
    text = refusal(pool, argv, world)
    assert (
        "weight_decay: checkpoint 0.1, run 0.4" in text
        and "lr of the phase that goes on: checkpoint 0.01" in text
    )
    assert pool.run(train, world, [*argv, "--override-opt_param-scheduler"]) == ["done"] * world
    before = stored(base)
    after = stored(new)
    names = [name.removeprefix("model.") for name in before if name.startswith("model.")]
    assert len(names) > 10
    for lr, weight_decay, is_right in ((3e-3, 0.4, True), (1e-2, 0.4, False), (3e-3, 0.1, False)):
        worst = max(
            float(
                np.abs(
                    adamw_step(before, after, name, lr, weight_decay) - after[f"model.{name}"]
                ).max()
            )
            for name in names
        )
        assert (worst < 1e-12) == is_right, (lr, weight_decay, worst)
    # The checkpoint's own are taken by the other flag.
    argv = base_arguments(
        corpus,
        save=str(tmp_path / "same"),
        load=base,
        train_iters=3,
        lr=3e-3,
        weight_decay=0.4,
        use_checkpoint_opt_param_scheduler=True,
        **common,
    )
    assert pool.run(train, world, argv) == ["done"] * world
    after = stored(tmp_path / "same")
    assert (
        max(
            float(np.abs(adamw_step(before, after, name, 1e-2, 0.1) - after[f"model.{name}"]).max())
            for name in names
        )
        < 1e-12
    )


def adamw_step(before: dict, after: dict, name: str, lr: float, weight_decay: float) -> np.ndarray:
    """The parameter after torch's own step from `before`, on the gradient that the first moment
    tells."""
    old = {
        key: torch.from_numpy(before[f"optimizer.{name}.{key}"])
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    parameter = torch.nn.Parameter(torch.from_numpy(before[f"model.{name}"]).clone())
    parameter.grad = (
        torch.from_numpy(after[f"optimizer.{name}.exp_avg"]) - 0.9 * old["exp_avg"]
    ) / (1 - 0.9)
    optimizer = torch.optim.AdamW(
        [parameter],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
        weight_decay=weight_decay if parameter.dim() > 1 else 0.0,
    )
    optimizer.state[parameter] = {key: value.clone() for key, value in old.items()}
    optimizer.step()
    return parameter.detach().numpy()


def test_a_checkpoint_without_optimizer_goes_on_only_when_told(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=2, no_save_optim=True))
    assert all(name.startswith("model.") for name in stored(save))
    longer = base_arguments(corpus, save=save, train_iters=4)
    assert (
        "was saved with --no-save-optim and holds no optimizer state. Fix: --no-load-optim"
        in refusal(pool, longer)
    )
    longer = [*longer, "--no-load-optim"]
    assert warnings_about(make_plan(load_config(longer), 1)) == []
    assert pool.run(train, 1, longer) == ["done"]
    steps = [tensor for name, tensor in stored(save).items() if name.endswith(".step")]
    assert steps and all(step == 2 for step in steps) and sorted(losses(save)) == [1, 2, 3, 4]


def test_other_models_and_seeds_are_refused(pool, corpus, tmp_path):
    save = str(tmp_path / "save")
    pool.run(train, 1, base_arguments(corpus, save=save, train_iters=1))
    text = refusal(pool, base_arguments(corpus, save=save, hidden_size=64, seed=5))
    assert (
        "hidden_size: checkpoint 32, run 64" in text and "seed: checkpoint 1234, run 5" in text
    ), "all at once"
    assert "seed: checkpoint 1234, run 5" in refusal(
        pool, base_arguments(corpus, save=save, train_iters=2, seed=5)
    )
    assert losses(save).keys() == {1}
