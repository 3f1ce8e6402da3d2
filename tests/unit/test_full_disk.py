"""A save on a disk that is full, or fails, is refused in one line and leaves nothing behind."""

import errno
import os
import re
import subprocess

import pytest
import torch

from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint, space
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.hashing_writer import _HashingFile
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.shared_errors import SaveFailed
from pretrain.checkpointing.stored_tensors import read_whole_tensors
from pretrain.processes.agreement import Refused

DISK_MIB = 3


def save(root, step, mib=1.0, value=1.0):
    world = single_process_layout(torch.device("cpu")).world
    count = int(mib * 2**20) // 4
    tensors = {"model.a": torch.full((count // 2,), value), "model.b": torch.ones(count // 2)}
    progress = Progress(
        step=step, clock=0, phase={}, longest_seq_length=0, data=None, tokenizer=None
    )
    return checkpoint.save(root, step, tensors, progress, "", {}, world)


def require_untouched(root):
    """The checkpoint of step 1 is the newest and whole, and nothing else is there."""
    folder = find_published(root)
    assert folder.name == "iter_0000001"
    assert read_whole_tensors(folder, ["model.a"])["model.a"].unique().tolist() == [1.0]
    assert not list(root.glob(".*iter_*")) and len(list(root.glob("iter_*"))) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", tmp_path], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_checkpoint_larger_than_the_free_space_is_refused_before_it_is_written(small_disk):
    save(small_disk, 1)
    with pytest.raises(Refused) as refused:
        save(small_disk, 2, mib=5)
    text = str(refused.value)
    assert "\n" not in text
    assert f"checkpoint {small_disk}/iter_0000002: not written (rank 0: No space left" in text
    assert re.search(r"it needs 5\.0 MiB, and [12]\.\d MiB were free", text), text
    assert "Fix: free space there, or give --save another folder." in text
    require_untouched(small_disk)
    save(small_disk, 3)


def test_a_disk_that_fills_up_meanwhile_is_named_with_its_file(small_disk, monkeypatch):
    save(small_disk, 1)
    monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)
    with pytest.raises(Refused) as refused:
        save(small_disk, 2, mib=5)
    text = str(refused.value)
    assert "\n" not in text
    assert "No space left on device at " in text and "__0_0.distcp)" in text, text
    require_untouched(small_disk)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_the_file_system_says_reaches_the_user_through_torch_save(
    tmp_path, monkeypatch, number
):
    save(tmp_path, 1)
    write = _HashingFile.write

    def fail_late(self, data):
        # In the second tensor: torch.save is in the middle of its file then.
        if self.file.tell() > 2**20 * 3 // 4:
            self.error = OSError(number, os.strerror(number))
            raise self.error
        return write(self, data)

    monkeypatch.setattr(_HashingFile, "write", fail_late)
    with pytest.raises(Refused) as refused:
        save(tmp_path, 2, value=2.0)
    text = str(refused.value)
    assert f"{os.strerror(number)} at {tmp_path}/.iter_0000002.partial/__0_0.distcp" in text, text
    require_untouched(tmp_path)


def test_any_other_failure_may_be_tried_again(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(self, data):
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr(_HashingFile, "write", fail)
    with pytest.raises(SaveFailed, match=r"iter_0000002: not written \(rank 0: "):
        save(tmp_path, 2)
    require_untouched(tmp_path)


def test_a_file_system_that_tells_no_free_space_ends_the_save_on_all_ranks(tmp_path, monkeypatch):
    """As a network file system does that has lost its server: in words that go to all ranks."""
    save(tmp_path, 1)

    def fail(_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(space.shutil, "disk_usage", fail)
    with pytest.raises(SaveFailed, match=r"iter_0000002: not written \(rank 0: Stale file handle"):
        save(tmp_path, 2)
    require_untouched(tmp_path)


def test_free_space_is_that_of_the_folder_above_one_that_is_not_there(tmp_path):
    assert space.free_bytes(tmp_path / "a" / "b") > 0
