"""launch/train.sh with real processes, and tests/faults/trainer.py as the trainer.

What a launch says when it cannot work, that it says it once, and that nothing is left of it.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.faults.launched_run import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SH = ROOT / "launch" / "train.sh"
SECONDS = 180
"""The seconds in which a launch must end, also on a machine that does much else."""

PYTHON = r"""#!/usr/bin/env bash
exec {python} "${{@/#pretrain.train/tests.faults.trainer}}"
"""


class Launches:
    """A folder from which train.sh is started, once for each node."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = []
        python = folder / "python"
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        unset = ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "LOGLEVEL")
        self.environment = {key: value for key, value in os.environ.items() if key not in unset}
        self.environment |= {
            "ITHACA_PYTHON": str(python),
            "HERE": str(folder),
            "TMPDIR": str(folder),
            "NPROC_PER_NODE": "2",
            "NNODES": "1",
            "MAX_RESTARTS": "0",
            "GRACE": "5",
            "JOIN_WAIT": "30",
            "NCCL_SOCKET_IFNAME": "lo",
        }

    def start(self, *before: str, **environment: str) -> subprocess.Popen:
        """Start train.sh in the background, after the words `before`."""
        process = subprocess.Popen(
            [*before, "bash", str(TRAIN_SH), "--config", "run.yaml"],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, **environment: str) -> tuple[int, str]:
        return finish(self.start(**environment))

    def pid(self, rank: int) -> int:
        """Wait for a rank's stand-in trainer -> its process id."""
        wait_until(lambda: (self.folder / f"ready.{rank}").exists(), f"rank {rank} starts")
        return int((self.folder / f"pid.{rank}").read_text())

    def end(self) -> None:
        """Leave nothing behind, also where a test has found that something stays."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
        for path in self.folder.glob("pid.*"):
            pid = int(path.read_text())
            for left in (parent_of(pid), pid) if is_trainer(pid) else ():
                if left > 1:
                    os.kill(left, signal.SIGKILL)
        for process in self.started:
            process.communicate()


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for train.sh -> its exit code, and what it said but for the lines of every start."""
    _, err = process.communicate(timeout=SECONDS)
    usual = ("gloo use", "of 2 trains: rank", "2 nodes with", "train.sh:   ")
    lines = [line for line in err.splitlines() if not any(words in line for words in usual)]
    return process.returncode, "\n".join(lines)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, f"it did not come to this: {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def is_trainer(pid: int) -> bool:
    return is_alive(pid) and b"tests.faults.trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture
def launches(tmp_path):
    found = Launches(tmp_path)
    yield found
    found.end()


def test_nothing_goes_on_when_train_sh_is_killed_and_a_new_start_works(launches):
    process = launches.start(ACTION="train")
    pids = [launches.pid(rank) for rank in range(2)]
    launcher = parent_of(pids[0])
    assert parent_of(launcher) == process.pid, "launch.node is train.sh's child"
    process.kill()
    for pid in (launcher, *pids):
        wait_until(lambda pid=pid: not is_alive(pid), f"process {pid} ends")
    code, err = launches.run(ACTION="done")
    assert code == 0, err


def test_no_worker_goes_on_when_the_launcher_is_killed(launches):
    process = launches.start(ACTION="train")
    pids = [launches.pid(rank) for rank in range(2)]
    process.send_signal(signal.SIGSTOP)  # the kernel ends them, not train.sh
    os.kill(parent_of(pids[0]), signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: not is_alive(pid), f"process {pid} ends")
    process.send_signal(signal.SIGCONT)
    code, err = finish(process)
    assert code == 1, err


def test_a_stop_says_nothing_but_that_it_stops(launches):
    process = launches.start(ACTION="train")
    launches.pid(0)
    launches.pid(1)
    process.send_signal(signal.SIGTERM)
    code, err = finish(process)
    assert code == 75, err
    assert err.splitlines() == [
        "train.sh: SIGTERM: asking the run to save and stop (up to 5 s)",
        "train.sh: stopped before the first step; the same command goes on",
    ]


def test_a_refusal_is_one_line(launches):
    code, err = launches.run(ACTION="refuse")
    assert code == 2, err
    assert err == "error: lr = -1: must be positive. Fix: a positive one."


def test_a_crash_ends_with_the_error_of_the_rank_that_failed(launches):
    code, err = launches.run(ACTION="crash")
    assert code == 1, err
    assert err.count("Traceback (most recent call last)") == 1, err
    said = err[err.index("RuntimeError: the loss is a pear") :].splitlines()
    assert said[1].startswith("train.sh: error: rank 1 (local rank 1, process ")
    assert said[1].endswith("failed before the first step: RuntimeError: the loss is a pear")
    # What is more than the console shows is in a file of the rank.
    folder = said[2].removeprefix("train.sh: what every rank of this node said is in ")
    assert "raise RuntimeError" in (Path(folder) / "rank1.txt").read_text()


