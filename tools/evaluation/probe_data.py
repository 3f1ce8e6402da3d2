"""The documents that the probes read: token files of `preprocess`, or text files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.sources import Blend, open_corpus
from data.stream import DocumentStream
from data.tokenizers.identity import hash_text
from data.tokenizers.tokenizer import Tokenizer


def open_blend(
    words: Sequence[str], seed: int, vocab_size: int, tokenizer: Tokenizer | None
) -> Blend:
    """Open token files as one blend of all their documents.

    Args:
        words: as --data-path takes them, `[weight] prefix ...`.

    Raises:
        ValueError: files are missing or damaged, or hold ids of another tokenizer.
    """
    config = DataConfig(train_data_path=list(words))
    described = tokenizer.describe() if tokenizer is not None else None
    corpus = open_corpus(config, seed, vocab_size, described)
    settings = corpus.settings(1, words, "data_path", "concat", "repeat")
    return [(weight, corpus.train[name]) for weight, name in settings.blend]


def read_text(path: Path) -> str:
    """Read a text file; ValueError where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text_file = {path}: is not text in UTF-8 ({error.reason}). Fix: give a text file."
        ) from None
    if not text.split():
        raise ValueError(f"text_file = {path}: holds no word. Fix: give a longer text.")
    return text


def encode_blend(paths: Sequence[Path], seed: int, tokenizer: Tokenizer) -> Blend:
    """Make a blend of text files, a document each."""
    return [(1.0, DocumentStream(TextDocuments(paths, tokenizer), None, seed))]


class TextDocuments:
    """Reads text files that were encoded in memory, a document each."""

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer):
        self.prefix = ", ".join(map(str, paths))
        self.tokens = [
            np.array(tokenizer.encode(read_text(path)), dtype=np.int64) for path in paths
        ]
        self.document_lengths = np.array([len(ids) for ids in self.tokens], dtype=np.int64)

    def read_spans(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray, out: np.ndarray
    ) -> None:
        place = 0
        for document, offset, length in zip(documents, offsets, lengths, strict=True):
            out[place : place + length] = self.tokens[document][offset : offset + length]
            place += length

    def fingerprint(self) -> str:
        return hash_text(" ".join(hash_text(str(ids.tolist())) for ids in self.tokens))
