"""Whether the fast encoder can stand for the tokenizer: by its definition, and on a sample."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.tokenizers.fast import CHECK_EVERY, CheckedEncoder, first_difference, probe_texts
from data.tokenizers.tokenizer import Tokenizer
from tools.preprocessing.encoders import TextCounts
from tools.preprocessing.text_files import Piece, is_stream, name_place, read_documents, read_pieces

FastTokenizer = Literal["auto", "on", "off"]
SAMPLE_PLACES = 64
"""Equally spaced places of the corpus."""
SAMPLE_BYTES = 32 << 10
"""Read at each place: 2 MiB in all, about a second of the reference's time."""


@dataclass(frozen=True)
class Choice:
    """How the corpus is encoded.

    encoder: the fast one, None where it is not used. note: what was compared, or why it is not
    used, for people. warn: `note` is a warning.
    """

    encoder: CheckedEncoder | None
    note: str
    warn: bool = False

    def describe(self, counts: TextCounts) -> str:
        """Who encoded which documents, for the summary."""
        if self.encoder is None:
            return self.note
        return (
            f"{self.note}; {counts.checked:,} documents in the run (one in {CHECK_EVERY}) encoded "
            f"both ways, with the same ids; {counts.slow:,} that gigatoken might encode otherwise, "
            "by the tokenizer itself"
        )


def choose_encoder(
    tokenizer: Tokenizer, wanted: FastTokenizer, files: Sequence[Path], key: str
) -> Choice:
    """Decide by the tokenizer's definition, and compare the two on a sample of the files.

    Raises:
        ValueError: `wanted` is "on", and the fast encoder cannot be used or gives other ids.
    """
    if wanted == "off":
        return Choice(None, "one text at a time, as asked")
    try:
        fast = CheckedEncoder(tokenizer, tokenizer.fast_rules())
    except ValueError as error:
        return _refuse(wanted, str(error), warn=False)
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
    return Choice(
        fast,
        f"{fast.fast.name}; same ids as the tokenizer's on {len(sample):,} documents of the input "
        f"({size:,} bytes) and {len(probes)} built-in texts",
    )


def _refuse(wanted: FastTokenizer, reason: str, *, warn: bool) -> Choice:
    if wanted == "on":
        raise ValueError(
            f"fast_tokenizer = on: {reason}. Fix: --fast-tokenizer auto, which then uses the "
            "tokenizer itself, more slowly."
        )
    return Choice(None, f"one text at a time: {reason}", warn)


def sample_texts(files: Sequence[Path], key: str) -> Iterator[tuple[Piece, int, str]]:
    """(piece, offset, text) of documents at equally spaced places of the files.

    A file that can be read from its beginning only gives as much from there; the running check sees
    the rest. A text longer than SAMPLE_BYTES is cut; what cannot be read is passed over, since the
    real pass reports it.
    """
    sizes = [path.stat().st_size for path in files]
    total = sum(sizes)
    before = 0
    at = 0
    streamed: dict[int, int] = {}  # number of a file -> places in it
    places = [total * place // SAMPLE_PLACES for place in range(SAMPLE_PLACES)] if total else []
    for number, position in enumerate(places):
        while position >= before + sizes[at]:
            before += sizes[at]
            at += 1
        if is_stream(files[at]):
            streamed[at] = streamed.get(at, 0) + 1
            continue
        stop = places[number + 1] if number + 1 < len(places) else total
        start = position - before
        piece = Piece(
            str(files[at]), start, min(start + min(SAMPLE_BYTES, stop - position), sizes[at])
        )
        yield from _read_sample(piece, key)
    for number, count in streamed.items():
        yield from _read_beginning(files[number], count * SAMPLE_BYTES, key)


def _read_beginning(path: Path, size: int, key: str) -> Iterator[tuple[Piece, int, str]]:
    """The first documents, of `size` letters together."""
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
    if not piece.is_json:
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            # The cut may split a letter at either end.
            yield piece, piece.start, file.read(piece.end - piece.start).decode("utf-8", "ignore")
        return
    documents = read_documents(piece, key, skip_bad=True)
    for text, offset in zip(documents.texts, documents.offsets, strict=True):
        yield piece, offset, text[:SAMPLE_BYTES]
