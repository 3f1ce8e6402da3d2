"""A profiled run computes the same bit for bit, and leaves a trace per rank with a step's parts."""

import gzip
import json

import numpy as np
import pytest

from tests.dist.training import base_arguments, losses, stored, train, write_corpus


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory):
    """The folders of a run of four steps and of the same profiled, each in two processes."""
    root = tmp_path_factory.mktemp("profile")
    corpus = write_corpus(root / "corpus", documents=60)
    for name in ("plain", "profiled"):
        argv = base_arguments(corpus, train_iters=4, save=str(root / name), eval_iters=0)
        if name == "profiled":
            argv += "--profile --profile-step-start 1 --profile-step-end 3".split()
            argv += ["--profile-ranks", "0", "1"]
        assert pool.run(train, 2, argv) == ["done", "done"]
    return root


def test_a_profiled_run_is_the_same_bit_for_bit(runs):
    assert losses(runs / "plain") == losses(runs / "profiled")
    plain = stored(runs / "plain")
    profiled = stored(runs / "profiled")
    assert plain.keys() == profiled.keys()
    for name, tensor in plain.items():
        assert np.array_equal(tensor, profiled[name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trace_has_the_parts_of_the_chosen_steps_and_no_others(runs, rank):
    folder = runs / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps2-3-rank0.json.gz",
        "steps2-3-rank1.json.gz",
    ]
    with gzip.open(folder / f"steps2-3-rank{rank}.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    # Four samples of 64 tokens on two data ranks: two microbatches in each of two steps.
    assert names.count("forward") == 4 and names.count("backward") == 4, set(names)
    for part in ("reading data", "reducing gradients", "updating the weights"):
        assert names.count(part) == 2, (part, names)
    assert any(str(event.get("name")).startswith("gloo:") for event in events)
