"""Text to token files: `python -m tools.preprocess_data --input F... --output-prefix P --tokenizer-type T
--tokenizer-model M [--append-eod --workers N]`.

Inputs are .jsonl/.json files (one object per line), .parquet (one document per row), .ids (one list of
token ids per line), other text files (each one document) and folders of them, as they are or compressed
(.gz, .zst). Writes P.bin, P.idx and P.json, all or none; the result does not depend on --workers. A run
that was stopped goes on where it was when the same command is given again.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from data.config import TokenizerType
from data.indexed import optimal_dtype
from data.resumable_writer import ResumableWriter
from data.tokenizer import NullTokenizer, Tokenizer, build_tokenizer
from tools.ids_files import read_ids
from tools.progress import describe_change, make_plan
from tools.read_ahead import read_ahead
from tools.text_files import EXTENSIONS, Piece, find_files, is_stream, name_place, read_documents, read_pieces

TASK_BYTES = 1 << 20
"""Input of one task: large enough to hide the hand-over, small enough to keep all workers busy."""
TASKS_IN_FLIGHT = 4
"""Per worker; bounds the memory, since results are written in order."""
MOST_READERS = 8
"""Threads that decompress, for as many files."""
SAVE_BYTES = 128 << 20
"""Input between two saves of the progress."""


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Files and folders."""
    output_prefix: str
    """Prefix of the files to write."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePiece (three spellings of one thing), a Hugging Face folder, or none (the input is token ids)."""
    tokenizer_model: str | None = None
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    vocab_size: int | None = None
    """Token ids, for NullTokenizer."""
    append_eod: bool = False
    """Put the end-of-document token after each document."""
    workers: int = 1
    """Processes that tokenize."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in .jsonl/.json objects, column in .parquet; one per run."""
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    """Endings of the files to take from folders, also compressed (.gz, .zst)."""
    skip_bad_lines: bool = False
    """Leave out, and count, lines that are not JSON objects with the key, what is not UTF-8, rows of null."""


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
    """Token ids of the documents of a task, in order: one array, and the length of each."""

    ids: np.ndarray
    lengths: list[int]
    empty: int
    bad: int
    size: int


class Encoder:
    """A worker's state: the tokenizer, and what to do with each document."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.tokenizer = _tokenizer(arguments)
        self.dtype = optimal_dtype(self.tokenizer.vocab_size)

    def encode(self, task: Task) -> Result:
        """Raises ValueError that names file and line."""
        arrays, empty, bad = [], 0, 0
        tail = [self.tokenizer.eod] if self.arguments.append_eod else []
        for piece in task.pieces:
            documents = read_documents(piece, self.arguments.json_keys[0], self.arguments.skip_bad_lines)
            bad += documents.bad
            for text, offset in zip(documents.texts, documents.offsets, strict=True):
                try:
                    ids = self.tokenizer.encode(text)
                except ValueError as error:
                    raise ValueError(f"{name_place(piece, offset)}: {error}") from None
                if ids:
                    arrays.append(np.array(ids + tail, dtype=self.dtype))
                else:
                    empty += 1
        ids = np.concatenate(arrays) if arrays else np.empty(0, dtype=self.dtype)
        return Result(ids, [len(array) for array in arrays], empty, bad, task.size)


class IdsEncoder:
    """As `Encoder`, for input that is token ids."""

    def __init__(self, arguments: Arguments, tokenizer: NullTokenizer):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, task: Task) -> Result:
        """Raises ValueError that names file and line."""
        key, skip_bad = self.arguments.json_keys[0], self.arguments.skip_bad_lines
        parts = [read_ids(piece, key, skip_bad, self.tokenizer) for piece in task.pieces]
        lengths = np.concatenate([part[1] for part in parts])
        ids = np.concatenate([part[0] for part in parts]).astype(self.dtype)
        empty = int((lengths == 0).sum())
        lengths = lengths[lengths > 0]
        if self.arguments.append_eod:
            ids = np.insert(ids, np.cumsum(lengths), self.tokenizer.eod)
            lengths = lengths + 1
        return Result(ids, lengths.tolist(), empty, sum(part[2] for part in parts), task.size)


def build_encoder(arguments: Arguments) -> Encoder | IdsEncoder:
    """What the tokenizer type asks for."""
    if arguments.tokenizer_type == "NullTokenizer":
        return IdsEncoder(arguments, NullTokenizer(arguments.vocab_size))
    return Encoder(arguments)


_encoder: Encoder | IdsEncoder | None = None  # of this worker process; a process pool has no other place for it


def _start_worker(arguments: Arguments) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = build_encoder(arguments)


def _end_with_parent() -> None:
    """A killed parent cannot tell its workers: they would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(task: Task) -> Result:
    assert _encoder is not None
    return _encoder.encode(task)


