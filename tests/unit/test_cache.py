"""The index cache: whole or not there, made again when damaged, made once by processes that start
together."""

import multiprocessing
import os
import random
import signal
import time
import warnings

import numpy as np
import pytest

from data import cache
from data.cache import IndexCache

KEY = {"what": "numbers", "size": 200_000}
assert 8 * KEY["size"] > cache.LEAST_MAPPED_BYTES


def make_arrays():
    return {
        "numbers": np.arange(KEY["size"], dtype=np.int64),
        "few": np.array([3, 1], dtype=np.uint32),
        "none": np.empty(0, dtype=np.int32),
    }


def check(arrays):
    for name, expected in make_arrays().items():
        assert np.array_equal(arrays[name], expected) and arrays[name].dtype == expected.dtype


def never():
    raise AssertionError("made again")


def index_file(folder):
    (path,) = folder.glob("*.index")
    return path


def test_made_once_and_mapped(tmp_path):
    check(IndexCache(str(tmp_path)).get(KEY, make_arrays))
    found = IndexCache(str(tmp_path)).get(KEY, never)
    check(found)
    assert not found["numbers"].flags.writeable, "mapped"
    assert found["few"].flags.owndata, "copied"
    IndexCache(str(tmp_path)).get(KEY | {"size": 5}, make_arrays)
    assert len(list(tmp_path.glob("*.index"))) == 2
    check(IndexCache(None).get(KEY, make_arrays))


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "header", "grown", "other"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    IndexCache(str(tmp_path)).get(KEY, make_arrays)
    path = index_file(tmp_path)
    raw = bytearray(path.read_bytes())
    if damage == "other":
        IndexCache(str(tmp_path / "b")).get(KEY | {"size": 6}, make_arrays)
        raw = index_file(tmp_path / "b").read_bytes()
    elif damage == "flipped":
        raw[len(raw) // 2] ^= 1
    elif damage == "header":
        raw[20] ^= 255
    raw = {"truncated": raw[:-100], "empty": b"", "grown": raw + b"x"}.get(damage, raw)
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match="made again, since"):
        check(IndexCache(str(tmp_path)).get(KEY, make_arrays))
    check(IndexCache(str(tmp_path)).get(KEY, never))


def test_no_flipped_bit_of_the_header_goes_unnoticed(tmp_path):
    small = {"few": np.array([3, 1], dtype=np.uint32)}
    IndexCache(str(tmp_path)).get({"what": "few"}, lambda: small)
    path = index_file(tmp_path)
    raw = path.read_bytes()
    for place in range(len(raw) - 64):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = IndexCache(str(tmp_path)).get({"what": "few"}, lambda: small)
        assert found.keys() == small.keys() and np.array_equal(found["few"], small["few"]), place


def test_a_hundred_kills(tmp_path):
    """SIGKILL at random points of making and writing; the next start always works."""
    generator = random.Random(0)
    whole = 0
    partial = 0
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        child = os.fork()
        if child == 0:
            try:
                IndexCache(str(folder)).get(KEY, make_arrays)
            finally:
                os._exit(0)
        time.sleep(generator.uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        whole += any(folder.glob("*.index"))
        partial += any(folder.glob(".*.index.*"))
        check(IndexCache(str(folder)).get(KEY, make_arrays))
        check(IndexCache(str(folder)).get(KEY, never))
    assert whole + partial > 0, "no kill came while or after the file was written"


def _get(folder, marks):
    def make():
        (marks / str(os.getpid())).touch()
        return make_arrays()

    check(IndexCache(str(folder)).get(KEY, make))


def test_processes_that_start_together_make_it_once(tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_get, args=(tmp_path / "cache", marks)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6 and len(
        list(marks.iterdir())
    ) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="data_cache_path = .*file/x: cannot be written.*Fix"):
        IndexCache(str(tmp_path / "file" / "x"))


def test_everyone_may_read_an_index_whatever_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        IndexCache(str(tmp_path)).get(KEY, make_arrays)
    finally:
        os.umask(before)
    assert oct(index_file(tmp_path).stat().st_mode & 0o777) == "0o644"


def test_a_disk_that_fills_up_costs_a_warning(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.files.os.fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        check(IndexCache(str(tmp_path)).get(KEY, make_arrays))
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
