"""data/source_runs.py: the runs of a slice are those of its tokens, looked at one by one."""

import numpy as np

from data.source_runs import NO_SOURCE, SourceRun, source_runs


def test_the_runs_of_a_slice_say_of_each_token_where_it_comes_from():
    generator = np.random.default_rng(1)
    sources = [2, 2, 0, 1, 1]
    seq_length = 6
    # Two pieces, out of order and across samples, as context parallelism by two levels deals them.
    pieces = [(16, 25), (3, 8)]
    has_target = generator.random(14) < 0.5
    of_token = np.repeat(sources, seq_length)
    slice_sources = np.concatenate([of_token[low:high] for low, high in pieces])
    runs = source_runs(sources, seq_length, pieces, has_target)
    shown = np.concatenate([np.full(run.end - run.begin, run.source) for run in runs])
    assert shown.tolist() == slice_sources.tolist()
    for run in runs:
        assert run.num_targets == has_target[run.begin : run.end].sum(), run
    assert [run.source for run in runs] == [0, 1, 2], "neighbours of one source are one run"


def test_a_sample_without_a_source_asks_for_nothing():
    assert source_runs([NO_SOURCE], 4, [(0, 4)], np.ones(4, dtype=bool)) == ()
    (run,) = source_runs([0], 4, [(0, 4)], np.ones(4, dtype=bool))
    assert run == SourceRun(0, 4, 0, 4)
