"""The workers of tools.preprocess_data: from pieces of the input to token ids."""

import multiprocessing
import os
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
    """Pieces that one worker tokenizes in one go.

    next: number of the file, and in it of the piece, after the last.
    """

    pieces: list[Piece]
    next: tuple[int, int]

    @property
    def size(self) -> int:
        """Bytes of input files."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass
class TextCounts:
    """How documents became ids.

    special_documents, special_tokens: documents in which a special token is written, and how often
    that is. slow: documents that the tokenizer itself encoded, beside the fast encoder. checked:
    documents that were encoded both ways.
    """

    special_documents: int = 0
    special_tokens: int = 0
    slow: int = 0
    checked: int = 0

    def add(self, other: "TextCounts") -> None:
        """Add those of other documents."""
        for name, number in asdict(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass
class Result:
    """Token ids of the documents of a task in order, and the length of each, int64 [documents]."""

    ids: np.ndarray
    lengths: np.ndarray
    empty: int
    bad: int
    size: int
    text: TextCounts = field(default_factory=TextCounts)


@dataclass(frozen=True)
class Job:
    """What a worker has to know.

    eod: to put after each document, None for nothing. fast: encodes, None to use the tokenizer
    itself. bos: to put before each document, None for nothing. special_tokens_in_text: what is made
    of `special_texts` in a document.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int
    dtype: type[np.integer]
    eod: int | None
    key: str
    skip_bad: bool
    fast: CheckedEncoder | None
    bos: int | None = None
    ids_from: IdsFrom | None = None
    special_tokens_in_text: SpecialTokensInText = "as-text"
    special_texts: tuple[str, ...] = ()

    def finish(self, ids: np.ndarray, lengths: np.ndarray, bad: int, size: int) -> Result:
        """Leave out empty documents, begin and end the others."""
        full = lengths[lengths > 0]
        ids = ids.astype(self.dtype)
        if self.bos is not None:
            ids = np.insert(ids, np.cumsum(full) - full, self.bos)
            full = full + 1
        if self.eod is not None:
            ids = np.insert(ids, np.cumsum(full), self.eod)
            full = full + 1
        return Result(ids, full, len(lengths) - len(full), bad, size)


class Encoder:
    """For text: the tokenizer, or the fast encoder that stands for it."""

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
        """Raises ValueError that names file and line."""
        texts: list[str] = []
        places: list[tuple[Piece, int]] = []
        bad = 0
        for piece in task.pieces:
            documents = read_documents(piece, self.job.key, self.job.skip_bad)
            bad += documents.bad
            texts += documents.texts
            places += [(piece, offset) for offset in documents.offsets]
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
        if self.job.fast is None:
            return Encoded(*self._encode_slowly(texts))
        encoded = self.job.fast.encode_batch(texts)
        # By the place in the input, so that neither --workers nor a restart changes which documents
        # are checked.
        encoded.checked = self.job.fast.check(texts, task.next)
        return encoded


class IdsEncoder:
    """For input that is token ids."""

    def __init__(self, job: Job):
        self.job, self.tokenizer = job, NullTokenizer(job.vocab_size)

    def encode(self, task: Task) -> Result:
        """Raises ValueError that names file and line."""
        parts = [
            read_ids(piece, self.job.key, self.job.skip_bad, self.tokenizer)
            for piece in task.pieces
        ]
        ids, lengths = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return self.job.finish(ids, lengths, sum(part[2] for part in parts), task.size)


def build_encoder(job: Job) -> Encoder | IdsEncoder:
    """What the tokenizer type asks for."""
    return IdsEncoder(job) if job.tokenizer_type == "NullTokenizer" else Encoder(job)


def start_pool(job: Job, workers: int) -> tuple[Executor, Callable[[Task], Result]]:
    """Workers, and what to submit to them."""
    if (
        job.fast is not None
    ):  # it encodes without the GIL; threads start at once and share its cache of words
        return ThreadPoolExecutor(workers), Encoder(job).encode
    # spawn: a forked child may inherit locks that a tokenizer library's threads hold.
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (job,)
    ), _work


_encoder: Encoder | IdsEncoder | None = (
    None  # of this worker process; a process pool has no other place for it
)


def _start_worker(job: Job) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = build_encoder(job)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers: they would wait for work forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Task) -> Result:
    assert _encoder is not None
    return _encoder.encode(task)
