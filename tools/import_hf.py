"""Make a checkpoint of a Hugging Face folder: `python -m tools.import_hf --hf DIR --save DIR`.

Llama, Qwen2 and Qwen3 architectures; rope default, linear, llama3 or yarn. The result is weights:
start a run from it with --pretrained-checkpoint DIR and your own --save. Needs no GPU and no
process group; the whole model is held in memory in fp32. Nothing is published unless its logits are
those of transformers on the folder.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from data.tokenizers.folder import IdsFrom, TwoDefinitions, tokenizer_files
from data.tokenizers.tokenizer import build_tokenizer
from model.attention_backends.choice import choose_attention
from model.build import build_whole_model
from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.folders import find_published, iteration_folder
from pretrain.checkpointing.model_files import GENERATION, read_model_files
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.facts import problems_of
from pretrain.config.load import dump_yaml
from pretrain.planner.model_size import num_parameters
from tools.huggingface.compare_logits import (
    Sequence,
    compute_in_double,
    judge,
    our_logits,
    transformers_logits,
)
from tools.huggingface.config import FolderConfig, read_config_file, understand
from tools.huggingface.fit import check_fit, pad_vocabulary, settle_tie
from tools.huggingface.weights import open_weights
from tools.outputs.files import Input, check_root
from tools.shared.door import run_door

VERIFIED_BELOW = 10e9
"""Parameters from which on --verify must be asked for: transformers' fp32 copy takes 40 GB."""
VERIFIED_TOKENS = 256
"""Tokens of each sequence that is compared."""


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
    """--verify or --no-verify: compare transformers' logits on the folder with ours before
    publishing. By default yes below 10B parameters."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which of the folder's definitions of its tokenizer gives the ids; needed where they
    differ."""


# ---------------------------------------------------------------- the comparison


def compared_sequences(vocab_size: int, longest: int) -> list[Sequence]:
    """Random tokens at the first positions, the last ones, and spread over the declared context."""
    length = min(VERIFIED_TOKENS, longest)
    generator = torch.Generator().manual_seed(0)
    positions = {f"positions 0 to {length - 1:,}": torch.arange(length)}
    if longest > length:
        positions[f"positions {longest - length:,} to {longest - 1:,}"] = torch.arange(
            longest - length, longest
        )
        step = (longest - 1) // max(1, length - 1)
        positions[f"each {step:,}th position to {step * (length - 1):,}"] = (
            torch.arange(length) * step
        )
    return [
        Sequence(name, torch.randint(vocab_size, (length,), generator=generator), places)
        for name, places in positions.items()
    ]


def refuse_other_logits(
    config: Config,
    tensors: dict[str, torch.Tensor],
    sequences: list[Sequence],
    expected: list[torch.Tensor],
) -> None:
    """Compare the model to be published with what transformers makes of the folder.

    Raises:
        ValueError: they are not the same model.
    """
    vocab_size = config.data.vocab_size
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float64)
    model = build_whole_model(config.model, vocab_size, tensors, attend, device)
    compute_in_double(model, model.layers.values())
    problems = []
    for sequence, theirs in zip(sequences, expected):
        problem = judge(sequence, our_logits(model, vocab_size, sequence), theirs)
        if problem:
            problems.append(problem)
    if problems:
        raise ValueError(
            f"verification of the import failed: {'; '.join(problems)}. Fix: this is a defect of "
            "the conversion, or of the folder; nothing was published."
        )


# ---------------------------------------------------------------- the tool


def configure(settings: FolderConfig, folder: Path, arguments: Arguments) -> Config:
    """The configuration that the checkpoint carries.

    Raises:
        ValueError: a setting that is not legal here.
    """
    config = Config()
    for name, value in settings.model.items():
        setattr(config.model, name, value)
    config.model.make_vocab_size_divisible_by = arguments.make_vocab_size_divisible_by
    config.data.vocab_size = settings.vocab_size
    files = tokenizer_files(folder)
    config.data.tokenizer_type = "HuggingFaceTokenizer" if files else "NullTokenizer"
    config.data.tokenizer_model = str(folder.resolve()) if files else None
    config.data.tokenizer_ids_from = arguments.tokenizer_ids_from if files else None
    problems = problems_of(config.model)
    if problems:
        raise ValueError("\n".join(problems))
    return config


