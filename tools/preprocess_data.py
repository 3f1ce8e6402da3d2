"""Text to token files: `python -m tools.preprocess_data --input F... --output-prefix P
--tokenizer-type T --tokenizer-model M [--append-eod --workers N]`.

Inputs are JSON (an object per line: .jsonl, .ndjson, .jsonlines, .json; or a .json file that is one
array), tables (.parquet, .csv, .tsv: a document per row), .ids (a list of token ids per line), text
files (each one document) and folders of them, as they are or compressed (.gz, .zst, .bz2, .xz).
What is left out is named at the end. Writes P.bin, P.idx and P.json, all or none; the result does
not depend on --workers. A run that was stopped goes on where it was when the same command is given
again; what stands at P is replaced only with --overwrite.
"""

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data.config import TokenizerType
from data.idx_format import describe_one_token_documents, optimal_dtype
from data.tokenizers.folder import IdsFrom, SpecialTokensInText
from data.tokenizers.tokenizer import Tokenizer
from data.writers.output_prefix import check_output
from data.writers.resumable_writer import ResumableWriter
from tools.preprocessing.choose_encoder import FastTokenizer, choose_encoder
from tools.preprocessing.encoders import Job, Result, Task, TextCounts, build_encoder, start_pool
from tools.preprocessing.find_files import describe_inputs, find_files
from tools.preprocessing.input_kinds import EXTENSIONS
from tools.preprocessing.progress import describe_change, make_plan
from tools.preprocessing.read_ahead import read_ahead
from tools.preprocessing.text_files import Piece, is_stream, read_pieces
from tools.preprocessing.text_settings import (
    build_text_tokenizer,
    describe_special_tokens,
    find_bos,
)
from tools.shared.door import run_door

TASK_BYTES = 1 << 20
"""Input of one task: large enough to hide the hand-over, small enough to keep all workers busy."""
TASKS_IN_FLIGHT = 4
"""Per worker; bounds the memory, since results are written in order."""
MOST_READERS = 8
"""Threads that decompress, for as many files."""
READING = 2
"""Version of what makes documents of files; progress of another one is no use."""
SAVE_BYTES = 128 << 20
"""Input between two saves of the progress."""


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Files and folders."""
    output_prefix: str
    """Prefix of the files to write."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePiece (three spellings of one thing), a Hugging Face folder, or none (the input is
    token ids)."""
    tokenizer_model: str | None = None
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    vocab_size: int | None = None
    """Token ids, for NullTokenizer."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which of a Hugging Face folder's definitions gives the ids; needed where the two differ."""
    fast_tokenizer: FastTokenizer = "auto"
    """Encode with gigatoken: where it gives the tokenizer's own ids (auto), or else stop (on), or
    not."""
    special_tokens_in_text: SpecialTokensInText = "as-text"
    """Special tokens that are written in a document: text, or those tokens (keep), or an error."""
    append_eod: bool = False
    """Put the end-of-document token after each document."""
    prepend_bos: Annotated[bool, tyro.conf.arg(aliases=["--append-bos"])] = False
    """Put the beginning-of-sequence token before each document, for models that were trained with
    one."""
    workers: int = 1
    """Threads, or processes without the fast tokenizer, that tokenize; the result does not depend
    on it."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in JSON objects, column of tables; one per run."""
    extensions: list[str] = field(default_factory=lambda: list(EXTENSIONS))
    """Endings of the files to take from folders, also compressed; files of a new one are text."""
    plain_text: bool = False
    """Read files of unknown endings (.log, .c, none) as text, each one document."""
    overwrite: bool = False
    """Replace the finished pair that stands at the output prefix."""
    skip_bad_lines: bool = False
    """Leave out, and count, lines and rows without a text, such as null, and what is not UTF-8."""


def _tokenizer(arguments: Arguments) -> Tokenizer:
    return build_text_tokenizer(
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        arguments.vocab_size,
        ids_from=arguments.tokenizer_ids_from,
        special_tokens_in_text=arguments.special_tokens_in_text,
    )


