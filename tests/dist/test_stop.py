"""A stop signal on one rank: all ranks follow it at the next microbatch, and nothing is lost or
done twice by it."""

import json
import os
import signal
from unittest import mock

import numpy as np
import pytest
import yaml

from parallel.layout import World
from pretrain import train as train_module
from pretrain.processes import stop
from pretrain.config.flags import spell
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.step import Stepper
from pretrain.train import Trainer
from pretrain.training_loop import TrainingLoop
from tests.dist.training import base_arguments, losses, stored, train, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus")


class Watched(TrainingLoop):
    """Gets a signal at a place: ("evaluation" | "step" | "save", its step, microbatch from 1; 0 =
    as it begins)."""

    at: tuple[str, int, int] | None = None

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.place = ("", 0)
        self.microbatches = 0
        self.after = None
        """Microbatches that began after the signal."""

    def _enter(self, kind: str, step: int) -> None:
        self.place = (kind, step)
        self.microbatches = 0
        self._pass()

    def _pass(self) -> None:
        if (*self.place, self.microbatches) == self.at:
            self.after = 0
            os.kill(os.getpid(), signal.SIGTERM)

    def begin_microbatch(self) -> None:
        self.microbatches += 1
        self._pass()
        self.stop.check()
        if self.after is not None:
            self.after += 1

    def _evaluate(self, stepper, phase):
        self._enter("evaluation", self.state.step)
        return super()._evaluate(stepper, phase)

    def _step(self, stepper, phase):
        self._enter("step", self.state.step + 1)
        return super()._step(stepper, phase)

    def _save(self, phase, **settings):
        self._enter("save", self.state.step)
        return super()._save(phase, **settings)


def train_with_signal(
    world: World, argv: list[str], at: tuple[str, int, int]
) -> tuple[str, int | None]:
    """-> (outcome, microbatches that this rank began after the signal); the last rank gets it."""
    plan = make_plan(load_config(spell(argv)), world.size)
    trainer = Trainer(plan, world)
    with (
        mock.patch.object(Watched, "at", at if world.rank == world.size - 1 else None),
        mock.patch.object(train_module, "TrainingLoop", Watched),
        mock.patch.object(stop, "CHECK_SECONDS", 0.0),
        mock.patch.object(Stepper, "_check_stop", lambda _: trainer.loop.begin_microbatch()),
    ):
        outcome = trainer.run()
    return outcome, trainer.loop.after


def lines(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_losses(records: list[dict]) -> list[tuple]:
    return [
        (record["step"], record["phase"], record["kind"], record["seq_length"])
        for record in records
    ]


def check_equal_runs(straight, disturbed) -> None:
    assert without_losses(lines(disturbed, "validation.jsonl")) == without_losses(
        lines(straight, "validation.jsonl")
    )
    assert lines(disturbed, "validation.jsonl") == lines(straight, "validation.jsonl")
    assert losses(disturbed) == losses(straight)
    expected = stored(straight)
    found = stored(disturbed)
    assert expected.keys() == found.keys()
    different = [
        name for name, tensor in expected.items() if not np.array_equal(tensor, found[name])
    ]
    assert not different, different


COMMON = dict(train_iters=4, eval_interval=2, eval_iters=2, save_interval=2, context_gain_cut=16)
LENGTHS = ["--eval-seq-lengths", "32", "64"]
ZERO3 = dict(data_parallel_sharding_strategy="optim_grads_params")
PIPELINE = dict(pipeline_model_parallel_size=2)
CASES = {
    "first evaluation": ({}, ("evaluation", 0, 3)),
    "evaluation": ({}, ("evaluation", 2, 3)),
    "evaluation as it begins": ({}, ("evaluation", 2, 0)),
    "last evaluation": ({}, ("evaluation", 4, 3)),
    "step": ({}, ("step", 2, 2)),
    "step, zero 3": (ZERO3, ("step", 2, 2)),
    "step as it begins": ({}, ("step", 3, 0)),
    "save": ({}, ("save", 2, 0)),
    "evaluation, pipeline": (PIPELINE, ("evaluation", 2, 2)),
    "step, pipeline": (PIPELINE, ("step", 3, 1)),
}
"""Name -> (settings, where the signal comes)."""
IN_EVERY_RUN = ("evaluation", "step, zero 3")
STRAIGHT: dict[str, object] = {}


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.long)
        for name in CASES
    ],
)
def test_all_ranks_stop_at_the_next_microbatch_and_nothing_is_lost(
    pool, corpus, tmp_path_factory, name
):
    settings, at = CASES[name]
    layout = repr(settings)
    if layout not in STRAIGHT:
        STRAIGHT[layout] = tmp_path_factory.mktemp("straight")
        argv = base_arguments(corpus, save=str(STRAIGHT[layout]), **COMMON, **settings) + LENGTHS
        assert pool.run(train, 2, argv) == ["done"] * 2
    save = tmp_path_factory.mktemp("disturbed")
    argv = base_arguments(corpus, save=str(save), **COMMON, **settings) + LENGTHS
    results = pool.run(train_with_signal, 2, argv, at)
    assert [outcome for outcome, _ in results] == ["stopped"] * 2
    assert results[1][1] == 0, "no microbatch begins after the signal"
    assert pool.run(train, 2, argv) == ["done"] * 2
    check_equal_runs(STRAIGHT[layout], save)


