"""The workers of tools.preprocess_data: from pieces of the input to token ids."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from data.tokenizers.fast import CheckedEncoder, Encoded, TextError, encode_one_by_one
from data.tokenizers.folder import IdsFrom, SpecialTokensInText
from data.tokenizers.text_search import TextSearch
from data.tokenizers.tokenizer import NullTokenizer, build_tokenizer
from tools.preprocessing.ids_files import read_ids
from tools.preprocessing.text_files import Piece, name_place, read_documents


@dataclass(frozen=True)
class Task:
    """Holds the pieces that one worker tokenizes together."""

    pieces: list[Piece]
    next: tuple[int, int]
    """Number of the file, and in it of the piece, after the last."""

    @property
    def size(self) -> int:
        """Bytes of input files that the pieces cover."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass
class TextCounts:
    """Counts how documents became ids."""

    special_documents: int = 0
    """Documents in which a special token is written."""
    special_tokens: int = 0
    """Special tokens that are written in documents."""
    slow: int = 0
    """Documents that the tokenizer itself encoded, beside the fast encoder."""
    checked: int = 0
    """Documents that were encoded both ways."""

    def add(self, other: "TextCounts") -> None:
        """Add the counts of other documents."""
        for name, number in asdict(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass
class Result:
    """Holds what became of a task."""

    ids: np.ndarray
    """Token ids of its documents, in order."""
    lengths: np.ndarray
    """Length of each document, int64 [documents]."""
    empty: int
    """Documents without a token, left out."""
    bad: int
    """Lines and rows that could not be read, left out."""
    size: int
    """Bytes of input files."""
    text: TextCounts = field(default_factory=TextCounts)


@dataclass(frozen=True)
class Job:
    """Tells a worker how to make ids of documents."""

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int
    dtype: type[np.integer]
    """Type of the ids in the output."""
    eod: int | None
    """Id to put after each document; None for nothing."""
    key: str
    """Key of the text in JSON objects, column of tables."""
    skip_bad: bool
    """Count what cannot be read, instead of stopping."""
    fast: CheckedEncoder | None
    """The fast encoder; None to use the tokenizer itself."""
    bos: int | None = None
    """Id to put before each document; None for nothing."""
    ids_from: IdsFrom | None = None
    special_tokens_in_text: SpecialTokensInText = "as-text"
    """What becomes of `special_texts` in a document."""
    special_texts: tuple[str, ...] = ()

    def finish(self, ids: np.ndarray, lengths: np.ndarray, bad: int, size: int) -> Result:
        """Leave out empty documents, and put bos and eod around the others."""
        full = lengths[lengths > 0]
        ids = ids.astype(self.dtype)
        if self.bos is not None:
            starts = np.cumsum(full) - full
            ids = np.insert(ids, starts, self.bos)
            full = full + 1
        if self.eod is not None:
            ends = np.cumsum(full)
            ids = np.insert(ids, ends, self.eod)
            full = full + 1
        return Result(ids, full, len(lengths) - len(full), bad, size)


class TextEncoder:
    """Encodes text with the tokenizer, or with the fast encoder that replaces it."""

    def __init__(self, job: Job):
        self.job = job
        self._special = TextSearch(job.special_texts)
        if job.fast is None:
            tokenizer = build_tokenizer(
                job.tokenizer_type,
                job.tokenizer_model,
                job.vocab_size,
                ids_from=job.ids_from,
                keep_special=job.special_tokens_in_text == "keep",
            )
            self._encode_slowly = partial(encode_one_by_one, tokenizer)

    def encode(self, task: Task) -> Result:
        """Encode all documents of a task.

        Raises:
            ValueError: names file and line of what cannot be read or encoded.
        """
        # Where each text comes from, for errors.
        texts: list[str] = []
        places: list[tuple[Piece, int]] = []
        bad = 0
        for piece in task.pieces:
            documents = read_documents(piece, self.job.key, skip_bad=self.job.skip_bad)
            bad += documents.bad
            texts += documents.texts
            places += [(piece, offset) for offset in documents.offsets]
        # Special tokens that are written in a text: counted, or refused.
        special = self._special.count(texts)
        if special and self.job.special_tokens_in_text == "refuse":
            index = min(special)
            raise ValueError(
                f"{name_place(*places[index])}: the special token "
                f"{self._special.first(texts[index])!r} is written in the text. Fix: the text, or "
                "--special-tokens-in-text as-text or keep."
            )
        try:
            encoded = self._encode(texts, task)
        except TextError as error:
            raise ValueError(f"{name_place(*places[error.index])}: {error}") from None
        result = self.job.finish(encoded.ids, encoded.lengths, bad, task.size)
        result.text = TextCounts(len(special), sum(special.values()), encoded.slow, encoded.checked)
        return result

    def _encode(self, texts: list[str], task: Task) -> Encoded:
        """Encode texts, and some of them both ways where the fast encoder does it."""
        if self.job.fast is None:
            return Encoded(*self._encode_slowly(texts))
        # All documents at once: the fast encoder is fast on many texts.
        encoded = self.job.fast.encode_batch(texts)
        # By the place in the input, so that neither --workers nor a restart changes which documents
        # are checked.
        encoded.checked = self.job.fast.check(texts, task.next)
        return encoded


class IdsEncoder:
    """Reads input that is token ids already."""

    def __init__(self, job: Job):
        self.job = job
        self.tokenizer = NullTokenizer(job.vocab_size)

    def encode(self, task: Task) -> Result:
        """Read all documents of a task.

        Raises:
            ValueError: names file and line of what is not a list of ids.
        """
        parts = [
            read_ids(piece, self.job.key, self.tokenizer, skip_bad=self.job.skip_bad)
            for piece in task.pieces
        ]
        ids = np.concatenate([part.ids for part in parts])
        lengths = np.concatenate([part.lengths for part in parts])
        return self.job.finish(ids, lengths, sum(part.bad for part in parts), task.size)


def build_encoder(job: Job) -> TextEncoder | IdsEncoder:
    """Build the encoder that the tokenizer type asks for."""
    return IdsEncoder(job) if job.tokenizer_type == "NullTokenizer" else TextEncoder(job)


def start_pool(job: Job, workers: int) -> tuple[Executor, Callable[[Task], Result]]:
    """Start workers -> (them, the function to submit to them)."""
    if job.fast is not None:
        # It encodes without the interpreter's lock; threads share its cache of words.
        return ThreadPoolExecutor(workers), TextEncoder(job).encode
    # spawn: a forked child may inherit locks that a tokenizer library's threads hold.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _start_worker, (job,)), _encode_in_worker


_encoder: TextEncoder | IdsEncoder | None = None
"""Encoder of this worker process; a process pool has no other place for it."""


def _start_worker(job: Job) -> None:
    """Prepare a worker process."""
    global _encoder
    # Ctrl-C reaches the whole group: the parent answers it, and its end is this one's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = build_encoder(job)


def _end_with_parent() -> None:
    """End this process with its parent, which cannot tell its workers if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)


def _encode_in_worker(task: Task) -> Result:
    """Encode a task in a worker process."""
    assert _encoder is not None
    return _encoder.encode(task)
