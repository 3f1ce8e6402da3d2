"""What becomes of exports beside training: one at a time, killed, cut short by a stop, gone on.

The process is another one than tools.export_hf here; tests/dist/test_exports.py has the real one.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pretrain.checkpointing import export_process, exports
from pretrain.checkpointing.exports import PENDING, Exporter, open_exporter
from pretrain.checkpointing.folders import MANIFEST, iteration_folder
from pretrain.config.checkpoint_config import CheckpointConfig

PROCESS = """
import pathlib, sys, time
output, release = map(pathlib.Path, sys.argv[1:])
partial = output.with_name(f".{output.name}.partial")
partial.mkdir(parents=True)
print("writing")
while not release.exists():
    time.sleep(0.01)
if release.read_text():
    sys.exit(release.read_text())
partial.rename(output)
"""
"""Writes a folder as the export does: waits for a file, and fails with what is in it."""


class Run:
    """An exporter of a --save folder, what it reports, and the processes that it starts."""

    def __init__(self, root: Path, monkeypatch, **settings):
        self.root = root
        self.events: list[tuple] = []
        self.processes: list[subprocess.Popen] = []
        monkeypatch.setattr(Exporter, "_start", self._start)
        monkeypatch.setattr(exports, "STOP_SECONDS", 0.1)
        given = {"hf_export_interval": 2, "save_interval": 1, "save": str(root)} | settings
        self.exporter = open_exporter(
            CheckpointConfig(**given), lambda *event: self.events.append(event), lambda: None
        )

    def _start(self, step, output, said) -> subprocess.Popen:
        words = [sys.executable, "-c", PROCESS, str(output), str(self.release(step))]
        self.processes.append(subprocess.Popen(words, stdout=said, stderr=said))
        return self.processes[-1]

    def _start_of(self, step: int) -> Path:
        return self.root / "hf" / f".step_{step:08d}.partial"

    def release(self, step: int) -> Path:
        return self.root / f"release{step}"

    def publish(self, step: int, *, ends_phase: bool = False) -> None:
        folder = iteration_folder(self.root, step)
        folder.mkdir()
        (folder / MANIFEST).write_text("{}")
        self.exporter.after_publish(folder, 100 * step, ends_phase=ends_phase)

    def wait_begun(self, step: int) -> None:
        wait_until(self._start_of(step).exists)

    def wait_reported(self, count: int) -> None:
        wait_until(lambda: len(self.events) == count)

    def folders(self) -> list[str]:
        return sorted(path.name for path in (self.root / "hf").glob("*"))


def wait_until(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "nothing happened"
        time.sleep(0.005)


def pending(root: Path) -> dict:
    return json.loads((root / PENDING).read_text())


def test_one_export_runs_at_a_time_and_holds_its_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    for step in (1, 2, 3, 4):
        run.publish(step, ends_phase=step == 3)
    run.wait_begun(2)
    assert run.exporter.in_use() == {2, 3, 4} and len(run.processes) == 1
    assert pending(tmp_path) == {"2": 200, "3": 300, "4": 400}
    for step in (2, 3, 4):
        run.wait_begun(step)
        run.release(step).write_text("")
    run.exporter.close(finish=True)
    assert [event[:3] for event in run.events] == [
        ("export", 2, 200),
        ("export", 3, 300),
        ("export", 4, 400),
    ]
    assert run.folders() == ["step_00000002", "step_00000003", "step_00000004"]
    assert run.exporter.in_use() == set() and pending(tmp_path) == {}


def test_a_killed_process_leaves_no_half_folder_and_the_next_one_runs(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    run.publish(2)
    run.publish(4)
    run.wait_begun(2)
    run.processes[0].send_signal(signal.SIGKILL)
    run.wait_reported(1)
    assert run.events == [
        ("export failed", 2, 200, "step 2 is not exported: its process was ended by signal 9")
    ]
    run.release(4).write_text("")
    run.exporter.close(finish=True)
    assert [event[:2] for event in run.events] == [("export failed", 2), ("export", 4)]
    assert run.folders() == ["step_00000004"]


def test_a_process_that_fails_says_why_in_one_line(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    why = "output = x: the disk is full. Fix: free space."
    run.release(2).write_text(f"warning: slow\nerror: {why}")
    run.publish(2)
    run.exporter.close(finish=True)
    (event,) = run.events
    assert event == ("export failed", 2, 200, f"step 2 is not exported: {why}")


def test_a_folder_that_another_export_is_writing_stays(tmp_path, monkeypatch):
    theirs = tmp_path / "hf" / ".step_00000002.partial" / "model.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("weights")
    run = Run(tmp_path, monkeypatch)
    run.publish(2)
    run.exporter.close(finish=True)
    assert [event[:2] for event in run.events] == [("export failed", 2)]
    assert theirs.read_text() == "weights"


@pytest.mark.parametrize("content", ["{", "[2, 4]", '{"2": null}', '{"two": 200}', b"\xff"])
def test_a_damaged_list_of_pending_exports_is_said_in_one_line(
    content, tmp_path, monkeypatch, capsys
):
    damaged = content if isinstance(content, bytes) else content.encode()
    (tmp_path / PENDING).write_bytes(damaged)
    run = Run(tmp_path, monkeypatch)
    (line,) = capsys.readouterr().out.splitlines()
    assert f"{tmp_path / PENDING}: cannot be read" in line and "are not exported" in line
    # What is published from here on is exported.
    run.publish(2)
    assert pending(tmp_path) == {"2": 200}
    run.release(2).write_text("")
    run.exporter.close(finish=True)
    assert [event[:2] for event in run.events] == [("export", 2)]


def test_what_a_stop_cuts_short_is_exported_by_the_next_start(tmp_path, monkeypatch, capsys):
    run = Run(tmp_path, monkeypatch)
    for step in (2, 4, 6):
        run.publish(step)
    run.wait_begun(2)
    run.exporter.close(finish=False)
    assert run.processes[0].wait(timeout=5) == -signal.SIGKILL and len(run.processes) == 1
    assert [event[:2] for event in run.events] == [
        ("export left", 2),
        ("export left", 4),
        ("export left", 6),
    ]
    assert run.folders() == []

    # Step 4's checkpoint is gone meanwhile.
    (iteration_folder(tmp_path, 4) / MANIFEST).unlink()
    following = Run(tmp_path, monkeypatch)
    assert following.exporter.in_use() == {2, 6}
    said = "no complete checkpoint of step 4 is there any more: not exported"
    assert said in capsys.readouterr().out
    for step in (2, 6):
        following.release(step).write_text("")
    following.exporter.close(finish=True)
    assert [event[:3] for event in following.events] == [("export", 2, 200), ("export", 6, 600)]
    assert pending(tmp_path) == {}


def test_an_export_that_ends_after_its_run_is_left_to_the_next_start(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch)
    monkeypatch.setattr(exports, "KILL_SECONDS", 0.1)
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    is_reporting = threading.Event()
    is_slow = threading.Event()

    def report_slowly(*event) -> None:
        if event[0] == "export":
            is_reporting.set()
            is_slow.wait(30)
        run.events.append(event)

    run.exporter.report = report_slowly
    run.release(2).write_text("")
    run.publish(2)
    run.publish(4)
    assert is_reporting.wait(30)
    run.exporter.close(finish=False)
    assert [event[:2] for event in run.events] == [("export left", 2), ("export left", 4)]
    # The thread goes on only now: it neither fails nor forgets one of the two.
    is_slow.set()
    run.exporter._thread.join(30)
    assert not run.exporter._thread.is_alive()
    assert failures == [], failures
    assert pending(tmp_path) == {"2": 200, "4": 400}


@pytest.mark.parametrize(
    "settings, exported",
    [
        (dict(hf_export_interval=4), [3, 4]),
        (dict(hf_export_interval=None, hf_export_phase_ends=True), [3]),
    ],
)
def test_steps_of_the_interval_and_ends_of_phases_are_exported(
    tmp_path, monkeypatch, settings, exported
):
    run = Run(tmp_path, monkeypatch, hf_export_dir=str(tmp_path / "elsewhere"), **settings)
    for step in range(1, 6):
        run.release(step).write_text("")
        run.publish(step, ends_phase=step == 3)
    run.exporter.close(finish=True)
    assert [event[1] for event in run.events] == exported
    names = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert names == [f"step_{step:08d}" for step in exported]


def test_nothing_is_started_where_nothing_was_asked_for(tmp_path):
    for settings in (dict(save=str(tmp_path)), dict(save=None, hf_export_phase_ends=True)):
        assert open_exporter(CheckpointConfig(**settings), print, print) is None


def test_the_command_names_the_checkpoint_and_hides_the_gpus(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(
        subprocess, "Popen", lambda words, **how: started.append((words, how["env"]))
    )
    settings = CheckpointConfig(save=str(tmp_path), hf_export_phase_ends=True)
    exporter = Exporter(tmp_path, tmp_path / "hf", settings, print, print)
    exporter._start(12, tmp_path / "hf" / "step_00000012", None)
    exporter.close(finish=False)
    ((words, environment),) = started
    assert words[words.index("--load") :] == [
        *("--load", str(tmp_path), "--ckpt-step", "12"),
        *("--output", str(tmp_path / "hf" / "step_00000012")),
        *("--dtype", "bfloat16", "--overwrite"),
    ]
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(exports.ROOT)


REPLACED = """
import os, shutil
from pretrain.checkpointing import export_process
execute = os.execv
os.execv = lambda *_: execute(shutil.which("sleep"), ["sleep", "60"])
export_process.main(os.getppid(), [])
"""
PARENT = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(process.pid, flush=True)
time.sleep(60)
"""


def test_the_process_has_the_lowest_priority_and_ends_with_the_trainer():
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, REPLACED],
        env=os.environ | {"PYTHONPATH": str(exports.ROOT)},
        stdout=subprocess.PIPE,
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        priority = export_process.LOWEST_PRIORITY
        wait_until(lambda: os.getpriority(os.PRIO_PROCESS, child) == priority)
        wait_until(lambda: "sleep" in Path(f"/proc/{child}/comm").read_text())
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not runs(child))


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
