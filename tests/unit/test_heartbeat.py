"""pretrain/processes/heartbeat.py: how long a part of a run may be silent."""

import math

import pytest

from launch.rank_view import read_record
from pretrain.processes.heartbeat import Heartbeat

TIMEOUT_MINUTES = 10.0


@pytest.fixture
def heartbeat(tmp_path):
    made = Heartbeat(tmp_path / "rank0", rank=0)
    made.set_limits(30.0, TIMEOUT_MINUTES)
    yield made
    made.close()


def patience(tmp_path) -> float:
    return read_record((tmp_path / "rank0").read_bytes(), 0).patience


def test_what_is_slow_ends_before_the_others_give_up(tmp_path, heartbeat):
    heartbeat.enter_slow("making the groups")
    assert patience(tmp_path) == pytest.approx(0.9 * 60 * TIMEOUT_MINUTES)


def test_a_save_has_the_time_that_its_own_collectives_have(tmp_path, heartbeat):
    heartbeat.enter_save("waiting for the last save")
    assert patience(tmp_path) == pytest.approx(0.9 * 3600)


def test_a_plan_takes_as_long_as_it_takes(tmp_path, heartbeat):
    heartbeat.enter_plan()
    assert patience(tmp_path) == math.inf


def test_only_the_first_steps_of_a_phase_may_compile(tmp_path, heartbeat):
    heartbeat.begin_phase()
    found = []
    for step in range(3):
        heartbeat.begin_step(step)
        heartbeat.enter("forward")
        found.append(patience(tmp_path) > 0)
        heartbeat.end_step()
    assert found == [True, True, False]
