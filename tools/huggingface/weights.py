"""What a Hugging Face folder's safetensors files hold, under our names: shapes first, values later.

Files are chosen as transformers chooses them: model.safetensors, else what
model.safetensors.index.json names. Nothing is read beside that, and what is left unread is said.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model.hf.architecture import Architecture
from tools.shared.message_text import count_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|masked_bias)$"
)
"""Names of tensors that older versions of transformers saved, and that the model computes."""
OTHER_FORMATS = (
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)
"""Files of weights that are not read: pickle may run code."""
DTYPES = {"F64", "F32", "F16", "BF16"}
"""Types of safetensors that are read; others hold parts of a quantized model."""
COMPARED_ROWS = 4096
"""Rows of two tensors that are compared at once."""
EMBEDDING = "embedding.weight"
OUTPUT = "output.weight"
_AGAIN = "Fix: download the folder again."
SHOWN = 4
"""Problems of one kind that are said; the others are counted."""


@dataclass(frozen=True)
class Entry:
    """Says where one tensor of the folder is."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32."""


@dataclass(frozen=True)
class Weights:
    """Lists every tensor of the folder by our name, none of them read yet."""

    entries: dict[str, Entry]
    warnings: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """Number of layers that the names mean."""
        numbers = [int(name.split(".")[1]) for name in self.entries if name.startswith("layers.")]
        return max(numbers, default=-1) + 1

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Read one tensor into `tensor`; rows that the folder lacks become zeros.

        Raises:
            ValueError: a file that cannot be read, or numbers that are not finite.
        """
        entry = self.entries[name]
        own = tensor[: entry.shape[0]]
        # Opened for each tensor: what was read of a file stays in memory until it is closed.
        with _open(entry.file) as opened:
            try:
                own.copy_(opened.get_tensor(entry.name))
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{entry.file}: tensor {entry.name} cannot be read ({error}). {_AGAIN}"
                ) from None
        tensor[entry.shape[0] :] = 0
        _refuse_not_finite(entry, own)

    def read(self, name: str, num_rows: int | None = None) -> torch.Tensor:
        """Read one tensor, in fp32; with `num_rows` as many rows, else those of the folder.

        Raises:
            ValueError: as `fill`.
        """
        shape = self.entries[name].shape
        rows = shape[0] if num_rows is None else num_rows
        tensor = torch.empty((rows, *shape[1:]), dtype=torch.float32, device="cpu")
        self.fill(name, tensor)
        return tensor

    def read_all(self, num_rows: Mapping[str, int]) -> dict[str, torch.Tensor]:
        """Read all tensors; num_rows: those of the tensors that get more than the folder has."""
        names = tqdm(self.entries, desc="reading weights", unit="tensor", leave=False)
        return {name: self.read(name, num_rows.get(name)) for name in names}

    def are_equal(self, one: str, other: str) -> bool:
        """Tell whether two tensors of one shape hold the same numbers, read some rows at a time."""
        entries = [self.entries[name] for name in (one, other)]
        with ExitStack() as opened:
            slices = [
                opened.enter_context(_open(entry.file)).get_slice(entry.name) for entry in entries
            ]
            return all(
                torch.equal(*(part[begin : begin + COMPARED_ROWS].float() for part in slices))
                for begin in range(0, entries[0].shape[0], COMPARED_ROWS)
            )


def open_weights(folder: Path, architecture: Architecture) -> Weights:
    """Find the folder's tensors.

    Raises:
        ValueError: no file that is read, an index that does not fit its files, a tensor that our
            model has no place for or whose dtype is not a floating-point one.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"hf = {folder}: adapter_config.json: transformers adds an adapter to the "
            "weights. Fix: merge it (peft: merge_and_unload), and give that folder."
        )
    _refuse_unfinished_download(folder)
    located = _locate(folder)
    warnings = []
    present = {file.name for file in folder.glob("*.safetensors")}
    unread = present - {file.name for file in located.values()}
    if unread:
        names = ", ".join(sorted(unread))
        warnings.append(f"{folder}: not read, since no index names them: {names}")

    # What the files hold, against what the index says that they hold.
    entries: dict[str, Entry] = {}
    problems = []
    buffers = 0
    for file in sorted(set(located.values())):
        with _open(file) as opened:
            for name in opened.keys():
                if BUFFERS.search(name):
                    buffers += 1
                    continue
                if located.get(name) != file:
                    problems.append(
                        f"{file}: tensor {name}: the index does not say that it is here. {_AGAIN}"
                    )
                    continue
                problems += _take(entries, architecture, opened, file, name)
    # And the other way round.
    found = {entry.name for entry in entries.values()}
    absent = sorted(name for name in located if name not in found and not BUFFERS.search(name))
    if absent and not problems:
        problems = [
            f"{located[name]}: tensor {name} is not in it, but the index says so. {_AGAIN}"
            for name in absent
        ]
    if problems:
        raise ValueError("\n".join(first_few(problems)))
    doubles = sum(entry.dtype == "F64" for entry in entries.values())
    if doubles:
        warnings.append(
            f"{folder}: {count_of(doubles, 'tensor')} of F64 are rounded to fp32, in which a "
            "checkpoint keeps weights"
        )
    if buffers:
        warnings.append(
            f"{folder}: {count_of(buffers, 'buffer')} (rotary_emb.inv_freq and the like) are "
            "computed by the model; not read"
        )
    return Weights(entries, warnings)


