"""The loss of each source of a blend is, on any layout, that of its samples one by one."""

import json

import numpy as np
import pytest
import torch

from data.mixture import fresh_mixture
from tests.dist.parity import TOLERANCE, Case, memory_stream
from tests.dist.training import base_arguments, train, write_corpus
from tests.marks import cases
from tests.measuring import measured

WEIGHTS = (0.5, 0.2, 0.3)
LAYOUTS = {
    "tp2 cp2": Case(tp=2, cp=2, micro_batch_size=2),
    "pp2 dp2": Case(pp=2, dp=2, micro_batch_size=2),
    "cp4 two levels": Case(cp=4, context_levels=(2, 2), micro_batch_size=4),
    "pp2 ZBV": Case(pp=2, schedule="ZBV", model=dict(num_layers=5), micro_batch_size=2),
    "tp2 sequence parallel": Case(tp=2, dp=2, sequence_parallel=True),
}


def blend(case: Case):
    """Three sources whose documents differ in length."""
    streams = [memory_stream(case.lengths[i:], seed=i) for i in range(len(WEIGHTS))]
    return fresh_mixture(list(zip(WEIGHTS, streams, strict=True)), case.seq_length)


def losses_by_source(world, case: Case) -> dict:
    layout, _, _, stepper, loader = case.build(world)
    loader.mixture = blend(case)
    batches = loader.read(0)
    source_losses = torch.zeros(len(WEIGHTS), dtype=torch.float64)
    loss, num_targets = stepper.start(batches, train=True, source_losses=source_losses)
    found = measured(batches, layout, source_losses=source_losses)
    return {
        "losses": found.losses_by_source,
        "targets": found.targets_by_source,
        "whole": (float(loss), int(num_targets)),
    }


def losses_by_sample(world, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Loss and targets of each sample, which is a microbatch of its own, without gradients."""
    _, _, _, stepper, loader = case.build(world)
    loader.mixture = blend(case)
    scores = stepper.score(loader.read(0))
    return scores.loss_sums, scores.num_targets


@pytest.mark.parametrize(
    "name", cases(LAYOUTS, lambda name: name in ("pp2 ZBV", "tp2 sequence parallel"))
)
def test_the_loss_of_each_source_is_that_of_its_samples_one_by_one(pool, name):
    case = LAYOUTS[name]
    single = case.single()
    ((sums, targets),) = pool.run(losses_by_sample, 1, single)
    sources, _ = blend(single).order.draw(0, case.samples)
    assert set(sources.tolist()) == {0, 1, 2}, "every source has a sample in the batch"
    expected = [sums[sources == source].sum() for source in range(3)]
    counted = [int(targets[sources == source].sum()) for source in range(3)]
    for result in pool.run(losses_by_source, case.world_size, case):
        assert result["targets"] == counted
        np.testing.assert_allclose(result["losses"], expected, rtol=TOLERANCE)
        loss, num_targets = result["whole"]
        assert sum(counted) == num_targets
        np.testing.assert_allclose(sum(result["losses"]) / num_targets, loss, rtol=TOLERANCE)


def test_a_run_over_two_sources_writes_the_loss_of_each(pool, tmp_path):
    first = write_corpus(tmp_path / "first", documents=40)
    second = write_corpus(tmp_path / "second", documents=40, seed=4)
    argv = base_arguments(first, train_iters=2, save=str(tmp_path / "save"), eval_iters=0)
    at = argv.index(first)
    argv[at : at + 1] = ["0.5", first, "0.5", second]
    argv += ["--micro-batch-size", "2"]
    assert pool.run(train, 2, argv) == ["done", "done"]
    for line in (tmp_path / "save" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses = record["source_losses"]
        assert set(losses) == set(record["sources"]), losses
        assert min(losses.values()) <= record["loss"] <= max(losses.values()), losses
        # 0 where ranks were busy all the time, as on a machine with other work.
        assert 0 <= record["communication_share"] < 1, record["communication_share"]
        assert 0 < record["data_share"] <= 1, record["data_share"]
        assert record["host_memory_bytes"] > 50 * 2**20, record["host_memory_bytes"]
        assert record["peak_reserved_bytes"] is None
