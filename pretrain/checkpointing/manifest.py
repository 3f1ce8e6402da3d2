"""A checkpoint's list of files with their checksums: made by a save, compared before a load.

The list is sealed: it ends with a checksum of its own text, so that it vouches for every other
file and for itself.
"""

import dataclasses
import errno
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from data.files import checksum
from pretrain.checkpointing.folders import CARRIED, MANIFEST, TOKENIZER, complete_steps, step_of
from pretrain.checkpointing.stored_tensors import METADATA, SafeReader, name_damaged_tensors

FORMAT = 2
"""Number of the format of a checkpoint's folder. Raise it when an older version of this code would
misread what a save writes. 1 had no number and no seal."""
SEAL = "checksum"
"""Key of the manifest's own checksum."""
READERS = 4
"""Files that a process compares at once: checksums leave the interpreter free."""
DISK_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""What a file system says where the disk has lost what was written."""
SHOWN_PROBLEMS = 4
"""Files or tensors that a message about a checkpoint names."""


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were saved.

    Args:
        folder: the checkpoint.
        problems: what is wrong with it, a sentence each.
    """

    def __init__(self, folder: Path, problems: list[str]):
        self.folder = folder
        self.problems = problems
        earlier = [step for step in complete_steps(folder.parent) if step < (step_of(folder) or 0)]
        fix = f"--ckpt-step {earlier[0]}, the one before it" if earlier else "another checkpoint"
        super().__init__(f"{describe_damage(folder, problems)}. Fix: load {fix}.")


def describe_damage(folder: Path, problems: list[str]) -> str:
    """Say in one sentence what is wrong with a checkpoint."""
    shown = "; ".join(problems[:SHOWN_PROBLEMS])
    more = len(problems) - SHOWN_PROBLEMS
    return f"checkpoint {folder}: damaged: {shown}{f'; and {more} more' if more > 0 else ''}"


# ---------------------------------------------------------------- written by a save


