"""A run on two nodes in two networks, and the wire between them is cut."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.dist.training import base_arguments, write_corpus
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
