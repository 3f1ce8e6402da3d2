"""A bit that flips anywhere in a checkpoint, or in what names the latest, is noticed by a load."""

import random
from pathlib import Path

import pytest
import torch

from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.damage import find_restart
from pretrain.checkpointing.folders import LATEST
from pretrain.checkpointing.manifest import DamagedCheckpoint
from tests.damaged import NAMES, files_of, flip, save


def refusal_of_load(folder: Path) -> str:
    """Load a checkpoint in one process -> what its refusal says, or that it was loaded."""
    tensors = {name: torch.zeros(8, 5) for name in NAMES}
    world = single_process_layout(torch.device("cpu")).world
    try:
        checkpoint.load(folder, tensors, world)
        return "loaded"
    except DamagedCheckpoint as damage:
        assert not any(tensor.any() for tensor in tensors.values()), "a part was loaded"
        return str(damage)


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_every_single_bit_flip_is_caught(tmp_path, count):
    """Drawn uniformly over all bytes: passed over by the plan, or refused before the load."""
    good = save(tmp_path, 1)
    newest = save(tmp_path, 2)
    places = [(path, path.stat().st_size) for path in [*files_of(newest), tmp_path / LATEST]]
    by_file = {path.name: 0 for path, _ in places}
    generator = random.Random(8)
    for number in range(count):
        (path,) = generator.choices(*zip(*places, strict=True))
        bit = generator.randrange(8 * path.stat().st_size)
        flip(path, bit)
        found = find_restart(tmp_path)
        if path.name == LATEST:
            caught = found.folder == newest and found.is_pointer_wrong
        else:
            # What the plan does not read is refused by the load, which then changes nothing.
            said = str(found.damaged[0]) if found.damaged else refusal_of_load(newest)
            caught = f"{path} " in said
            assert found.folder == (good if found.damaged else newest)
        assert caught, f"flip {number}: bit {bit} of {path}: {found}"
        flip(path, bit)
        by_file[path.name] += 1
    assert find_restart(tmp_path).folder == newest and refusal_of_load(newest) == "loaded"
    assert sum(by_file.values()) == count and by_file["__0_0.distcp"] > 0, by_file
