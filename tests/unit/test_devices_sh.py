"""launch/devices.sh: how many GPUs are counted, and how many processes a run of fours gets."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = '. "$0/launch/devices.sh"; choose_devices; echo "$(count_gpus) $processes $where"'


def ask(folder: Path, **environment: str) -> str:
    """Count on a machine whose driver lists 8 GPUs."""
    driver = folder / "nvidia-smi"
    driver.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo GPU $i: H100; done\n")
    driver.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name[:4] != "CUDA"}
    inherited["PATH"] = f"{folder}:{inherited['PATH']}"
    command = ["bash", "-euc", ASK, str(ROOT)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_gpus_count(tmp_path):
    assert ask(tmp_path) == "8 8 8 GPUs"


@pytest.mark.parametrize(
    "visible, expected", [("0,1,2,3,4,5", "6 4 4 GPUs"), ("2", "1 1 1 GPU"), ("0,1", "2 1 1 GPU")]
)
def test_only_visible_gpus_count(tmp_path, visible, expected):
    assert ask(tmp_path, CUDA_VISIBLE_DEVICES=visible) == expected


@pytest.mark.parametrize("visible", ["", "-1"])
def test_without_a_visible_gpu_four_processes_share_the_cpu(tmp_path, visible):
    assert ask(tmp_path, CUDA_VISIBLE_DEVICES=visible).startswith("0 4 4 processes on the CPU")
