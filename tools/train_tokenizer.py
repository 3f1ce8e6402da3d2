"""Train a SentencePiece BPE tokenizer: `bash launch/ithaca.sh train-tokenizer --input PATHS...
--vocab-size 8192 --output-prefix P` writes P.model.

No normalization and byte fallback, so that encoding then decoding gives any text back (but U+2581,
which is SentencePiece's own sign for a space). `SentencePiece.save_huggingface` makes the same
tokenizer for transformers.
"""

import io
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.files import write_atomically
from data.permutation import Permutation
from tools.outputs.files import Input, check_file
from tools.preprocessing.find_files import describe_left_out, find_files
from tools.preprocessing.input_kinds import (
    EXTENSIONS,
    IDS_EXTENSION,
    ending_of,
    strip_byte_order_mark,
)
from tools.preprocessing.streams import read_blocks
from tools.preprocessing.text_files import Documents, Piece, is_stream, read_documents, read_pieces
from tools.shared.door import run_door

BLOCK_BYTES = 64 << 10
"""Unit of the sample: lines that begin in a block."""
LONGEST_LINE = 4096
"""Characters; SentencePiece drops sentences above its limit in bytes, so longer lines are cut."""


@dataclass(kw_only=True)
class Arguments:
    input: list[str]
    """Files and folders of text, as for the command `preprocess`."""
    output_prefix: str
    """The model is written to PREFIX.model."""
    vocab_size: int = 8192
    """Number of token ids, with the 256 bytes and 3 control tokens."""
    max_bytes: int = 20_000_000
    """Most text to train on; from larger inputs blocks are drawn evenly over the files."""
    seed: int = 1234
    """Seed of that draw."""
    overwrite: bool = False
    """Replace an existing PREFIX.model; only a file that SentencePiece reads."""
    json_keys: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in .jsonl/.json objects; one per run."""
    extensions: list[str] = field(
        default_factory=lambda: [ending for ending in EXTENSIONS if ending != IDS_EXTENSION]
    )
    """Endings of the files to take from folders; files of a new one are text."""
    plain_text: bool = False
    """Read files of unknown endings as text."""


@dataclass
class SampleCounts:
    """Counts what `sample_texts` has drawn so far."""

    texts: int = 0
    bad: int = 0
    """Lines and rows without a text, left out."""

    def take(self, documents: Documents) -> list[str]:
        """Count some documents -> their texts."""
        self.texts += len(documents.texts)
        self.bad += documents.bad
        return documents.texts


def sample_texts(
    files: list[Path], max_bytes: int, seed: int, key: str, counts: SampleCounts | None = None
) -> Iterator[str]:
    """Draw blocks of the files at random and give their texts, about `max_bytes` at most.

    Compressed files and tables give an equal share each, from their beginning. Lines and rows
    without a text are counted in `counts` and left out: tools.preprocess_data names them.
    """
    counts = counts or SampleCounts()
    # All blocks of all files, in one random order.
    blocks = [block for path in files for block in _cut_into_blocks(path)]
    taken = 0
    for number in Permutation.make(len(blocks), seed).values(0, len(blocks)):
        block = blocks[number]
        if is_stream(block.path):
            texts = _first_texts(Path(block.path), max_bytes // len(files), key, counts)
        elif block.is_json:
            texts = iter(counts.take(read_documents(block, key, skip_bad=True)))
        else:
            # Plain text: a block counts as it is on disk, with the lines that it cuts.
            counts.texts += 1
            taken += block.end - block.start
            yield _whole_lines(block)
            texts = iter(())
        for text in texts:
            taken += len(text.encode())
            yield text
        if taken >= max_bytes:
            return


def _cut_into_blocks(path: Path) -> list[Piece]:
    """Cut a file into blocks of lines; one that cannot be read from the middle is one block."""
    size = path.stat().st_size
    step = max(1, size) if is_stream(path) else BLOCK_BYTES
    return [Piece(str(path), start, min(start + step, size)) for start in range(0, size, step)]


def _first_texts(path: Path, max_bytes: int, key: str, counts: SampleCounts) -> Iterator[str]:
    """Give texts from a file that is read from its beginning only, about `max_bytes`."""
    taken = 0
    for piece in read_pieces(path, BLOCK_BYTES, key):
        if taken > max_bytes:
            return
        if piece.is_lines:
            texts = counts.take(read_documents(piece, key, skip_bad=True))
        else:
            # One long document: its first block is enough.
            counts.texts += 1
            beginning, _ = next(read_blocks(piece.path), (b"", 0))
            texts = [beginning[:max_bytes].decode("utf-8", errors="ignore")]
        taken += sum(len(text.encode()) for text in texts)
        yield from texts


def _whole_lines(block: Piece) -> str:
    """Read the lines inside a block of a text file.

    A line longer than the block is cut; half a letter at a cut is left out.
    """
    with open(block.path, "rb") as file:
        file.seek(block.start)
        data = file.read(block.end - block.start)
        is_last = not file.read(1)
    # Lines that begin before the block, or end after it, are left out.
    if block.start and b"\n" in data:
        data = data[data.index(b"\n") + 1 :]
    if not is_last and b"\n" in data:
        data = data[: data.rindex(b"\n") + 1]
    if block.start == 0:
        data = strip_byte_order_mark(data)
    return data.decode("utf-8", errors="ignore")


def train(texts: Iterator[str], vocab_size: int) -> bytes:
    """Train on the lines of the texts -> the model file's bytes.

    Raises:
        ValueError: SentencePiece cannot make that many pieces from them.
    """
    import sentencepiece

    model = io.BytesIO()
    # Without newlines: each then is the byte piece <0x0A>, since no merge crosses it.
    lines = (
        line[i : i + LONGEST_LINE]
        for text in texts
        for line in text.split("\n")
        for i in range(0, len(line), LONGEST_LINE)
    )
    # Nothing is normalized, so that decoding gives the text back.
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            max_sentence_length=4 * LONGEST_LINE,
            minloglevel=2,
        )
    except RuntimeError as error:
        # The last line says why; those before are its log.
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"vocab_size = {vocab_size}: SentencePiece refuses it for this text ({reason}). "
            "Fix: more text, or a vocabulary between 512 and what the text allows."
        ) from None
    return model.getvalue()


def is_sentencepiece(path: Path) -> bool:
    """Tell whether a file is a SentencePiece model."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size() > 0
    except (RuntimeError, OSError):
        return False