def _tasks(files: list[Path], key: str, workers: int, start: tuple[int, int]) -> Iterator[Task]:
    """Tasks of about TASK_BYTES (at most 256 files each) in input order, from a task's `next`
    on."""
    sources = (
        (number, partial(read_pieces, files[number], TASK_BYTES, key), is_stream(files[number]))
        for number in range(start[0], len(files))
    )
    pieces: list[Piece] = []
    work = 0
    place = (start[0], 0)
    for number, piece in read_ahead(sources, min(workers, MOST_READERS)):
        place = (number, place[1] + 1 if number == place[0] else 1)
        if place <= start:
            continue
        pieces.append(piece)
        work += piece.work
        if len(pieces) >= 256 or work >= TASK_BYTES:
            yield Task(pieces, place)
            pieces = []
            work = 0
    if pieces:
        yield Task(pieces, (len(files), 0))


def _results(job: Job, workers: int, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
    """Tasks, in their order, and what came of them, with a bounded number of them in flight."""
    if workers == 1:
        encoder = build_encoder(job)
        for task in tasks:
            yield task, encoder.encode(task)
        return
    pool, work = start_pool(job, workers)
    with pool:
        waiting: deque = deque()
        try:
            for task in tasks:
                waiting.append((task, pool.submit(work, task)))
                if len(waiting) >= TASKS_IN_FLIGHT * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"workers = {workers}: a worker died, most likely for want of memory. Fix: "
                "fewer --workers, or smaller input files."
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()


def _check(arguments: Arguments, files: list[Path]) -> Tokenizer:
    """Raises ValueError for what shows before any text is read."""
    if arguments.workers < 1:
        raise ValueError(
            f"workers = {arguments.workers}: must be at least 1. Fix: give a positive number."
        )
    if len(arguments.json_keys) != 1:
        raise ValueError(
            f"json_keys = {' '.join(arguments.json_keys)}: must be one key, since it makes one corpus. "
            "Fix: run once per key, with a prefix for each."
        )
    check_output(arguments.output_prefix, overwrite=arguments.overwrite, inputs=files)
    tokenizer = _tokenizer(arguments)
    if arguments.append_eod and tokenizer.eod is None:
        raise ValueError(
            "append_eod = True: the tokenizer has no end-of-document token. Fix: remove it."
        )
    ids = next((path for path in files if Piece(str(path), 0, 0).is_ids), None)
    if ids is not None and arguments.tokenizer_type != "NullTokenizer":
        raise ValueError(
            f"{ids}: token ids, but tokenizer_type = {arguments.tokenizer_type}. Fix: --tokenizer-type "
            "NullTokenizer --vocab-size V."
        )
    return tokenizer


@dataclass
class Progress:
    """How far a run is. next: as in Task. done: bytes of input files. empty, bad: what was left
    out. text: how."""

    next: tuple[int, int] = (0, 0)
    done: int = 0
    empty: int = 0
    bad: int = 0
    text: TextCounts = field(default_factory=TextCounts)


def _begin(
    writer: ResumableWriter, plan: dict, arguments: Arguments, progress: Progress
) -> Progress:
    """Take up what an earlier run with the same plan left; else begin again, and say why.
    `progress`: a fresh one."""
    note = writer.saved()
    if note is None:
        writer.discard()
        return progress
    change = describe_change(note["plan"], plan)
    if not change and note["bad"] and not arguments.skip_bad_lines:
        change = "skip_bad_lines was True, now False"
    if change:
        print(f"{arguments.output_prefix}.progress.json: begins again, since {change}", flush=True)
        writer.discard()
        return progress
    writer.restore()
    print(
        f"{arguments.output_prefix}.progress.json: goes on after {note['done']:,} of {plan['input_bytes']:,} bytes, "
        f"{writer.num_documents:,} documents",
        flush=True,
    )
    text = TextCounts(**note.get("text", {}))
    return Progress(tuple(note["next"]), note["done"], note["empty"], note["bad"], text)


def _write(
    writer: ResumableWriter,
    job: Job,
    workers: int,
    files: list[Path],
    plan: dict,
    progress: Progress,
) -> None:
    """Tokenize what `progress` leaves to do, bringing it up to date."""
    total = max(1, plan["input_bytes"])
    unsaved = 0
    with tqdm(
        total=total, initial=progress.done, unit="B", unit_scale=True, desc="tokenize", disable=None
    ) as bar:
        for task, result in _results(job, workers, _tasks(files, job.key, workers, progress.next)):
            writer.add_documents(result.ids, result.lengths)
            progress.next = task.next
            progress.done = progress.done + task.size
            progress.empty = progress.empty + result.empty
            progress.bad = progress.bad + result.bad
            progress.text.add(result.text)
            writer.share = max(progress.done, 1) / total
            unsaved += sum(piece.work for piece in task.pieces)
            if unsaved >= SAVE_BYTES:
                writer.save({"plan": plan} | asdict(progress))
                unsaved = 0
            bar.update(task.size)


def preprocess(arguments: Arguments) -> dict:
    """Tokenize all inputs and publish the token files -> the summary that `main` prints.

    Its cpu_seconds are those of this process and its threads after preparing.

    Raises:
        ValueError: bad input, or the disk is full; an earlier output stands as it was.
    """
    began = time.perf_counter()
    found = find_files(arguments.input, arguments.extensions, plain_text=arguments.plain_text)
    files = found.files
    tokenizer = _check(arguments, files)
    bos = find_bos(tokenizer, wanted=arguments.prepend_bos)
    text_settings = {
        "append_eod": arguments.append_eod,
        "prepend_bos": arguments.prepend_bos,
        "special_tokens_in_text": arguments.special_tokens_in_text,
    }
    plan = make_plan(
        files,
        {
            "tokenizer": tokenizer.describe(),
            "json_keys": arguments.json_keys,
            "task_bytes": TASK_BYTES,
            "reading": READING,
        }
        | text_settings,
    )
    choice = choose_encoder(tokenizer, arguments.fast_tokenizer, files, arguments.json_keys[0])
    if choice.warn:
        print(f"warning: {choice.note}", file=sys.stderr)
    job = Job(
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        tokenizer.vocab_size,
        optimal_dtype(tokenizer.vocab_size),
        tokenizer.eod if arguments.append_eod else None,
        arguments.json_keys[0],
        arguments.skip_bad_lines,
        choice.encoder,
        bos,
        arguments.tokenizer_ids_from,
        arguments.special_tokens_in_text,
        tuple(tokenizer.special_texts()),
    )
    prepared = time.perf_counter()
    cpu = time.process_time()
    with ResumableWriter(arguments.output_prefix, job.dtype) as writer:
        # Again, now that no other run writes there: one may have finished since.
        check_output(arguments.output_prefix, overwrite=arguments.overwrite, inputs=files)
        progress = _begin(
            writer, plan, arguments, Progress(empty=sum(path.stat().st_size == 0 for path in files))
        )
        before = writer.num_tokens, progress.done
        _write(writer, job, arguments.workers, files, plan, progress)
        if writer.num_documents == 0:
            raise ValueError(
                f"input = {' '.join(arguments.input)}: no document has a token ({len(files)} files, "
                f"{progress.empty} empty documents, {progress.bad} bad). Fix: give inputs that are not "
                "empty."
            )
        outputs = writer.finish(tokenizer.describe(), text_settings)
    return {
        "files": len(files),
        "bytes": plan["input_bytes"],
        "documents": writer.num_documents,
        "tokens": writer.num_tokens,
        "new_tokens": writer.num_tokens - before[0],
        "new_bytes": plan["input_bytes"] - before[1],
        "empty": progress.empty,
        "bad": progress.bad,
        "seconds": time.perf_counter() - began,
        "prepare_seconds": prepared - began,
        "cpu_seconds": time.process_time() - cpu,
        "outputs": outputs,
        "text": asdict(progress.text),
        "encoder": choice.describe(progress.text),
        "special_tokens": describe_special_tokens(progress.text, arguments.special_tokens_in_text),
        "single": writer.num_single,
        "inputs": describe_inputs(
            found, documents=writer.num_documents, empty=progress.empty, bad=progress.bad
        ),
    }


def preprocess_and_report(arguments: Arguments) -> None:
    """Tokenize, then print what was read and written."""
    summary = preprocess(arguments)
    work = summary["seconds"] - summary["prepare_seconds"]
    print(
        f"{summary['documents']:,} documents, {summary['tokens']:,} tokens from {summary['bytes']:,} bytes in "
        f"{summary['files']:,} files; "
        f"prepared in {summary['prepare_seconds']:.1f} s, tokenized in {work:.1f} s: "
        f"{summary['new_bytes'] / work / 1e6:.1f} MB/s, {summary['new_tokens'] / work:,.0f} tokens/s"
    )
    print("\n".join(summary["inputs"]))
    if summary["single"]:
        print(describe_one_token_documents(summary["single"], summary["documents"]))
    print(f"encoder: {summary['encoder']}")
    if summary["special_tokens"]:
        print(summary["special_tokens"])
    print(f"wrote {', '.join(summary['outputs'])}")


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments,
        preprocess_and_report,
        name="tools.preprocess_data",
        description=__doc__,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
