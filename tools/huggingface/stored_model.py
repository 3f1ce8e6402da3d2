"""The model in a published checkpoint, with all that an export needs to know of it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from model.hf.architecture import Architecture
from model.hf.choice import ExportForm, export_form
from model.rope import Rope
from pretrain.checkpointing.folders import LATEST, find_published, tokenizer_model_in
from pretrain.checkpointing.manifest import refuse_damage, verify_files, verify_small_files
from pretrain.checkpointing.model_files import CONFIG, read_carried
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.config_yaml import read_config_yaml
from tools.huggingface.export_files import parse_json


@dataclass(frozen=True)
class StoredModel:
    """Holds a checkpoint that was opened for reading."""

    folder: Path
    config: Config
    progress: Progress
    tokenizer: Tokenizer | None
    carried: dict[str, bytes]
    """What the model's Hugging Face source held besides weights; empty where it began here."""

    @property
    def vocab_size(self) -> int:
        """Token ids of the model, without the padding of the embedding."""
        size = self.config.data.vocab_size
        assert size is not None, f"{self.folder}: its config.yaml has no vocab_size"
        return size

    @cached_property
    def form(self) -> ExportForm:
        """How an export writes the model.

        Raises:
            ValueError: no architecture of transformers has the model's parts.
        """
        source = parse_json(self.carried.get(CONFIG))
        return export_form(self.config.model, source.get("model_type"))

    @property
    def architecture(self) -> Architecture:
        """The architecture of transformers that an export has."""
        return self.form.architecture

    @property
    def rope(self) -> Rope:
        """Rotary embedding of the phase that the checkpoint was saved in."""
        return self.progress.rope


def open_stored_model(
    root: str, step: int | None, *, verify: bool = True, compare_weights: bool = True
) -> StoredModel:
    """Find, verify and open the checkpoint of a step, or the latest one.

    Args:
        verify: compare the files with their checksums; of several processes one is enough.
        compare_weights: compare those of weights, too, which reads them whole; whoever reads them
            with a VerifyingReader does so himself.

    Raises:
        ValueError: there is none, or its files are damaged.
    """
    folder = find_published(root, step)
    if folder is None:
        raise ValueError(
            f"load = {root}: no checkpoint is published there (no {LATEST}). "
            "Fix: give the --save folder of a run."
        )
    # A folder may have been cut short by a copy: its checksums say so.
    if verify:
        compare = verify_files if compare_weights else verify_small_files
        refuse_damage(folder, compare(folder))
    config = read_config_yaml(str(folder / "config.yaml"))
    # No weights yet: those are read a file at a time.
    return StoredModel(
        folder=folder,
        config=config,
        progress=Progress.read(folder),
        tokenizer=stored_tokenizer(folder, config),
        carried=read_carried(folder),
    )


def stored_tokenizer(
    folder: Path, config: Config, *, keep_special: bool = False
) -> Tokenizer | None:
    """Build the tokenizer from the files beside the weights; None where the run had none.

    Args:
        keep_special: special tokens that are written in a text are those tokens, and not text.
    """
    data = config.data
    model = tokenizer_model_in(folder, data.tokenizer_type)
    if model is None:
        return None
    return build_tokenizer(
        data.tokenizer_type,
        model,
        data.vocab_size,
        ids_from=data.tokenizer_ids_from,
        keep_special=keep_special,
    )
