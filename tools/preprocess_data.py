"""Text to token files: `python -m tools.preprocess_data --input F... --output-prefix P --tokenizer-type T
--tokenizer-model M [--append-eod --workers N]`.

Inputs are .jsonl/.json files (one object per line), other text files (each one document) and folders
of them. Writes P.bin, P.idx and P.json, all or none; the result does not depend on --workers.
"""

import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.config import TokenizerType
from data.indexed import IndexedWriter, optimal_dtype
from data.tokenizer import Tokenizer, build_tokenizer
from data.tokenizer_fast import FastEncoder, TextError, encode_one_by_one
from tools.choose_encoder import FastTokenizer, choose_encoder
from tools.text_files import EXTENSIONS, Piece, cut_into_pieces, find_files, name_place, read_documents

TASK_BYTES = 1 << 20
"""Input of one task: large enough to hide the hand-over, small enough to keep all workers busy."""
TASKS_IN_FLIGHT = 4
"""Per worker; bounds the memory, since results are written in order."""


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Files and folders."""
    output_prefix: str
    """Prefix of the files to write."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePiece (three spellings of one thing), a Hugging Face folder, or none (text of integers)."""
    tokenizer_model: str | None = None
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    vocab_size: int | None = None
    """Token ids, for NullTokenizer."""
    fast_tokenizer: FastTokenizer = "auto"
    """Encode with gigatoken: where it gives a sample of the input the same ids (auto), or else stop (on), or not."""
    append_eod: bool = False
    """Put the end-of-document token after each document."""
    workers: int = 1
    """Threads, or processes without the fast tokenizer, that tokenize; the result does not depend on it."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in .jsonl/.json objects; one per run."""
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    """Endings of the files to take from folders."""
    skip_bad_lines: bool = False
    """Leave out, and count, lines that are not JSON objects with the key, and what is not UTF-8."""


@dataclass(frozen=True)
class Task:
    """Pieces that one worker tokenizes in one go."""

    pieces: list[Piece]

    @property
    def size(self) -> int:
        return sum(piece.end - piece.start for piece in self.pieces)


@dataclass
class Result:
    """Token ids of the documents of a task, in order: one array, and the length of each."""

    ids: np.ndarray
    lengths: np.ndarray
    empty: int
    bad: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What a worker has to know. definition: for the fast encoder, None to use the tokenizer itself."""

    arguments: Arguments
    dtype: type[np.integer]
    eod: int | None
    vocab_size: int
    definition: str | None


class Encoder:
    """A worker's state: the tokenizer, and what to do with each document."""

    def __init__(self, plan: Plan):
        self.plan = plan
        if plan.definition is not None:  # without transformers, which takes seconds to import
            self._encode_batch = FastEncoder(plan.definition, plan.vocab_size).encode_batch
        else:
            self._encode_batch = partial(encode_one_by_one, _tokenizer(plan.arguments))

    def encode(self, task: Task) -> Result:
        """Raises ValueError that names file and line."""
        arguments = self.plan.arguments
        texts: list[str] = []
        places: list[tuple[Piece, int]] = []
        bad = 0
        for piece in task.pieces:
            documents = read_documents(piece, arguments.json_keys[0], arguments.skip_bad_lines)
            bad += documents.bad
            texts += documents.texts
            places += [(piece, offset) for offset in documents.offsets]
        try:
            ids, lengths = self._encode_batch(texts)
        except TextError as error:
            raise ValueError(f"{name_place(*places[error.index])}: {error}") from None
        full = lengths[lengths > 0]
        ids = ids.astype(self.plan.dtype)
        if arguments.append_eod:
            ids, full = np.insert(ids, np.cumsum(full), self.plan.eod), full + 1
        return Result(ids, full, len(lengths) - len(full), bad, task.size)


_encoder: Encoder | None = None  # of this worker process; a process pool has no other place for it


def _start_worker(plan: Plan) -> None:
    global _encoder
    _encoder = Encoder(plan)


def _work(task: Task) -> Result:
    assert _encoder is not None
    return _encoder.encode(task)


def _tokenizer(arguments: Arguments) -> Tokenizer:
    return build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model, arguments.vocab_size)


def _tasks(files: list[Path]) -> Iterator[Task]:
    """Tasks of about TASK_BYTES (at most 256 files each) in input order."""
    pieces: list[Piece] = []
    for path in files:
        for piece in cut_into_pieces(path, TASK_BYTES):
            pieces.append(piece)
            if len(pieces) >= 256 or Task(pieces).size >= TASK_BYTES:
                yield Task(pieces)
                pieces = []
    if pieces:
        yield Task(pieces)