@pytest.mark.parametrize(
    "at, events",
    [
        (("evaluation", 0, 3), [("start", 0), ("phase", 0), ("stopped", 0)]),
        (("evaluation", 2, 3), [("start", 0), ("phase", 0), ("save", 2), ("stopped", 2)]),
        (("save", 2, 0), [("start", 0), ("phase", 0), ("save", 2), ("stopped", 2)]),
        (("step", 3, 2), [("start", 0), ("phase", 0), ("save", 2), ("stopped", 2)]),
        (("step", 2, 2), [("start", 0), ("phase", 0), ("save", 1), ("stopped", 1)]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_each_step_is_saved_once(pool, corpus, tmp_path, at, events):
    argv = base_arguments(corpus, save=str(tmp_path), **COMMON)
    assert pool.run(train_with_signal, 1, argv, at) == [("stopped", 0)]
    assert [(event["event"], event["step"]) for event in lines(tmp_path, "events.jsonl")] == events


def test_the_last_evaluation_of_a_phase_is_made_up_for_on_its_layout(pool, corpus, tmp_path):
    """The next phase has another layout: the evaluation of the one that is over comes first, and
    only once."""
    phases = [
        dict(name="a", seq_length=64, train_tokens=512, global_batch_tokens=256),
        dict(
            name="b",
            seq_length=64,
            train_tokens=512,
            global_batch_tokens=256,
            tensor_model_parallel_size=2,
        ),
    ]
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"phases": phases}))
    argv = base_arguments(corpus)
    for flag in ("--train-iters", "--seq-length", "--global-batch-size"):
        at = argv.index(flag)
        del argv[at : at + 2]
    argv = ["--config", str(config), *argv, *LENGTHS]
    straight = [*argv, "--save", str(tmp_path / "straight")]
    assert [pool.run(train, 2, straight)[0] for _ in range(2)] == ["again", "done"]
    disturbed = [*argv, "--save", str(tmp_path / "disturbed")]
    assert pool.run(train_with_signal, 2, disturbed, ("evaluation", 2, 2)) == [
        ("stopped", None),
        ("stopped", 0),
    ]
    assert [pool.run(train, 2, disturbed)[0] for _ in range(3)] == ["again", "done", "done"]
    check_equal_runs(tmp_path / "straight", tmp_path / "disturbed")


def train_late(world: World, argv: list[str]) -> str:
    """The outcome of a run whose --exit-duration-in-mins is over from the first step on."""
    trainer = Trainer(make_plan(load_config(spell(argv)), world.size), world)
    trainer.started -= 3600
    return trainer.run()


@pytest.mark.parametrize("eval_iters, outcomes", [(0, ["done"]), (1, ["stopped", "done"])])
def test_a_stop_in_the_last_step_leaves_only_an_evaluation_to_do(
    pool, corpus, tmp_path, eval_iters, outcomes
):
    argv = base_arguments(
        corpus, save=str(tmp_path), train_iters=1, eval_iters=eval_iters, exit_duration_in_mins=1
    )
    assert [pool.run(train_late, 1, argv)[0] for _ in outcomes] == outcomes
    if eval_iters:
        assert [record["step"] for record in lines(tmp_path, "validation.jsonl")] == [0, 1]
