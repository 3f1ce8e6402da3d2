"""What is called a spike, from the last steps alone."""

import json
import math

import pytest

from pretrain.config.guards_config import GuardsConfig
from pretrain.guards.spikes import NO_LIMITS, SpikeHistory, SpikeWatch, upper_limit


def watch(policy: str = "skip", window: int = 8) -> SpikeWatch:
    return SpikeWatch(GuardsConfig(spike_policy=policy, spike_window=window), SpikeHistory())


def steps(watcher: SpikeWatch, losses, phase: str = "main", batch: int = 256) -> list[bool]:
    """Whether each of the steps is a spike; the gradient norm stays at 1."""
    found = []
    for loss in losses:
        watcher.before_step(phase, batch)
        found.append(watcher.after_step(loss, 1.0) is not None)
    return found


def test_the_limit_is_the_median_and_ten_deviations_above_it():
    # By hand: median 3, deviations 2 1 0 1 2, their median 1, sigma 1.4826.
    assert upper_limit([1, 2, 3, 4, 5], 10, 0.05) == pytest.approx(3 + 14.826)


def test_one_earlier_spike_does_not_move_the_limit():
    assert upper_limit([1, 2, 3, 4, 1000], 10, 0.05) == pytest.approx(3 + 14.826)


def test_a_flat_curve_gives_no_alarm_within_the_floor():
    assert steps(watch(), [2.0] * 8 + [2.09, 2.11]) == [False] * 9 + [True]


def test_a_gradient_norm_counts_too():
    watcher = watch()
    steps(watcher, [2.0] * 8)
    watcher.before_step("main", 256)
    spike = watcher.after_step(2.0, 2.5)
    assert str(spike) == "gradient norm 2.5 above 2"


def test_nothing_is_called_a_spike_before_half_a_window():
    assert steps(watch(), [2.0] * 3 + [9.0]) == [False] * 4
    assert steps(watch(), [2.0] * 4 + [9.0]) == [False] * 4 + [True]


def test_another_phase_or_a_smaller_batch_begins_again_and_a_larger_one_does_not():
    for phase, batch, is_spike in (
        ("next", 256, False),
        ("main", 128, False),
        ("main", 512, True),
    ):
        watcher = watch()
        steps(watcher, [2.0] * 8)
        assert steps(watcher, [9.0], phase, batch) == [is_spike], (phase, batch)


def test_steps_that_are_not_finite_are_not_remembered():
    watcher = watch()
    steps(watcher, [2.0] * 8)
    assert steps(watcher, [math.nan, math.inf]) == [False, False]
    assert watcher.history.losses == [2.0] * 8


def test_a_skipped_spike_is_forgotten_and_one_that_trained_is_not():
    """A new level that is trained on is called a spike for half a window at most."""
    assert steps(watch("skip"), [2.0] * 8 + [9.0] * 8) == [False] * 8 + [True] * 8
    assert sum(steps(watch("warn"), [2.0] * 8 + [9.0] * 8)) == 4


def test_a_policy_that_only_warns_gives_the_device_no_limits():
    for policy, is_limited in (("warn", False), ("skip", True), ("rewind", True)):
        watcher = watch(policy)
        steps(watcher, [2.0] * 8)
        assert (watcher.before_step("main", 256) != NO_LIMITS) == is_limited


def test_a_falling_curve_and_noise_give_no_alarm():
    # Exponential decay with a deterministic ripple of 3 %.
    losses = [2 + 8 * math.exp(-i / 50) + 0.1 * math.sin(12.9898 * i) for i in range(400)]
    assert not any(steps(watch(window=32), losses))


def test_decisions_are_the_same_after_the_history_went_through_a_checkpoint():
    losses = [2 + 0.3 * math.sin(12.9898 * i) for i in range(40)]
    losses[30] = 9.0
    whole = watch(window=16)
    first = watch(window=16)
    expected = steps(whole, losses)
    found = steps(first, losses[:27])
    stored = json.loads(json.dumps(first.history.to_json()))
    second = SpikeWatch(first.settings, SpikeHistory.from_json(stored))
    assert found + steps(second, losses[27:]) == expected
    assert expected.index(True) == 30
    assert second.history == whole.history
