"""A conversion holds one tensor in memory, whatever the size of the model and of its files."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.huggingface.model_folders import change_weights, write_folder
from tools.bench.fresh import trim
from tools.export_hf import Arguments as ExportArguments
from tools.export_hf import export
from tools.import_hf import Arguments as ImportArguments
from tools.import_hf import import_folder

SIZES = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=5, vocab_size=2048)
"""22 million numbers: 87 MB in fp32, of which the largest tensor has 4 MB."""
WHOLE_BYTES = 80_000_000
ROOM_BYTES = 40_000_000
"""More memory than a conversion takes for tensors, blocks and what it imports late."""


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024


def peak_of(act: Callable[[], object]) -> int:
    """Run `act` in a fork -> the bytes by which its memory grew at most."""
    # Memory that this process freed and still holds could be used again without growing.
    trim()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            # A fork begins with its parent's peak, but without most pages of its files: what
            # grows would hide below it. 5 = forget the peak.
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_bytes()
            act()
            os.write(writing, str(peak_bytes() - before).encode())
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        grown = int(pipe.read())
    os.waitpid(child, 0)
    return grown


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("memory") / "hf", "llama", **SIZES, head_dim=128)

    def halve(tensors):
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    change_weights(folder, halve)
    return folder


def test_what_is_held_shows_in_the_peak():
    # As after other tests: more free memory in the middle of the heap than the tensor takes. The
    # blocks are too small to be mapped one by one. The last one stays: glibc would give free memory
    # at the heap's end back on its own.
    blocks = [bytearray(50_000) for _ in range(3 * WHOLE_BYTES // 50_000)]
    del blocks[:-1]
    held = peak_of(lambda: torch.ones(WHOLE_BYTES // 4))
    assert held > 0.9 * WHOLE_BYTES, held


def test_an_import_and_an_export_hold_one_tensor(folder, tmp_path, capfd):
    save = tmp_path / "save"
    arguments = ImportArguments(hf=str(folder), save=str(save), verify=False)
    grown = peak_of(lambda: import_folder(arguments))
    stored = sum(path.stat().st_size for path in save.rglob("*.distcp"))
    assert stored > WHOLE_BYTES
    assert grown < ROOM_BYTES, f"the import took {grown:,} bytes"
    # One file of the output is larger than the room.
    grown = peak_of(lambda: export(ExportArguments(load=str(save), output=str(tmp_path / "out"))))
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > WHOLE_BYTES
    assert grown < ROOM_BYTES, f"the export took {grown:,} bytes"
