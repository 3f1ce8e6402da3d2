"""launch/comparison.py: nodes that tell each other what surrounds them, in threads."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from launch import comparison, network
from launch import store as stores
from launch.comparison import Comparison
from launch.meeting import Patience
from launch.outcome import NotMet
from launch.store import Node0, connect
from launch.surroundings import Group, RunFacts, Surroundings


def node(rank: int, clip_grad: str = "1.0") -> Surroundings:
    """Describe a node of a run with one setting."""
    groups = [Group({"clip_grad": clip_grad}, "the same command")]
    shown = {"code": "abc, commit 123"}
    return Surroundings(
        f"host{rank}",
        f"10.0.0.{rank} (eth0)",
        0,
        "none",
        "torch 2.13.0",
        2**40,
        RunFacts(groups, shown=shown),
    )


class Nodes:
    """Several nodes, each with a connection of its own to node 0's store."""

    def __init__(self, saves: list[Path | None]):
        listening = network.listen(0)
        self.place = Node0("127.0.0.1", "127.0.0.1", listening.getsockname()[1])
        self.store = stores.open_store(listening)
        self.saves = saves
        self.ends: dict[int, object] = {}

    def part(self, rank: int, found: Surroundings | None) -> Comparison:
        return Comparison(rank, len(self.saves), self.saves[rank], lambda: found)

    def connection(self, rank: int) -> dist.TCPStore:
        store = self.store if rank == 0 else connect(self.place)
        assert store is not None
        return store

    def compare(self, found: list[Surroundings | None], limit: float = 20.0) -> dict[int, object]:
        """Let all compare -> what each returned or raised."""

        def run(rank: int) -> None:
            try:
                part = self.part(rank, found[rank])
                self.ends[rank] = part.wait(
                    lambda: self.connection(rank), Patience(limit), lambda: None
                )
            except (ValueError, NotMet) as error:
                self.ends[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.ends


def test_nodes_that_fit_go_on_and_node_0_knows_them_all(tmp_path):
    ends = Nodes([tmp_path / "run"] * 3).compare([node(rank) for rank in range(3)])
    first = ends[0]
    assert isinstance(first, list), first
    assert [found.host for found in first] == ["host0", "host1", "host2"]
    assert ends[1] == ends[2] == []
    assert not list(tmp_path.iterdir()), "the mark is gone"


def test_nodes_that_differ_all_say_the_same_line(tmp_path):
    ends = Nodes([None] * 3).compare([node(0), node(1, "0.5"), node(2)])
    lines = {str(end) for end in ends.values()}
    assert lines == {
        "clip_grad: must be the same on all nodes (nodes 0, 2 (first host0): 1.0, node 1 (host1): "
        "0.5). Fix: the same command on every node."
    }


def test_another_folder_to_save_in_is_refused_on_all_nodes(tmp_path):
    for name in ("shared", "local"):
        (tmp_path / name).mkdir()
    saves = [tmp_path / name / "run" for name in ("shared", "local")]
    ends = Nodes(saves).compare([node(0), node(1)])
    for end in ends.values():
        assert f"node 1 (host1): save = {saves[1]}: must be one folder for all nodes" in str(end)


def test_a_node_that_does_not_tell_is_named(monkeypatch, capsys):
    monkeypatch.setattr("launch.meeting.REPORT_SECONDS", 0.1)
    ends = Nodes([None] * 3).compare([node(0), None, node(2)], limit=1.0)
    for end in ends.values():
        assert isinstance(end, NotMet)
    assert "waited 1 s for NODE_RANK 1 to import torch and look at its surr" in str(ends[2])
    assert "train.sh: waiting for NODE_RANK 1 to import torch" in capsys.readouterr().err


def test_a_node_that_loses_its_connection_compares_by_the_next_one():
    nodes = Nodes([None, None])
    connections = [None, nodes.connection(1)]

    def connection() -> dist.TCPStore:
        found = connections.pop(0)
        if found is None:
            raise dist.DistNetworkError("no connection to node 0")
        return found

    part = nodes.part(1, node(1))
    waits = (connection, Patience(20.0), lambda: None)
    thread = threading.Thread(target=part.wait, args=waits)
    thread.start()
    first = nodes.part(0, node(0)).wait(lambda: nodes.store, Patience(20.0), lambda: None)
    thread.join(20)
    assert not thread.is_alive()
    assert [found.host for found in first] == ["host0", "host1"]


def test_a_clock_is_compared_with_node_0s_as_it_writes_it():
    nodes = Nodes([None, None])
    part = nodes.part(1, node(1))
    part.store = nodes.connection(1)
    nodes.store.set(stores.MARK, "")
    nodes.store.set(stores.CLOCK, str(time.time() - 900))
    part._tell()
    assert part.clock_ahead is None, "this may have been written long ago"
    nodes.store.set(stores.CLOCK, str(time.time() - 100))
    part._tell()
    assert part.clock_ahead == pytest.approx(100, abs=5)
    told = json.loads(nodes.store.get(f"{stores.FACTS}1"))
    assert told["clock_ahead"] == part.clock_ahead


def test_the_table_has_a_row_for_each_thing_and_a_line_for_what_differs(capsys):
    nodes = [node(rank) for rank in range(6)]
    nodes[4] = replace(nodes[4], software="torch 2.11.0", free_bytes=2**30)
    nodes[5] = replace(nodes[5], clock_ahead=-3.0)
    comparison.show(nodes, 8, "node0 port 29500", "/shared/run")
    lines = [line.removeprefix("train.sh: ") for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "6 nodes with 8 processes each fit together:",
        "  meeting    node0 port 29500",
        "  addresses  10.0.0.0 (eth0), 10.0.0.1 (eth0), 10.0.0.2 (eth0), 10.0.0.3 (eth0), ... and "
        "2 more",
        "  GPUs       none",
        "  software   torch 2.13.0",
        "  code       abc, commit 123",
        "  clocks     warning: 3.0 s apart: node 5 (host5) is -3.0 s from node 0, so that times in "
        "logs mislead (see chronyc or timedatectl)",
        "  save       /shared/run: one folder for all, 1 GiB free",
        "  warning: node 4 (host4) differs: torch 2.11.0",
    ]
