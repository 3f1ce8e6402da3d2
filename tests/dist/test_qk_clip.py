"""Whole runs with QK-clip: what they write, and that a stop and another layout change nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.dist.parity import relative_error
from tests.dist.training import base_arguments, stored, train, write_corpus


def facts_of(save: Path) -> list[tuple[float, int]]:
    """What each step says of its logits."""
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    return [(line["max_attention_logit"], line["qk_clipped_heads"]) for line in lines]


def test_a_run_goes_on_with_qk_clip_on_another_layout(pool, tmp_path):
    prefix = write_corpus(tmp_path / "corpus")

    def arguments(save: str, **settings) -> list[str]:
        settings |= dict(save=str(tmp_path / save), fp64=True, eval_iters=0)
        clip = dict(qk_clip=True, qk_clip_threshold=0.05, init_method_std=0.2)
        return base_arguments(prefix, **clip, **settings)

    assert pool.run(train, 1, arguments("whole")) == ["done"]
    tp2 = arguments("cut", tensor_model_parallel_size=2, exit_interval=3)
    assert pool.run(train, 2, tp2) == ["stopped"] * 2
    cp2 = arguments("cut", context_parallel_size=2)
    assert pool.run(train, 2, cp2) == ["done"] * 2
    expected = facts_of(tmp_path / "whole")
    found = facts_of(tmp_path / "cut")
    assert [heads for _, heads in found] == [heads for _, heads in expected]
    assert all(heads > 0 for _, heads in expected)
    assert [logit for logit, _ in found] == pytest.approx([logit for logit, _ in expected], rel=1e-9)
    theirs = stored(tmp_path / "cut")
    for name, tensor in stored(tmp_path / "whole").items():
        if np.abs(tensor).max() > 0:
            error = relative_error(theirs[name], tensor)
            assert error < 1e-9, f"{name}: {error}"
