"""tools/faults/kills.py: when a kill is over, and where the run must go on after it."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tools.faults import kills
from tools.faults.kills import Kill, Killer, wrong_starts


@dataclass
class OtherRun:
    """Stands for a run of which only this is asked."""

    save: Path
    begun: list[dict] = field(default_factory=list)
    current: list[int] = field(default_factory=list)
    nodes: tuple = ()

    def events(self) -> list[dict]:
        return self.begun

    def trainers(self) -> list[int]:
        return self.current


@pytest.fixture
def killer(tmp_path) -> Killer:
    killer = Killer(OtherRun(tmp_path / "save"), ["step"], 1, cache=None, save_interval=2)
    killer.kills.append(Kill("start", "launcher", "start", time=100.0, step=24, pointer=22))
    return killer


@pytest.fixture
def stays():
    """A process that does not end by itself."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


def publish(killer: Killer, step: int) -> None:
    (killer.run.save / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_worker_of_a_node_that_had_not_met_the_killed_one_may_stay(killer, stays):
    killer.run.current = [stays]
    killer.run.begun = [{"event": "restart", "time": 101.0, "step": 22}]
    publish(killer, 308)
    killer._wait_until_gone([stays], [])
    assert killer.kills[0].pointer == 22, "not what the start that followed has published since"
    assert wrong_starts(killer.kills, killer.run.begun) == []


def test_a_worker_of_a_launch_that_is_over_must_go(killer, stays, monkeypatch):
    monkeypatch.setattr(kills, "GONE_SECONDS", 0.2)
    killer.run.begun = [{"event": "restart", "time": 101.0, "step": 22}]
    with pytest.raises(RuntimeError, match=f"still run: .*{stays}"):
        killer._wait_until_gone([stays], [])


def test_a_worker_that_stays_without_a_start_is_not_waited_for_for_ever(killer, monkeypatch):
    monkeypatch.setattr(kills, "GONE_SECONDS", 0.2)
    killer.run.current = [os.getpid()]
    killer.run.begun = [{"event": "restart", "time": 99.0, "step": 20}]
    with pytest.raises(RuntimeError, match="still run"):
        killer._wait_until_gone([os.getpid()], [])


def test_what_is_published_when_all_are_gone_is_where_the_next_start_begins(killer):
    publish(killer, 24)
    killer._wait_until_gone([], [])
    assert killer.kills[0].pointer == 24
    begun = [{"event": "restart", "time": 101.0, "step": 22}]
    (fault,) = wrong_starts(killer.kills, begun)
    assert "went on from step 22, and 24 was published" in fault
