"""The benchmark of recompute: four ways with one gradient, and what each of them keeps."""

import torch

from tools.bench.recompute import Arguments, compare


def test_ours_keep_no_more_than_torchs_own():
    """`compare` itself refuses ways whose gradients differ."""
    arguments = Arguments(layers=2, hidden=64, tokens=128, seconds=0.0)
    kept = {row[1]: float(row[2]) for row in compare(arguments, torch.float32)}
    assert kept["full"] < kept["attention_kept"], kept
    assert kept["full"] <= kept["full, torch"], kept
    assert kept["attention_kept"] <= kept["attention_kept, torch"], kept