def test_with_a_save_folder_the_errors_are_kept_there(launches):
    (launches.folder / "run.yaml").write_text("save: out")
    code, err = launches.run(ACTION="crash")
    assert code == 1, err
    (kept,) = launches.folder.glob("out/errors/*/rank1.txt")
    assert f"said is in {kept.parent.relative_to(launches.folder)}" in err
    assert not list(launches.folder.glob("ithaca.*"))


def test_a_segmentation_fault_says_where_it_was(launches):
    code, err = launches.run(ACTION="segfault")
    assert code == 1, err
    assert "was killed by SIGSEGV" in err
    assert "Fatal Python error: Segmentation fault" in err
    assert "trainer.py" in err


def test_a_killed_rank_is_named_with_its_signal(launches):
    code, err = launches.run(ACTION="killed")
    assert code == 1, err
    assert "error: rank 1 (local rank 1, process " in err
    assert "was killed by SIGKILL" in err
    assert "Traceback" not in err


def two_nodes(**environment: str) -> dict[str, str]:
    return {"NNODES": "2", "MASTER_ADDR": "localhost", "NPROC_PER_NODE": "1"} | environment


def test_a_node_waits_for_node_0_and_says_so(launches):
    settings = two_nodes(MASTER_PORT=str(free_port()), ACTION="done")
    other = launches.start(NODE_RANK="1", **settings)
    said = ""
    while "waiting for node 0 at localhost" not in said:
        said = other.stderr.readline()
        assert said, "node 1 ended before node 0 started"
    code, err = launches.run(NODE_RANK="0", **settings)
    assert code == 0, err
    code, err = finish(other)
    assert code == 0, err


def test_a_stop_while_a_node_waits_is_an_orderly_one(launches):
    """Nothing is trained yet: Slurm is to start the same command again later."""
    node0 = launches.start(NODE_RANK="0", **two_nodes(MASTER_PORT=str(free_port())))
    said = ""
    while "waiting for 1 node of 2" not in said:
        said = node0.stderr.readline()
        assert said, "node 0 ended before node 1 started"
    node0.send_signal(signal.SIGTERM)
    code, err = finish(node0)
    assert code == 75, err


def test_a_port_in_use_is_one_line_and_not_tried_as_a_crash(launches):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, err = launches.run(
            NODE_RANK="0", MAX_RESTARTS="3", **two_nodes(MASTER_PORT=str(port))
        )
    assert code == 2, err
    assert err == (
        f"train.sh: error: MASTER_PORT = {port}: must be a port that is free on node 0 (Address "
        "already in use). Fix: another one, the same on all nodes, or end the process that has it."
    )


@pytest.mark.long  # test_meeting.py has it without train.sh
def test_a_node_0_that_is_never_there_is_one_line_and_not_tried_as_a_crash(launches):
    settings = two_nodes(MASTER_PORT=str(free_port()), JOIN_WAIT="1", MAX_RESTARTS="3")
    code, err = launches.run(NODE_RANK="1", **settings)
    assert code == 1, err
    (line,) = err.splitlines()
    assert "error: waited 1 s for node 0 at localhost (127.0.0.1) port " in line
    assert ": Connection refused. Fix: " in line


def test_a_name_that_does_not_resolve_is_refused(launches):
    code, err = launches.run(
        **two_nodes(NODE_RANK="1", MASTER_ADDR="no.such.host.invalid", JOIN_WAIT="1")
    )
    assert code == 2, err
    (line,) = err.splitlines()
    assert line.startswith(
        "train.sh: error: MASTER_ADDR = no.such.host.invalid: must be a name or an"
    )
    assert "Fix: node 0's address" in line


def test_a_node_that_refuses_ends_the_others_which_name_it(launches):
    settings = two_nodes(MASTER_PORT=str(free_port()), ACTION="refuse on node 1")
    node0 = launches.start(NODE_RANK="0", **settings)
    code, err = launches.run(NODE_RANK="1", **settings)
    assert code == 2, err
    assert err == "error: data_path = x: does not exist. Fix: another one."
    code, err = finish(node0)
    assert code == 2, err
    assert err == (
        f"train.sh: error: node 1 ({socket.gethostname()}) ended this launch: it refused to train; "
        "its own output says why"
    )


def test_a_node_that_crashes_ends_the_others_which_name_it(launches):
    """They end as if asked to stop, which must not look like a stop: they are to start again."""
    settings = two_nodes(MASTER_PORT=str(free_port()), ACTION="killed")
    node0 = launches.start(NODE_RANK="0", **settings)
    code, err = launches.run(NODE_RANK="1", **settings)
    assert code == 1, err
    assert "was killed by SIGKILL" in err
    code, err = finish(node0)
    assert code == 1, err
    host = socket.gethostname()
    assert f"error: node 1 ({host}) ended this launch: rank 1 (local rank 0, process " in err
    assert "was killed by SIGKILL" in err


