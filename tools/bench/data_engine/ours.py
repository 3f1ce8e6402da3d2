"""Run our side of the data benchmark, and hold all that it knows of data/.

Each of the measured functions runs in a process of its own (fresh.py).
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from data.config import Packing
from data.indexed import IndexedReader
from data.ledger import Ledger
from data.loader import Loader
from data.packing.bins import pack
from data.segments import DataSettings
from data.stream import DocumentStream, Reader
from tools.bench.data_engine.corpus import EOD, VOCAB_SIZE
from tools.bench.fresh import measured

SOURCE = "corpus"
SEED = 1234
RANKS = 32


def index(prefix: str, warm_up: str, seq_length: int, next_length: int) -> dict:
    """Measure from opening the files to sample 0; then another length, with the files open."""
    ledger = open_ledger(warm_up)
    first_sample(ledger, 0, seq_length)
    first_sample(ledger, seq_length, next_length)
    with measured() as found:
        ledger = open_ledger(prefix)
        first_sample(ledger, 0, seq_length)
    with measured() as again:
        first_sample(ledger, seq_length, next_length)
    return {**found, **{f"again_{name}": value for name, value in again.items()}}


def read(prefix: str, warm_up: str, seq_length: int, samples: int) -> dict:
    """Time each of the first `samples` samples, after one that is not timed."""
    loader = make_loader(open_ledger(prefix), 0, seq_length)
    seconds = []
    cpu_seconds = []
    for number in range(samples + 1):
        start = time.perf_counter()
        cpu = time.process_time()
        (batch,) = loader.read(number * seq_length)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
        assert len(batch.tokens) == len(batch.positions) == seq_length
    return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:]}


def check(prefix: str, seq_length: int, samples: int) -> dict:
    """Check that positions are Megatron-Core's, and labels the next token of the document."""
    from tools.bench.data_engine.megatron import positions

    loader = make_loader(open_ledger(prefix), 0, seq_length)
    wrong = []
    for number in range(samples):
        (batch,) = loader.read(number * seq_length)
        tokens = batch.tokens.numpy()
        labels = batch.labels.numpy()
        if not np.array_equal(batch.positions.numpy(), positions(tokens)):
            wrong.append(f"sample {number}: positions")
        # A document's last token has no label, every other one the token after it.
        ends = tokens == EOD
        if not (
            np.array_equal(labels < 0, ends)
            and np.array_equal(labels[:-1][~ends[:-1]], tokens[1:][~ends[:-1]])
        ):
            wrong.append(f"sample {number}: labels")
    return {"wrong": wrong}


def pack_lengths(prefix: str, warm_up: str, documents: int, seq_length: int) -> dict:
    """Pack the first documents at once by best fit, from an array of their lengths."""
    # Compile the algorithm, outside the measurement.
    pack(np.arange(1, 100), 128)
    with measured() as found:
        lengths = IndexedReaderLengths(prefix).document_lengths[:documents].astype(np.int64)
        start = time.perf_counter()
        cpu = time.process_time()
        bins = pack(lengths, seq_length)
        found["pack_seconds"] = time.perf_counter() - start
        found["pack_cpu_seconds"] = time.process_time() - cpu
    return {
        **found,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "samples": int(bins.max()) + 1,
    }


def pack_stream(prefix: str, warm_up: str, documents: int, seq_length: int) -> dict:
    """Pack an epoch as a run does: the stream in windows, located, cut, packed and put in order."""
    settings = DataSettings(seq_length, ((1.0, SOURCE),), "best_fit", "error")

    def enter(prefix: str, documents: int | None) -> tuple[DocumentStream, int]:
        stream = DocumentStream(
            IndexedReaderLengths(prefix), None if documents is None else np.arange(documents), SEED
        )
        ledger = Ledger({SOURCE: stream})
        ledger.enter(0, "packing", settings)
        limit = ledger.mixture().limits[0]
        assert limit is not None, "--data-exhausted error draws one epoch"
        return stream, limit

    # Compile everything, outside the measurement.
    enter(warm_up, None)
    with measured() as found:
        stream, samples = enter(prefix, documents)
    return {
        **found,
        "documents": stream.num_documents,
        "tokens": stream.tokens_per_epoch,
        "samples": samples,
    }


