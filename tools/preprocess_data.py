"""Text to token files: `bash launch/ithaca.sh preprocess --input F... --output-prefix P
--tokenizer-type T --tokenizer-model M [--append-eod --workers N]`.

Inputs are JSON (an object per line: .jsonl, .ndjson, .jsonlines, .json; or a .json file that is one
array), tables (.parquet, .csv, .tsv: a document per row), .ids (a list of token ids per line), text
files (each one document) and folders of them, as they are or compressed (.gz, .zst, .bz2, .xz).
What is left out is named at the end. Writes P.bin, P.idx and P.json, all or none; the result does
not depend on --workers. A run that was stopped continues where it was when the same command is
given again; an existing pair at P is replaced only with --overwrite.
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data.config import TokenizerType
from data.idx_format import optimal_dtype
from data.tokenizers.folder import IdsFrom, SpecialTokensInText
from data.tokenizers.tokenizer import Tokenizer
from data.writers.output_prefix import check_output
from data.writers.resumable_writer import ResumableWriter
from tools.preprocessing import tasks
from tools.preprocessing.choose_encoder import EncoderChoice, FastTokenizer, choose_encoder
from tools.preprocessing.encoders import Job
from tools.preprocessing.find_files import describe_inputs, find_files
from tools.preprocessing.input_kinds import EXTENSIONS
from tools.preprocessing.progress import CorpusProgress, Plan, continue_or_begin, make_plan
from tools.preprocessing.summary import Summary
from tools.preprocessing.tasks import cut_into_tasks, encode_tasks
from tools.preprocessing.text_files import Piece
from tools.preprocessing.text_settings import (
    build_text_tokenizer,
    describe_special_tokens,
    find_bos,
)
from tools.shared.door import run_door
from tools.shared.message_text import count_of

READING_VERSION = 2
"""Version of what makes documents from files; the progress of another version is useless."""
SAVE_BYTES = 128 << 20
"""Input between two saves of the progress."""


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Files and folders."""
    output_prefix: str
    """Prefix of the files to write."""
    tokenizer_type: TokenizerType = "SentencePieceTokenizer"
    """SentencePiece (three names for it), a Hugging Face folder, or none (the input is token
    ids)."""
    tokenizer_model: str | None = None
    """The .model file of SentencePiece, or the Hugging Face tokenizer's folder."""
    vocab_size: int | None = None
    """Number of token ids, for NullTokenizer."""
    tokenizer_ids_from: IdsFrom | None = None
    """Which of a Hugging Face folder's definitions gives the ids; needed where the two differ."""
    fast_tokenizer: FastTokenizer = "auto"
    """Encode with gigatoken where it gives the tokenizer's own ids (auto), always or stop (on), or
    never (off)."""
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
    """Replace an existing pair at the output prefix."""
    skip_bad_lines: bool = False
    """Leave out, and count, lines and rows without a text, such as null, and what is not UTF-8."""


def check_arguments(arguments: Arguments, files: list[Path]) -> Tokenizer:
    """Return the tokenizer; ValueError for what is wrong before any text is read."""
    if arguments.workers < 1:
        raise ValueError(
            f"workers = {arguments.workers}: must be at least 1. Fix: give a positive number."
        )
    if len(arguments.json_keys) != 1:
        raise ValueError(
            f"json_keys = {' '.join(arguments.json_keys)}: must be one key, since it makes one "
            "corpus. Fix: run once per key, with a prefix for each."
        )
    # The output before the tokenizer, which takes seconds to open.
    check_output(arguments.output_prefix, overwrite=arguments.overwrite, inputs=files)
    tokenizer = build_text_tokenizer(
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        arguments.vocab_size,
        ids_from=arguments.tokenizer_ids_from,
        special_tokens_in_text=arguments.special_tokens_in_text,
    )
    if arguments.append_eod and tokenizer.eod is None:
        raise ValueError(
            "append_eod = True: the tokenizer has no end-of-document token. Fix: remove it."
        )
    # Ids read as text would be encoded digit by digit.
    ids = next((path for path in files if Piece(str(path), 0, 0).is_ids), None)
    if ids is not None and arguments.tokenizer_type != "NullTokenizer":
        raise ValueError(
            f"{ids}: token ids, but tokenizer_type = {arguments.tokenizer_type}. "
            "Fix: --tokenizer-type NullTokenizer --vocab-size V."
        )
    return tokenizer


def _text_settings(arguments: Arguments) -> dict[str, bool | str]:
    """Return the settings by which text became ids, as P.json holds them."""
    return {
        "append_eod": arguments.append_eod,
        "prepend_bos": arguments.prepend_bos,
        "special_tokens_in_text": arguments.special_tokens_in_text,
    }


def _make_plan(arguments: Arguments, files: list[Path], tokenizer: Tokenizer) -> Plan:
    """Describe what decides the bytes of the output."""
    settings = {
        "tokenizer": tokenizer.describe(),
        "json_keys": arguments.json_keys,
        "task_bytes": tasks.TASK_BYTES,
        "reading": READING_VERSION,
    }
    return make_plan(files, settings | _text_settings(arguments))


