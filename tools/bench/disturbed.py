"""Kill a run at random moments and compare it with the same run left alone:
`bash launch/ithaca.sh bench disturbed`.

Both runs go through launch/train.sh with the same configuration. Of the first, random workers get
SIGKILL: at random steps, while a checkpoint is being written, and while the processes start again
on the next phase's layout. Every step's data digest and loss, and the last checkpoint's weights and
optimizer state, must be the same bit for bit; then tools.audit_data counts every token of the
disturbed run.
"""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tools.audit_data import audit

ROOT = Path(__file__).resolve().parents[2]


@dataclass(kw_only=True)
class Arguments:
    config: str
    """YAML of the run; its phases may change layouts."""
    output: str
    """New folder for the two runs' checkpoints: disturbed/ and alone/."""
    flags: str = ""
    """Further flags of the trainer, as one word: --flags="--data-path P --tokenizer-model M"."""
    kills: int = 20
    """Workers killed."""
    processes: int = 4
    """Processes of the run."""
    seed: int = 1
    """Seed of the moments of the kills."""


@dataclass(frozen=True)
class Kill:
    """Plan when to kill a worker."""

    kind: Literal["step", "save", "crossing"]
    """At a step, in the save after it, or after a restart for a new layout."""
    step: int
    delay: float = 0.0
    """Seconds after that restart."""
    crossing: int = 0
    """Number of that restart, from 1."""


def plan_kills(kills: int, steps: int, crossings: list[int], seed: int) -> list[Kill]:
    """Plan half of the kills at steps, the others in saves and crossings, in the order of steps.

    Args:
        crossings: the steps after which the run starts again on another layout.
    """
    chance = random.Random(seed)
    kinds: list[Literal["step", "save", "crossing"]] = [
        ("step", "save", "step", "crossing" if crossings else "step")[number % 4]
        for number in range(kills)
    ]
    moments = []
    for kind in kinds:
        if kind == "crossing":
            number = chance.randrange(len(crossings))
            moments.append(Kill(kind, crossings[number], chance.uniform(0, 12), number + 1))
        else:
            # A save must follow: none in the last steps.
            moments.append(Kill(kind, chance.randrange(max(1, steps - 3))))
    return sorted(moments, key=lambda moment: moment.step)


def crossings_of(folder: Path) -> list[int]:
    """List the steps after which an undisturbed run started again on another layout."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "start"][1:]


class BackgroundRun:
    """Run launch/train.sh in the background, and look at what it does."""

    def __init__(self, arguments: list[str], save: Path, processes: int):
        """Start the run.

        Args:
            arguments: of the trainer, without --save.
        """
        self.save = save
        self.lines: list[str] = []
        environment = os.environ | {
            "NPROC_PER_NODE": str(processes),
            "OMP_NUM_THREADS": "1",
            "ITHACA_PYTHON": sys.executable,
            # Every kill is a failure that is started again at once.
            "RETRY_WAIT": "0",
            "MAX_RESTARTS": "1000",
            "GRACE": "60",
        }
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "train.sh"), *arguments, "--save", str(save)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.reader = threading.Thread(
            target=lambda: self.lines.extend(self.process.stdout or ()), daemon=True
        )
        self.reader.start()

    def last_step(self) -> int:
        """Return the last step in metrics.jsonl; lines of steps that are done again come and go."""
        try:
            return json.loads((self.save / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def starts_for_layouts(self) -> int:
        """Count the restarts for another layout so far."""
        return sum("starting again: the next phase" in line for line in self.lines)

    def is_saving(self) -> bool:
        """Tell whether a checkpoint is being written now."""
        return any(self.save.glob(".iter_*.partial"))

    def workers(self) -> list[int]:
        """List the process ids of this run's trainers."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"pretrain.train" in words
                and str(self.save).encode() in words
                and b"launch.node" not in words
            ):
                found.append(int(folder.name))
        return sorted(found)

    def is_alive(self) -> bool:
        """Tell whether train.sh is still there."""
        return self.process.poll() is None

    def wait(self, timeout: float | None = None) -> tuple[int, str]:
        """Wait for train.sh; returns its exit code, and all that it printed."""
        code = self.process.wait(timeout)
        self.reader.join(5)
        return code, "".join(self.lines)

    def wait_until_done(self) -> None:
        """Wait for the end of the run.

        Raises:
            RuntimeError: it did not end as done.
        """
        code, said = self.wait()
        if code != 0:
            raise RuntimeError("the run failed:\n" + "\n".join(said.splitlines()[-30:]))

    def end(self) -> None:
        """End the run, and leave no process behind."""
        if self.is_alive():
            self.process.terminate()
            try:
                self.process.wait(90)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for worker in self.workers():
            os.kill(worker, signal.SIGKILL)


