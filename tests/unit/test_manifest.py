"""The manifest vouches for every file and for itself, the pointer for its number."""

import json

import pytest

from pretrain.checkpointing.folders import (
    LATEST,
    MANIFEST,
    find_published,
    iteration_folder,
    pointer_text,
    read_pointer,
    write_pointer,
)
from pretrain.checkpointing.manifest import (
    FORMAT,
    DamagedCheckpoint,
    read_manifest,
    to_text,
    verify_files,
)

CHECKSUMS = {"config.yaml": "0" * 32, "tokenizer/ü.model": "f" * 32}


def flips(content: bytes):
    """Every content that differs from this one in a single bit."""
    for at in range(8 * len(content)):
        changed = bytearray(content)
        changed[at // 8] ^= 1 << at % 8
        yield bytes(changed)


def test_no_bit_of_a_manifest_changes_unnoticed(tmp_path):
    # The folder has a parent of its own: each refusal looks for other checkpoints there.
    folder = iteration_folder(tmp_path, 1)
    folder.mkdir()
    content = to_text(CHECKSUMS).encode()
    (folder / MANIFEST).write_bytes(content)
    assert read_manifest(folder).files == CHECKSUMS
    caught = 0
    for changed in flips(content):
        (folder / MANIFEST).write_bytes(changed)
        with pytest.raises(DamagedCheckpoint, match="manifest.json cannot be used"):
            read_manifest(folder)
        caught += 1
    assert caught == 8 * len(content) > 1000


@pytest.mark.parametrize("step", [0, 7, 100, 1234567, 10**9])
def test_no_bit_of_a_pointer_changes_unnoticed(tmp_path, step):
    write_pointer(tmp_path, step)
    assert read_pointer(tmp_path) == step
    for changed in flips(pointer_text(step).encode()):
        (tmp_path / LATEST).write_bytes(changed)
        with pytest.raises(ValueError, match=LATEST):
            read_pointer(tmp_path)


def test_other_programs_read_a_pointer_as_a_number():
    assert int(pointer_text(1200).strip()) == 1200, "as Megatron-LM reads it"
    assert pointer_text(1200).splitlines()[0] == "1200"


@pytest.mark.parametrize("text", ["12", "12\n", " 12 \r\n"])
def test_a_number_that_a_person_wrote_is_a_pointer(tmp_path, text):
    (tmp_path / LATEST).write_text(text, newline="")
    assert read_pointer(tmp_path) == 12


def test_a_number_edited_above_its_checksum_is_refused_with_the_way_to_choose(tmp_path):
    (tmp_path / LATEST).write_text(pointer_text(12).replace("12", "6", 1))
    with pytest.raises(ValueError, match=r"= 6: does not fit the checksum .* echo 6 > "):
        find_published(tmp_path)


def test_a_newer_format_is_refused_with_the_fix_and_is_no_damage(tmp_path, monkeypatch):
    with monkeypatch.context() as newer:
        newer.setattr("pretrain.checkpointing.manifest.FORMAT", FORMAT + 1)
        (tmp_path / MANIFEST).write_text(to_text(CHECKSUMS))
    with pytest.raises(ValueError, match="Fix: use the version that saved it") as refusal:
        verify_files(tmp_path)
    assert not isinstance(refusal.value, DamagedCheckpoint)
    assert f"has format {FORMAT + 1}, and this version of the code reads formats up to" in str(
        refusal.value
    )


def test_a_manifest_of_the_first_format_is_read_and_known_to_have_no_seal(tmp_path):
    folder = iteration_folder(tmp_path, 3)
    folder.mkdir()
    stored = {"algorithm": "xxh3_128", "files": CHECKSUMS}
    (folder / MANIFEST).write_text(json.dumps(stored, indent=1))
    manifest = read_manifest(folder)
    assert manifest.files == CHECKSUMS and not manifest.is_sealed
    (folder / MANIFEST).write_text(to_text(CHECKSUMS))
    assert read_manifest(folder).is_sealed


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"files": []}', "{", '"files"'])
def test_what_is_no_manifest_is_damage(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    (problem,) = verify_files(tmp_path)
    assert problem.startswith(f"{tmp_path / MANIFEST} cannot be used (")
