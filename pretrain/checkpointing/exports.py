"""Hugging Face folders of a run's checkpoints, written while it trains.

A process of its own (tools/export_hf.py) reads a published checkpoint, compares what it reads with
the checksums and writes the folder, which appears whole or not at all. It runs at the lowest
priority and sees no GPU; one runs at a time, on the node of global rank 0. Whatever becomes of it,
training goes on. Checkpoints that are still to be exported are listed in PENDING, so that the next
start goes on with them.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from data.files import write_atomically
from pretrain.checkpointing.folders import EXPORTS, complete_steps, step_of
from pretrain.config.checkpoint_config import CheckpointConfig

PENDING = "hf_exports_pending.json"
"""File in --save: {step: clock} of the checkpoints that are to be exported."""
END_SECONDS = 600.0
"""What the end of a run waits for its exports: other nodes wait for this one."""
STOP_SECONDS = 5.0
"""What a stop waits for them."""
KILL_SECONDS = 10.0
"""What a killed process is waited for."""
ROOT = Path(__file__).resolve().parents[2]
"""The folder of this code, from which the process imports."""

Report = Callable[[str, int, int, str], None]
"""Takes the kind of an event, its step, its clock and its text."""


def open_exporter(
    settings: CheckpointConfig, report: Report, done: Callable[[], None]
) -> "Exporter | None":
    """Return what exports a run's checkpoints; None where that was not asked for."""
    if settings.save is None or not settings.exports:
        return None
    root = Path(settings.save)
    folder = Path(settings.hf_export_dir) if settings.hf_export_dir else root / EXPORTS
    return Exporter(root, folder, settings, report, done)


class Exporter:
    """Exports a run's checkpoints one after the other, watched by a thread of its own.

    Only global rank 0 has one.

    Args:
        root: --save.
        folder: of the exports.
        report: writes an event of the run.
        done: is called after each export, whatever became of it.
    """

    def __init__(
        self,
        root: Path,
        folder: Path,
        settings: CheckpointConfig,
        report: Report,
        done: Callable[[], None],
    ):
        self.root = root
        self.folder = folder
        self.settings = settings
        self.report = report
        self.done = done
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_ended = False
        self._process: subprocess.Popen | None = None
        self._due = self._read_pending()
        """Step -> clock of each checkpoint that is to be exported, in that order."""
        # A daemon: a process that fails does not stay for it.
        self._thread = threading.Thread(target=self._work, name="hf-export", daemon=True)
        self._thread.start()

    def in_use(self) -> set[int]:
        """Return the steps of the checkpoints that are being exported, or are to be."""
        with self._changed:
            return set(self._due)

    def after_publish(self, checkpoint: Path, clock: int, *, ends_phase: bool) -> None:
        """Have a published checkpoint exported, where that is due; returns at once."""
        step = step_of(checkpoint)
        assert step is not None, f"{checkpoint} is no checkpoint's name"
        interval = self.settings.hf_export_interval
        if not ends_phase and (interval is None or step % interval):
            return
        with self._changed:
            self._due[step] = clock
            self._write_pending()
            self._changed.notify_all()

    def close(self, *, finish: bool) -> None:
        """End the thread and the process; what was not exported is left to the next start.

        Args:
            finish: wait for the exports first, as far as they take no longer than a while.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if finish and self.in_use():
            text = f"waiting up to {END_SECONDS:.0f} s for the export to {self.folder}"
            print(text, flush=True)
        self._thread.join(END_SECONDS if finish else STOP_SECONDS)
        with self._changed:
            self._is_ended = True
            if self._process is not None:
                self._process.kill()
        self._thread.join(KILL_SECONDS)
        with self._changed:
            left = dict(self._due)
            self._due.clear()
        for step, clock in left.items():
            text = f"step {step:,} is not exported yet: the next start does it"
            self._say("export left", step, clock, text)

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        """Export what is due, until there is nothing left and the run ends."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._is_closing)
                if self._is_ended or not self._due:
                    return
                step, clock = next(iter(self._due.items()))
            try:
                is_over = self._export(step, clock)
            except Exception as error:  # training goes on, whatever it is
                text = f"step {step:,} is not exported: {error!r}"
                self._say("export failed", step, clock, text)
                is_over = True
            if not is_over:
                return
            with self._changed:
                if step not in self._due:
                    return  # `close` waited no longer, and left it to the next start
                del self._due[step]
                self._write_pending()
            self.done()

    def _export(self, step: int, clock: int) -> bool:
        """Export one checkpoint -> False where the run ended it."""
        output = self.folder / f"step_{step:08d}"
        partial = output.with_name(f".{output.name}.partial")
        was_there = partial.exists()
        began = time.perf_counter()
        with tempfile.TemporaryFile() as said:
            with self._changed:
                if self._is_ended:
                    return False
                self._process = self._start(step, output, said)
            code = self._process.wait()
            with self._changed:
                self._process = None
                is_ended = self._is_ended
            if code == 0:
                seconds = time.perf_counter() - began
                text = f"exported step {step:,} to {output} in {seconds:.1f} s"
                self._say("export", step, clock, text)
                return True
            # What a killed process left; one that fails removes it itself. What was there before
            # may be another export, which is still writing it.
            if code < 0 and not was_there:
                shutil.rmtree(partial, ignore_errors=True)
            if is_ended:
                return False
            said.seek(0)
            reason = _last_error(said.read().decode(errors="replace"), code)
        self._say("export failed", step, clock, f"step {step:,} is not exported: {reason}")
        return True

    def _start(self, step: int, output: Path, said: IO[bytes]) -> subprocess.Popen:
        """Start the process that exports a step."""
        words = [
            *(sys.executable, "-P", "-m", "pretrain.checkpointing.export_process"),
            *(str(os.getpid()), "--load", str(self.root), "--ckpt-step", str(step)),
            *("--output", str(output), "--dtype", self.settings.hf_export_dtype, "--overwrite"),
        ]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            words,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
        )

    # ------------------------------------------------------------ what it leaves and says

    def _read_pending(self) -> dict[int, int]:
        """Read what an earlier process of the run left to be exported, as far as it is there.

        A line says what is not exported any more.
        """
        path = self.root / PENDING
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {int(step): int(clock) for step, clock in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            print(
                f"warning: {path}: cannot be read ({error}); checkpoints that it named are not "
                "exported: bash launch/ithaca.sh export does it",
                flush=True,
            )
            return {}
        complete = complete_steps(self.root)
        gone = [step for step in found if step not in complete]
        if gone:
            print(
                f"warning: {path}: no complete checkpoint of step "
                f"{', '.join(f'{step:,}' for step in gone)} is there any more: not exported",
                flush=True,
            )
        return {step: clock for step, clock in found.items() if step in complete}

    def _write_pending(self) -> None:
        """Note what is to be exported; a disk that cannot ends nothing."""
        try:
            write_atomically(self.root / PENDING, json.dumps(self._due) + "\n")
        except OSError as error:
            print(f"warning: {self.root / PENDING}: not written ({error.strerror})", flush=True)

    def _say(self, kind: str, step: int, clock: int, text: str) -> None:
        print(text, flush=True)
        self.report(kind, step, clock, text)


def _last_error(said: str, code: int) -> str:
    """Return why the process failed: the last error that it wrote, or how it ended."""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    if code < 0:
        return f"its process was ended by signal {-code}"
    lines = said.strip().splitlines()
    return f"its process ended with code {code}{f' ({lines[-1]})' if lines else ''}"
