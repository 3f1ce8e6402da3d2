"""A bit that flips anywhere in a checkpoint, or in what names the latest, is noticed by a load."""

import random

import pytest

from pretrain.checkpointing.damage import find_restart
from pretrain.checkpointing.folders import LATEST
from pretrain.checkpointing.manifest import verify_files
from tests.damaged import files_of, flip, save


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
            damage = [*found.damaged[:1]] or verify_files(newest)
            caught = str(path) in str(damage[0]) if damage else False
            assert (found.folder == good) == bool(found.damaged)
        assert caught, f"flip {number}: bit {bit} of {path}: {found}"
        flip(path, bit)
        by_file[path.name] += 1
    assert find_restart(tmp_path).folder == newest and not verify_files(newest)
    assert sum(by_file.values()) == count and by_file["__0_0.distcp"] > 0, by_file
