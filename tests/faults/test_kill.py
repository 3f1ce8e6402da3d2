"""A real run through launch/train.sh, a worker killed in the middle: the run goes on and ends as if nothing was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.dist.training import base_arguments, losses, stored, train, write_corpus

ROOT = Path(__file__).resolve().parents[2]
STEPS, INTERVAL = 300, 25


def workers_of(save: Path) -> list[int]:
    """Process ids of the trainers of this run, from /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"pretrain.train" in words and str(save).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(folder.name))
    return found


def launch(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "ITHACA_PYTHON": sys.executable,
                                "RETRY_WAIT": "0", "GRACE": "20"}
    return subprocess.Popen(["bash", str(ROOT / "launch" / "train.sh"), *argv], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 600
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < limit, "the run did not get that far"
        time.sleep(0.02)


def end(run: subprocess.Popen, save: Path) -> None:
    """Leave nothing behind, whatever happened."""
    if run.poll() is None:
        run.terminate()
        try:
            run.wait(30)
        except subprocess.TimeoutExpired:
            run.kill()
    for worker in workers_of(save):
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, 0), (signal.SIGTERM, 75)], ids=["kill -9", "SIGTERM"])
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(pool, tmp_path, number, code):
    corpus = write_corpus(tmp_path / "corpus")
    settings = dict(train_iters=STEPS, save_interval=INTERVAL, global_batch_size=2, seq_length=32)
    argv = base_arguments(corpus, save=str(tmp_path / "disturbed"), **settings)
    run = launch(argv)
    try:
        wait_for_lines(tmp_path / "disturbed" / "metrics.jsonl", 40, run)
        if number == signal.SIGKILL:
            os.kill(workers_of(tmp_path / "disturbed")[-1], number)
        else:
            run.send_signal(number)
        output, _ = run.communicate(timeout=900)
        assert run.returncode == code, output
        if code == 75:  # saved and stopped as asked: the same command goes on
            run = launch(argv)
            output, _ = run.communicate(timeout=900)
            assert run.returncode == 0, output
        # A start from step 0 would end with the same weights.
        assert "start: continuing" in output and "iter_0000" in output.split("start: continuing")[1]
    finally:
        end(run, tmp_path / "disturbed")
    assert not workers_of(tmp_path / "disturbed"), "a worker was left behind"
    assert pool.run(train, 2, base_arguments(corpus, save=str(tmp_path / "straight"), **settings)) == ["done"] * 2
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
    expected, found = stored(tmp_path / "straight"), stored(tmp_path / "disturbed")
    assert expected.keys() == found.keys()
    assert all(np.array_equal(tensor, found[name]) for name, tensor in expected.items())
