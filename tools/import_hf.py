"""Make a checkpoint of a Hugging Face folder: `python -m tools.import_hf --hf DIR --save DIR`.

Llama, Qwen2 and Qwen3 architectures; rope default, linear, llama3 or yarn. The result is weights: start a run from it
with --pretrained-checkpoint DIR and your own --save. Needs no GPU and no process group; the whole model
is held in memory in fp32.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from tqdm import tqdm

from data.tokenizer import HUGGINGFACE_FILES, build_tokenizer
from model.build import parameter_shapes
from model.hf import VOCABULARY_ROWS, huggingface_name, model_settings, our_name
from parallel.layout import single_process_layout
from pretrain import checkpoint
from pretrain.config import Config
from pretrain.load_config import dump_yaml


@dataclass(kw_only=True)
class Arguments:
    hf: str
    """Hugging Face folder: config.json, safetensors files, tokenizer."""
    save: str
    """Folder for the checkpoint; must not hold one yet."""


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors files under our names, fp32.

    Raises:
        ValueError: no such files, or a tensor that our model has no place for.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"hf = {folder}: no .safetensors file. Fix: give the folder of a model saved in that format.")
    tensors = {}
    for file in tqdm(files, desc="reading weights", unit="file"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                try:
                    tensors[our_name(name)] = opened.get_tensor(name).float()
                except KeyError:
                    raise ValueError(f"{file}: tensor {name}: our model has no such part. Fix: another model.") \
                        from None
    return tensors


def fit(tensors: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Pad the vocabulary's rows and compare names and shapes with the model that the settings describe.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape.
    """
    shapes = parameter_shapes(config.model, config.data.vocab_size)
    if not config.model.untie_embeddings_and_output_weights:
        tensors.pop("output.weight", None)  # some folders store the tied copy too
    for name in set(VOCABULARY_ROWS) & tensors.keys():
        rows = config.model.padded_vocab_size(config.data.vocab_size) - tensors[name].shape[0]
        tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, max(0, rows)))
    problems = [f"{huggingface_name(name)} is missing" for name in shapes.keys() - tensors.keys()]
    problems += [f"{huggingface_name(name)} is left over" for name in tensors.keys() - shapes.keys()]
    problems += [f"{huggingface_name(name)} has shape {tuple(tensors[name].shape)}, config.json means {tuple(shape)}"
                 for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
    if problems:
        raise ValueError(f"the weights do not fit config.json: {'; '.join(sorted(problems)[:4])}. Fix: download the "
                         "folder again.")
    return tensors


def import_folder(arguments: Arguments) -> Path:
    """Read, check, write -> the published checkpoint.

    Raises:
        ValueError: bad input; nothing is published.
    """
    folder = Path(arguments.hf)
    if not (folder / "config.json").is_file():
        raise ValueError(f"hf = {folder}: no config.json in it. Fix: give a Hugging Face folder.")
    if checkpoint.published(arguments.save):
        raise ValueError(f"save = {arguments.save}: holds a checkpoint already. Fix: give another folder.")
    source = json.loads((folder / "config.json").read_text())
    config = Config()
    settings = model_settings(source)
    config.data.vocab_size = settings.pop("vocab_size")
    for name, value in settings.items():
        setattr(config.model, name, value)
    tokenizer_files = [str(folder / name) for name in HUGGINGFACE_FILES if (folder / name).is_file()]
    config.data.tokenizer_type = "HuggingFaceTokenizer" if tokenizer_files else "NullTokenizer"
    config.data.tokenizer_model = str(folder.resolve()) if tokenizer_files else None
    tensors = fit(read_weights(folder), config)
    length = source.get("max_position_embeddings")
    progress = {"step": 0, "clock": 0, "last_batch_tokens": 0, "real_tokens": 0, "skipped_in_a_row": 0,
                "wandb_run_id": None,
                "phase": {"name": "imported", "index": 0, "seq_length": length,
                          "rope": asdict(config.model.rope)},
                "longest_seq_length": length, "seed": None, "data": None,
                "tokenizer": _describe_tokenizer(config.data.tokenizer_model), "has_optimizer": False, "world_size": 1}
    world = single_process_layout(torch.device("cpu")).world
    return checkpoint.save(arguments.save, 0, {f"model.{name}": tensor for name, tensor in tensors.items()}, progress,
                           dump_yaml(config), tokenizer_files, world)


def _describe_tokenizer(folder: str | None) -> dict | None:
    """What a run's tokenizer is compared with; None where there is none that can be read."""
    if folder is None:
        return None
    try:
        return build_tokenizer("HuggingFaceTokenizer", folder, None).describe()
    except ValueError as error:
        print(f"warning: the checkpoint will not know its tokenizer: {error}", file=sys.stderr)
        return None


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.import_hf", description=__doc__)
    try:
        folder = import_folder(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"imported {arguments.hf} as {folder}; start with --pretrained-checkpoint {arguments.save} "
          "--use-checkpoint-args")
    return 0


if __name__ == "__main__":
    sys.exit(main())
