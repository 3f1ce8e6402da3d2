"""Make a checkpoint of a Hugging Face folder: `bash launch/ithaca.sh import --hf DIR --save DIR`.

Architectures: model/hf/architectures.py; rope default, linear, llama3 or yarn. The result is
weights: start a run from it with --pretrained-checkpoint DIR and your own --save. Needs no GPU and
no process group, and memory for one tensor; the comparison with transformers holds the whole model
in fp32. Nothing is published unless its logits are those of transformers on the folder.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizers.folder import IdsFrom, tokenizer_files
from model.build import parameter_shapes
from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folders import (
    find_published,
    is_checkpoint_folder,
    iteration_folder,
)
from pretrain.checkpointing.model_files import GENERATION, contents_of, read_model_files
from pretrain.checkpointing.progress import Progress
from pretrain.checkpointing.shared_errors import SaveFailed
from pretrain.config.config import Config
from pretrain.config.config_yaml import dump_yaml
from pretrain.planner.model_size import ModelSize
from pretrain.processes.agreement import Refused
from tools.huggingface.config import interpret_config, read_config_file
from tools.huggingface.fit import check_fit, padded_rows, settle_tie
from tools.huggingface.import_settings import (
    IMPORTED_PHASE,
    describe_tokenizer,
    make_config,
    progress_of_import,
)
from tools.huggingface.not_carried import describe_left_behind
from tools.huggingface.transformers_answers import ask_transformers
from tools.huggingface.verify_import import questions_about, verify_import, verify_stored
from tools.huggingface.weights import Weights, open_weights
from tools.outputs.files import Input, check_root, require_room
from tools.shared.door import run_door, warn

VERIFIED_BELOW = 10e9
"""Parameters from which on --verify must be asked for: transformers' fp32 copy takes 40 GB."""


FLOAT32_BYTES = 4
"""Bytes of a number in a checkpoint."""


@dataclass(kw_only=True)
class Arguments:
    hf: str
    """Hugging Face folder: config.json, safetensors files, tokenizer."""
    save: str
    """Folder for the checkpoint; must not hold one yet."""
    make_vocab_size_divisible_by: int = 128
    """Rows of the embedding are padded to a multiple of this, which tensor parallelism must divide.
    A run may choose another one when it loads the checkpoint."""
    verify: bool | None = None
    """--verify or --no-verify: compare transformers' logits and greedy text on the folder with ours
    before publishing, and then the stored weights bit for bit. By default yes below 10B
    parameters."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which of the folder's definitions of its tokenizer gives the ids; needed where they
    differ."""


def import_folder(arguments: Arguments) -> Path:
    """Read, check, compare, write -> the published checkpoint.

    Raises:
        ValueError: bad input, or another model than transformers'; nothing is published.
    """
    folder = Path(arguments.hf)
    content = read_config_file(folder)
    root = _check_output(arguments)

    # The settings and the weights have to mean the same model; shapes only, no values yet.
    settings = interpret_config(content)
    weights = open_weights(folder, settings.architecture)
    warnings = settings.warnings + weights.warnings
    weights, is_tied, tie_warnings = settle_tie(settings, weights)
    model = settings.model | {"untie_embeddings_and_output_weights": not is_tied}
    config = make_config(
        model,
        settings.vocab_size,
        folder,
        vocab_multiple=arguments.make_vocab_size_divisible_by,
        ids_from=arguments.tokenizer_ids_from,
    )
    check_fit(config.model, settings.vocab_size, weights, settings.architecture)
    tokenizer = describe_tokenizer(config)
    for text in warnings + tie_warnings:
        warn(text)

    # The values: compared first, where that is asked for, then written one tensor at a time.
    longest = settings.max_position_embeddings
    shapes = parameter_shapes(config.model, settings.vocab_size)
    require_room("save", root, sum(shape.numel() for shape in shapes.values()) * FLOAT32_BYTES)
    parameters = ModelSize(config.model, settings.vocab_size).num_parameters
    is_verified = should_verify(arguments.verify, parameters)
    if is_verified:
        _compare(folder, config, settings.vocab_size, weights, longest)
    progress = progress_of_import(config, tokenizer, longest)
    published = _publish(root, folder, config, progress, weights)
    if is_verified:
        verify_stored(published, weights.entries, settings.vocab_size)
    return published


