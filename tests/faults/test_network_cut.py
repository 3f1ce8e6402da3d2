"""A run on two nodes in two networks, and the wire between them is cut."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.dist.training import base_arguments, write_corpus
from tools.faults.comparison import differences
from tools.faults.launched_run import LaunchedRun

SHORT_CUT_SECONDS = 4
STEPS = 400
ENDS_WITHIN_SECONDS = 120
"""Seconds in which both nodes know that the wire is cut for good, and have ended: the kernel alone
would take a quarter of an hour."""


def launch(folder: Path, networks: list[str], *flags: str, **environment: str) -> LaunchedRun:
    corpus = write_corpus(folder / "corpus", documents=60)
    settings = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": ""} | environment
    return LaunchedRun(
        [*base_arguments(corpus, train_iters=STEPS, save_interval=50, eval_iters=0), *flags],
        folder / "save",
        1,
        nodes=2,
        before=[["ip", "netns", "exec", name] for name in networks],
        environment=settings,
    )


def set_wire(network: str, state: str) -> None:
    subprocess.run(["ip", "-n", network, "link", "set", "eth7", state], check=True)


@pytest.mark.long
def test_a_wire_that_comes_back_costs_nothing_but_time(networks, tmp_path):
    run = launch(tmp_path, networks)
    try:
        assert run.wait_until(lambda: run.last_step() >= 5), "".join(run.lines)
        set_wire(networks[0], "down")
        time.sleep(SHORT_CUT_SECONDS)
        at_cut = run.last_step()
        set_wire(networks[0], "up")
        ends = run.wait_for_all(300)
    finally:
        run.end()
    assert at_cut < STEPS, "the run was over before the wire was cut"
    assert [code for code, _ in ends] == [0, 0], ends
    starts = [event["event"] for event in run.events() if event["event"] in ("start", "restart")]
    assert starts == ["start"], "no restart was needed"
    assert run.last_step() == STEPS


@pytest.mark.long
def test_a_wire_that_stays_cut_is_found_and_ends_both_nodes(networks, tmp_path):
    run = launch(tmp_path, networks, MAX_RESTARTS="0", JOIN_WAIT="5")
    try:
        assert run.wait_until(lambda: run.last_step() >= 5), "".join(run.lines)
        set_wire(networks[0], "down")
        ends = run.wait_for_all(ENDS_WITHIN_SECONDS)
        left = run.workers()
    finally:
        run.end()
    for number, (code, said) in enumerate(ends):
        assert code == 1, said
        (line,) = [line for line in said.splitlines() if "ended this launch" in line]
        assert f"error: node {1 - number} (" in line
        assert "the network to it is cut: " in line
        assert "Traceback" not in said
    assert not left


@pytest.mark.long
def test_nodes_meet_again_when_the_wire_is_back_and_go_on_bit_identically(networks, tmp_path):
    run = launch(tmp_path, networks)
    try:
        assert run.wait_until(lambda: run.last_step() >= 60), "".join(run.lines)
        set_wire(networks[0], "down")
        assert run.wait_until(lambda: all(has_restarted(node.lines) for node in run.nodes))
        set_wire(networks[0], "up")
        ends = run.wait_for_all(300)
    finally:
        run.end()
    assert [code for code, _ in ends] == [0, 0], ends
    assert all(said.count("ended this launch") == 1 for _, said in ends), ends
    arguments = base_arguments(
        str(tmp_path / "corpus"), train_iters=STEPS, save_interval=50, eval_iters=0
    )
    alone = LaunchedRun(arguments, tmp_path / "undisturbed", 2)
    try:
        alone.wait_until_done()
    finally:
        alone.end()
    assert differences(tmp_path / "save", tmp_path / "undisturbed") == []


def has_restarted(lines: list[str]) -> bool:
    return any("restart 1 of" in line for line in lines)


@pytest.mark.long
def test_a_wire_cut_while_nodes_meet_ends_both_after_the_wait(networks, tmp_path):
    """They wait for a third node, which never comes."""
    run = launch(tmp_path, networks, NNODES="3", JOIN_WAIT="40")
    try:
        is_waiting = "waiting for 1 node of 3"
        assert run.wait_until(lambda: is_waiting in "".join(run.nodes[1].lines))
        set_wire(networks[0], "down")
        ends = run.wait_for_all(ENDS_WITHIN_SECONDS)
    finally:
        run.end()
    assert [code for code, _ in ends] == [1, 1], ends
    assert "s for 1 node of 3 (NODE_RANK 2). Fix: " in ends[0][1]
    assert "s for node 0 at 10.77.0.1 port " in ends[1][1]
    assert not any("restart" in said or "Traceback" in said for _, said in ends), ends
