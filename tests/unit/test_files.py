"""Locks: another holder is always an error, a file system without them only where it may be."""

import errno
import os

import pytest

from data.files import lock_file, lock_if_possible


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("lock", [lock_file, lock_if_possible])
def test_a_lock_that_another_holds_is_an_error(tmp_path, lock):
    with open(tmp_path / "a", "w") as holder, open(tmp_path / "a", "w") as other:
        lock(holder)
        with pytest.raises(BlockingIOError):
            lock(other)
        holder.close()
        lock(other)


@pytest.mark.parametrize("lock", [lock_file, lock_if_possible])
def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch, lock):
    monkeypatch.setattr("data.files.fcntl.flock", fail_with(errno.ENOLCK))
    with open(tmp_path / "a", "w") as file:
        lock(file)


def test_a_lock_that_fails_otherwise_is_an_error_only_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("data.files.fcntl.flock", fail_with(errno.EIO))
    with open(tmp_path / "a", "w") as file:
        lock_if_possible(file)
        with pytest.raises(OSError, match="Input/output error"):
            lock_file(file)
