"""launch/workers.py: what the launcher does with processes that it cannot end."""

import subprocess

from launch import workers
from launch.workers import Workers


class Stuck:
    """Stands in for a process in a driver's uninterruptible wait: no signal ends it."""

    def __init__(self):
        self.pid = 4711
        self.signals = 0
        self.waits: list[float] = []

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        self.signals += 1

    def wait(self, timeout: float) -> None:
        self.waits.append(timeout)
        raise subprocess.TimeoutExpired("trainer", timeout)


def test_a_process_that_cannot_be_killed_is_named_once_and_holds_nobody(capsys):
    stuck = Stuck()
    found = Workers.__new__(Workers)
    found.processes = [stuck]
    found._said_left = ""
    found.kill()
    found.kill()
    assert stuck.signals == 2
    assert 0 < stuck.waits[0] <= workers.KILL_SECONDS
    assert stuck.waits[1] == 0.0
    said = capsys.readouterr().err
    assert said.count("killed, and still there after 20 s: process 4711") == 1, said
