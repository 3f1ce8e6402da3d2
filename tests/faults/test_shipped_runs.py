"""The runs of launch/configs train at toy size: their phases, layouts and settings, made small."""

from pathlib import Path

import pytest
import yaml

from data.units import parse_tokens
from tests.dist.training import losses
from tools.faults.launched_run import ROOT, LaunchedRun

pytestmark = pytest.mark.long

PROCESSES = {"125m-1gpu": 1, "1b-8gpu": 2, "llama3-8b-extend-1m": 8, "llama3-70b-1m": 8}
SHORTER = 256
SAMPLES = 8
"""Samples of a step."""
STEPS = 2
"""Steps of a phase."""
OF_DATA = ("data_path", "split", "tokenizer_type", "tokenizer_model")
SECONDS = 900


def make_small(run: dict) -> dict:
    """Return the run with a tiny model, invented text and short samples, on layouts of twos."""
    small = {key: value for key, value in run.items() if key not in OF_DATA}
    small |= {"model": "tiny", "mock_data": True, "vocab_size": 512, "lr_warmup_tokens": 256}
    small |= {"save_interval": 100, "eval_iters": 1, "num_layers": 4}
    del small["save"]
    halve_layout(small)
    small["phases"] = [dict(phase) for phase in run["phases"]]
    for phase in small["phases"]:
        phase.pop("data_path", None)
        phase["seq_length"] = max(64, parse_tokens(phase["seq_length"]) // SHORTER)
        phase["global_batch_tokens"] = SAMPLES * phase["seq_length"]
        phase["train_tokens"] = STEPS * phase["global_batch_tokens"]
        halve_layout(phase)
    return small


def halve_layout(settings: dict) -> None:
    """Leave 2 ranks on each axis that has more, and 2 on each level of cp."""
    for axis in ("tensor_model", "pipeline_model", "context"):
        name = f"{axis}_parallel_size"
        if name in settings:
            settings[name] = min(2, settings[name])
    levels = settings.get("hierarchical_context_parallel_sizes")
    if levels:
        first, second = (min(2, size) for size in levels)
        settings["hierarchical_context_parallel_sizes"] = [first, second]
        settings["context_parallel_size"] = first * second


def test_each_shipped_run_of_a_cluster_is_here():
    shipped = {path.stem for path in (ROOT / "launch" / "configs").glob("*-*.yaml")}
    # quickstart.sh trains that one.
    assert shipped - {"quickstart-1gpu"} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_shipped_run_trains_through_all_its_phases(name, tmp_path: Path):
    run = yaml.safe_load((ROOT / "launch" / "configs" / f"{name}.yaml").read_text())
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(make_small(run), sort_keys=False))
    save = tmp_path / "save"
    launched = LaunchedRun(["--config", str(config)], save, PROCESSES[name])
    try:
        code, said = launched.wait(SECONDS)
    finally:
        launched.end()
    assert code == 0, said
    assert list(losses(save)) == list(range(1, STEPS * len(run["phases"]) + 1))
