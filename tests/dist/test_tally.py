"""Steps that teach nothing are said, and a run of nothing else is no success."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest
import torch

from data.writers.indexed_writer import IndexedWriter
from parallel.layout import World
from parallel.shard import own_shard
from pretrain import train as train_module
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from pretrain import state as state_module
from pretrain import training_loop
from pretrain.processes.agreement import Refused
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.plan_warnings import warnings_about
from pretrain.step import train_step
from pretrain.train import Trainer
from tests.dist.training import base_arguments, train, write_corpus


def write_documents(prefix, lengths) -> str:
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length) % 90)
        writer.finish()
    return str(prefix)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


def plan_of(argv):
    return make_plan(load_config(spell(argv)), 1)


def test_a_corpus_of_single_tokens_is_refused_unless_documents_are_joined(tmp_path):
    argv = base_arguments(write_documents(tmp_path / "single", [1] * 3000))
    with pytest.raises(
        ValueError, match="phase 'main': data_path = .*single: no document gives a target"
    ):
        plan_of(argv)
    assert plan_of([*argv, "--no-document-masking"]).corpus


def test_one_source_of_single_tokens_among_others_is_warned_of(tmp_path, corpus):
    single = write_documents(tmp_path / "single", [1] * 3000)
    argv = base_arguments(corpus)
    argv[argv.index("--data-path") + 1 : argv.index("--data-path") + 2] = [
        "0.5",
        corpus,
        "0.5",
        single,
    ]
    assert f"{single}: no document gives a target, since all have a single token" in warnings_about(
        plan_of(argv)
    )


def test_a_validation_set_without_a_target_has_no_loss(pool, tmp_path, corpus):
    """A loss of 0.0000 over 0 targets would look like a perfect model."""
    single = write_documents(tmp_path / "single", [1] * 300)
    argv = base_arguments(
        corpus, valid_data_path=single, split="1", save=str(tmp_path / "save"), train_iters=1
    )
    assert any(
        text.startswith("validation set valid: has no target")
        for text in warnings_about(plan_of(argv))
    )
    assert pool.run(train, 1, argv) == ["done"]
    assert not (tmp_path / "save" / "validation.jsonl").exists()


def run(world: World, argv: list[str], skipped_from: int | None, is_nan: bool) -> str:
    """The outcome of a run whose steps from one on find no finite gradient, or that starts from NaN
    weights."""
    steps = []

    def skip(*args):
        steps.append(0)
        result = train_step(*args)
        is_skipped = skipped_from is not None and len(steps) >= skipped_from
        return dataclasses.replace(result, skipped=True) if is_skipped else result

    def spoil(stages, *_):
        with torch.no_grad():
            for stage in stages:
                for parameter in stage.parameters():
                    parameter.fill_(float("nan"))

    plan = make_plan(load_config(spell(argv)), world.size)
    with mock.patch.object(training_loop, "train_step", skip):
        with mock.patch.object(
            state_module, "initialize", spoil if is_nan else state_module.initialize
        ):
            try:
                return Trainer(plan, world).run()
            except Refused as error:
                return f"refused: {error}"


def events(save) -> list[tuple[str, int]]:
    found = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    return [(event["event"], event["step"]) for event in found]


def test_a_run_whose_steps_are_all_skipped_is_refused_and_saves_nothing(pool, corpus, tmp_path):
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=3, eval_iters=0, save_interval=1)
    for text in pool.run(run, 2, argv, None, True):
        assert text.startswith("refused: step 3: all 3 steps of phase main were skipped"), text
    assert find_published(tmp_path) is None
    assert ("refused", 3) in events(tmp_path)
    assert "done" not in dict(events(tmp_path))


def test_a_stop_before_the_first_update_is_refused_since_another_start_repeats_it(
    pool, corpus, tmp_path
):
    """With exit 75 the caller would start it again for ever."""
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=6, eval_iters=0, save_interval=1)
    for text in pool.run(run, 2, [*argv, "--exit-interval", "2"], None, True):
        assert text.startswith("refused: step 2: all 2 steps until the stop were skipped"), text
    assert find_published(tmp_path) is None


def test_nothing_is_saved_over_a_good_checkpoint_for_steps_that_did_nothing(pool, corpus, tmp_path):
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=5, eval_iters=0, save_interval=2)
    (text,) = pool.run(run, 1, argv, 3, False)
    assert text.startswith("refused: step 5: the last 3 of 5 steps of phase main were"), text
    assert find_published(tmp_path).name == "iter_0000002"
    assert ("unsaved", 4) in events(tmp_path)


def test_a_stop_among_skipped_steps_moves_on_and_the_end_is_that_of_one_process(
    pool, corpus, tmp_path
):
    """Each start trains two steps; from the third on all are skipped."""
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=6, eval_iters=0)
    argv = [*argv, "--exit-interval", "2"]
    assert pool.run(run, 1, argv, 3, False) == ["stopped"]
    assert pool.run(run, 1, argv, 1, False) == ["stopped"]
    assert events(tmp_path)[-3:] == [("skipped", 4), ("save", 4), ("stopped", 4)]
    assert Progress.read(find_published(tmp_path)).skipped_in_a_row == 2
    (text,) = pool.run(run, 1, argv, 1, False)
    assert text.startswith("refused: step 6: the last 4 of 6 steps of phase main were"), text
    assert find_published(tmp_path).name == "iter_0000004"


def test_a_phase_is_judged_by_all_its_steps_whichever_process_trained_them(pool, corpus, tmp_path):
    """One skipped step at the end, alone in its process, is no failure."""
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=4, eval_iters=0)
    assert pool.run(run, 1, [*argv, "--exit-interval", "3"], None, False) == ["stopped"]
    assert pool.run(run, 1, argv, 1, False) == ["done"]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert "of 1 steps since the start 1 were skipped" in last["text"]


def test_spoilt_weights_are_no_success_however_few_steps_are_left(pool, corpus, tmp_path):
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=4, eval_iters=0)
    assert pool.run(run, 1, [*argv, "--exit-interval", "3"], None, False) == ["stopped"]
    for text in pool.run(run_from_spoilt_weights, 2, argv):
        assert text.startswith("refused: step 4: weights are NaN or infinite"), text
    assert find_published(tmp_path).name == "iter_0000003"


def run_from_spoilt_weights(world: World, argv: list[str]) -> str:
    """The outcome of a run after whose load one weight of the last rank is NaN."""
    build = train_module.build_state

    def spoilt(*arguments):
        state = build(*arguments)
        if world.rank == world.size - 1:
            with torch.no_grad():
                own_shard(next(state.stages[-1].parameters())).view(-1)[0] = float("nan")
        return state

    with mock.patch.object(train_module, "build_state", spoilt):
        return run(world, argv, None, False)


PHASES = """phases:
  - {name: base, seq_length: 64, train_tokens: 512, global_batch_tokens: 256}
  - {name: long, seq_length: 128, train_tokens: 512, global_batch_tokens: 256}