def _check_output(arguments: Arguments) -> Path:
    """Return the folder to write a checkpoint into, without `..`; ValueError if it may not be."""
    child = iteration_folder(arguments.save, 0)
    inputs = [Input("--hf", Path(arguments.hf))]
    root = check_root("save", Path(arguments.save), child, inputs)
    # Also one that no file names, unless it is an import that was killed before it could name it.
    is_in_the_way = os.path.lexists(root / child.name) and not _is_unnamed_import(root / child.name)
    if find_published(arguments.save) or is_in_the_way:
        raise ValueError(
            f"save = {arguments.save}: holds a checkpoint already. Fix: give another folder."
        )
    return root


def _is_unnamed_import(folder: Path) -> bool:
    """Tell whether an import wrote a checkpoint; with no file that names it, it was killed."""
    progress = Progress.read_if_whole(folder)
    return (
        progress is not None
        and progress.phase.get("name") == IMPORTED_PHASE
        and is_checkpoint_folder(folder)
    )


def should_verify(asked: bool | None, parameters: int) -> bool:
    """Decide whether to compare logits: by default where a second copy fits into common memories.

    Warns where it does not.
    """
    # Not asked: only where it costs little.
    if asked is None and parameters >= VERIFIED_BELOW:
        warn(
            f"not compared with transformers: {parameters:,} parameters. --verify does it, with "
            f"{parameters * 4 / 1e9:.0f} GB more memory"
        )
    return parameters < VERIFIED_BELOW if asked is None else asked


def _compare(folder: Path, config: Config, vocab_size: int, weights: Weights, longest: int) -> None:
    """Compare the model with transformers' of the folder; memory holds it whole.

    Args:
        longest: the context length to compare up to.

    Raises:
        ValueError: weights that cannot be read, or other logits than transformers'.
    """
    # transformers first: its model is freed before ours is read, so that memory holds one of them.
    questions = questions_about(config, vocab_size, longest)
    answers = ask_transformers(folder, questions)
    tensors = weights.read_all(padded_rows(config.model, vocab_size, weights))
    verify_import(config.model, vocab_size, tensors, questions, answers)


def _publish(
    root: Path, folder: Path, config: Config, progress: Progress, weights: Weights
) -> Path:
    """Write the checkpoint of step 0, with the folder's small files -> its path.

    Raises:
        ValueError: weights that cannot be read; nothing is left at `root`.
    """
    # Kept in every checkpoint, so that the export can write them again.
    carried = read_model_files(folder)
    for line in describe_left_behind(folder, carried):
        print(line)
    if is_broken_json(carried.get(GENERATION, b"{}")):
        warn(
            f"{folder / GENERATION}: is not valid JSON; kept as it is, but transformers ignores it"
        )
    vocab_size = config.data.vocab_size
    assert vocab_size is not None, "make_config sets it"
    problems = []

    def fill(stored_name: str, tensor: torch.Tensor) -> None:
        try:
            weights.fill(stored_name.removeprefix("model."), tensor)
        except ValueError as error:
            problems.append(error)  # a save wraps it in words of its own
            raise

    shapes = parameter_shapes(config.model, vocab_size)
    made = [place for place in (root, *root.parents) if not place.exists()]
    try:
        return checkpoint.save(
            root,
            0,
            # In the order in which they lie in the folder.
            {f"model.{name}": torch.empty(shapes[name], device="meta") for name in weights.entries},
            progress,
            dump_yaml(config),
            contents_of(tokenizer_files(folder)),
            single_process_layout(torch.device("cpu")).world,
            carried,
            fill=fill,
        )
    except (Refused, SaveFailed):
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()
        if problems:
            raise problems[0] from None
        raise


def is_broken_json(content: bytes) -> bool:
    """Tell whether a file's content is not valid JSON."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


def import_and_report(arguments: Arguments) -> None:
    """Import, then print how to start from it."""
    folder = import_folder(arguments)
    print(
        f"imported {arguments.hf} as {folder}; start with --pretrained-checkpoint {arguments.save} "
        "--use-checkpoint-args"
    )


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, import_and_report, name="tools.import_hf", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
