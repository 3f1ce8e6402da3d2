"""What a Hugging Face folder's safetensors files hold, under our names: shapes first, values later.

Files are chosen as transformers chooses them: model.safetensors, else what
model.safetensors.index.json names. Nothing is read beside that, and what is left unread is said.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from model.hf import our_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    r"|masked_bias)$"
)
"""Tensors that older versions of transformers saved and that the model computes by itself."""
PICKLED = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
"""Weights in formats that are not read: pickle may run code."""
DTYPES = {"F64", "F32", "F16", "BF16"}
"""Of safetensors; others hold parts of a quantized model."""
EMBEDDING = "embedding.weight"
OUTPUT = "output.weight"
_AGAIN = "Fix: download the folder again."


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder."""

    file: Path
    name: str
    """As it is stored."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """Every tensor of the folder by our name, none of them read yet."""

    entries: dict[str, Entry]
    warnings: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        numbers = [int(name.split(".")[1]) for name in self.entries if name.startswith("layers.")]
        return max(numbers, default=-1) + 1

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors in fp32.

        Raises:
            ValueError: a file that cannot be read, or numbers that are not finite.
        """
        tensors = {}
        problems = []
        files = sorted({entry.file for entry in self.entries.values()})
        for file in tqdm(files, desc="reading weights", unit="file", leave=False):
            with _open(file) as opened:
                for name, entry in self.entries.items():
                    if entry.file == file:
                        tensors[name] = _read_tensor(opened, entry)
                        problems += _not_finite(entry, tensors[name])
        if problems:
            raise ValueError("\n".join(problems))
        return tensors


def open_weights(folder: Path) -> Weights:
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
    located = _locate(folder)
    unread = sorted(
        {file.name for file in folder.glob("*.safetensors")}
        - {file.name for file in located.values()}
    )
    warnings = (
        [f"{folder}: not read, since no index names them: {', '.join(unread)}"] if unread else []
    )
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
                problems += _take(entries, opened, file, name)
    found = {entry.name for entry in entries.values()}
    absent = sorted(name for name in located if name not in found and not BUFFERS.search(name))
    if absent and not problems:
        problems = [
            f"{located[name]}: tensor {name} is not in it, but the index says so. {_AGAIN}"
            for name in absent[:4]
        ]
    if problems:
        raise ValueError("\n".join(problems[:4]))
    if buffers:
        warnings.append(
            f"{folder}: {buffers} buffers (rotary_emb.inv_freq and the like) are computed "
            "by the model; not read"
        )
    return Weights(entries, warnings)


def _take(entries: dict[str, Entry], opened, file: Path, name: str) -> list[str]:
    """Put one tensor in its place -> what is wrong with it, a line or none."""
    tensor = opened.get_slice(name)
    if tensor.get_dtype() not in DTYPES:
        return [
            f"{file}: tensor {name} has dtype {tensor.get_dtype()}: only "
            f"{', '.join(sorted(DTYPES))} are read. Fix: the model before it was quantized."
        ]
    try:
        ours = our_name(name)
    except KeyError:
        return [f"{file}: tensor {name}: our model has no such part. Fix: another model."]
    if ours in entries:
        return [f"{file}: tensors {entries[ours].name} and {name} are the same part. {_AGAIN}"]
    entries[ours] = Entry(file, name, tuple(tensor.get_shape()))
    return []


# ---------------------------------------------------------------- files


def _locate(folder: Path) -> dict[str, Path]:
    """Name as it is stored -> the file that holds it, by the only file or by the index.

    Raises:
        ValueError: there is neither, or the index is not one.
    """
    if (folder / SINGLE).is_file():
        with _open(folder / SINGLE) as opened:
            return dict.fromkeys(opened.keys(), folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_index(folder)
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    if shards:
        raise ValueError(
            f"hf = {folder}: {', '.join(shards[:4])}: neither {SINGLE} nor an index "
            f"({INDEX}) says which of them are the model. {_AGAIN}"
        )
    others = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
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
    for file in sorted(set(located.values())):
        if file.parent != folder or file.suffix != ".safetensors":
            raise ValueError(
                f"{path}: names {file}: not a .safetensors file of this folder. {_AGAIN}"
            )
        if not file.is_file():
            raise ValueError(f"{file}: is missing, and the index names it. {_AGAIN}")
    return located


def _open(file: Path) -> safe_open:
    """`safe_open` whose errors are one line; a context manager."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: is not a whole safetensors file ({error}). {_AGAIN}") from None


# ---------------------------------------------------------------- values


def _read_tensor(opened, entry: Entry) -> torch.Tensor:
    try:
        return opened.get_tensor(entry.name).float()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{entry.file}: tensor {entry.name} cannot be read ({error}). {_AGAIN}"
        ) from None


def _not_finite(entry: Entry, tensor: torch.Tensor) -> list[str]:
    count = tensor.numel() - int(torch.isfinite(tensor).sum())
    if count == 0:
        return []
    return [
        f"{entry.file}: tensor {entry.name}: {count:,} of {tensor.numel():,} numbers are NaN or "
        "infinite. Fix: another checkpoint of that model."
    ]
