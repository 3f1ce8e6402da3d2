"""Write small checkpoints, and damage them."""

from pathlib import Path

import torch

from parallel.layout import single_process_layout
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.progress import Progress
from pretrain.config.config_yaml import dump_yaml
from pretrain.config.load import load_config

NAMES = ("model.embedding.weight", "model.output.weight", "optimizer.output.weight.exp_avg")


def save(root: Path, step: int, value: float = 1.0) -> Path:
    """Publish a checkpoint with a tokenizer and carried files; its tensors are full of `value`."""
    tokenizer = root / "tok.model"
    root.mkdir(parents=True, exist_ok=True)
    tokenizer.write_bytes(bytes(range(256)))
    progress = Progress(
        step=step, clock=64 * step, phase={}, longest_seq_length=0, data=None, tokenizer=None
    )
    folder = checkpoint.save(
        root,
        step,
        {name: torch.full((8, 5), value) for name in NAMES},
        progress,
        dump_yaml(load_config(["--model", "tiny", "--vocab-size", "100"])),
        {tokenizer.name: tokenizer.read_bytes()},
        single_process_layout(torch.device("cpu")).world,
        {"generation_config.json": b"{}"},
    )
    tokenizer.unlink()
    return folder


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