def list_checksums(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """List every file of a checkpoint with its checksum; those that are not known yet are read.

    Args:
        known: relative path -> checksum, of files that were hashed as they were written.

    Returns:
        Relative path -> checksum.
    """
    unknown = _files_of_save(folder) - known.keys()
    read = {name: checksum(folder / name) for name in unknown}
    return dict(sorted((read | dict(known)).items()))


def _files_of_save(folder: Path) -> set[str]:
    """List every file there, and every one that .metadata names, seen by this node yet or not."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    stored = SafeReader(folder).read_metadata().storage_data
    return found | {place.relative_path for place in stored.values()}


def to_text(checksums: dict[str, str]) -> str:
    """Write the content of manifest.json."""
    return _sealed({"format": FORMAT, "algorithm": "xxh3_128", "files": checksums})


def _sealed(values: dict) -> str:
    """Write `values` as text that ends with its own checksum.

    This rule stays, whatever a later format holds: it tells a newer manifest from a damaged one.
    """
    seal = xxhash.xxh3_128_hexdigest(json.dumps(values, indent=1).encode())
    return json.dumps(values | {SEAL: seal}, indent=1)


# ---------------------------------------------------------------- compared by a load


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint's manifest says."""

    files: dict[str, str]
    """Relative path -> checksum, in the order of the paths."""
    is_sealed: bool
    """Does it vouch for itself? Those of format 1 do not."""


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint, and compare it with its own checksum.

    Raises:
        DamagedCheckpoint: it is not as it was written.
        ValueError: a newer version of this code wrote it.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode("utf-8")  # as it is, line ends too
        values = json.loads(text)
        # Format 1 held these two and nothing else. More than one change makes this of a later one.
        is_first_format = "files" in values and values.keys() <= {"algorithm", "files"}
        if not is_first_format:
            body = {name: value for name, value in values.items() if name != SEAL}
            if _sealed(body) != text:
                raise ValueError("it differs from its own checksum")
            if body["format"] > FORMAT:
                raise _of_newer_format(folder, body["format"])
        files = dict(sorted(values["files"].items()))
    except _NewerFormat:
        raise
    except FileNotFoundError:
        raise DamagedCheckpoint(folder, [f"{path} is missing"]) from None
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise DamagedCheckpoint(folder, [_unreadable(path, error)]) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(folder, [f"{path} cannot be used ({error})"]) from None
    return Manifest(files, is_sealed=not is_first_format)


class _NewerFormat(ValueError):
    """A checkpoint that a newer version of this code wrote."""


def _of_newer_format(folder: Path, number: int) -> _NewerFormat:
    return _NewerFormat(
        f"checkpoint {folder}: has format {number}, and this version of the code reads formats up "
        f"to {FORMAT}. Fix: use the version that saved it."
    )


def verify_files(folder: Path, rank: int = 0, size: int = 1) -> list[str]:
    """Compare this rank's share of the listed files with what is on disk.

    Returns:
        The problems found, each a sentence that names the file, and the tensors in it.

    Raises:
        ValueError: a newer version of this code wrote the checkpoint.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as damage:
        # Every rank reads it, and one says so.
        return damage.problems if rank == 0 else []
    # Rank 0 looks for files that the others cannot miss.
    problems = _unlisted_problems(folder, manifest) if rank == 0 else []
    names = share_of_rank(manifest.files, rank, size)

    def compare(name: str) -> list[str]:
        return _file_problems(folder, name, manifest.files[name], manifest)

    with ThreadPoolExecutor(READERS, thread_name_prefix="checksum") as pool:
        return problems + [problem for found in pool.map(compare, names) for problem in found]


def share_of_rank(names: Iterable[str], rank: int, size: int) -> list[str]:
    """Choose the files that a rank compares; each file is one rank's.

    A rank compares what a rank of its number wrote: it then loads most of its tensors from the same
    files, which its node has in memory.
    """
    share = []
    others = 0
    for name in names:
        writer = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
        if writer is None:
            number = others
            others += 1
        else:
            number = int(writer[1])
        if number % size == rank:
            share.append(name)
    return share


def verify_small_files(folder: Path) -> list[str]:
    """Compare the files that a run's plan is made from, and look whether the others are there.

    Takes milliseconds: the shards and their table are compared when they are loaded.

    Returns:
        The problems found, each a sentence.

    Raises:
        ValueError: a newer version of this code wrote the checkpoint.
    """
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpoint as damage:
        return damage.problems
    problems = _unlisted_problems(folder, manifest)
    present = {path.name for path in folder.iterdir()}
    for name, expected in manifest.files.items():
        is_large = name == METADATA or name.endswith(".distcp")
        if not is_large or name not in present:
            problems += _file_problems(folder, name, expected, manifest)
    return problems


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """List the files of a checkpoint's folder that no save put there."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return sorted(found - manifest.files.keys() - {MANIFEST})


def _unlisted_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Name files that would be read, although no save wrote them; others are left alone."""
    would_be_read = tuple(f"{name}/" for name in (TOKENIZER, CARRIED))
    return [
        f"{folder / name} is not in {MANIFEST}"
        for name in unlisted_files(folder, manifest)
        if name.startswith(would_be_read)
    ]


def _file_problems(folder: Path, name: str, expected: str, manifest: Manifest) -> list[str]:
    """Say what is wrong with one file, and which tensors lie there."""
    path = folder / name
    is_there = path.is_file()
    try:
        if is_there and checksum(path) == expected:
            return []
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return [_unreadable(path, error)]
    text = f"{path} differs from its checksum in {MANIFEST}" if is_there else f"{path} is missing"
    if name.endswith(".distcp") and _is_intact(folder, METADATA, manifest):
        text += f" ({name_damaged_tensors(folder, name)})"
    return [text]


def _unreadable(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror})"


def _is_intact(folder: Path, name: str, manifest: Manifest) -> bool:
    path = folder / name
    return path.is_file() and checksum(path) == manifest.files.get(name)


def refuse_damage(folder: Path, problems: list[str]) -> None:
    """Raise DamagedCheckpoint if there are problems."""
    if problems:
        raise DamagedCheckpoint(folder, problems)
