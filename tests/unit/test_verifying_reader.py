"""A checkpoint's tensors are read part by part, and no byte of its files is used unseen."""

import builtins
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint, manifest
from pretrain.checkpointing.folders import MANIFEST
from pretrain.checkpointing.manifest import DamagedCheckpoint, verify_files
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.verifying_reader import VerifyingReader
from tests.damaged import flip, save


def read(folder: Path, name: str) -> torch.Tensor:
    reader = VerifyingReader(folder)
    whole = torch.zeros(reader.entries[name].size)
    for place, values in reader.read_parts(name):
        whole[place] = values
    reader.finish()
    return whole


def test_each_byte_of_the_shards_is_read_once(tmp_path, monkeypatch):
    folder = save(tmp_path, 1, value=3.0)
    counted = {"bytes": 0}
    real = builtins.open

    class Counting:
        """A file that counts what is read into buffers and blocks of 1 MiB at most."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            return self.file.seek(place)

        def read(self, size):
            content = self.file.read(size)
            counted["bytes"] += len(content)
            return content

        def readinto(self, block):
            counted["bytes"] += len(block)
            return self.file.readinto(block)

    reader = VerifyingReader(folder)
    for shard in reader._files.values():
        monkeypatch.setattr(shard, "_open", lambda shard=shard: Counting(real(shard._path, "rb")))
    for name in reader.names(""):
        for _, values in reader.read_parts(name):
            assert values.unique().tolist() == [3.0]
    reader.finish()
    assert counted["bytes"] == sum(path.stat().st_size for path in folder.glob("*.distcp"))


@pytest.mark.filterwarnings("ignore:.*(is disabled|an existing checkpoint)")
def test_a_tensor_that_is_not_contiguous_in_its_file_is_read(tmp_path):
    """DCP keeps the strides of what it saves."""
    folder = save(tmp_path, 1)
    tensor = torch.arange(40.0).view(5, 8).t()
    dcp.save(
        {"model.output.weight": tensor},
        storage_writer=dcp.FileSystemWriter(folder, overwrite=True),
        no_dist=True,
    )
    listed = manifest.list_checksums(folder, {})
    listed.pop(MANIFEST)
    (folder / MANIFEST).write_text(manifest.to_text(listed))
    assert not verify_files(folder)
    assert torch.equal(read(folder, "model.output.weight"), tensor)


@pytest.mark.parametrize("place", ["a tensor that is read", "the optimizer's", "the table"])
def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path, place):
    folder = save(tmp_path, 1)
    reader = VerifyingReader(folder)
    shard = folder / "__0_0.distcp"
    parts = {name: reader._parts[name][0] for name in reader.entries}
    if place == "the table":
        flip(folder / ".metadata", 1234)
        with pytest.raises(DamagedCheckpoint, match=r"\.metadata differs from its checksum"):
            VerifyingReader(folder)
        return
    name = "model.output.weight" if place == "a tensor that is read" else list(parts)[-1]
    flip(shard, 8 * (parts[name].offset + parts[name].length // 2))
    with pytest.raises(DamagedCheckpoint, match="differs from its checksum"):
        for each in reader.names():
            for _ in reader.read_parts(each):
                pass
        reader.finish()


def test_a_shard_that_is_cut_short_names_its_tensors(tmp_path):
    folder = save(tmp_path, 1)
    shard = folder / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:1800])
    reader = VerifyingReader(folder)
    with pytest.raises(DamagedCheckpoint, match="damaged: model.output.weight"):
        list(reader.read_parts("model.output.weight"))


def test_a_tensor_is_read_when_it_is_written_and_its_memory_given_back_by_the_next(tmp_path):
    filled: list[torch.Tensor] = []
    held = []

    def fill(name: str, tensor: torch.Tensor) -> None:
        tensor.fill_(1 + float(name[-1]))
        filled.append(tensor)
        # Pages that were given back read as zeros.
        held.append(sum(bool(each.any()) for each in filled))

    names = [f"model.{number}" for number in range(5)]
    template = save(tmp_path / "template", 1)
    folder = checkpoint.save(
        tmp_path / "late",
        1,
        {name: torch.empty(40, 50, device="meta") for name in names},
        Progress.read(template),
        (template / "config.yaml").read_text(),
        {},
        single_process_layout(torch.device("cpu")).world,
        fill=fill,
    )
    assert held == [1] * 5, "only the tensor that is written is in memory"
    assert [read(folder, name).unique().tolist() for name in names] == [[1], [2], [3], [4], [5]]
