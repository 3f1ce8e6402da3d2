"""Every run that is shipped can be planned as its file says, and verified and trained in small."""

import json
from pathlib import Path

import pytest

from tools import plan

CONFIGS = Path(__file__).parents[2] / "launch" / "configs"
MADE_FOR = {
    "125m-1gpu": (1, "h100"),
    "1b-8gpu": (8, "h100"),
    "llama3-8b-extend-1m": (64, "h100"),
    "llama3-70b-1m": (1024, "h100"),
}
"""World size and hardware that the top of the file names."""
ON_A_LAPTOP = {"extend", "grow", "million", "quickstart", "quickstart-1gpu"}
"""Runs of tools and tests that train them (quickstart.sh, extend.sh, test_crossing.py)."""


def plan_of(name: str, world_size: int, hardware: str, folder: Path, *more: str) -> dict:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--world-size", str(world_size)]
    found = folder / "plan.json"
    words += ["--hardware", hardware, "--without-data", "--json", str(found), *more]
    assert plan.main(words) == 0
    return json.loads(found.read_text())


def test_every_shipped_run_is_planned_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(MADE_FOR) | ON_A_LAPTOP


@pytest.mark.parametrize("name", MADE_FOR)
def test_a_shipped_run_fits_the_machines_that_it_names(name, tmp_path):
    world_size, hardware = MADE_FOR[name]
    report = plan_of(name, world_size, hardware, tmp_path)
    assert f"--world-size {world_size}" in (CONFIGS / f"{name}.yaml").read_text() or world_size <= 8
    for phase in report["phases"]:
        memory = phase["memory"]
        assert memory["total_bytes"] <= memory["usable_bytes"], phase["name"]
        # What talks in every layer stays inside a node.
        for axis in phase["layout"]["axes"]:
            if axis["name"] in ("tp", "cp_a2a") or axis["name"] == "cp" and axis["size"] <= 8:
                assert axis["is_inside_node"], (phase["name"], axis)


@pytest.mark.parametrize("world_size", [128, 256])
def test_the_extension_runs_on_more_nodes_too(world_size, tmp_path):
    report = plan_of("llama3-8b-extend-1m", world_size, "h100", tmp_path)
    assert report["phases"][-1]["batch"]["seq_length"] == 1 << 20


@pytest.mark.long
@pytest.mark.parametrize("name", MADE_FOR)
def test_a_shipped_run_is_verified(name, tmp_path, capsys):
    world_size, hardware = MADE_FOR[name]
    plan_of(name, world_size, hardware, tmp_path, "--verify")
    assert "everything agrees" in capsys.readouterr().out
