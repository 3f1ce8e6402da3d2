"""launch/surroundings.py: what keeps nodes from training together, and how it is said."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.surroundings import (
    Group,
    RunFacts,
    Surroundings,
    count_alike,
    describe_gpus,
    existing_part,
    folder_problem,
    gpu_problems,
    judge,
    leave_mark,
    mark_problem,
    name_nodes,
)


def node(rank: int, **changes) -> Surroundings:
    """Describe a node without GPUs that trains with `clip_grad` 1.0 on one corpus."""
    run = RunFacts(
        groups=[
            Group({"code": "abc"}, "the same code"),
            Group({"clip_grad": "1.0"}, "the same command"),
            Group({"files of /d/web": "9 bytes of .bin"}, "the same files"),
        ],
        notes={"code": f"commit {rank}"},
    )
    usual = Surroundings(
        host=f"host{rank}",
        address=f"10.0.0.{rank} (eth0)",
        gpus=0,
        gpu_names="none",
        software="torch 2.13.0",
        free_bytes=2**30,
        run=run,
    )
    return replace(usual, **changes)


def with_text(rank: int, at: int, name: str, text: str) -> Surroundings:
    """Describe a node of which one text is another."""
    found = node(rank)
    groups = list(found.run.groups)
    groups[at] = Group({name: text}, groups[at].remedy)
    return replace(found, run=replace(found.run, groups=groups))


def test_nodes_that_are_alike_fit_whatever_git_calls_their_code():
    assert judge([node(0), node(1), node(2)]) == []


def test_a_setting_that_differs_names_the_nodes_and_their_values():
    assert judge([node(0), with_text(1, 1, "clip_grad", "0.5")]) == [
        "clip_grad: must be the same on all nodes (node 0 (host0): 1.0, node 1 (host1): 0.5). Fix: "
        "the same command on every node."
    ]


def test_code_that_differs_is_named_with_the_commit_and_hides_what_follows_from_it():
    other = with_text(2, 0, "code", "xyz")
    settings = with_text(1, 1, "clip_grad", "0.5")
    assert judge([node(0), settings, other]) == [
        "code: must be the same on all nodes (nodes 0-1 (first host0): abc (commit 0), node 2 "
        "(host2): xyz (commit 2)). Fix: the same code on every node."
    ]


def test_a_corpus_that_is_missing_on_one_node_is_named():
    (line,) = judge([node(0), with_text(1, 2, "files of /d/web", ".bin cannot be read (gone)")])
    assert "node 1 (host1): .bin cannot be read (gone)" in line
    assert line.startswith("files of /d/web: must be the same on all nodes (node 0 (host0): 9")


def test_what_one_node_lacks_is_absent_there():
    (line,) = judge([node(0), extra(1)])
    assert line.startswith("lr: must be the same on all nodes (node 0 (host0): absent, node 1")


def extra(rank: int) -> Surroundings:
    found = node(rank)
    groups = list(found.run.groups)
    groups[1] = Group(groups[1].texts | {"lr": "1.0"}, groups[1].remedy)
    return replace(found, run=replace(found.run, groups=groups))


def test_problems_of_a_node_come_first_and_those_of_all_nodes_are_said_once():
    broken = replace(with_text(1, 1, "clip_grad", "0.5"), problems=["the disk is full"])
    assert judge([node(0), broken]) == ["node 1 (host1): the disk is full"]
    everywhere = [replace(node(rank), problems=["no disk"]) for rank in range(3)]
    assert judge(everywhere) == ["no disk"]


def test_a_node_without_gpus_among_others_is_refused():
    (line,) = judge([node(0, gpus=8, gpu_names="8 x H100"), node(1)])
    assert (
        "device: must be the same on all nodes (node 0 (host0): GPU, node 1 (host1): CPU)" in line
    )


def test_a_node_whose_processes_have_ended_is_not_compared():
    assert judge([node(0, run=RunFacts()), node(1), node(2)]) == []
    assert judge([node(0, run=RunFacts()), node(1), with_text(2, 1, "clip_grad", "2")]) != []


def test_many_differences_are_cut_short():
    texts = {f"setting {number}": "1" for number in range(20)}
    groups = [Group({name: value + "0" for name, value in texts.items()}, "the same command")]
    other = node(1, run=RunFacts(groups=groups))
    lines = judge([node(0, run=RunFacts(groups=[Group(texts, "the same command")])), other])
    assert len(lines) == 9
    assert lines[-1] == "and 12 more"


@pytest.mark.parametrize(
    "gpus, names, processes, expected",
    [
        (0, [], 4, None),
        (8, ["H100"] * 8, 8, None),
        (8, ["H100"] * 8, 4, None),
        (4, ["H100"] * 4, 8, "NPROC_PER_NODE = 8: must be at most 4, the GPUs that torch finds"),
        (0, ["H100"] * 2, 2, "finds none of 2 x H100. Fix: a torch that fits the driver"),
    ],
)
def test_processes_without_a_gpu_each_are_refused(gpus, names, processes, expected):
    problems = gpu_problems(gpus, names, processes)
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


def test_equal_gpus_are_counted():
    assert count_alike(["H100", "H100", "A100"]) == "2 x H100; 1 x A100"


@pytest.mark.parametrize(
    "gpus, names, expected",
    [
        (0, [], "none"),
        (2, ["H100", "H100"], "2 x H100"),
        (1, ["H100", "H100"], "1 of 2 x H100"),
        (7, ["H100"], "1 x H100"),
        (8, [], "8 that nvidia-smi does not list"),
    ],
)
def test_the_table_names_the_gpus_that_torch_finds(gpus, names, expected):
    """CUDA_VISIBLE_DEVICES hides some; parts of one GPU count by themselves; others are AMD's."""
    assert describe_gpus(gpus, names) == expected