def _tokenizer(arguments: Arguments) -> Tokenizer:
    return build_tokenizer(arguments.tokenizer_type, arguments.tokenizer_model, arguments.vocab_size)


def _tasks(files: list[Path], arguments: Arguments, start: tuple[int, int]) -> Iterator[Task]:
    """Tasks of about TASK_BYTES (at most 256 files each) in input order, from a task's `next` on."""
    sources = ((number, partial(read_pieces, files[number], TASK_BYTES, arguments.json_keys[0]),
                is_stream(files[number])) for number in range(start[0], len(files)))
    pieces: list[Piece] = []
    work = 0
    place = (start[0], 0)
    for number, piece in read_ahead(sources, min(arguments.workers, MOST_READERS)):
        place = (number, place[1] + 1 if number == place[0] else 1)
        if place <= start:
            continue
        pieces.append(piece)
        work += piece.work
        if len(pieces) >= 256 or work >= TASK_BYTES:
            yield Task(pieces, place)
            pieces, work = [], 0
    if pieces:
        yield Task(pieces, (len(files), 0))


def _results(arguments: Arguments, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
    """Tasks, in their order, and what came of them, with a bounded number of them in flight."""
    if arguments.workers == 1:
        encoder = build_encoder(arguments)
        for task in tasks:
            yield task, encoder.encode(task)
        return
    # spawn: a forked child may inherit locks that a tokenizer library's threads hold.
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), _start_worker,
                             (arguments,)) as pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(_work, task)))
                if len(waiting) >= TASKS_IN_FLIGHT * arguments.workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(f"workers = {arguments.workers}: a worker died, most likely for want of memory. Fix: "
                             "fewer --workers, or smaller input files.") from None
        finally:
            for _, future in waiting:
                future.cancel()


def _check(arguments: Arguments, files: list[Path]) -> Tokenizer:
    """Raises ValueError for what shows before any text is read."""
    prefix = arguments.output_prefix
    if arguments.workers < 1:
        raise ValueError(f"workers = {arguments.workers}: must be at least 1. Fix: give a positive number.")
    if len(arguments.json_keys) != 1:
        raise ValueError(f"json_keys = {' '.join(arguments.json_keys)}: must be one key, since it makes one corpus. "
                         "Fix: run once per key, with a prefix for each.")
    if prefix.endswith("/") or Path(prefix).is_dir():
        raise ValueError(f"output_prefix = {prefix}: is a folder; the files are named PREFIX.bin and PREFIX.idx. Fix: "
                         f"for example {prefix.rstrip('/')}/corpus.")
    tokenizer = _tokenizer(arguments)
    if arguments.append_eod and tokenizer.eod is None:
        raise ValueError("append_eod = True: the tokenizer has no end-of-document token. Fix: remove it.")
    ids = next((path for path in files if Piece(str(path), 0, 0).is_ids), None)
    if ids is not None and arguments.tokenizer_type != "NullTokenizer":
        raise ValueError(f"{ids}: token ids, but tokenizer_type = {arguments.tokenizer_type}. Fix: --tokenizer-type "
                         "NullTokenizer --vocab-size V.")
    return tokenizer


@dataclass
class Progress:
    """How far a run is. next: as in Task. done: bytes of input files. empty, bad: what was left out."""

    next: tuple[int, int] = (0, 0)
    done: int = 0
    empty: int = 0
    bad: int = 0


