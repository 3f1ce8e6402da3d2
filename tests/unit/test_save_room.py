"""A folder that a run cannot save into is refused before training, and the plan says what it
takes."""

import errno
import fcntl
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.layout import single_process_layout
from pretrain.checkpointing import save_folder
from pretrain.checkpointing.folder_lock import FolderLock
from pretrain.checkpointing.save_folder import (
    check_disk,
    checkpoint_bytes,
    most_kept,
    require_writable,
)
from pretrain.config.load import load_config
from pretrain.plan import make_plan
from pretrain.plan_warnings import warnings_about

RUN = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 128 --global-batch-tokens 512 "
    "--train-tokens 51200 --save"
).split()


def plan(save, *flags, free=10**12, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(save_folder, "free_bytes", lambda _: free)
    return make_plan(load_config([*RUN, str(save), *flags]), 1)


def test_the_plan_says_what_checkpoints_take(tmp_path, monkeypatch):
    found = plan(tmp_path / "new", "--save-interval", "10", monkeypatch=monkeypatch)
    size = checkpoint_bytes(found.config, found.vocab_size)
    assert found.disk.lines == [
        f"checkpoints: {size / 2**20:.1f} MiB each, at most 4 at once, together "
        f"{4 * size / 2**20:.1f} MiB; 0 are there, and 931.3 GiB are free"
    ]
    assert found.disk.warnings == []


def test_the_plan_says_what_exports_take(tmp_path):
    flags = "--save-interval 10 --hf-export-interval 20".split()
    found = plan(tmp_path / "new", *flags)
    # 100 steps: 5 of the interval, and the end of the phase; 2 bytes a number instead of 12.
    size = checkpoint_bytes(found.config, found.vocab_size) / 6
    assert found.disk.lines[1] == (
        f"exports: {size / 2**20:.1f} MiB each, up to 6 of them, together "
        f"{6 * size / 2**20:.1f} MiB; none is ever deleted"
    )


def test_the_size_follows_from_what_is_stored(tmp_path):
    """tests/dist/test_retention.py compares it with a real checkpoint."""

    def size(*flags):
        return checkpoint_bytes(load_config([*RUN, str(tmp_path), *flags]), 100)

    assert size() == 3 * size("--no-save-optim"), "a weight and two moments"
    assert size("--fp64", "--no-bf16") == 2 * size()


PHASED = """
phases:
  - {name: a, seq_length: 128, train_tokens: 25600, global_batch_tokens: 512}
  - {name: b, seq_length: 256, train_tokens: 25600, global_batch_tokens: 512}
"""


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], 2),
        (["--save-interval", "10"], 3 + 1),
        (["--save-interval", "10", "--keep-last", "50"], 2 + 10),
        (["--save-interval", "10", "--no-keep-phase-ends"], 3),
        (["--save-interval", "1", "--keep-all"], 2 + 100),
        (["--save-interval-in-mins", "1", "--keep-all"], 100),
        (["--save-interval", "5", "--keep-every", "10240"], 3 + 1 + 5),
        (["--save-interval", "5", "--save-retain-interval", "10"], 3 + 1 + 10),
        (["--save-interval", "5", "--keep-best", "2"], 3 + 1 + 2 * 2),
        (["--save-interval", "5", "--keep-best", "2", "--eval-seq-lengths", "128"], 3 + 1 + 2),
    ],
)
def test_how_many_are_kept_at_most(tmp_path, flags, expected):
    file = tmp_path / "run.yaml"
    file.write_text(PHASED)
    argv = "--model tiny --mock-data --vocab-size 100".split()
    found = make_plan(
        load_config([*argv, "--config", str(file), "--save", str(tmp_path / "run"), *flags]), 1
    )
    assert sum(phase.steps for phase in found.phases) == 100
    assert most_kept(found.config, found.phases) == expected


def test_a_disk_without_room_for_one_is_refused_and_with_room_for_few_warned_of(
    tmp_path, monkeypatch
):
    found = plan(tmp_path, "--save-interval", "10", monkeypatch=monkeypatch)
    size = checkpoint_bytes(found.config, found.vocab_size)
    with pytest.raises(ValueError, match="a checkpoint takes .* are free there. Fix: free space"):
        plan(tmp_path, free=size - 1, monkeypatch=monkeypatch)
    tight = plan(tmp_path, "--save-interval", "10", free=4 * size - 1, monkeypatch=monkeypatch)
    (text,) = [text for text in warnings_about(tight) if text.startswith("save = ")]
    assert "up to 4 more checkpoints take" in text
    enough = plan(tmp_path, "--save-interval", "10", free=4 * size, monkeypatch=monkeypatch)
    assert enough.disk.warnings == []


def test_a_run_that_is_over_and_a_plan_that_is_printed_need_no_room(tmp_path, monkeypatch):
    found = plan(tmp_path, monkeypatch=monkeypatch)
    monkeypatch.setattr(save_folder, "free_bytes", lambda _: 0)
    end = found.phases[-1].end
    assert check_disk(found.config, found.phases, found.vocab_size, end).problems == []
    argv = load_config([*RUN, str(tmp_path / "elsewhere")])
    assert make_plan(argv, 1, only_print=True).disk.lines == []
    assert not (tmp_path / "elsewhere").exists()


# ---------------------------------------------------------------- rights


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper" / "run"):
        with pytest.raises(ValueError, match=rf"cannot be written \({tmp_path}/file is a file\)"):
            require_writable(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_rights_and_a_read_only_one_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(ValueError, match=r"\(no permission to write\). Fix: give another"):
            require_writable(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    with pytest.raises(ValueError, match=r"\(its file system is read-only\)"):
        require_writable(tmp_path)


# ---------------------------------------------------------------- locks


@pytest.fixture
def world(monkeypatch):
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *args, **kwargs: None)
    return single_process_layout(torch.device("cpu")).world


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_trained_into(
    tmp_path, world, monkeypatch, capsys, number
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    FolderLock(tmp_path, world).release()
    first = capsys.readouterr().err
    assert f"save = {tmp_path}: its file system has no locks" in first
    assert "the last run here" not in first
    FolderLock(tmp_path, world).release()
    assert f"the last run here was process {os.getpid()} on " in capsys.readouterr().err


def test_another_failure_of_the_lock_is_refused(tmp_path, world, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ValueError, match=r"cannot be written \(Input/output error\)"):
        FolderLock(tmp_path, world)


def test_a_folder_that_another_run_holds_names_it(tmp_path, world):
    first = FolderLock(tmp_path, world)
    with pytest.raises(
        ValueError, match=rf"process {os.getpid()} on .* is training into it. Fix: stop that run"
    ):
        FolderLock(tmp_path, world)
    first.release()
    FolderLock(tmp_path, world).release()