def _make_job(
    arguments: Arguments, tokenizer: Tokenizer, choice: EncoderChoice, bos: int | None
) -> Job:
    """Tell the workers what to do with a document."""
    return Job(
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        vocab_size=tokenizer.vocab_size,
        dtype=optimal_dtype(tokenizer.vocab_size),
        eod=tokenizer.eod if arguments.append_eod else None,
        key=arguments.json_keys[0],
        skip_bad=arguments.skip_bad_lines,
        fast=choice.encoder,
        bos=bos,
        ids_from=arguments.tokenizer_ids_from,
        special_tokens_in_text=arguments.special_tokens_in_text,
        special_texts=tuple(tokenizer.special_texts()),
    )


def _write_documents(
    writer: ResumableWriter,
    job: Job,
    workers: int,
    files: list[Path],
    plan: Plan,
    progress: CorpusProgress,
) -> None:
    """Tokenize what `progress` leaves to do, and bring it up to date."""
    # Progress is counted in bytes of input files, as they are on disk.
    total = max(1, plan["input_bytes"])
    unsaved = 0
    cut = cut_into_tasks(files, job.key, workers, progress.next)
    with tqdm(
        total=total, initial=progress.done, unit="B", unit_scale=True, desc="tokenize", disable=None
    ) as bar:
        for task, result in encode_tasks(job, workers, cut):
            writer.add_documents(result.ids, result.lengths)
            progress.add(task, result)
            writer.share = max(progress.done, 1) / total
            # By what a task holds decompressed: that is what a stopped run would do again.
            unsaved += sum(piece.work for piece in task.pieces)
            if unsaved >= SAVE_BYTES:
                writer.save({"plan": plan} | asdict(progress))
                unsaved = 0
            bar.update(task.size)


def _no_token_error(
    arguments: Arguments, files: list[Path], progress: CorpusProgress
) -> ValueError:
    """Say that nothing in the input became a token."""
    return ValueError(
        f"input = {' '.join(arguments.input)}: no document has a token "
        f"({count_of(len(files), 'file')}, {count_of(progress.empty, 'empty document')}, "
        f"{progress.bad:,} bad). Fix: give inputs that are not empty."
    )


def preprocess(arguments: Arguments) -> Summary:
    """Tokenize all inputs and publish the token files -> the summary.

    Raises:
        ValueError: bad input, or the disk is full; an earlier output stays as it was.
    """
    # What to read, and with which tokenizer.
    began = time.perf_counter()
    found = find_files(arguments.input, arguments.extensions, plain_text=arguments.plain_text)
    files = found.files
    tokenizer = check_arguments(arguments, files)
    bos = find_bos(tokenizer, wanted=arguments.prepend_bos)  # refused before samples are read
    plan = _make_plan(arguments, files, tokenizer)
    # How to encode: fast where the ids are the same.
    choice = choose_encoder(tokenizer, arguments.fast_tokenizer, files, arguments.json_keys[0])
    if choice.warn:
        print(f"warning: {choice.note}", file=sys.stderr)
    job = _make_job(arguments, tokenizer, choice, bos)
    prepared = time.perf_counter()
    cpu = time.process_time()

    # Read, encode and write; the files take their names at the end.
    with ResumableWriter(arguments.output_prefix, job.dtype) as writer:
        # Again, now that no other run writes there: one may have finished since.
        check_output(arguments.output_prefix, overwrite=arguments.overwrite, inputs=files)
        empty_files = sum(path.stat().st_size == 0 for path in files)
        progress = continue_or_begin(
            writer, plan, skip_bad=arguments.skip_bad_lines, empty_files=empty_files
        )
        # What an earlier run left does not count for this one's speed.
        tokens_before = writer.num_tokens
        bytes_before = progress.done
        _write_documents(writer, job, arguments.workers, files, plan, progress)
        if writer.num_documents == 0:
            raise _no_token_error(arguments, files, progress)
        outputs = writer.finish(tokenizer.describe(), _text_settings(arguments))
    return Summary(
        files=len(files),
        bytes=plan["input_bytes"],
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        new_tokens=writer.num_tokens - tokens_before,
        new_bytes=plan["input_bytes"] - bytes_before,
        empty=progress.empty,
        bad=progress.bad,
        single=writer.num_single,
        seconds=time.perf_counter() - began,
        prepare_seconds=prepared - began,
        cpu_seconds=time.process_time() - cpu,
        outputs=outputs,
        text=progress.text,
        encoder=choice.describe(progress.text),
        special_tokens=describe_special_tokens(progress.text, arguments.special_tokens_in_text),
        inputs=describe_inputs(
            found, documents=writer.num_documents, empty=progress.empty, bad=progress.bad
        ),
    )


def preprocess_and_report(arguments: Arguments) -> None:
    """Tokenize, then print what was read and written."""
    print("\n".join(preprocess(arguments).lines()))


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
