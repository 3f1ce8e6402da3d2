"""Imports of tiny Hugging Face folders, compared with transformers or refused."""

from pathlib import Path

import torch

from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.stored_tensors import read_whole_tensors, tensor_names
from tests.huggingface.model_folders import SHAPE, transformers_logits, transformers_model
from tools import import_hf
from tools.huggingface import compare_logits
from tools.huggingface.questions import ComparedSequence
from tools.huggingface.stored_model import StoredModel, open_stored_model
from tools.huggingface.verify_export import model_of_checkpoint

IDS = torch.randint(SHAPE["vocab_size"], (48,), generator=torch.Generator().manual_seed(3))
POSITIONS = torch.arange(48)


def run(folder: Path, *flags: str) -> tuple[int, Path]:
    """(exit code, place of the checkpoint)."""
    save = folder.parent / "imported"
    return import_hf.main(["--hf", str(folder), "--save", str(save), *flags]), save


def refusal(folder: Path, capsys, *flags: str) -> str:
    """The one line that the import is refused with; nothing is published."""
    code, save = run(folder, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert code == 2, code
    assert len(lines) == 1, lines
    assert not save.exists()
    return lines[0]


def assert_same_model(folder: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Import and compare with transformers, by the test's own means -> the checkpoint's tensors."""
    code, save = run(folder, "--no-verify", *flags)
    assert code == 0
    expected = transformers_logits(transformers_model(folder), IDS, POSITIONS)
    ours = our_logits(save)
    difference = (ours - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max(), difference
    published = find_published(save)
    return read_whole_tensors(published, tensor_names(published))


def our_logits(save: Path) -> torch.Tensor:
    (save / "config.json").write_text('{"torch_dtype": "float32"}')
    return checkpoint_logits(open_stored_model(str(save), None), save, IDS, POSITIONS)


def checkpoint_logits(
    stored: StoredModel, exported: Path, ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Logits [t, V] of our model, its weights rounded to the dtype of the exported folder."""
    model = model_of_checkpoint(stored, exported)
    sequence = ComparedSequence("", ids, positions)
    return compare_logits.our_logits(model, stored.vocab_size, sequence)
