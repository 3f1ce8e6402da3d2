"""Convert a checkpoint to a Hugging Face folder: `python -m tools.export_hf --load DIR --output DIR
[--verify]`.

Needs no GPU and no process group. The folder appears whole or not at all; with --verify only after
transformers' logits have been compared with ours (tools/huggingface/verify.py). Besides weights it holds
what the model's own Hugging Face folder held (generation, chat templates); what training changed is
named.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from model.hf import (
    VOCABULARY_ROWS,
    architecture,
    context_to_declare,
    huggingface_config,
    huggingface_name,
)
from model.rope import Rope
from pretrain.checkpointing.folders import LATEST, find_published
from pretrain.checkpointing.manifest import refuse_damage, verify_files
from pretrain.checkpointing.model_files import CONFIG, read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.stored_tensors import SafeReader, read_whole_tensors, tensor_names
from pretrain.config.config import Config
from pretrain.config.load import read_config_yaml
from tools.huggingface import export_files
from tools.huggingface.verify import verify
from tools.outputs.files import Input
from tools.outputs.folder import NewFolder
from tools.shared.door import run_door

MAKER = "tools.export_hf"


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
    """Context length to declare; by default the longest that was trained, or yarn's factor x
    original context."""
    verify: bool = False
    """Compare transformers' logits with ours on real text before publishing; fail if they
    differ."""
    verify_text: str | None = None
    """Text file to compare on; by default documents of the run's own data."""
    tokenizer: bool = True
    """Write the tokenizer too; an error if transformers would give other ids than the one trained
    with."""
    overwrite: bool = False
    """Replace an earlier export at the output; only a folder that this tool wrote, with nothing
    else in it."""
    max_shard_bytes: int = 5_000_000_000
    """Size at which weights go on in another file."""


@dataclass(frozen=True)
class Source:
    """A published checkpoint, opened for reading."""

    folder: Path
    config: Config
    progress: Progress
    tokenizer: Tokenizer | None
    carried: dict[str, bytes]
    """What the model's Hugging Face source held besides weights; empty where it began here."""

    @property
    def vocab_size(self) -> int:
        return self.config.data.vocab_size

    @property
    def rope(self) -> Rope:
        """Of the phase that the checkpoint was saved in."""
        return self.progress.rope


def open_source(root: str, step: int | None) -> Source:
    """Find, verify and open a checkpoint.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    folder = find_published(root, step)
    if folder is None:
        raise ValueError(
            f"load = {root}: no checkpoint is published there (no {LATEST}). "
            "Fix: give the --save folder of a run."
        )
    refuse_damage(folder, verify_files(folder))
    config = read_config_yaml(str(folder / "config.yaml"))
    return Source(
        folder=folder,
        config=config,
        progress=Progress.read(folder),
        tokenizer=stored_tokenizer(folder, config),
        carried=read_carried(folder),
    )


def stored_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The tokenizer from the files beside the weights; None where the run had none."""
    files = sorted((folder / "tokenizer").iterdir())
    if not files:
        return None
    data = config.data
    model = (
        files[0]
        if len(files) == 1 and data.tokenizer_type != "HuggingFaceTokenizer"
        else folder / "tokenizer"
    )
    return build_tokenizer(
        data.tokenizer_type, str(model), data.vocab_size, ids_from=data.tokenizer_ids_from
    )