def test_nodes_are_named_in_ranges():
    hosts = [f"host{rank}" for rank in range(10)]
    assert name_nodes([3], hosts) == "node 3 (host3)"
    assert name_nodes([1, 2, 3, 7], hosts) == "nodes 1-3, 7 (first host1)"


def test_what_a_node_says_survives_the_store():
    found = node(1, clock_ahead=0.25, problems=["no disk"])
    assert Surroundings.from_text(found.to_text()) == found


# -- the folder in which the run saves


def test_the_mark_of_node_0_is_found_in_the_same_folder_alone(tmp_path):
    ours = tmp_path / "shared" / "run"
    theirs = tmp_path / "local" / "run"
    for folder in (ours, theirs):
        folder.parent.mkdir()
    mark = leave_mark(ours)  # the folder itself is not there yet
    assert Path(mark).parent == ours.parent
    assert mark_problem(ours, mark) is None
    assert f"save = {theirs}: must be one folder for all nodes" in str(mark_problem(theirs, mark))


def test_the_mark_is_found_where_the_folder_is_made_after_it(tmp_path):
    ours = tmp_path / "run"
    mark = leave_mark(ours)
    ours.mkdir()
    assert mark_problem(ours, mark) is None


def test_a_folder_that_may_not_be_entered_is_no_place_to_save_in(tmp_path):
    save = tmp_path / "closed" / "run"
    save.parent.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:  # who may enter everything
        os.seteuid(65534)
    try:
        folder = existing_part(save)
        problem = folder_problem(save, folder)
        assert "cannot be written (Permission denied)" in str(problem)
        assert "must be one folder" in str(mark_problem(save, str(save.parent / "mark")))
    finally:
        os.seteuid(user)


def test_a_file_in_the_way_is_no_folder_to_save_in(tmp_path):
    file = tmp_path / "file"
    file.touch()
    save = file / "run"
    assert f"save = {save}: cannot be written ({file} is a file)" in str(
        folder_problem(save, existing_part(save))
    )


def test_a_read_only_file_system_is_no_place_to_save_in():
    assert "cannot be written (" in str(folder_problem(Path("/proc/run"), Path("/proc")))
