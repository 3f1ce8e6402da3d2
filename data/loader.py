"""The microbatches of a step as a pure function of the clock, and the opening of a corpus."""

from concurrent.futures import Future
from threading import Thread

import numpy as np

from data.batch import Batch, read_batch
from data.config import DataConfig
from data.indexed import IndexedReader, read_side_file
from data.stream import DocumentStream, SyntheticReader, split_documents

SCANNED_BYTES = 1 << 30
"""A .bin up to this size is scanned for ids that are too large at the start; a larger one as it is read."""


class Loader:
    """Reads the microbatches of one rank, in the shape of one phase.

    Sample m of the step at clock c starts at stream position c + m x seq_length. Microbatch j of data
    rank d holds samples (j x dp_size + d) x micro_batch_size and the next micro_batch_size - 1.
    """

    def __init__(self, stream: DocumentStream, *, seq_length: int, micro_batch_size: int, global_batch_tokens: int,
                 dp_rank: int, dp_size: int, pieces: list[tuple[int, int]] | None = None,
                 document_masking: bool = True, eod: int | None = None, eod_mask_loss: bool = False,
                 vocab_size: int | None = None, prefetch: bool = True):
        """
        Args:
            pieces: ranges of a microbatch's tokens that this rank holds (see `read_batch`).
            prefetch: read the next step in a thread while this one is trained; changes no result.

        Raises:
            ValueError: global_batch_tokens is not a multiple of seq_length x micro_batch_size x dp_size.
        """
        unit = seq_length * micro_batch_size * dp_size
        if global_batch_tokens < 1 or global_batch_tokens % unit:
            raise ValueError(f"global_batch_tokens = {global_batch_tokens}: must be a multiple of seq_length x "
                             f"micro_batch_size x data-parallel size = {seq_length} x {micro_batch_size} x {dp_size} = "
                             f"{unit}. Fix: {max(1, global_batch_tokens // unit) * unit} or "
                             f"{(global_batch_tokens // unit + 1) * unit}.")
        self.stream, self.seq_length, self.micro_batch_size = stream, seq_length, micro_batch_size
        self.global_batch_tokens, self.num_microbatches = global_batch_tokens, global_batch_tokens // unit
        self.dp_rank, self.dp_size, self.prefetch = dp_rank, dp_size, prefetch
        self.document_masking = document_masking
        self._slice = {"seq_length": seq_length, "pieces": pieces, "document_masking": document_masking,
                       "eod": eod, "eod_mask_loss": eod_mask_loss, "vocab_size": vocab_size}
        self._next: tuple[int, Future] | None = None

    def read(self, clock: int) -> list[Batch]:
        """The microbatches of the step that begins at stream position `clock`, in order.

        Raises:
            ValueError: a token id is too large (see `read_batch`).
        """
        expected, self._next = self._next, None
        if expected and expected[0] == clock:
            batches = expected[1].result()
        else:
            batches = self._read(clock)
        if self.prefetch:
            self._start_reading(clock + self.global_batch_tokens)
        return batches

    def _read(self, clock: int) -> list[Batch]:
        batches = []
        for j in range(self.num_microbatches):
            first = (j * self.dp_size + self.dp_rank) * self.micro_batch_size
            starts = [clock + m * self.seq_length for m in range(first, first + self.micro_batch_size)]
            batches.append(read_batch(self.stream, starts, **self._slice))
        return batches

    def _start_reading(self, clock: int) -> None:
        """Read a step in a thread of its own, which ends with it; errors wait in the future."""
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result(self._read(clock))
            except BaseException as error:
                future.set_exception(error)

        self._next = clock, future
        Thread(target=work, name="data-prefetch").start()


def open_corpus(config: DataConfig, seed: int, vocab_size: int,
                tokenizer: dict | None = None) -> dict[str, DocumentStream]:
    """Open the data of a run -> "train" and, where the settings leave one, "valid".

    Args:
        tokenizer: `Tokenizer.describe()` of the run's own; a corpus made with another one is refused.

    Raises:
        ValueError: files are missing or damaged, hold ids outside the vocabulary, or leave nothing to train on.
    """
    if config.mock_data:
        return _split(SyntheticReader(vocab_size, seed), config.split, seed)
    if config.data_path:
        return _split(_open(config.data_path[0], vocab_size, tokenizer), config.split, seed)
    paths = {"train": config.train_data_path, "valid": config.valid_data_path}
    streams = {}
    for name, path in paths.items():
        if path:
            reader = _open(path[0], vocab_size, tokenizer)
            streams[name] = DocumentStream(reader, np.arange(reader.num_documents), seed)
    return streams


def fingerprint(streams: dict[str, DocumentStream]) -> dict:
    """JSON-able identity of the training data, to store beside a checkpoint.

    Of the training stream only: another validation set does not change what the run has learned.
    """
    return {"train": streams["train"].fingerprint()}


def _split(reader: IndexedReader | SyntheticReader, split: str, seed: int) -> dict[str, DocumentStream]:
    # Empty documents would take seats in a split without giving it a token.
    documents = np.flatnonzero(reader.document_lengths)
    if len(documents) == 0:
        raise ValueError(f"{reader.prefix}: no document has a token. Fix: give a corpus that is not empty.")
    parts = split_documents(len(documents), split, seed)
    return {name: DocumentStream(reader, documents[parts[name]], seed) for name in ("train", "valid")
            if len(parts[name])}


def _open(prefix: str, vocab_size: int, tokenizer: dict | None) -> IndexedReader:
    """Open a pair; check its tokenizer, and its ids where that is cheap: by a scan, its dtype or its side file."""
    reader = IndexedReader(prefix)
    side, limits = read_side_file(prefix), np.iinfo(reader.dtype)
    belongs = side and (side["documents"], side["tokens"]) == (reader.num_documents, reader.num_tokens)
    if belongs and tokenizer and side.get("tokenizer"):
        _check_tokenizer(prefix, side["tokenizer"], tokenizer)
    low, high = 0, -1
    if limits.min < 0 or limits.max >= vocab_size:
        if reader.num_tokens * np.dtype(reader.dtype).itemsize < SCANNED_BYTES:
            low, high = reader.token_range()
        elif belongs:
            high = side["max_token_id"]
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{prefix}: holds token id {low if low < 0 else high}; ids must be in [0, vocab_size = "
                         f"{vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the corpus.")
    return reader


def _check_tokenizer(prefix: str, theirs: dict, ours: dict) -> None:
    """Raises ValueError unless the corpus was made with the run's tokenizer (ids without one always pass)."""
    if any(theirs.get(name) != ours.get(name) for name in ("type", "fingerprint")):
        raise ValueError(f"{prefix}: was made with another tokenizer: {theirs}; this run has {ours}. Fix: give the "
                         "tokenizer that made the corpus, or preprocess the text again.")
