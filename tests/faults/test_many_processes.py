"""A run of many processes on one machine, on every axis at once."""

import pytest

from tests.dist.training import base_arguments, losses, write_corpus
from tools.faults.launched_run import LaunchedRun

LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "context_parallel_size": 4,
}
PROCESSES = 32
"""Twice what the layout needs: two data parallel copies."""


@pytest.mark.long
def test_thirty_two_processes_train_on_every_axis(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=60)
    arguments = base_arguments(
        corpus,
        train_iters=2,
        eval_iters=0,
        hidden_size=64,
        num_attention_heads=8,
        num_query_groups=8,
        **LAYOUT,
    )
    run = LaunchedRun(arguments, tmp_path / "save", PROCESSES)
    try:
        run.wait_until_done()
    finally:
        run.end()
    assert list(losses(tmp_path / "save")) == [1, 2]
    said = "".join(run.lines)
    assert "tp 2 x pp 2" in said and "x cp 4 x dp 2 on cpu" in said, said
    assert not run.workers(), "a worker was left behind"
