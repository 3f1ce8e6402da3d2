"""Can the fast encoder replace the tokenizer? By the tokenizer's definition, and on a sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.tokenizers.fast import CHECK_EVERY, CheckedEncoder, first_difference, probe_texts
from data.tokenizers.tokenizer import Tokenizer
from tools.preprocessing.encoders import TextCounts
from tools.preprocessing.text_files import Piece, is_stream, name_place, read_documents, read_pieces
from tools.shared.message_text import count_of

FastTokenizer = Literal["auto", "on", "off"]
SAMPLE_PLACES = 64
"""Equally spaced places of the corpus, at which the sample is read."""
SAMPLE_BYTES = 32 << 10
"""Bytes read at each place: 2 MiB in all, about a second of the tokenizer's time."""


@dataclass(frozen=True)
class EncoderChoice:
    """Says how the corpus is encoded, and why."""

    encoder: CheckedEncoder | None
    """The fast encoder; None where it is not used."""
    note: str
    """What was compared, or why the fast encoder is not used, for people."""
    warn: bool = False
    """The note is a warning."""

    def describe(self, counts: TextCounts) -> str:
        """Say what encoded which documents, for the summary."""
        if self.encoder is None:
            return self.note
        return (
            f"{self.note}; {count_of(counts.checked, 'document')} in the run (one in "
            f"{CHECK_EVERY}) encoded both ways, with the same ids; {counts.slow:,} that gigatoken "
            "might encode otherwise, by the tokenizer itself"
        )


def choose_encoder(
    tokenizer: Tokenizer, wanted: FastTokenizer, files: Sequence[Path], key: str
) -> EncoderChoice:
    """Decide by the tokenizer's definition, and compare the two on a sample of the files.

    Raises:
        ValueError: `wanted` is "on", and the fast encoder cannot be used or gives other ids.
    """
    if wanted == "off":
        return EncoderChoice(None, "one text at a time, as asked")
    # First by definition: it refuses tokenizers that it is known to encode otherwise.
    try:
        fast = CheckedEncoder(tokenizer, tokenizer.fast_rules())
    except ValueError as error:
        return _refuse(wanted, str(error), warn=False)
    # Then by comparison, on built-in texts and on the input.
    probes = probe_texts(tokenizer)
    sample = list(sample_texts(files, key))
    texts = probes + [text for *_, text in sample]
    different = first_difference(tokenizer, fast, texts)
    if different is not None:
        where = "a built-in text"
        if different >= len(probes):
            piece, offset, _ = sample[different - len(probes)]
            where = name_place(piece, offset)
        return _refuse(
            wanted,
            f"{fast.fast.name} gives other ids than the tokenizer on {where}, which begins "
            f"{texts[different][:40]!r}",
            warn=True,
        )
    size = sum(len(text.encode()) for *_, text in sample)
    return EncoderChoice(
        fast,
        f"{fast.fast.name}; same ids as the tokenizer's on {count_of(len(sample), 'document')} of "
        f"the input ({size:,} bytes) and {len(probes)} built-in texts",
    )


def _refuse(wanted: FastTokenizer, reason: str, *, warn: bool) -> EncoderChoice:
    """Choose the tokenizer itself; ValueError where the fast encoder was asked for."""
    if wanted == "on":
        raise ValueError(
            f"fast_tokenizer = on: {reason}. Fix: --fast-tokenizer auto, which then uses the "
            "tokenizer itself, more slowly."
        )
    return EncoderChoice(None, f"one text at a time: {reason}", warn)


def sample_texts(files: Sequence[Path], key: str) -> Iterator[tuple[Piece, int, str]]:
    """Read documents at equally spaced places of the files, as (piece, offset, text).

    A file that can be read from its beginning only gives as much from there; the running check sees
    the rest. A text longer than SAMPLE_BYTES is cut; what cannot be read is passed over, since the
    real pass reports it.
    """
    # The files are one range of bytes here: `before` is where file `at` begins in it.
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    before = 0
    at = 0
    places_in_streams: dict[int, int] = {}  # by the number of the file
    places = [total * place // SAMPLE_PLACES for place in range(SAMPLE_PLACES)] if total else []
    for number, position in enumerate(places):
        while position >= before + sizes[at]:
            before += sizes[at]
            at += 1
        if is_stream(files[at]):
            places_in_streams[at] = places_in_streams.get(at, 0) + 1
            continue
        stop = places[number + 1] if number + 1 < len(places) else total
        start = position - before
        end = min(start + min(SAMPLE_BYTES, stop - position), sizes[at])
        yield from _read_sample(Piece(str(files[at]), start, end), key)
    for number, count in places_in_streams.items():
        yield from _read_beginning(files[number], count * SAMPLE_BYTES, key)


def _read_beginning(path: Path, size: int, key: str) -> Iterator[tuple[Piece, int, str]]:
    """Read the first documents of a file, of `size` letters together."""
    try:
        for piece in read_pieces(path, SAMPLE_BYTES, key):
            documents = read_documents(piece, key, skip_bad=True)
            for text, offset in zip(documents.texts, documents.offsets, strict=True):
                yield piece, offset, text[:SAMPLE_BYTES]
                size -= min(len(text), SAMPLE_BYTES)
                if size <= 0:
                    return
    except ValueError:
        return  # the real pass says what is wrong


def _read_sample(piece: Piece, key: str) -> Iterator[tuple[Piece, int, str]]:
    """Read the documents of a piece, or a part of one."""
    if not piece.is_json:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            # The cut may split a letter at either end.
            yield piece, piece.start, file.read(piece.end - piece.start).decode("utf-8", "ignore")
        return
    documents = read_documents(piece, key, skip_bad=True)
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        yield piece, offset, text[:SAMPLE_BYTES]
