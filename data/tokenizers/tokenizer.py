"""Text to token ids and back: SentencePiece, Hugging Face, or none.

The libraries are imported by the class that uses them, so that a run on one needs only that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from data.tokenizers.folder import HUGGINGFACE_FILES as HUGGINGFACE_FILES
from data.tokenizers.folder import HuggingFace, IdsFrom, refuse_tokens_beside_model
from data.tokenizers.identity import SAMPLE_TEXT as SAMPLE_TEXT
from data.tokenizers.identity import hash_files
from data.tokenizers.sentencepiece_model import SentencePiece

if TYPE_CHECKING:
    from data.tokenizers.rules import FastRules


class Tokenizer(Protocol):
    """What the trainer and the tools ask of a tokenizer."""

    vocab_size: int
    """One more than the largest id that `encode` can give or `eod` can be."""
    eod: int | None
    """The end-of-document id, None where there is none."""
    bos: int | None
    """The beginning-of-sequence id, None where there is none."""
    files: list[str]
    """Paths that rebuild the tokenizer; stored beside a checkpoint."""

    def encode(self, text: str) -> list[int]:
        """Encode a text; no bos or eos is added. ValueError where the text has no ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to their text."""
        ...

    def describe(self) -> dict:
        """Describe its identity, JSON-able; identity.py: same_tokenizer compares two."""
        ...

    def fast_rules(self) -> FastRules:
        """Say which texts gigatoken may encode for it, and how. ValueError if none."""
        ...

    def special_texts(self) -> list[str]:
        """List how special tokens (control pieces) are written in text."""
        ...

    def special_tokens_left(self) -> list[str]:
        """List special tokens that `encode` gives for their text where they should be text."""
        ...

    def save_huggingface(self, folder: str) -> None:
        """Write what makes AutoTokenizer give the same ids. ValueError if it cannot."""
        ...


def build_tokenizer(
    type: str,
    model: str | None,
    vocab_size: int | None,
    *,
    ids_from: IdsFrom | None = None,
    keep_special: bool = False,
) -> Tokenizer:
    """Build the tokenizer of a `--tokenizer-type`.

    Args:
        type: one of config.py: TokenizerType.
        model: the .model file (SentencePiece) or the folder (Hugging Face).
        vocab_size: used by NullTokenizer only.
        ids_from: which definition of a Hugging Face folder gives the ids; None where both agree.
        keep_special: special tokens that are written in a text are those tokens, and not text.

    Raises:
        ValueError: unknown type, a missing or unreadable model, a missing vocabulary size, or two
            definitions that differ.
    """
    # The kinds that need no file, unknown ones, and a missing file.
    if type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    kinds = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
    if type not in (*kinds, "HuggingFaceTokenizer"):
        raise ValueError(
            f"tokenizer_type = {type}: unknown. Fix: one of {', '.join(kinds)}, "
            "HuggingFaceTokenizer, NullTokenizer."
        )
    if not model:
        raise ValueError(
            f"tokenizer_model = {model}: must be given for {type}. Fix: give --tokenizer-model."
        )
    # A folder is read by transformers, unless it holds a SentencePiece model and no tokenizer.json:
    # then the ids are those of SentencePiece.
    pieces = Path(model) / "tokenizer.model"
    is_folder = type == "HuggingFaceTokenizer"
    if is_folder:
        is_alone = pieces.is_file() and not (Path(model) / "tokenizer.json").is_file()
        if not is_alone or ids_from is not None:
            return HuggingFace(model, ids_from=ids_from, keep_special=keep_special)
    # What is left is SentencePiece, which has no way to keep special tokens.
    if keep_special:
        raise ValueError(
            "special_tokens_in_text = keep: SentencePiece takes what is written in a text as "
            "text. Fix: as-text or refuse."
        )
    tokenizer = SentencePiece(str(pieces) if is_folder else model)
    if is_folder:
        refuse_tokens_beside_model(Path(model), tokenizer)
    return tokenizer


class NullTokenizer:
    """Reads text of integers, for data that is already tokenized.

    eod is `vocab_size - 1`. Megatron-Core's class counts the end-of-document token beside its
    vocab_size argument (V gives V + 1 ids and eod = V); here vocab_size is the number of ids, eod
    among them. For data made there with V, give V + 1.
    """

    def __init__(self, vocab_size: int | None):
        if vocab_size is None or vocab_size < 2:
            raise ValueError(
                f"vocab_size = {vocab_size}: NullTokenizer needs at least 2. Fix: give "
                "--vocab-size, one more than the largest id."
            )
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1
        self.bos: int | None = None
        self.files: list[str] = []

    def encode(self, text: str) -> list[int]:
        """Read whitespace-separated integers. ValueError: not integers in [0, vocab_size)."""
        # A word that is no integer, then an integer that is no id.
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            raise ValueError(
                f"NullTokenizer: text must be whitespace-separated integers ({error}). Fix: the "
                "input, or another --tokenizer-type."
            ) from None
        wrong = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if wrong is not None:
            raise ValueError(
                f"token id {wrong}: must be in [0, vocab_size = {self.vocab_size}). Fix: the "
                "input, or a larger --vocab-size."
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(int(i)) for i in ids)

    def describe(self) -> dict:
        # It has no files; a description always has a fingerprint.
        return {
            "type": "NullTokenizer",
            "vocab_size": self.vocab_size,
            "fingerprint": hash_files([]),
        }

    def fast_rules(self) -> FastRules:
        raise ValueError("its text is integers")

    def special_texts(self) -> list[str]:
        return []

    def special_tokens_left(self) -> list[str]:
        return []

    def save_huggingface(self, folder: str) -> None:
        raise ValueError(
            f"tokenizer_type = NullTokenizer: there is no tokenizer to write to {folder}. Fix: put "
            "the files of the tokenizer that made the ids there."
        )
