"""Convert a checkpoint to a Hugging Face folder: `bash launch/ithaca.sh export --load DIR --output
DIR [--verify]`.

Needs no GPU and no process group. The folder appears whole or not at all; with --verify only after
it was compared with transformers (tools/huggingface/verify_export.py). Besides
weights it holds what the model's own Hugging Face folder held (generation, chat templates), and a
model card with the facts of the training; what training changed is named.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pretrain.checkpointing.folders import EXPORTS
from pretrain.config.config import Config
from tools.huggingface.export_settings import choose_context, write_settings
from tools.huggingface.export_weights import WeightsExport
from tools.huggingface.model_card import HUB_NAME, write_model_card
from tools.huggingface.stored_model import open_stored_model
from tools.huggingface.verify_export import verify_export
from tools.outputs.files import Input, real_path, require_room
from tools.outputs.folder import NewFolder
from tools.shared.door import run_door
from tools.shared.message_text import short

MAKER = "tools.export_hf"
"""What an exported folder says of who wrote it."""


@dataclass(kw_only=True)
class Arguments:
    load: str
    """Folder of a run's checkpoints (its --save)."""
    output: str
    """Folder to write."""
    ckpt_step: int | None = None
    """Iteration to export, instead of the latest."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the written weights; training keeps them in float32. An error where a number is
    beyond the largest of float16."""
    max_position_embeddings: int | None = None
    """Context length to declare; by default the longest that was trained, or yarn's factor x
    original context."""
    verify: bool = False
    """Compare weights, and transformers' logits and greedy text with ours on real text, before
    publishing; fail if they differ."""
    verify_text: str | None = None
    """Text file to compare on; by default documents of the run's own data. Of an import that was
    not trained: a page of this project, or random tokens without a tokenizer."""
    tokenizer: bool = True
    """Write the tokenizer too; an error if transformers would give other ids than the one trained
    with."""
    base_model: str | None = None
    """Name on the Hub of the model that training began with, for the model card; by default what
    its config.json says."""
    overwrite: bool = False
    """Replace an earlier export at the output; only a folder that this tool wrote, with nothing
    else in it."""
    max_shard_bytes: int = 5_000_000_000
    """Size at which weights continue in another file."""


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
    if arguments.base_model is not None and not HUB_NAME.fullmatch(arguments.base_model):
        raise ValueError(
            f"base_model = {short(arguments.base_model)}: must be owner/model. Fix: the model's "
            "name on the Hub, or leave it out."
        )
    # A setting without effect is an error: it was meant to do something.
    if arguments.verify_text is not None and not arguments.verify:
        raise ValueError(
            f"verify_text = {arguments.verify_text}: has an effect with --verify only. "
            "Fix: add --verify."
        )
    # Said now, and not once all weights are written.
    if arguments.verify_text is not None and not Path(arguments.verify_text).is_file():
        raise ValueError(
            f"verify_text = {arguments.verify_text}: no such file. Fix: give a text file."
        )


def inputs_of_run(config: Config) -> list[Input]:
    """List folders and files that a run's settings name: no export may replace one of them."""
    settings = config.checkpoint
    named = {
        "the run's --save": settings.save,
        "the run's --load": settings.load,
        "the run's --pretrained-checkpoint": settings.pretrained_checkpoint,
        "the run's tokenizer": config.data.tokenizer_model,
        "the run's --data-cache-path": config.data.data_cache_path,
    }
    inputs = [Input(label, Path(path)) for label, path in named.items() if path]
    # Words of a blend are weights and prefixes, perhaps as name=prefix[split].
    words = [*config.data.data_path, *config.data.train_data_path, *config.data.valid_data_path]
    prefixes = [word.split("=")[-1].split("[")[0] for word in words]
    return inputs + [Input("the run's data", Path(f"{prefix}.bin")) for prefix in prefixes]


def beside_exports(inputs: list[Input], output: Path) -> list[Input]:
    """Leave out the --save folder that has the output in its place for exports, DIR/hf/NAME."""
    folder = real_path(output).parent
    return [each for each in inputs if real_path(each.path) / EXPORTS != folder]


def export(arguments: Arguments) -> None:
    """Write, optionally verify, then publish by renaming.

    Raises:
        ValueError: bad input, or logits that differ.
    """
    check_arguments(arguments)
    # What may be written is settled before anything is read.
    inputs = [Input("--load", Path(arguments.load))]
    if arguments.verify_text is not None:
        inputs.append(Input("--verify-text", Path(arguments.verify_text)))
    output = Path(arguments.output)
    inputs = beside_exports(inputs, output)
    new = NewFolder("output", output, MAKER, inputs=inputs, overwrite=arguments.overwrite)
    stored = open_stored_model(arguments.load, arguments.ckpt_step, compare_weights=False)
    new.refuse_inputs(beside_exports(inputs_of_run(stored.config), output))
    # A model that transformers has no architecture for is refused.
    for part, factor in stored.form.factors.items():
        class_name = stored.architecture.class_name
        print(f"note: {part} is multiplied by {factor:g}, for which {class_name} has no key")
    declared = choose_context(stored, arguments.max_position_embeddings)

    weights = WeightsExport(stored, getattr(torch, arguments.dtype), arguments.max_shard_bytes)
    require_room("output", output, weights.num_bytes)

    # The new folder takes its name only once all of it is written and compared.
    with new:
        # The weights last: what is wrong with the small files shows in seconds.
        config = write_settings(
            stored, new.path, declared, arguments.dtype, with_tokenizer=arguments.tokenizer
        )
        write_model_card(stored, new.path, config, output.name, arguments.base_model)
        weights.write(new.path)
        if arguments.verify:
            verify_export(
                stored,
                new.path,
                declared,
                arguments.verify_text,
                with_tokenizer=arguments.tokenizer,
            )
        new.publish()
    print(
        f"exported {stored.folder} to {output}: {config['architectures'][0]}, "
        f"{declared:,} positions, rope {stored.rope.describe()}, {arguments.dtype}"
    )


def main(argv: list[str] | None = None) -> int:
    return run_door(Arguments, export, name="tools.export_hf", description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
