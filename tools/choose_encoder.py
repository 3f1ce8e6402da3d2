"""Whether the fast encoder gives this corpus the tokenizer's own ids: both encode a sample spread over it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.tokenizer import Tokenizer
from data.tokenizer_fast import FastEncoder, first_difference, probe_texts
from tools.streams import is_compressed
from tools.text_files import Piece, is_parquet, name_place, read_documents, read_pieces

FastTokenizer = Literal["auto", "on", "off"]
SAMPLE_PLACES, SAMPLE_BYTES = 64, 32 << 10
"""Equally spaced places of the corpus, and how much is read at each: 2 MiB, about a second of the reference's time."""


@dataclass(frozen=True)
class Choice:
    """definition: for FastEncoder, None where it is not used. note: what was compared, or why it is not used, for
    people. warn: `note` is a warning.
    """

    definition: str | None
    note: str
    warn: bool = False


def choose_encoder(tokenizer: Tokenizer, wanted: FastTokenizer, files: Sequence[Path], key: str) -> Choice:
    """Compare the fast encoder with the tokenizer on a sample of the files.

    Raises:
        ValueError: `wanted` is "on", and the fast encoder cannot be used or gives other ids.
    """
    if wanted == "off":
        return Choice(None, "one text at a time, as asked")
    try:
        definition = tokenizer.to_tokenizer_json()
        fast = FastEncoder(definition, tokenizer.vocab_size)
    except ValueError as error:
        return _refuse(wanted, str(error), warn=False)
    probes, sample = probe_texts(tokenizer), list(sample_texts(files, key))
    texts = probes + [text for *_, text in sample]
    different = first_difference(tokenizer, fast, texts)
    if different is not None:
        where = "a built-in text"
        if different >= len(probes):
            piece, offset, _ = sample[different - len(probes)]
            where = name_place(piece, offset)
        return _refuse(wanted, f"{fast.name} gives other ids than the tokenizer on {where}, which begins "
                       f"{texts[different][:40]!r}", warn=True)
    size = sum(len(text.encode()) for *_, text in sample)
    return Choice(definition, f"{fast.name}; same ids as the tokenizer's on {len(sample):,} documents of the input "
                  f"({size:,} bytes) and {len(probes)} built-in texts")


def _refuse(wanted: FastTokenizer, reason: str, warn: bool) -> Choice:
    if wanted == "on":
        raise ValueError(f"fast_tokenizer = on: {reason}. Fix: --fast-tokenizer auto, which then uses the tokenizer "
                         "itself, more slowly.")
    return Choice(None, f"one text at a time: {reason}", warn)


def sample_texts(files: Sequence[Path], key: str) -> Iterator[tuple[Piece, int, str]]:
    """(piece, offset, text) of documents at equally spaced places of the files.

    A text longer than SAMPLE_BYTES is cut; what cannot be read is passed over, since the real pass reports it.
    """
    sizes = [path.stat().st_size for path in files]
    total, before, at = sum(sizes), 0, 0
    places = [total * place // SAMPLE_PLACES for place in range(SAMPLE_PLACES)] if total else []
    for number, position in enumerate(places):
        while position >= before + sizes[at]:
            before, at = before + sizes[at], at + 1
        stop = places[number + 1] if number + 1 < len(places) else total
        start = position - before
        piece = Piece(str(files[at]), start, min(start + min(SAMPLE_BYTES, stop - position), sizes[at]))
        yield from _read_sample(piece, key)


def _read_sample(piece: Piece, key: str) -> Iterator[tuple[Piece, int, str]]:
    if is_compressed(piece.path) or is_parquet(piece.path):  # can be read from the beginning only
        try:
            piece = next(read_pieces(Path(piece.path), SAMPLE_BYTES, key))
            documents = read_documents(piece, key, skip_bad=True)
        except (ValueError, StopIteration):
            return  # the real pass says what is wrong
        for text, offset in zip(documents.texts, documents.offsets, strict=True):
            yield piece, offset, text[:SAMPLE_BYTES]
        return
    if not piece.is_json:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            # The cut may split a letter at either end.
            yield piece, piece.start, file.read(piece.end - piece.start).decode("utf-8", "ignore")
        return
    documents = read_documents(piece, key, skip_bad=True)
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        yield piece, offset, text[:SAMPLE_BYTES]
