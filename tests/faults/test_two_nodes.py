"""Two networks as two nodes, the real trainer on each: a good run, and nodes that differ."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.dist.training import base_arguments, write_corpus
from tools.faults.launched_run import Node, free_port

ROOT = Path(__file__).resolve().parents[2]
CODE = ("launch", "parallel", "data", "model", "pretrain")
"""Folders that a node needs."""
END_SECONDS = 300
PHASES = [
    {"name": "short", "train_tokens": 256, "seq_length": 32},
    {"name": "long", "train_tokens": 512, "seq_length": 64, "context_parallel_size": 2},
]


def start(
    network: str,
    rank: int,
    arguments: Sequence[str],
    port: int,
    *,
    root: Path = ROOT,
    before: Sequence[str] = (),
) -> Node:
    """Start train.sh in a network as one node of two, without a word about interfaces.

    Args:
        root: where the code lies.
        before: words before the command.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GLOO_", "NCCL_", "MASTER_", "NODE_RANK"))
    }
    environment |= {
        "NNODES": "2",
        "NODE_RANK": str(rank),
        "NPROC_PER_NODE": "1",
        "MASTER_ADDR": "10.77.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "ITHACA_PYTHON": sys.executable,
        "MAX_RESTARTS": "0",
    }
    command = ["ip", "netns", "exec", network, *before, "bash", str(root / "launch" / "train.sh")]
    return Node([*command, *arguments], environment, None)


def finish(nodes: list[Node]) -> list[tuple[int, str]]:
    """Wait for both nodes -> the exit code and the output of each."""
    try:
        for node in nodes:
            node.process.wait(END_SECONDS)
            node.reader.join(5)
    finally:
        for node in nodes:
            if node.is_alive():
                node.process.kill()
    return [(node.process.returncode, "".join(node.lines)) for node in nodes]


def settings(folder: Path, corpus: str, **overrides) -> list[str]:
    """Flags of a run of four steps."""
    return base_arguments(
        corpus, train_iters=4, eval_iters=0, save=str(folder / "save"), **overrides
    )


@pytest.mark.long  # two starts of two nodes; test_nodes.py has them with a trainer without torch
@pytest.mark.parametrize("late", [3, 40])
def test_two_nodes_cross_from_one_layout_to_another_and_end(networks, tmp_path, late):
    corpus = write_corpus(tmp_path / "corpus", documents=60)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"phases": PHASES}))
    arguments = settings(tmp_path, corpus)
    for flag in ("--train-iters", "--seq-length"):
        at = arguments.index(flag)
        del arguments[at : at + 2]
    arguments = ["--config", str(config), *arguments]
    port = free_port()
    nodes = [start(networks[0], 0, arguments, port)]
    time.sleep(late)
    nodes.append(start(networks[1], 1, arguments, port))
    ends = finish(nodes)
    assert [code for code, _ in ends] == [0, 0], ends
    first, second = (said.splitlines() for _, said in ends)
    # Node 0 says for whom it waits, shows the table once, and crosses to the other layout.
    waiting = [line for line in first if "waiting for 1 node of 2 (NODE_RANK 1)" in line]
    assert len(waiting) >= late // 10, first
    assert sum("2 nodes with 1 processes each fit together" in line for line in first) == 1
    (addresses,) = [line for line in first if "  addresses  " in line]
    assert addresses.endswith("10.77.0.1 (eth7), 10.77.0.2 (bond0.7)")
    assert any("needs another layout: starting again" in line for line in first), first
    # Node 1 says one line at each start and one at each end.
    own = [line for line in second if "node 1 of 2" in line]
    assert own == [
        "train.sh: node 1 of 2 trains: rank 1",
        "train.sh: node 1 of 2: again",
        "train.sh: node 1 of 2 trains: rank 1",
        "train.sh: node 1 of 2: done",
    ]


def code_with_another_line(folder: Path) -> Path:
    """Copy the code of a node, and change a comment in it."""
    root = folder / "code"
    for name in CODE:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    with open(root / "model" / "gpt.py", "a", encoding="utf-8") as file:
        file.write("# another line\n")
    return root


def with_folder_at(source: Path, target: Path) -> list[str]:
    """Make the words before a command that let it find `source` at `target`."""
    source.mkdir(exist_ok=True)
    inside = f'mount --bind {source} {target} && exec "$@"'
    return ["unshare", "-m", "bash", "-c", inside, "bash"]


EXPECTED = {
    "setting": "clip_grad: must be the same on all nodes (node 0 (",
    "code": "code: must be the same on all nodes (node 0 (",
    "corpus": "bytes of .idx, hash",
    "missing corpus": ".bin cannot be read (No such file or directory)",
}
"""What differs on node 1 -> what both nodes say."""


@pytest.mark.long  # test_comparison.py and test_surroundings.py have it without processes
@pytest.mark.parametrize("what", EXPECTED)
def test_what_differs_on_node_1_is_one_line_on_both_nodes(networks, tmp_path, what):
    data = tmp_path / "data"
    other = tmp_path / "other"
    for seed, folder in enumerate((data, other)):
        folder.mkdir()
        write_corpus(folder / "corpus", documents=60, seed=seed)
    corpus = str(data / "corpus")
    arguments = settings(tmp_path, corpus)
    port = free_port()
    second: dict = {}
    if what == "setting":
        arguments_there = settings(tmp_path, corpus, clip_grad=0.5)
    else:
        arguments_there = arguments
    if what == "code":
        second["root"] = code_with_another_line(tmp_path)
    if "corpus" in what:
        source = other if what == "corpus" else tmp_path / "empty"
        second["before"] = with_folder_at(source, data)
    nodes = [start(networks[0], 0, arguments, port)]
    nodes.append(start(networks[1], 1, arguments_there, port, **second))
    for code, said in finish(nodes):
        assert code == 2, said
        lines = [line for line in said.splitlines() if "error" in line]
        assert len(lines) == 1, said
        assert EXPECTED[what] in lines[0]
        assert "node 1 (" in lines[0]
        assert "Traceback" not in said