def _start_pool(plan: Plan) -> tuple[Executor, Callable[[Task], Result]]:
    """Workers, and what to submit to them."""
    workers = plan.arguments.workers
    if plan.definition is not None:  # it lets go of the GIL, and threads start at once and share its cache of words
        return ThreadPoolExecutor(workers), Encoder(plan).encode
    # spawn: a forked child may inherit locks that a tokenizer library's threads hold.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (plan,)), _work


def _results(plan: Plan, tasks: Iterable[Task]) -> Iterator[Result]:
    """Results in the order of the tasks, with a bounded number of them in flight."""
    workers = plan.arguments.workers
    if workers == 1:
        yield from map(Encoder(plan).encode, tasks)
        return
    pool, work = _start_pool(plan)
    with pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) >= TASKS_IN_FLIGHT * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError(f"workers = {workers}: a worker died, most likely for want of memory. Fix: "
                             "fewer --workers, or smaller input files.") from None
        finally:
            for future in waiting:
                future.cancel()


def _check(arguments: Arguments) -> Tokenizer:
    """Raises ValueError for what shows before any text is read."""
    if arguments.workers < 1:
        raise ValueError(f"workers = {arguments.workers}: must be at least 1. Fix: give a positive number.")
    if len(arguments.json_keys) != 1:
        raise ValueError(f"json_keys = {' '.join(arguments.json_keys)}: must be one key, since it makes one corpus. "
                         "Fix: run once per key, with a prefix for each.")
    tokenizer = _tokenizer(arguments)
    if arguments.append_eod and tokenizer.eod is None:
        raise ValueError("append_eod = True: the tokenizer has no end-of-document token. Fix: remove it.")
    return tokenizer


def preprocess(arguments: Arguments) -> dict:
    """Tokenize all inputs and publish the token files -> the summary that `main` prints.

    Its cpu_seconds are those of this process and its threads after preparing.

    Raises:
        ValueError: bad input; nothing was written, and an earlier output stands as it was.
    """
    began = time.perf_counter()
    files = find_files(arguments.input, arguments.extensions)
    tokenizer = _check(arguments)
    total = sum(path.stat().st_size for path in files)
    empty = sum(path.stat().st_size == 0 for path in files)
    bad = 0
    if arguments.output_prefix.endswith("/") or Path(arguments.output_prefix).is_dir():
        raise ValueError(f"output_prefix = {arguments.output_prefix}: is a folder; the files are named PREFIX.bin and "
                         "PREFIX.idx. Fix: for example "
                         f"{arguments.output_prefix.rstrip('/')}/corpus.")
    choice = choose_encoder(tokenizer, arguments.fast_tokenizer, files, arguments.json_keys[0])
    if choice.warn:
        print(f"warning: {choice.note}", file=sys.stderr)
    plan = Plan(arguments, optimal_dtype(tokenizer.vocab_size), tokenizer.eod, tokenizer.vocab_size, choice.definition)
    prepared, cpu = time.perf_counter(), time.process_time()
    with (IndexedWriter(arguments.output_prefix, plan.dtype) as writer,
          tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar):
        for result in _results(plan, _tasks(files)):
            writer.add_documents(result.ids, result.lengths)
            empty, bad = empty + result.empty, bad + result.bad
            bar.update(result.size)
        if writer.num_documents == 0:
            raise ValueError(f"input = {' '.join(arguments.input)}: no document has a token ({len(files)} files, "
                             f"{empty} empty documents, {bad} bad). Fix: give inputs that are not empty.")
        outputs = writer.finish(tokenizer.describe())
    return {"files": len(files), "bytes": total, "documents": writer.num_documents, "tokens": writer.num_tokens,
            "empty": empty, "bad": bad, "seconds": time.perf_counter() - began,
            "prepare_seconds": prepared - began, "cpu_seconds": time.process_time() - cpu, "outputs": outputs,
            "encoder": choice.note}


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.preprocess_data", description=__doc__)
    try:
        summary = preprocess(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    work = summary["seconds"] - summary["prepare_seconds"]
    left_out = [f"{summary[name]:,} {text} left out" for name, text in (("empty", "empty documents"),
                                                                       ("bad", "bad lines or files")) if summary[name]]
    print(f"{summary['documents']:,} documents, {summary['tokens']:,} tokens from {summary['bytes']:,} bytes in "
          f"{summary['files']:,} files{''.join(', ' + text for text in left_out)}; "
          f"prepared in {summary['prepare_seconds']:.1f} s, "
          f"tokenized in {work:.1f} s: {summary['bytes'] / work / 1e6:.1f} MB/s, "
          f"{summary['tokens'] / work:,.0f} tokens/s")
    print(f"encoder: {summary['encoder']}")
    print(f"wrote {', '.join(summary['outputs'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