def _check_output(arguments: Arguments, files: list[Path]) -> Path:
    """Return the path of the model, without `..`; ValueError where it may not be written."""
    path = Path(f"{arguments.output_prefix}.model")
    inputs = [Input("--input", file) for file in files]
    path = check_file("output_prefix", path, "SentencePiece", is_sentencepiece, inputs)
    if path.exists() and not arguments.overwrite:
        raise ValueError(
            f"output_prefix = {arguments.output_prefix}: {path} exists already; what it encoded "
            "cannot be decoded without it. Fix: give another prefix, or --overwrite."
        )
    return path


def train_tokenizer(arguments: Arguments) -> str:
    """Train and publish -> the path of the model.

    Raises:
        ValueError: bad input; nothing was written.
    """
    if len(arguments.json_keys) != 1:
        raise ValueError(
            f"json_keys = {' '.join(arguments.json_keys)}: must be one key. Fix: choose one."
        )
    if arguments.max_bytes < 1:
        raise ValueError(
            f"max_bytes = {arguments.max_bytes}: must be at least 1. Fix: for example 20000000."
        )
    # What is read, and what is not.
    found = find_files(arguments.input, arguments.extensions, plain_text=arguments.plain_text)
    for line in describe_left_out(found):
        print(f"left out: {line}", flush=True)
    ids = [str(file) for file in found.files if ending_of(file) == IDS_EXTENSION]
    if ids:
        raise ValueError(f"input = {ids[0]}: token ids, not text. Fix: remove it.")
    path = _check_output(arguments, found.files)

    # Texts are drawn while SentencePiece asks for them; the counts are right afterwards.
    key = arguments.json_keys[0]
    counts = SampleCounts()
    texts = sample_texts(found.files, arguments.max_bytes, arguments.seed, key, counts)
    try:
        model = train(texts, arguments.vocab_size)
    except ValueError:
        if counts.texts:
            raise
        # Without any text, SentencePiece's own reason would mislead.
        raise ValueError(
            f"input = {' '.join(arguments.input)}: holds no text ({counts.bad:,} lines or rows "
            f"without text under {key!r}). Fix: --json-keys, or other inputs."
        ) from None
    if counts.bad:
        print(
            f"left out: {counts.bad:,} lines or rows without text under {key!r} "
            "(bash launch/ithaca.sh preprocess names them)",
            flush=True,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, model)
    return f"{arguments.output_prefix}.model"


def train_and_report(arguments: Arguments) -> None:
    """Train, then print what was written."""
    began = time.perf_counter()
    path = train_tokenizer(arguments)
    print(f"wrote {path}: {arguments.vocab_size:,} ids, in {time.perf_counter() - began:.1f} s")


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, train_and_report, name="tools.train_tokenizer", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