"""


def phased(corpus, folder, save, **settings) -> list[str]:
    """Two phases of two steps."""
    argv = base_arguments(corpus, save=str(save), eval_iters=0, **settings)
    for flag in ("--train-iters", "--global-batch-size"):
        at = argv.index(flag)
        del argv[at : at + 2]
    (folder / "phases.yaml").write_text(PHASES)
    return [*argv, "--config", str(folder / "phases.yaml")]


def test_a_later_phase_that_is_skipped_is_no_success(pool, corpus, tmp_path):
    save = tmp_path / "save"
    (text,) = pool.run(run, 1, phased(corpus, tmp_path, save), 3, False)
    assert text.startswith("refused: step 4: all 2 steps of phase long were skipped"), text
    assert find_published(save).name == "iter_0000002"


def test_a_stop_at_the_end_of_a_phase_is_judged_and_marked_as_its_end(pool, corpus, tmp_path):
    argv = [*phased(corpus, tmp_path, tmp_path / "good"), "--exit-interval", "2"]
    assert pool.run(run, 1, argv, None, False) == ["stopped"]
    assert Progress.read(find_published(tmp_path / "good")).ends_phase
    argv = [*phased(corpus, tmp_path, tmp_path / "bad"), "--exit-interval", "2"]
    (text,) = pool.run(run, 1, argv, 1, False)
    assert text.startswith("refused: step 2: all 2 steps of phase base were skipped"), text


def test_a_run_with_some_skipped_steps_is_done_and_says_so(pool, corpus, tmp_path):
    argv = base_arguments(corpus, save=str(tmp_path), train_iters=4, eval_iters=0, save_interval=2)
    assert pool.run(run, 1, argv, 3, False) == ["done"]
    last = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
    assert "of 4 steps since the start 2 were skipped" in last["text"]
    assert find_published(tmp_path).name == "iter_0000004", "the clock of the end"


def test_steps_without_a_target_are_counted_and_a_run_of_them_alone_is_refused(pool, tmp_path):
    corpus = write_documents(tmp_path / "corpus", [1] * 1500 + [40] + [1] * 1500)
    argv = base_arguments(
        corpus, save=str(tmp_path / "save"), train_iters=11, eval_iters=0, split="1"
    )
    outcome = pool.run(run, 1, argv, None, False)
    lines = [
        json.loads(line) for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    ]
    empty = [line["step"] for line in lines if line["num_targets"] == 0]
    assert 9 <= len(empty) <= 10, "39 targets of 2,816 of 3,039 tokens, in one step or two"
    assert outcome == ["done"]
    assert [step for kind, step in events(tmp_path / "save") if kind == "no target"] == empty
    last = json.loads((tmp_path / "save" / "events.jsonl").read_text().splitlines()[-1])
    assert f"{len(empty)} had no target" in last["text"]

    before = min(line["step"] for line in lines if line["num_targets"]) - 1
    assert before > 0, "choose another seed"
    argv = base_arguments(
        corpus, save=str(tmp_path / "short"), train_iters=before, eval_iters=0, split="1"
    )
    (text,) = pool.run(run, 1, argv, None, False)
    assert text.startswith(f"refused: step {before}: no step of phase main had a target"), text
    assert find_published(tmp_path / "short") is None

    # Stopped among them and then told to end there: not done either.
    argv = base_arguments(
        corpus, save=str(tmp_path / "cut"), train_iters=11, eval_iters=0, split="1"
    )
    stop = ["--exit-interval", str(before)]
    assert pool.run(run, 1, [*argv, *stop], None, False) == ["stopped"]
    (text,) = pool.run(run, 1, [*argv, "--train-iters", str(before)], None, False)
    assert text.startswith(f"refused: step {before}: no step of phase main had a target"), text
