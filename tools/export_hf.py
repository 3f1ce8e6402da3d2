"""Convert a checkpoint to a Hugging Face folder: `python -m tools.export_hf --load DIR --output DIR [--verify]`.

Needs no GPU and no process group. The folder appears whole or not at all; with --verify only after
transformers' logits have been compared with ours (tools/verify_hf.py).
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file
from tqdm import tqdm

from data.tokenizer import Tokenizer, build_tokenizer
from model.hf import VOCABULARY_ROWS, architecture, context_to_declare, huggingface_config, huggingface_name
from model.rope import Rope
from pretrain import checkpoint
from pretrain.config import Config
from pretrain.load_config import read_config_yaml
from tools.verify_hf import verify


@dataclass(kw_only=True)
class Arguments:
    load: str
    """Folder of a run's checkpoints (its --save)."""
    output: str
    """Folder to write."""
    ckpt_step: int | None = None
    """Iteration to export, instead of the latest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the written weights; training keeps them in float32."""
    max_position_embeddings: int | None = None
    """Context length to declare; by default the longest that was trained, or yarn's factor x original context."""
    verify: bool = False
    """Compare transformers' logits with ours on real text before publishing; fail if they differ."""
    verify_text: str | None = None
    """Text file to compare on; by default documents of the run's own data."""
    tokenizer: bool = True
    """Write the tokenizer too; an error if transformers would give other ids than the one trained with."""
    overwrite: bool = False
    """Replace an existing output folder."""
    max_shard_bytes: int = 5_000_000_000
    """Size at which weights go on in another file."""


@dataclass(frozen=True)
class Source:
    """A published checkpoint, opened for reading."""

    folder: Path
    config: Config
    progress: dict
    tokenizer: Tokenizer | None

    @property
    def vocab_size(self) -> int:
        return self.config.data.vocab_size

    @property
    def rope(self) -> Rope:
        """Of the phase that the checkpoint was saved in."""
        return Rope(**self.progress["phase"]["rope"])


def open_source(root: str, step: int | None) -> Source:
    """Find, verify and open a checkpoint.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    folder = checkpoint.published(root, step)
    if folder is None:
        raise ValueError(f"load = {root}: no checkpoint is published there (no {checkpoint.LATEST}). "
                         "Fix: give the --save folder of a run.")
    checkpoint.refuse_damage(folder, checkpoint.verify_files(folder))
    config = read_config_yaml(str(folder / "config.yaml"))
    return Source(folder, config, checkpoint.read_progress(folder), stored_tokenizer(folder, config))


def stored_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The tokenizer from the files beside the weights; None where the run had none."""
    files = sorted((folder / "tokenizer").iterdir())
    if not files:
        return None
    data = config.data
    model = files[0] if len(files) == 1 and data.tokenizer_type != "HuggingFaceTokenizer" else folder / "tokenizer"
    return build_tokenizer(data.tokenizer_type, str(model), data.vocab_size)


def write_weights(source: Source, output: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """safetensors files of at most `max_shard_bytes` (or one tensor) each, and their index."""
    shards = _plan_shards(checkpoint.tensor_names(source.folder), source, dtype, max_shard_bytes)
    weight_map, total = {}, 0
    for number, names in enumerate(tqdm(shards, desc="writing weights", unit="file"), 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for stored, tensor in checkpoint.read_whole_tensors(source.folder, names).items():
            name = stored.removeprefix("model.")
            if name in VOCABULARY_ROWS:
                tensor = tensor[:source.vocab_size]
            tensors[huggingface_name(name)] = tensor.to(dtype).contiguous()
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _plan_shards(names: list[str], source: Source, dtype: torch.dtype, limit: int) -> list[list[str]]:
    sizes = checkpoint.SafeReader(source.folder).read_metadata().state_dict_metadata
    shards, room = [], 0
    for name in names:
        size = sizes[name].size.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def export(arguments: Arguments) -> None:
    """Write, optionally verify, then publish by renaming.

    Raises:
        ValueError: bad input, or logits that differ.
    """
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise ValueError(f"output = {output}: exists already. Fix: give another folder, or --overwrite.")
    source = open_source(arguments.load, arguments.ckpt_step)
    architecture(source.config.model)
    phase = source.progress["phase"]
    longest = source.progress.get("longest_seq_length", phase["seq_length"])
    declared = (arguments.max_position_embeddings or source.config.model.max_position_embeddings
                or context_to_declare(source.rope, longest))
    if source.rope.type == "yarn" and declared != source.rope.scaled_length:
        print(f"warning: max_position_embeddings = {declared}: transformers before 5 divides it by "
              "original_max_position_embeddings for yarn's factor, which gives another model than "
              f"{source.rope.scaled_length} does", file=sys.stderr)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(source, partial, getattr(torch, arguments.dtype), arguments.max_shard_bytes)
    config = huggingface_config(source.config.model, source.vocab_size, source.rope, declared, arguments.dtype,
                                source.tokenizer.eod if source.tokenizer else None)
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    if arguments.tokenizer and source.tokenizer is not None:
        try:
            source.tokenizer.save_huggingface(str(partial))
        except ValueError as error:
            raise ValueError(f"{error} Or export without it: --no-tokenizer.") from None
    if arguments.verify:
        verify(source, partial, declared, arguments.verify_text, with_tokenizer=arguments.tokenizer)
    if output.exists():
        shutil.rmtree(output)
    partial.rename(output)
    print(f"exported {source.folder} to {output}: {config['architectures'][0]}, {declared:,} positions, rope "
          f"{source.rope.describe()}, {arguments.dtype}")


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.export_hf", description=__doc__)
    try:
        export(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