def disturb(run: BackgroundRun, moments: list[Kill], chance: random.Random) -> list[str]:
    """Kill a random worker at each moment; returns what was done, a line each."""
    done = []
    for moment in moments:
        if not _wait_for(run, moment) or not _wait_until(run, run.workers):
            # The run ended before.
            break
        workers = run.workers()
        # They may have ended by themselves in between.
        if workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            done.append(f"{moment.kind} at step {run.last_step()}")
            _wait_until(run, lambda before=workers: run.workers() != before)
    return done


def _wait_for(run: BackgroundRun, moment: Kill) -> bool:
    """Wait for the moment of a kill; False if the run ends before."""
    if moment.kind == "crossing":
        if not _wait_until(run, lambda: run.starts_for_layouts() >= moment.crossing):
            return False
        # The delay lets the new processes come to some other point.
        until = time.monotonic() + moment.delay
        return _wait_until(run, lambda: time.monotonic() > until and bool(run.workers()))
    reached = _wait_until(run, lambda: run.last_step() > moment.step)
    return _wait_until(run, run.is_saving) if reached and moment.kind == "save" else reached


def _wait_until(run: BackgroundRun, condition: Callable[[], object]) -> bool:
    """Wait until the condition holds; False if the run ends before."""
    while run.is_alive():
        if condition():
            return True
        # Shorter than a save, and long enough to leave the run its cores.
        time.sleep(0.05)
    return False


def differences(one: Path, other: Path) -> list[str]:
    """List what differs between two runs' steps and last checkpoints."""
    runs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    found = []
    if [line["step"] for line in runs[0]] != [line["step"] for line in runs[1]]:
        found.append(f"{len(runs[0])} and {len(runs[1])} steps")
    for key in ("tokens", "phase", "data_digest", "loss", "grad_norm", "lr", "sources"):
        steps = [a["step"] for a, b in zip(*runs, strict=False) if a[key] != b[key]]
        if steps:
            found.append(f"{key} of {len(steps)} steps, first of {steps[0]}")
    folders = []
    for folder in (one, other):
        published = find_published(folder)
        if published is None:
            return [*found, f"no checkpoint in {folder}"]
        folders.append(published)
    # Weights and optimizer state, bit for bit.
    names = tensor_names(folders[0], "")
    if names != tensor_names(folders[1], ""):
        return [*found, "the checkpoints' tensors"]
    for name in names:
        mine, theirs = (read_whole_tensors(folder, [name])[name] for folder in folders)
        if not torch.equal(mine, theirs):
            found.append(f"{name} by up to {float((mine - theirs).abs().max()):.1e}")
    return found


def run(arguments: Arguments) -> int:
    """Run twice, once disturbed, and compare; 0, or 1 where the two differ."""
    output = Path(arguments.output)
    argv = ["--config", arguments.config, *shlex.split(arguments.flags)]
    # It must be new: nothing of another run is compared, or written over.
    output.mkdir(parents=True)
    # How the run goes without a kill.
    alone = BackgroundRun(argv, output / "alone", arguments.processes)
    try:
        began = time.monotonic()
        alone.wait_until_done()
        steps = alone.last_step()
        print(
            f"alone: {steps} steps, {alone.starts_for_layouts()} changes of layout, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    finally:
        alone.end()
    # The same run, with kills at what is known of its steps now.
    disturbed = BackgroundRun(argv, output / "disturbed", arguments.processes)
    try:
        began = time.monotonic()
        moments = plan_kills(arguments.kills, steps, crossings_of(output / "alone"), arguments.seed)
        done = disturb(disturbed, moments, random.Random(arguments.seed))
        disturbed.wait_until_done()
        print(
            f"disturbed: {len(done)} workers killed ({', '.join(done)}), "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    finally:
        disturbed.end()
    found = differences(output / "alone", output / "disturbed")
    print(
        "compared: "
        + (
            "; ".join(found)
            if found
            else "every step's data, loss, gradient norm and learning rate, "
            "the weights and the optimizer state are the same, bit for bit"
        )
    )
    # Every token of the disturbed run, counted.
    lines, well = audit(str(output / "disturbed"))
    print("\n".join(lines))
    return 1 if found or not well or len(done) < arguments.kills / 2 else 0
