"""Ranks that differ, and a signal in the middle of an evaluation, through launch/train.sh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dist.training import base_arguments, write_corpus
from tools.faults.launched_run import LaunchedRun, free_port

ROOT = Path(__file__).resolve().parents[2]


def run_two_nodes(folder: Path, flags: list[list[str]]) -> list[tuple[int, str]]:
    """launch/train.sh twice, as on two machines, each with its own flags -> (exit code, output)."""
    port = free_port()
    processes = []
    for node, argv in enumerate(flags):
        environment = os.environ | {
            "NNODES": "2",
            "NODE_RANK": str(node),
            "NPROC_PER_NODE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "ITHACA_PYTHON": sys.executable,
            "RETRY_WAIT": "0",
        }
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "train.sh"), *argv],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        processes.append(process)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()
    return [
        (process.returncode, output) for process, output in zip(processes, outputs, strict=True)
    ]


DIFFERENT = {
    "clip_grad": (0.5, "clip_grad: must be the same on all nodes (node 0 ("),
    # Nodes are compared before the rules of a setting are checked.
    "lr": (-1, "lr: must be the same on all nodes (node 0 ("),
}
"""Setting -> its value on the second node, and what both nodes say."""


@pytest.mark.long  # two starts of torch; dist/test_agreement.py has it without a launcher
@pytest.mark.parametrize("name", DIFFERENT)
def test_two_nodes_that_differ_are_refused_once_and_not_tried_again(tmp_path, name):
    value, expected = DIFFERENT[name]
    corpus = write_corpus(tmp_path / "corpus", documents=40)
    argv = base_arguments(corpus, train_iters=2)
    other = base_arguments(corpus, train_iters=2, **{name: value})
    for code, output in run_two_nodes(tmp_path, [argv, other]):
        assert code == 2, output
        said = [line for line in output.splitlines() if expected in line]
        assert len(said) == 1, output
        assert "error" in said[0].split(name)[0], output
        assert "restart" not in output
        assert "Traceback" not in output


@pytest.mark.long
def test_a_signal_in_a_long_evaluation_ends_it_at_once(tmp_path):
    """The evaluation would take many minutes; the grace period is over long before."""
    argv = base_arguments("unused", train_iters=9, eval_iters=10**6, split="50,50", log_interval=1)
    at = argv.index("--data-path")
    argv[at : at + 2] = ["--mock-data"]
    at = argv.index("--tokenizer-type")
    del argv[at : at + 2]
    run = LaunchedRun(argv, tmp_path / "save", processes=2)
    try:
        events = tmp_path / "save" / "events.jsonl"
        while not events.exists() or '"phase"' not in events.read_text():
            assert run.is_alive(), "".join(run.lines)
            time.sleep(0.05)
        sent = time.time()
        run.process.send_signal(signal.SIGTERM)
        code, output = run.wait(timeout=300)
    finally:
        run.end()
    assert code == 75, output
    last = json.loads(events.read_text().splitlines()[-1])
    print(f"stopped {last['time'] - sent:.2f} s after the signal")
    assert last["event"] == "stopped", last
    assert not (tmp_path / "save" / "validation.jsonl").exists()