def _begin(writer: ResumableWriter, plan: dict, arguments: Arguments, progress: Progress) -> Progress:
    """Take up what an earlier run with the same plan left; else begin anew, and say why. `progress`: a fresh one."""
    note = writer.saved()
    if note is None:
        writer.discard()
        return progress
    change = describe_change(note["plan"], plan)
    if not change and note["bad"] and not arguments.skip_bad_lines:
        change = "skip_bad_lines was True, now False"
    if change:
        print(f"{arguments.output_prefix}.progress.json: begins anew, since {change}", flush=True)
        writer.discard()
        return progress
    writer.restore()
    print(f"{arguments.output_prefix}.progress.json: goes on after {note['done']:,} of {plan['input_bytes']:,} bytes, "
          f"{writer.num_documents:,} documents", flush=True)
    return Progress(tuple(note["next"]), note["done"], note["empty"], note["bad"])


def _write(writer: ResumableWriter, arguments: Arguments, files: list[Path], plan: dict, progress: Progress) -> None:
    """Tokenize what `progress` leaves to do, bringing it up to date."""
    total = max(1, plan["input_bytes"])
    unsaved = 0
    with tqdm(total=total, initial=progress.done, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for task, result in _results(arguments, _tasks(files, arguments, progress.next)):
            for ids in np.split(result.ids, np.cumsum(result.lengths)[:-1]) if result.lengths else []:
                writer.add_document(ids)
            progress.next, progress.done = task.next, progress.done + task.size
            progress.empty, progress.bad = progress.empty + result.empty, progress.bad + result.bad
            writer.share = max(progress.done, 1) / total
            unsaved += sum(piece.work for piece in task.pieces)
            if unsaved >= SAVE_BYTES:
                writer.save({"plan": plan} | asdict(progress))
                unsaved = 0
            bar.update(task.size)


def preprocess(arguments: Arguments) -> dict:
    """Tokenize all inputs and publish the token files -> the summary that `main` prints.

    Raises:
        ValueError: bad input, or the disk is full; an earlier output stands as it was.
    """
    began = time.perf_counter()
    files = find_files(arguments.input, arguments.extensions)
    tokenizer = _check(arguments, files)
    plan = make_plan(files, {"tokenizer": tokenizer.describe(), "append_eod": arguments.append_eod,
                             "json_keys": arguments.json_keys, "task_bytes": TASK_BYTES})
    with ResumableWriter(arguments.output_prefix, optimal_dtype(tokenizer.vocab_size)) as writer:
        progress = _begin(writer, plan, arguments, Progress(empty=sum(path.stat().st_size == 0 for path in files)))
        before = writer.num_tokens
        _write(writer, arguments, files, plan, progress)
        if writer.num_documents == 0:
            raise ValueError(f"input = {' '.join(arguments.input)}: no document has a token ({len(files)} files, "
                             f"{progress.empty} empty documents, {progress.bad} bad). Fix: give inputs that are not "
                             "empty.")
        outputs = writer.finish(tokenizer.describe())
    return {"files": len(files), "bytes": plan["input_bytes"], "documents": writer.num_documents,
            "tokens": writer.num_tokens, "new_tokens": writer.num_tokens - before, "empty": progress.empty,
            "bad": progress.bad, "seconds": time.perf_counter() - began, "outputs": outputs}


def main() -> int:
    arguments = tyro.cli(Arguments, prog="tools.preprocess_data", description=__doc__)
    try:
        summary = preprocess(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left_out = [f"{summary[name]:,} {text} left out" for name, text in (("empty", "empty documents"),
                                                                       ("bad", "bad lines or files")) if summary[name]]
    print(f"{summary['documents']:,} documents, {summary['tokens']:,} tokens from {summary['bytes']:,} bytes in "
          f"{summary['files']:,} files{''.join(', ' + text for text in left_out)}; {summary['seconds']:.1f} s, "
          f"{summary['new_tokens'] / summary['seconds']:,.0f} tokens/s")
    print(f"wrote {', '.join(summary['outputs'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