def test_nodes_whose_own_name_is_127_0_1_1_reach_each_other(launches, networks):
    """The ranks of both nodes sum over gloo, which by itself tells the other node 127.0.1.1."""
    processes = []
    for rank, name in enumerate(networks):
        hosts = launches.folder / f"hosts.{rank}"
        own = (
            "127.0.1.1 node0\n10.77.0.2 node1\n"
            if rank == 0
            else "10.77.0.1 node0\n127.0.1.1 node1\n"
        )
        hosts.write_text("127.0.0.1 localhost\n" + own)
        inside = f'hostname node{rank} && mount --bind {hosts} /etc/hosts && exec "$@"'
        before = ["ip", "netns", "exec", name, "unshare", "-m", "-u", "bash", "-c", inside, "bash"]
        settings = two_nodes(MASTER_ADDR="node0", ACTION="all_reduce", NODE_RANK=str(rank))
        processes.append(launches.start(*before, **settings))
    errors = [process.communicate(timeout=SECONDS)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    assert (launches.folder / "sum.0").read_text() == "3 over eth7"
    assert (launches.folder / "sum.1").read_text() == "3 over bond0.7"
    assert "gloo use eth7 (10.77.0.1): MASTER_ADDR node0 is 127.0.1.1 here" in errors[0]
    assert "gloo use bond0.7 (10.77.0.2): it reaches MASTER_ADDR node0 (10.77.0.1)" in errors[1]


def both(launches, second: dict[str, str] | None = None, **settings: str) -> list:
    """Start both nodes of a launch, node 1 with settings of its own."""
    settings = two_nodes(MASTER_PORT=str(free_port())) | settings
    return [
        launches.start(NODE_RANK=str(rank), **settings | (second or {} if rank else {}))
        for rank in range(2)
    ]


def launcher_of(process: subprocess.Popen) -> int:
    """Return the process id of train.sh's launcher."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text() != "", "train.sh starts its launcher")
    return int(children.read_text().split()[0])


@pytest.mark.parametrize(
    "rank, name", [(1, "SIGTERM"), pytest.param(0, "SIGUSR1", marks=pytest.mark.long)]
)
def test_a_stop_of_one_node_stops_both_and_says_which(launches, rank, name):
    nodes = both(launches, ACTION="train")
    launches.pid(0)
    launches.pid(1)
    nodes[rank].send_signal(getattr(signal, name))
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [75, 75], ends
    told = f"train.sh: node {rank} ({socket.gethostname()}) is asked to stop ({name}): this node"
    assert told in ends[1 - rank][1]
    assert told not in ends[rank][1]
    for _, err in ends:
        assert err.count("asking the run to save and stop") == 1, err
        assert err.endswith("stopped before the first step; the same command goes on"), err


def test_the_same_error_twice_ends_both_nodes_with_the_reason(launches):
    nodes = both(launches, ACTION="crash", MAX_RESTARTS="9")
    for node in nodes:
        code, err = finish(node)
        assert code == 1, err
        assert "the same error twice at the same step, without a new checkpoint in between" in err
        assert err.endswith(
            "RuntimeError in trainer.py: main before the first step: the loss is a pear"
        )


@pytest.mark.long  # test_meeting.py has both sides of it
def test_a_stop_while_a_restart_waits_stops_both(launches):
    nodes = both(launches, ACTION="killed", MAX_RESTARTS="9", RETRY_WAIT="60")
    for line in nodes[1].stderr:
        if "restart 2 of 9 in 60 s" in line:
            break
    nodes[1].send_signal(signal.SIGTERM)
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [75, 75], ends
    assert f"node 1 ({socket.gethostname()}) is asked to stop (SIGTERM)" in ends[0][1]


def test_a_node_whose_launcher_is_killed_is_named_and_comes_back(launches):
    nodes = both(launches, ACTION="train once", MAX_RESTARTS="1")
    launches.pid(0)
    launches.pid(1)
    os.kill(launcher_of(nodes[1]), signal.SIGKILL)
    ends = [finish(node) for node in nodes]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "error: node 1 (" in ends[0][1]
    assert "its launcher" in ends[0][1] and "is gone" in ends[0][1]


@pytest.mark.long  # the test before has the other node
def test_node_0_that_is_killed_is_named_and_waited_for(launches):
    nodes = both(launches, ACTION="train once", MAX_RESTARTS="1")
    launches.pid(0)
    launches.pid(1)
    nodes[0].kill()
    for line in nodes[1].stderr:
        if "restart 1 of 1" in line:
            break
        if "error:" in line:
            assert "node 0 (localhost) ended this launch: its launcher is gone" in line
    settings = dict(
        pair.split("=", 1)
        for pair in Path(f"/proc/{nodes[1].pid}/environ").read_text().split("\0")
        if "=" in pair
    )
    code, err = launches.run(**settings | {"NODE_RANK": "0"})
    assert code == 0, err
    assert finish(nodes[1])[0] == 0