def first_few(problems: Sequence[str]) -> list[str]:
    """Return some of many problems; the last one says how many more there are."""
    shown = list(problems[:SHOWN])
    more = len(problems) - SHOWN
    if more > 0:
        shown[-1] += f" (and {more} more)"
    return shown


def _take(
    entries: dict[str, Entry],
    architecture: Architecture,
    opened: safe_open,
    file: Path,
    name: str,
) -> list[str]:
    """Add one tensor to `entries` -> what is wrong with it, a line or none."""
    tensor = opened.get_slice(name)
    if tensor.get_dtype() not in DTYPES:
        return [
            f"{file}: tensor {name} has dtype {tensor.get_dtype()}: only "
            f"{', '.join(sorted(DTYPES))} are read. Fix: the model before it was quantized."
        ]
    # Two stored names may mean one part: with and without `model.`.
    try:
        ours = architecture.our_name(name)
    except KeyError:
        return [f"{file}: tensor {name}: our model has no such part. Fix: another model."]
    if ours in entries:
        return [f"{file}: tensors {entries[ours].name} and {name} are the same part. {_AGAIN}"]
    entries[ours] = Entry(file, name, tuple(tensor.get_shape()), tensor.get_dtype())
    return []


# ---------------------------------------------------------------- files


def _refuse_unfinished_download(folder: Path) -> None:
    """Raise ValueError where `hf download` left a part of a file: another one may be missing."""
    parts = [*folder.glob("*.incomplete"), *folder.glob(".cache/**/*.incomplete")]
    if parts:
        raise ValueError(
            f"hf = {folder}: its download is not finished ({parts[0].relative_to(folder)}). Fix: "
            "run the same download again, which goes on where it stopped; or remove that file, "
            "where the folder is whole."
        )


def _locate(folder: Path) -> dict[str, Path]:
    """Find the file of each tensor, by its stored name: the only file, or what the index names.

    Raises:
        ValueError: there is neither, or the index is not one.
    """
    # transformers' order: the single file counts, even beside an index.
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as opened:
            return dict.fromkeys(opened.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_index(folder)
    # Neither: say what is there instead.
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        raise ValueError(
            f"hf = {folder}: {', '.join(shards[:4])}: neither {SINGLE} nor an index "
            f"({INDEX}) says which of them are the model. {_AGAIN}"
        )
    others = sorted(file.name for pattern in OTHER_FORMATS for file in folder.glob(pattern))
    if others:
        raise ValueError(
            f"hf = {folder}: {', '.join(others[:4])}: only safetensors are read; pickled "
            "weights may run code. Fix: save the model with transformers' save_pretrained."
        )
    raise ValueError(
        f"hf = {folder}: no .safetensors file. Fix: give the folder of a model saved in "
        "that format."
    )


def _read_index(folder: Path) -> dict[str, Path]:
    """Read the index as stored name -> file; ValueError where it is none, or names other files."""
    path = folder / INDEX
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        located = {name: folder / file for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{path}: is not an index: no weight_map of tensors and files. {_AGAIN}"
        ) from None
    if not located:
        raise ValueError(f"{path}: names no tensor. {_AGAIN}")
    # It may name any path; only files of this folder are opened.
    for file in sorted(set(located.values())):
        if file.parent != folder or file.suffix != ".safetensors":
            raise ValueError(
                f"{path}: names {file}: not a .safetensors file of this folder. {_AGAIN}"
            )
        if not file.is_file():
            raise ValueError(f"{file}: is missing, and the index names it. {_AGAIN}")
    return located


def _open(file: Path) -> safe_open:
    """Open a file of safetensors, for a `with` block; ValueError in one line if it is none."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({error}). {_AGAIN}") from None


def _refuse_not_finite(entry: Entry, tensor: torch.Tensor) -> None:
    """Raise ValueError where numbers of a tensor are NaN or infinite."""
    low, high = tensor.aminmax()
    if torch.isfinite(low) and torch.isfinite(high):
        return
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    raise ValueError(
        f"{entry.file}: tensor {entry.name}: {count:,} of {tensor.numel():,} numbers are NaN or "
        "infinite. Fix: another checkpoint of that model."
    )
