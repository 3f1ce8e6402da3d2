"""The record that a rank writes, as the launcher reads it, and what is noted of collectives."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from launch.rank_view import read_ranks, read_record
from parallel.collective_log import COLLECTIVES, PAIRS, CollectiveLog
from parallel.layout import Axis
from parallel.rank_record import RankRecord


@pytest.fixture
def record(tmp_path):
    made = RankRecord(tmp_path / "rank3", rank=3, local_rank=1, world_size=8)
    yield made
    made.close()


def read(tmp_path):
    (view,) = read_ranks(tmp_path, node=0)
    return view


def test_the_launcher_reads_what_the_rank_wrote(tmp_path, record):
    record.tell(watchdog_seconds=30, device="cpu")
    record.set(step=57)
    record.enter("backward", patience=7.5, counts_gaps=True)
    slot = record.add_slot("dp_cp", range(1, 8, 2), counts_alike=True)
    record.begin(slot, b"all_gather", 1204, 4096)
    record.wait(slot, b"all_gather", 1204)
    view = read(tmp_path)
    assert (view.rank, view.pid, view.step) == (3, os.getpid(), 57)
    assert (view.activity, view.patience, view.watchdog_seconds) == ("backward", 7.5, 30)
    assert view.process_state == "R"
    assert view.wait is not None
    assert (view.wait.axis, view.wait.op, view.wait.number) == ("dp_cp", "all_gather", 1204)
    (last,) = view.collectives
    assert (last.num_bytes, last.has_ended, last.ranks) == (4096, False, [1, 3, 5, 7])


def test_a_wait_that_ends_is_no_gap_of_this_rank(tmp_path, record):
    record.enter("forward", patience=0.0, counts_gaps=True)
    slot = record.add_slot("tp", [2, 3], counts_alike=True)
    record.begin(slot, b"all_reduce", 1, 8)
    since = record.wait(slot, b"all_reduce", 1)
    time.sleep(0.05)
    record.end_wait(slot, since)
    assert record.waited >= 0.05e9
    view = read(tmp_path)
    assert view.wait is None
    assert view.collectives[0].has_ended
    assert view.longest_gap < 0.05
    time.sleep(0.05)
    record.sign()
    assert read(tmp_path).longest_gap >= 0.05


def test_uneven_groups_are_written_out(tmp_path, record):
    slot = record.add_slot("odd", [0, 3, 4], counts_alike=True)
    record.begin(slot, b"barrier", 1, 0)
    assert read(tmp_path).collectives[0].ranks == [0, 3, 4]


def test_ages_count_from_the_moment_of_reading(tmp_path, record):
    record.sign()
    content = (tmp_path / "rank3").read_bytes()
    later = read_record(content, 0, now=time.monotonic_ns() + 40 * 10**9)
    assert 40 <= later.silence < 41


def test_a_record_that_is_being_made_is_left_for_the_next_look(tmp_path):
    (tmp_path / "rank0").write_bytes(b"\0" * 9000)
    (tmp_path / "rank1").write_bytes(b"")
    assert read_ranks(tmp_path, 0) == []


# ---------------------------------------------------------------- collectives


@pytest.fixture
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    # Of size 2 in name only: the log leaves out axes of size 1.
    yield Axis("dp_cp", 0, 2, (0, 1), dist.group.WORLD)
    dist.destroy_process_group()


def test_every_kind_of_collective_is_noted_and_torch_gets_its_methods_back(tmp_path, record, world):
    before = {name: getattr(ProcessGroup, name, None) for name in [*COLLECTIVES, *PAIRS]}
    wait = Work.wait
    log = CollectiveLog(record)
    log.listen()
    log.name_axes([world])
    x = torch.ones(4)
    calls = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather": lambda: dist.all_gather_into_tensor(torch.empty(4), x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(torch.empty(4), x),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty(4), x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "barrier": dist.barrier,
    }
    for number, (op, call) in enumerate(calls.items(), 1):
        call()
        (last,) = read(tmp_path).collectives
        assert (last.op, last.number, last.has_ended) == (op, number, True)
        assert last.num_bytes == (0 if op == "barrier" else 16)
    log.close()
    after = {name: getattr(ProcessGroup, name, None) for name in before}
    assert after == before
    assert Work.wait == wait
    assert read(tmp_path).collectives == []


def test_a_collective_that_was_begun_and_not_waited_for_has_not_ended(tmp_path, record, world):
    log = CollectiveLog(record)
    log.listen()
    log.name_axes([world])
    try:
        work = dist.all_reduce(torch.ones(2), async_op=True)
        (last,) = read(tmp_path).collectives
        assert (last.op, last.has_ended) == ("all_reduce", False)
        work.wait()
        assert read(tmp_path).collectives[0].has_ended
    finally:
        log.close()


def test_groups_without_a_name_are_no_sign_of_life(tmp_path, record, world):
    log = CollectiveLog(record)
    log.listen()
    try:
        silence = read(tmp_path).silence
        dist.all_reduce(torch.ones(2))
        assert read(tmp_path).silence >= silence
    finally:
        log.close()