def progress_of_import(config: Config, tokenizer: dict | None, longest: int) -> Progress:
    """Describe a checkpoint that holds weights only."""
    phase = {
        "name": "imported",
        "index": 0,
        "seq_length": longest,
        "rope": asdict(config.model.rope),
    }
    return Progress(
        step=0,
        clock=0,
        phase=phase,
        longest_seq_length=longest,
        data=None,
        tokenizer=tokenizer,
        has_optimizer=False,
        world_size=1,
    )


def _describe_tokenizer(folder: str | None, ids_from: IdsFrom | None) -> dict | None:
    """What a run's tokenizer is compared with; None where there is none that can be read."""
    if folder is None:
        return None
    try:
        return build_tokenizer("HuggingFaceTokenizer", folder, None, ids_from=ids_from).describe()
    except TwoDefinitions:
        raise
    except ValueError as error:
        warn(f"the checkpoint will not know its tokenizer: {error}")
        return None


def import_folder(arguments: Arguments) -> Path:
    """Read, check, compare, write -> the published checkpoint.

    Raises:
        ValueError: bad input, or another model than transformers'; nothing is published.
    """
    folder = Path(arguments.hf)
    content = read_config_file(folder)
    child = iteration_folder(arguments.save, 0)
    root = check_root("save", Path(arguments.save), child, [Input("--hf", folder)])
    # Also one that no file names: a save would take it for what it left itself, and replace it.
    if find_published(arguments.save) or os.path.lexists(root / child.name):
        raise ValueError(
            f"save = {arguments.save}: holds a checkpoint already. Fix: give another folder."
        )
    settings = understand(content)
    weights = open_weights(folder)
    warnings = settings.warnings + weights.warnings
    weights, is_tied, more = settle_tie(settings, weights)
    settings.model["untie_embeddings_and_output_weights"] = not is_tied
    config = configure(settings, folder, arguments)
    check_fit(config, weights)
    tokenizer = _describe_tokenizer(config.data.tokenizer_model, config.data.tokenizer_ids_from)
    for text in warnings + more:
        warn(text)
    longest = settings.max_position_embeddings
    sequences = []
    if should_verify(arguments.verify, num_parameters(config.model, settings.vocab_size)):
        sequences = compared_sequences(settings.vocab_size, longest)
    # transformers first: its model is gone before ours is read, so that memory holds one of them.
    expected = transformers_logits(folder, sequences) if sequences else []
    tensors = weights.read()
    pad_vocabulary(tensors, config)
    if sequences:
        refuse_other_logits(config, tensors, sequences, expected)
    carried = read_model_files(folder)
    if is_broken_json(carried.get(GENERATION, b"{}")):
        warn(
            f"{folder / GENERATION}: is not valid JSON; kept as it is, but transformers ignores it"
        )
    world = single_process_layout(torch.device("cpu")).world
    return checkpoint.save(
        root,
        0,
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        progress_of_import(config, tokenizer, longest),
        dump_yaml(config),
        tokenizer_files(folder),
        world,
        carried,
    )


def should_verify(asked: bool | None, parameters: int) -> bool:
    """Compare logits? By default where a second copy fits into common memories; says where not."""
    if asked is None and parameters >= VERIFIED_BELOW:
        warn(
            f"not compared with transformers: {parameters:,} parameters. --verify does it, with "
            f"{parameters * 4 / 1e9:.0f} GB more memory"
        )
    return parameters < VERIFIED_BELOW if asked is None else asked


def is_broken_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return True
    return False


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


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
