"""pretrain/logs/profiler.py: what is recorded when, where it is written, and what is refused."""

import pytest
import torch

from parallel.layout import single_process_layout
from pretrain.config.config import Config
from pretrain.config.flat import from_flat
from pretrain.logs import profiler
from pretrain.logs.profiler import StepProfiler, snapshot_path, write_memory_snapshot
from pretrain.plan_settings import ranks_that_are_none
from pretrain.processes.heartbeat import Heartbeat


def config(**settings) -> Config:
    texts = {name: str(value) for name, value in settings.items()}
    return from_flat(texts, "test", Config())


def run_steps(settings: Config, steps: range) -> list[str]:
    """Go through steps as a start of the run does -> the lines that were said."""
    said: list[str] = []
    heartbeat = Heartbeat()
    layout = single_process_layout(torch.device("cpu"))
    profiling = StepProfiler(settings, layout, heartbeat, said.append)
    for step in steps:
        profiling.begin_step(step)
        heartbeat.enter("forward")
        torch.ones(2).sum()
        profiling.end_step(step)
    profiling.close()
    return said


def test_a_start_records_what_it_has_of_the_chosen_steps(tmp_path):
    settings = config(
        profile=True, profile_step_start=3, profile_step_end=6, profile_dir=str(tmp_path)
    )
    # From before the steps, from among them, and cut short by a stop.
    for steps, name in ((range(1, 9), "4-6"), (range(5, 9), "5-6"), (range(1, 6), "4-5")):
        (line,) = run_steps(settings, steps)
        path = tmp_path / f"steps{name}-rank0.json.gz"
        assert line == (f"profile: rank 0, steps {name}: {path} (open it at ui.perfetto.dev)")
        assert path.stat().st_size > 0


def test_steps_that_never_come_are_said_once(tmp_path):
    settings = config(
        profile=True, profile_step_start=3, profile_step_end=6, profile_dir=str(tmp_path)
    )
    assert run_steps(settings, range(7, 10)) == [
        "profile: steps 4 to 6 were over when this start began, with step 7: nothing is recorded"
    ]
    assert run_steps(settings, range(1, 3)) == [
        "profile: this start ended before one of the steps 4 to 6 was done: nothing is recorded"
    ]
    # The step before the first one only warms up.
    assert run_steps(settings, range(1, 4)) == [
        "profile: this start ended before one of the steps 4 to 6 was done: nothing is recorded"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_cut_short_leaves_no_trace(tmp_path):
    settings = config(
        profile=True, profile_step_start=1, profile_step_end=3, profile_dir=str(tmp_path)
    )
    said: list[str] = []
    layout = single_process_layout(torch.device("cpu"))
    for begun in ([1], [1, 2], [2]):
        profiling = StepProfiler(settings, layout, Heartbeat(), said.append)
        for step in begun:
            profiling.begin_step(step)
            if step != begun[-1]:
                profiling.end_step(step)
        profiling.close()
        (line,) = said
        assert line.endswith("steps 2 to 3 was done: nothing is recorded"), begun
        said.clear()
    assert list(tmp_path.iterdir()) == []


def test_the_watchdog_is_patient_while_a_rank_writes_its_trace(tmp_path):
    settings = config(
        profile=True, profile_step_start=0, profile_step_end=1, profile_dir=str(tmp_path)
    )
    slow: list[tuple[str, int]] = []

    class Noting(Heartbeat):
        def enter_slow(self, activity: str) -> None:
            slow.append((activity, len(list(tmp_path.iterdir()))))

    layout = single_process_layout(torch.device("cpu"))
    profiling = StepProfiler(settings, layout, Noting(), lambda text: None)
    profiling.begin_step(1)
    profiling.end_step(1)
    # Before the file is there.
    assert slow == [("starting the profiler", 0), ("writing a trace", 0)]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    settings = config(
        profile=True, profile_step_start=0, profile_step_end=1, profile_dir=str(tmp_path / "file")
    )
    (line,) = run_steps(settings, range(1, 3))
    assert line.startswith(f"profile: rank 0 cannot write {tmp_path}/file/steps1-1-rank0.json.gz")


def test_ranks_that_are_not_asked_for_record_nothing(tmp_path):
    settings = config(profile=True, profile_ranks="1", profile_dir=str(tmp_path))
    assert run_steps(settings, range(1, 20)) == []


@pytest.mark.parametrize(
    "settings, problem",
    [
        (
            dict(profile=True, save="d", profile_step_start=5, profile_step_end=5),
            "profile_step_end = 5: must be above profile_step_start = 5. Fix: 7 records two steps.",
        ),
        (
            dict(profile=True),
            "profile = True: is written inside --save, which is not given. Fix: --profile-dir DIR, "
            "or --save.",
        ),
        (
            dict(record_memory_history=True),
            "record_memory_history = True: is written inside --save, which is not given. Fix: "
            "--profile-dir DIR, or --save.",
        ),
    ],
)
def test_a_profile_that_cannot_be_is_refused(settings, problem):
    assert problem in config(**settings).validate()


def test_ranks_that_the_run_does_not_have_are_refused():
    (problem,) = ranks_that_are_none(config(profile=True, profile_ranks="0 8 9"), world_size=8)
    assert problem == (
        "profile_ranks = 8 9: must be ranks of the run, 0 to 7. Fix: --profile-ranks 0."
    )


def test_a_memory_snapshot_is_written_by_chosen_ranks_and_by_whoever_runs_out(
    tmp_path, monkeypatch, capsys
):
    written = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    settings = config(record_memory_history=True, save=str(tmp_path))
    write_memory_snapshot(settings, 3, is_out_of_memory=False)
    write_memory_snapshot(settings, 0, is_out_of_memory=False)
    write_memory_snapshot(settings, 3, is_out_of_memory=True)
    assert written == [
        str(tmp_path / "profile" / "memory-rank0.pickle"),
        str(tmp_path / "profile" / "memory-rank3-out-of-memory.pickle"),
    ]
    write_memory_snapshot(config(save=str(tmp_path)), 0, is_out_of_memory=True)
    assert len(written) == 2 and capsys.readouterr().out.count("memory history: rank") == 2
    given = config(record_memory_history=True, memory_snapshot_path="out/m.pickle")
    assert str(snapshot_path(given, 2, is_out_of_memory=False)) == "out/m-rank2.pickle"


def test_a_memory_snapshot_that_cannot_be_written_is_said_and_hides_no_error(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = config(record_memory_history=True, profile_dir=str(tmp_path / "file"))
    write_memory_snapshot(settings, 0, is_out_of_memory=True)
    path = tmp_path / "file" / "memory-rank0-out-of-memory.pickle"
    said = capsys.readouterr().out
    assert said.startswith(f"memory history: rank 0 cannot write {path} ("), said


def test_memory_is_recorded_on_gpus_alone(monkeypatch):
    begun = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: begun.append(options)
    )
    settings = config(record_memory_history=True)
    profiler.begin_memory_history(settings, single_process_layout(torch.device("cpu")))
    assert begun == []
    profiler.begin_memory_history(settings, single_process_layout(torch.device("meta")))
    assert begun == []
    on_gpu = single_process_layout(torch.device("cuda:0"))
    profiler.begin_memory_history(config(), on_gpu)
    assert begun == []
    profiler.begin_memory_history(settings, on_gpu)
    assert begun == [{"max_entries": profiler.MOST_MEMORY_EVENTS, "stacks": "python"}]