def slices(prefix: str, seq_length: int, samples: int, packing: Packing, balanced: bool) -> dict:
    """Count what each of RANKS ranks reads of a sample: tokens, and entries of .idx.

    Returns:
        the most of any rank, and the most beyond its share.
    """
    # It imports megatron, which the memory of the other rows should not hold.
    from parallel.context import group_pieces

    worst = {"tokens": 0, "beyond": -(1 << 60), "entries_beyond": -(1 << 60), "entries": 0}
    ledger = open_ledger(prefix)
    # With `balanced`, a rank has two pieces: one from each half of the sample.
    share = seq_length // RANKS
    stream = ledger.streams[SOURCE]
    reader: Any = CountingReader(stream.reader)
    # The stream reads through the counter from here on.
    stream.reader = reader
    for rank in range(RANKS):
        pieces = (
            group_pieces(seq_length, rank, RANKS)
            if balanced
            else [(rank * share, (rank + 1) * share)]
        )
        loader = make_loader(ledger, 0, seq_length, packing=packing, pieces=pieces)
        for number in range(samples):
            reader.tokens = 0
            reader.entries = 0
            (batch,) = loader.read(number * seq_length)
            assert len(batch.tokens) == share
            starts = batch.cu_seqlens.numpy()[:-1]
            # Documents that have a token in one of the rank's pieces.
            touched = sum(
                int(np.searchsorted(starts, high) - np.searchsorted(starts, low, side="right")) + 1
                for low, high in pieces
            )
            found = {
                "tokens": reader.tokens,
                "beyond": reader.tokens - share - len(pieces),
                "entries": reader.entries,
                "entries_beyond": reader.entries - touched,
            }
            # The rank that reads most decides.
            worst = {name: max(worst[name], value) for name, value in found.items()}
    return worst


def open_ledger(prefix: str) -> Ledger:
    """Open the whole corpus as one source, with no index cached."""
    return Ledger({SOURCE: DocumentStream(IndexedReader(prefix), None, SEED)})


def make_loader(
    ledger: Ledger,
    clock: int,
    seq_length: int,
    packing: Packing = "concat",
    pieces: list[tuple[int, int]] | None = None,
) -> Loader:
    """Make a loader of one sample per step, from `clock` on."""
    # Another length or packing begins a new segment of the ledger.
    ledger.enter(clock, "bench", DataSettings(seq_length, ((1.0, SOURCE),), packing, "repeat"))
    return Loader(
        ledger.mixture(),
        clock,
        micro_batch_size=1,
        global_batch_tokens=seq_length,
        dp_rank=0,
        dp_size=1,
        pieces=pieces,
        eod=EOD,
        vocab_size=VOCAB_SIZE,
        prefetch=False,
    )


def first_sample(ledger: Ledger, clock: int, seq_length: int) -> None:
    """Read the sample at `clock`."""
    make_loader(ledger, clock, seq_length).read(clock)


class IndexedReaderLengths(IndexedReader):
    """Read lengths alone: the fingerprint is the file's name, so that nothing of .bin is read."""

    def fingerprint(self) -> str:
        return Path(self.prefix).name


class CountingReader:
    """Count what a reader copies from .bin in tokens, and what it looks up in .idx in entries."""

    def __init__(self, reader: Reader):
        self._reader: Any = reader
        self.tokens = 0
        self.entries = 0

    def __getattr__(self, name: str):
        return getattr(self._reader, name)

    def read_spans(self, documents, offsets, lengths, out) -> None:
        self.tokens += int(lengths.sum())
        self.entries += len(documents)
        self._reader.read_spans(documents, offsets, lengths, out)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        self.tokens += length
        self.entries += 1
        return self._reader.read(document, offset, length)
