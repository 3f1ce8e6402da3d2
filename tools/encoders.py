"""The workers of tools.preprocess_data: from pieces of the input to token ids."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from data.tokenizer import NullTokenizer, build_tokenizer
from data.tokenizer_fast import FastEncoder, TextError, encode_one_by_one
from tools.ids_files import read_ids
from tools.text_files import Piece, name_place, read_documents


@dataclass(frozen=True)
class Task:
    """Pieces that one worker tokenizes in one go. next: number of the file, and in it of the piece, after the last."""

    pieces: list[Piece]
    next: tuple[int, int]

    @property
    def size(self) -> int:
        """Bytes of input files."""
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass
class Result:
    """Token ids of the documents of a task, in order: one array, and the length of each, int64 [documents]."""

    ids: np.ndarray
    lengths: np.ndarray
    empty: int
    bad: int
    size: int


@dataclass(frozen=True)
class Job:
    """What a worker has to know. definition: for the fast encoder, None to use the tokenizer itself. eod: to put after
    each document, None for nothing.
    """

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int
    dtype: type[np.integer]
    eod: int | None
    key: str
    skip_bad: bool
    definition: str | None

    def finish(self, ids: np.ndarray, lengths: np.ndarray, bad: int, size: int) -> Result:
        """Leave out empty documents, and end the others."""
        full = lengths[lengths > 0]
        ids = ids.astype(self.dtype)
        if self.eod is not None:
            ids, full = np.insert(ids, np.cumsum(full), self.eod), full + 1
        return Result(ids, full, len(lengths) - len(full), bad, size)


class Encoder:
    """For text: the tokenizer, or the fast encoder that stands for it."""

    def __init__(self, job: Job):
        self.job = job
        if job.definition is not None:  # without transformers, which takes seconds to import
            self._encode_batch = FastEncoder(job.definition, job.vocab_size).encode_batch
        else:
            tokenizer = build_tokenizer(job.tokenizer_type, job.tokenizer_model, job.vocab_size)
            self._encode_batch = partial(encode_one_by_one, tokenizer)

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
        try:
            ids, lengths = self._encode_batch(texts)
        except TextError as error:
            raise ValueError(f"{name_place(*places[error.index])}: {error}") from None
        return self.job.finish(ids, lengths, bad, task.size)


class IdsEncoder:
    """For input that is token ids."""

    def __init__(self, job: Job):
        self.job, self.tokenizer = job, NullTokenizer(job.vocab_size)

    def encode(self, task: Task) -> Result:
        """Raises ValueError that names file and line."""
        parts = [read_ids(piece, self.job.key, self.job.skip_bad, self.tokenizer) for piece in task.pieces]
        ids, lengths = (np.concatenate([part[i] for part in parts]) for i in range(2))
        return self.job.finish(ids, lengths, sum(part[2] for part in parts), task.size)


def build_encoder(job: Job) -> Encoder | IdsEncoder:
    """What the tokenizer type asks for."""
    return IdsEncoder(job) if job.tokenizer_type == "NullTokenizer" else Encoder(job)


def start_pool(job: Job, workers: int) -> tuple[Executor, Callable[[Task], Result]]:
    """Workers, and what to submit to them."""
    if job.definition is not None:  # it lets go of the GIL, and threads start at once and share its cache of words
        return ThreadPoolExecutor(workers), Encoder(job).encode
    # spawn: a forked child may inherit locks that a tokenizer library's threads hold.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (job,)), _work


_encoder: Encoder | IdsEncoder | None = None  # of this worker process; a process pool has no other place for it


def _start_worker(job: Job) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = build_encoder(job)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers: they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Task) -> Result:
    assert _encoder is not None
    return _encoder.encode(task)
