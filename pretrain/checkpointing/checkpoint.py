"""Save and load checkpoints: torch.distributed.checkpoint files, published whole or not at all.

A save writes into a hidden folder, checksums every file, syncs, and renames; only then does the
text file name it. A load compares every checksum first. All ranks must see the same folder.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from functools import partial as bind
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from data.files import sync_path, write_durably
from parallel.layout import Axis
from pretrain.checkpointing import manifest
from pretrain.checkpointing.fit import (
    find_repadded,
    list_misfits,
    list_surplus,
    refuse_misfits,
)
from pretrain.checkpointing.folders import (
    CARRIED,
    MANIFEST,
    TOKENIZER,
    clear,
    iteration_folder,
    replaced_folder,
    write_pointer,
)
from pretrain.checkpointing.hashing_writer import HashingWriter
from pretrain.checkpointing.late_tensors import FillTensor, LatePlanner
from pretrain.checkpointing.progress import FILE as PROGRESS_FILE
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.shared_errors import SaveFailed, SavePlace, gather, run_together
from pretrain.checkpointing.space import free_bytes, require_space, stored_bytes
from pretrain.checkpointing.stored_tensors import ALONE, SafeReader, tensors_of
from pretrain.processes.agreement import Refused

# ---------------------------------------------------------------- writing


def save(
    root: str | os.PathLike,
    step: int,
    tensors: dict[str, torch.Tensor],
    progress: Progress,
    config_yaml: str,
    tokenizer: Mapping[str, bytes],
    world: Axis,
    carried: Mapping[str, bytes] = MappingProxyType({}),
    *,
    fill: FillTensor | None = None,
) -> Path:
    """Write and publish iteration `step`; collective over `world`, in whichever thread.

    A world of size 1 needs no process group.

    Args:
        tensors: flat name -> DTensor or plain tensor (pretrain/state.py: checkpoint_tensors).
        tokenizer: name -> content of the tokenizer's files.
        carried: name -> content of what the model's Hugging Face folder held besides weights.
        fill: reads a tensor's content when it is written; then `tensors` are on device `meta`.

    Returns:
        The published folder.

    Raises:
        Refused: the disk is full, or fails in another way that a second try cannot mend; on all
            ranks.
        SaveFailed: anything else went wrong on one of them; on all ranks.
    """
    final = iteration_folder(root, step)
    partial = final.with_name(f".{final.name}.partial")
    place = _measure_place(final, tensors, world)

    def begin() -> None:
        # One rank writes the small files, into a hidden folder that no load looks into.
        if world.rank == 0:
            clear(partial)
            require_space(final, place.needed_bytes)
            _write_small_files(partial, progress, config_yaml, tokenizer, carried)

    def publish() -> None:
        if world.rank == 0:
            # The manifest last: where it is, everything is.
            checksums = manifest.list_checksums(partial, written)
            write_durably(partial / MANIFEST, manifest.to_text(checksums))
            _publish(partial, final)
            write_pointer(Path(root), step)
            clear(replaced_folder(final))

    try:
        run_together(begin, place, world)
        # The tensors: each rank writes its own shards.
        on_host = fill is not None or all(tensor.is_cpu for tensor in tensors.values())
        writer = HashingWriter(partial, on_host=on_host)
        planner = LatePlanner(fill) if fill is not None else None
        run_together(bind(_write_tensors, tensors, writer, planner, world), place, world)
        written = dict(pair for part in gather(writer.checksums, world) for pair in part.items())
        run_together(publish, place, world)
    except (Refused, SaveFailed):
        # All ranks have stopped writing; nothing half-written takes the space.
        if world.rank == 0:
            clear(partial)
        raise
    return final


def _measure_place(final: Path, tensors: dict[str, torch.Tensor], world: Axis) -> SavePlace:
    """Count the bytes that all ranks will write, and those that are free; collective."""
    needed = sum(gather(sum(map(stored_bytes, tensors.values())), world))
    free: int | None = None
    # A disk that does not even say this fails when the save begins, for all ranks.
    with contextlib.suppress(OSError):
        free = free_bytes(final.parent)
    return SavePlace(final, needed, free)


def _write_tensors(
    tensors: dict[str, torch.Tensor],
    writer: HashingWriter,
    planner: LatePlanner | None,
    world: Axis,
) -> None:
    """Write this rank's shards, and rank 0 the list of all."""
    with _quiet_alone(world):
        dcp.save(
            tensors,
            storage_writer=writer,
            planner=planner,
            process_group=world.group,
            no_dist=world.group is None,
        )


@contextlib.contextmanager
def _quiet_alone(world: Axis) -> Iterator[None]:
    """Silence DCP's warning that it works alone, where that is meant."""
    if world.group is not None:
        # Other threads may be at work, and filters of warnings are shared by all of them.
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=ALONE)
        yield


def _write_small_files(
    folder: Path,
    progress: Progress,
    config_yaml: str,
    tokenizer: Mapping[str, bytes],
    carried: Mapping[str, bytes],
) -> None:
    """Write everything of a checkpoint but its tensors into a new folder."""
    (folder / TOKENIZER).mkdir(parents=True)
    write_durably(folder / "config.yaml", config_yaml)
    write_durably(folder / PROGRESS_FILE, progress.to_text())
    for name, content in tokenizer.items():
        (folder / TOKENIZER / name).write_bytes(content)
    for name, content in carried.items():
        path = folder / CARRIED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def _publish(partial: Path, final: Path) -> None:
    """Give a whole checkpoint its name; one that has the name already is moved aside."""
    sync_path(partial)
    clear(replaced_folder(final))
    if os.path.lexists(final):
        # A kill from here to the next line is mended by the next start (restore_replaced).
        os.rename(final, replaced_folder(final))
    os.rename(partial, final)
    sync_path(final.parent)


# ---------------------------------------------------------------- reading


def load(
    folder: Path, tensors: dict[str, torch.Tensor], world: Axis, *, vocab_size: int | None = None
) -> None:
    """Fill `tensors` in place from a checkpoint written on any layout; collective over `world`.

    Args:
        vocab_size: tokens that exist. Rows beyond them are padding and take no part: the checkpoint
            may have more or fewer of them, and those that it lacks are filled with zeros.

    Raises:
        DamagedCheckpoint: files that are not what was saved.
        ValueError: tensors that the checkpoint lacks, holds in another shape, or holds although the
            model has none of that name. Both are the same on all ranks, and nothing is changed.
    """
    # Are the files what was written? Each rank compares its share.
    damage = manifest.verify_files(folder, world.rank, world.size)
    manifest.refuse_damage(folder, _gather(damage, world))

    # Do the tensors fit? Those with a row per token may differ in rows of padding.
    reader = SafeReader(folder)
    stored = tensors_of(reader.read_metadata())
    padded = find_repadded(stored, tensors, vocab_size)
    others = {name: tensor for name, tensor in tensors.items() if name not in padded}
    problems = _gather(list_misfits(stored, others), world)
    refuse_misfits(folder, [*problems, *list_surplus(stored, tensors, world)])

    for tensor in padded.values():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        local.zero_()
    reader.sizes = {name: tensor.shape for name, tensor in padded.items()}
    with _quiet_alone(world):
        dcp.load(
            tensors,
            storage_reader=reader,
            process_group=world.group,
            no_dist=world.group is None,
        )


def _gather(problems: list[str], world: Axis) -> list[str]:
    """Collect the problems of all ranks, in the order of the ranks; collective."""
    return [problem for part in gather(problems, world) for problem in part]
