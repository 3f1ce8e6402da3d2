"""torch's profiler around chosen steps of chosen ranks, and the history of a GPU's memory.

Both only listen: what is computed stays the same bit for bit. A trace is one file per rank that
Perfetto (ui.perfetto.dev) and chrome://tracing open.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from parallel.layout import Layout
from pretrain.config.config import Config
from pretrain.processes.heartbeat import Heartbeat

MOST_MEMORY_EVENTS = 200_000
"""Allocations and frees that are kept, the last ones: some 100 MB of a snapshot."""


def profile_folder(config: Config) -> Path:
    """Return the folder of traces and snapshots; validate() has seen to it that there is one."""
    if config.logging.profile_dir is not None:
        return Path(config.logging.profile_dir)
    assert config.checkpoint.save is not None
    return Path(config.checkpoint.save) / "profile"


def print_line(text: str) -> None:
    """Print a line of this rank, whichever it is."""
    print(text, flush=True)


class StepProfiler:
    """Profiles the steps after --profile-step-start up to and with --profile-step-end.

    The parts of a step are ranges of the trace under the names that the heartbeat has for them.

    Args:
        say: prints a line on this rank.
    """

    def __init__(
        self, config: Config, layout: Layout, heartbeat: Heartbeat, say: Callable[[str], None]
    ):
        settings = config.logging
        self.first = settings.profile_step_start + 1
        self.last = settings.profile_step_end
        self.rank = layout.world.rank
        self.layout = layout
        self.heartbeat = heartbeat
        self.say = say
        self._waits = settings.profile and self.rank in settings.profile_ranks
        self._folder = profile_folder(config) if self._waits else Path()
        self._profile: profile | None = None
        self._range: record_function | None = None
        self._recorded: list[int] = []

    def begin_step(self, step: int) -> None:
        """Begin to profile, where step `step` or the next one is the first to be recorded."""
        if self._waits and step > self.last:
            self._waits = False
            self.say(
                f"profile: steps {self.first:,} to {self.last:,} were over when this start began, "
                f"with step {step:,}: nothing is recorded"
            )
        if self._waits and step >= self.first - 1:
            self._waits = False
            self._start(step)

    def end_step(self, step: int) -> None:
        """End a step, and with the last one the trace."""
        if self._profile is None:
            return
        if step >= self.first:
            self._recorded.append(step)
        self._end_range()
        if step >= self.last:
            self.close()
        else:
            self._profile.step()

    def close(self) -> None:
        """Write what was recorded; say so where the steps never came."""
        if self._profile is not None:
            self._end_range()
            self._stop(self._profile)
            self._profile = None
        elif not self._waits:
            return
        self._waits = False
        if not self._recorded:
            self.say(
                f"profile: this start ended before one of the steps {self.first:,} to "
                f"{self.last:,} was done: nothing is recorded"
            )

    def _stop(self, running: profile) -> None:
        """End the recording, which writes the trace; an error there ends no run."""
        self.heartbeat.on_activity = None
        # A large trace takes minutes, and the other ranks wait for this one.
        self.heartbeat.enter_slow("writing a trace")
        try:
            running.stop()
        except (OSError, RuntimeError) as error:
            self.say(f"profile: rank {self.rank} cannot write {self._path} ({error})")

    def _start(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self.layout.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        # The step before the first one warms up, where it is trained by this process.
        warmup = int(step < self.first)
        active = self.last - max(step, self.first) + 1
        with warnings.catch_warnings():
            # Of a first step without one before it: nothing can be done about it.
            warnings.filterwarnings("ignore", message=".*won't be using warmup.*")
            steps = schedule(wait=0, warmup=warmup, active=active, repeat=1)
        self._profile = profile(activities=activities, schedule=steps, on_trace_ready=self._write)
        self.heartbeat.enter_slow("starting the profiler")
        self._profile.start()
        self.heartbeat.on_activity = self._enter

    def _enter(self, activity: str) -> None:
        """Begin the range of another part of the step."""
        self._end_range()
        self._range = record_function(activity)
        self._range.__enter__()

    def _end_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _write(self, recorded: profile) -> None:
        """Write the trace, whole or not at all."""
        if not self._recorded:
            return  # a step that was cut short
        path = self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}")
        try:
            recorded.export_chrome_trace(str(part))
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self.say(
            f"profile: rank {self.rank}, steps {self._shown_steps}: {path} (open it at "
            "ui.perfetto.dev)"
        )

    @property
    def _path(self) -> Path:
        return self._folder / f"steps{self._shown_steps}-rank{self.rank}.json.gz"

    @property
    def _shown_steps(self) -> str:
        """The first and the last step that are recorded whole."""
        return f"{self._recorded[0]}-{self._recorded[-1]}" if self._recorded else "none"


# ---------------------------------------------------------------- memory


def begin_memory_history(config: Config, layout: Layout) -> None:
    """Keep from now on who allocates and frees memory on this rank's GPU, where that is asked."""
    if config.logging.record_memory_history and layout.device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS, stacks="python")


def write_memory_snapshot(config: Config, rank: int, *, is_out_of_memory: bool) -> None:
    """Write the history of this rank's GPU, where it is kept, and say where.

    At a run's end the ranks of --profile-ranks do so, and whichever runs out of memory. What goes
    wrong meanwhile is said, and hides no other error.
    """
    settings = config.logging
    if not settings.record_memory_history or not torch.cuda.is_available():
        return
    if not is_out_of_memory and rank not in settings.profile_ranks:
        return
    path = snapshot_path(config, rank, is_out_of_memory=is_out_of_memory)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        print_line(f"memory history: rank {rank} cannot write {path} ({error})")
        return
    print_line(f"memory history: rank {rank}: {path} (open it at pytorch.org/memory_viz)")


def snapshot_path(config: Config, rank: int, *, is_out_of_memory: bool) -> Path:
    """Return the file of a rank's snapshot: a name of its own for each rank, and for its end."""
    given = config.logging.memory_snapshot_path
    base = Path(given) if given is not None else profile_folder(config) / "memory.pickle"
    when = "-out-of-memory" if is_out_of_memory else ""
    return base.with_name(f"{base.stem}-rank{rank}{when}{base.suffix}")
