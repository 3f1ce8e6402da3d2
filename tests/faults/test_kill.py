"""A real run through launch/train.sh, a worker killed in the middle: the run goes on and ends as if
nothing was."""

import os
import signal
import time

import numpy as np
import pytest

from tests.dist.training import base_arguments, losses, stored, train, write_corpus
from tools.faults.launched_run import LaunchedRun

STEPS = 300
INTERVAL = 25


def wait_for_lines(run: LaunchedRun, count: int) -> None:
    limit = time.monotonic() + 600
    while run.last_step() < count:
        assert run.is_alive() and time.monotonic() < limit, "the run did not get that far"
        time.sleep(0.02)


@pytest.mark.long  # test_crossing.py kills, and test_train_sh.py signals, in every run
@pytest.mark.parametrize(
    "number, code", [(signal.SIGKILL, 0), (signal.SIGTERM, 75)], ids=["kill -9", "SIGTERM"]
)
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(pool, tmp_path, number, code):
    corpus = write_corpus(tmp_path / "corpus")
    settings = dict(train_iters=STEPS, save_interval=INTERVAL, global_batch_size=2, seq_length=32)
    argv = base_arguments(corpus, **settings)
    save = tmp_path / "disturbed"
    run = LaunchedRun(argv, save, processes=2)
    try:
        wait_for_lines(run, 40)
        if number == signal.SIGKILL:
            os.kill(run.workers()[-1], number)
        else:
            run.process.send_signal(number)
        found, output = run.wait(timeout=900)
        assert found == code, output
        if code == 75:  # saved and stopped as asked: the same command goes on
            run = LaunchedRun(argv, save, processes=2)
            found, output = run.wait(timeout=900)
            assert found == 0, output
        # A start from step 0 would end with the same weights.
        assert "start: continuing" in output and "iter_0000" in output.split("start: continuing")[1]
    finally:
        run.end()
    assert not run.workers(), "a worker was left behind"
    assert (
        pool.run(train, 2, base_arguments(corpus, save=str(tmp_path / "straight"), **settings))
        == ["done"] * 2
    )
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
    expected = stored(tmp_path / "straight")
    found = stored(tmp_path / "disturbed")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(tensor, found[name]) for name, tensor in expected.items())