def write_weights(source: Source, output: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """safetensors files of at most `max_shard_bytes` (or one tensor) each, and their index."""
    shards = _plan_shards(tensor_names(source.folder), source, dtype, max_shard_bytes)
    weight_map = {}
    total = 0
    for number, names in enumerate(tqdm(shards, desc="writing weights", unit="file"), 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {}
        for stored, tensor in read_whole_tensors(source.folder, names).items():
            name = stored.removeprefix("model.")
            if name in VOCABULARY_ROWS:
                tensor = tensor[: source.vocab_size]
            tensors[huggingface_name(name)] = tensor.to(dtype).contiguous()
        save_file(tensors, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _plan_shards(
    names: list[str], source: Source, dtype: torch.dtype, limit: int
) -> list[list[str]]:
    sizes = SafeReader(source.folder).read_metadata().state_dict_metadata
    shards = []
    room = 0
    for name in names:
        size = sizes[name].size.numel() * dtype.itemsize
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def inputs_of_run(config: Config) -> list[Input]:
    """Folders and files that a run names in its settings: no export may replace one of them."""
    settings = config.checkpoint
    named = {
        "the run's --save": settings.save,
        "the run's --load": settings.load,
        "the run's --pretrained-checkpoint": settings.pretrained_checkpoint,
        "the run's tokenizer": config.data.tokenizer_model,
        "the run's --data-cache-path": config.data.data_cache_path,
    }
    inputs = [Input(label, Path(path)) for label, path in named.items() if path]
    words = [*config.data.data_path, *config.data.train_data_path, *config.data.valid_data_path]
    prefixes = [word.split("=")[-1].split("[")[0] for word in words]
    return inputs + [Input("the run's data", Path(f"{prefix}.bin")) for prefix in prefixes]


def context_of_export(arguments: Arguments, source: Source) -> int:
    """max_position_embeddings to declare; warns of what older versions of transformers make of
    it."""
    longest = source.progress.longest_seq_length
    asked = arguments.max_position_embeddings or source.config.model.max_position_embeddings
    declared = asked or context_to_declare(source.rope, longest)
    theirs = export_files.parse_json(source.carried.get(CONFIG))
    before = theirs.get("max_position_embeddings")
    # Training on shorter samples takes no context away from a model whose rope is the source's.
    if not asked and isinstance(before, int) and export_files.source_rope(theirs) == source.rope:
        declared = max(before, longest)
    if source.rope.type == "yarn" and declared != source.rope.scaled_length:
        print(
            f"warning: max_position_embeddings = {declared}: transformers before 5 divides it by "
            "original_max_position_embeddings for yarn's factor, which gives another model than "
            f"{source.rope.scaled_length} does",
            file=sys.stderr,
        )
    return declared


def write_settings(source: Source, folder: Path, declared: int, arguments: Arguments) -> dict:
    """Write config.json, generation_config.json and the tokenizer, name what training changed ->
    config.json."""
    eod = source.tokenizer.eod if source.tokenizer else None
    ours = huggingface_config(
        source.config.model, source.vocab_size, source.rope, declared, arguments.dtype, eod
    )
    theirs = export_files.parse_json(source.carried.get(CONFIG))
    config, changes = export_files.merge_config(ours, theirs)
    changes += export_files.rope_change(theirs, source.rope)
    export_files.write_json(folder / CONFIG, config)
    ids = {} if eod is None else {"eos_token_id": eod}
    if arguments.tokenizer and _write_tokenizer(source, folder):
        lines = export_files.complete_tokenizer(folder, source.carried, declared)
        changes += [f"tokenizer: {line}" for line in lines]
        if not theirs:
            ids = export_files.tokens_by_role(folder) | ids
    if not theirs:
        config |= ids
        export_files.write_json(folder / CONFIG, config)
    export_files.write_generation(folder, source.carried, ids)
    for change in changes:
        print(f"changed since the import: {change}")
    stops = export_files.stop_ids(folder)
    if eod is not None and eod not in stops:
        print(
            f"note: generation stops at {stops}, as the source says; documents in training ended with {eod}"
        )
    return config


def _write_tokenizer(source: Source, folder: Path) -> bool:
    try:
        return export_files.write_tokenizer(folder, source.tokenizer, source.carried)
    except ValueError as error:
        raise ValueError(f"{error} Or export without it: --no-tokenizer.") from None


def check_arguments(arguments: Arguments) -> None:
    """Raise ValueError for values that no export can have, and for settings without effect."""
    context = arguments.max_position_embeddings
    if context is not None and context < 1:
        raise ValueError(
            f"max_position_embeddings = {context}: must be at least 1. Fix: leave it out."
        )
    if arguments.max_shard_bytes < 1:
        raise ValueError(
            f"max_shard_bytes = {arguments.max_shard_bytes}: must be at least 1. Fix: leave it out."
        )
    if arguments.verify_text is not None and not arguments.verify:
        raise ValueError(
            f"verify_text = {arguments.verify_text}: has an effect with --verify only. Fix: add --verify."
        )


def export(arguments: Arguments) -> None:
    """Write, optionally verify, then publish by renaming.

    Raises:
        ValueError: bad input, or logits that differ.
    """
    check_arguments(arguments)
    inputs = [Input("--load", Path(arguments.load))]
    if arguments.verify_text is not None:
        inputs.append(Input("--verify-text", Path(arguments.verify_text)))
    output = Path(arguments.output)
    new = NewFolder("output", output, MAKER, inputs=inputs, overwrite=arguments.overwrite)
    source = open_source(arguments.load, arguments.ckpt_step)
    new.refuse_inputs(inputs_of_run(source.config))
    architecture(source.config.model)
    declared = context_of_export(arguments, source)
    with new:
        write_weights(source, new.path, getattr(torch, arguments.dtype), arguments.max_shard_bytes)
        config = write_settings(source, new.path, declared, arguments)
        if arguments.verify:
            verify(
                source,
                new.path,
                declared,
                arguments.verify_text,
                with_tokenizer=arguments.tokenizer,
            )
        new.publish()
    print(
        f"exported {source.folder} to {output}: {config['architectures'][0]}, {declared:,} positions, rope "
        f"{source.rope.describe()}, {arguments.dtype}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_door(Arguments, export, name="tools.export_hf", description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
