"""The data of a run, opened: each source as a stream, and the validation sets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.blend import SourceName, parse_blend
from data.cache import IndexCache
from data.config import DataConfig, Exhausted, Packing, are_named, parse_split
from data.document_cost import DocumentCost
from data.document_split import SPLITS, split_documents
from data.idx_format import read_side_file
from data.indexed import IndexedReader, OpenFiles
from data.segments import DataSettings
from data.stream import DocumentStream
from data.synthetic import SyntheticReader
from data.tokenizers.identity import same_tokenizer

SCANNED_BYTES = 1 << 30
"""Largest .bin that is scanned for ids beyond the vocabulary at the start; a larger one is checked
as it is read."""
NAMED_SPLITS = 16
"""Most sources that have validation sets of their own under --split; more become one blend."""
MOCK = "mock data"
"""Name of the source of --mock-data."""

Blend = list[tuple[float, DocumentStream]]


@dataclass(frozen=True)
class Corpus:
    """The data of a run, open."""

    train: dict[str, DocumentStream]
    """Name of a source -> its training documents."""
    validation: dict[str, Blend]
    """Name of a validation set -> its blend."""
    empty: dict[str, int] = field(default_factory=dict)
    """Prefix -> documents without a token, which are never drawn; only those that have some."""
    unknown_tokenizers: list[str] = field(default_factory=list)
    """Prefixes of which nothing says which tokenizer made them, where the run has one."""

    def settings(
        self,
        seq_length: int,
        words: Sequence[str],
        field: str,
        packing: Packing,
        exhausted: Exhausted,
        max_documents_per_sample: int | None = None,
        equal_cost: DocumentCost | None = None,
        samples_per_step: int | None = None,
    ) -> DataSettings:
        """Make the settings of a segment that draws from `words`, without any from mock data.

        Args:
            field: the setting that gives `words`, for messages.
        """
        entries = parse_blend(words, field) if words else [(1.0, SourceName(MOCK))]
        blend = tuple(
            (_weight(weight, self.train[str(source)]), str(source)) for weight, source in entries
        )
        return DataSettings(
            seq_length,
            blend,
            packing,
            exhausted,
            max_documents_per_sample,
            equal_cost,
            samples_per_step,
        )


def _weight(given: float | None, stream: DocumentStream) -> float:
    """Weigh a source as given, or by its tokens."""
    return float(stream.tokens_per_epoch if given is None else given)


def open_corpus(
    config: DataConfig,
    seed: int,
    vocab_size: int,
    tokenizer: dict | None = None,
    phase_blends: Sequence[Sequence[str]] = (),
) -> Corpus:
    """Open all sources that the run or one of its phases names.

    Args:
        tokenizer: `Tokenizer.describe()` of the run's own; a corpus made with another one is
            refused.
        phase_blends: `data_path` of the phases that have their own.

    Raises:
        ValueError: files are missing or damaged, hold ids outside the vocabulary, or leave nothing
            to train on; or validation data is also trained on.
    """
    opener = _Opener(config, seed, vocab_size, tokenizer)
    # Mock data is one source, split like any other.
    if config.mock_data:
        parts = opener.split(SyntheticReader(vocab_size, seed), SourceName(MOCK))
        valid = {"valid": [(1.0, parts["valid"])]} if "valid" in parts else {}
        return Corpus({MOCK: parts["train"]}, valid)
    train: dict[str, DocumentStream] = {}
    valid_parts: list[tuple[float | None, SourceName, DocumentStream]] = []
    is_split = not config.train_data_path
    # The sources of all blends, each opened once, in the order in which they are named.
    own = config.data_path or config.train_data_path
    for words in (own, *phase_blends):
        for weight, source in parse_blend(words, "data_path"):
            if str(source) in train:
                continue
            parts = opener.split(opener.reader(source.prefix), source, is_split=is_split)
            if "train" not in parts:
                raise ValueError(
                    f"{source}: has no document to train on. Fix: another split or range of "
                    "lengths."
                )
            train[str(source)] = parts["train"]
            if "valid" in parts:
                valid_parts.append((weight, source, parts["valid"]))
    if config.valid_data_path:
        validation = _own_validation(config.valid_data_path, opener, train)
    else:
        validation = _split_validation(valid_parts)
    return Corpus(train, validation, opener.empty, opener.unknown_tokenizers)


class _Opener:
    """Opens prefixes once each and cuts their documents into streams."""

    def __init__(self, config: DataConfig, seed: int, vocab_size: int, tokenizer: dict | None):
        self.config = config
        self.seed = seed
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.cache = IndexCache(config.data_cache_path)
        self.files = OpenFiles()
        self.empty: dict[str, int] = {}
        """Prefix -> documents without a token; only those that have some."""
        self.unknown_tokenizers: list[str] = []
        """Prefixes whose tokenizer cannot be compared with the run's."""
        self._readers: dict[str, IndexedReader] = {}

    def reader(self, prefix: str) -> IndexedReader:
        """Give the reader of a prefix, which is opened and checked the first time."""
        if prefix not in self._readers:
            reader = self._readers[prefix] = self._open(prefix)
            # Counted here, as they are said once per corpus and not per source.
            if empty := reader.num_documents - int(np.count_nonzero(reader.document_lengths)):
                self.empty[prefix] = empty
        return self._readers[prefix]

    def split(
        self, reader: IndexedReader | SyntheticReader, source: SourceName, *, is_split: bool = True
    ) -> dict[str, DocumentStream]:
        """Cut a source's documents into streams: "train" and "valid", as far as they have any."""
        split = self.config.split if is_split else "1"
        if parse_split(split)[0] == 1 and source == SourceName(source.prefix):
            return {"train": DocumentStream(reader, None, self.seed, self.cache)}
        # Which documents are whose depends on all of this, and is kept in the cache.
        key = {
            "what": "documents",
            "split": split,
            "seed": self.seed,
            "low": source.low,
            "high": source.high,
            "corpus": reader.fingerprint(),
        }
        found = self.cache.get(key, lambda: self._select(reader, source, split))
        streams = {}
        for name in SPLITS[:2]:
            documents = found[name]
            if len(documents):
                everything = len(documents) == len(reader.document_lengths)
                streams[name] = DocumentStream(
                    reader, None if everything else documents, self.seed, self.cache
                )
        return streams

    def _select(
        self, reader: IndexedReader | SyntheticReader, source: SourceName, split: str
    ) -> dict[str, np.ndarray]:
        """List the documents of each split that have a token and a length in the source's range."""
        lengths = reader.document_lengths
        # Empty documents would take seats in a split without giving it a token.
        full = np.flatnonzero(lengths) if int(lengths.min()) == 0 else None
        count = len(lengths) if full is None else len(full)
        if count == 0:
            raise ValueError(
                f"{reader.prefix}: no document has a token. Fix: give a corpus that is not empty."
            )
        # Split first: a document is in the same split whatever range of lengths is named.
        parts = split_documents(count, split, self.seed)
        if full is not None:
            parts = {name: full[part] for name, part in parts.items()}
        if source.low > 1 or source.high is not None:
            high = np.iinfo(np.int64).max if source.high is None else source.high
            parts = {
                name: part[(lengths[part] >= source.low) & (lengths[part] < high)]
                for name, part in parts.items()
            }
        return {name: parts[name] for name in SPLITS[:2]}

    def _open(self, prefix: str) -> IndexedReader:
        """Open a pair; check its tokenizer, and its ids where that is cheap.

        Raises:
            ValueError: it is damaged, made with another tokenizer, or holds ids outside the
                vocabulary.
        """
        reader = IndexedReader(prefix, self.files)
        # A .json that was left from another corpus says nothing.
        side = read_side_file(prefix)
        size = (reader.num_documents, reader.num_tokens)
        if side and (side["documents"], side["tokens"]) != size:
            side = None
        recorded = side.get("tokenizer") if side else None
        if recorded and self.tokenizer:
            _check_tokenizer(prefix, recorded, self.tokenizer)
        elif self.tokenizer and self.tokenizer["type"] != "NullTokenizer":
            self.unknown_tokenizers.append(prefix)
        # Ids are legal by the dtype, by a scan of a small file, or by what the .json says.
        limits = np.iinfo(reader.dtype)
        low = 0
        high = -1
        if limits.min < 0 or limits.max >= self.vocab_size:
            if reader.num_tokens * np.dtype(reader.dtype).itemsize < SCANNED_BYTES:
                low, high = reader.token_range()
            elif side:
                high = side["max_token_id"]
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"{prefix}: holds token id {wrong}; ids must be in [0, vocab_size = "
                f"{self.vocab_size}). Fix: give the tokenizer (or --vocab-size) that made the "
                "corpus."
            )
        return reader


def _own_validation(
    words: Sequence[str], opener: _Opener, train: dict[str, DocumentStream]
) -> dict[str, Blend]:
    """Open --valid-data-path: `name=prefix` words are a set each, anything else is one blend, named
    "valid".

    Raises:
        ValueError: a name appears twice, a set holds data that is trained on, or no document.
    """
    trained = {stream.reader.fingerprint(): name for name, stream in train.items()}
    sets: dict[str, Blend] = {}
    if are_named(words):
        blends = [(name, [path]) for name, path in (word.split("=", 1) for word in words)]
    else:
        blends = [("valid", list(words))]
    for name, blend in blends:
        if name in sets:
            raise ValueError(
                f"valid_data_path: the name {name!r} is given twice. "
                "Fix: give each set its own name."
            )
        sets[name] = []
        for weight, source in parse_blend(blend, "valid_data_path"):
            # The same documents, under whatever name.
            reader = opener.reader(source.prefix)
            if twin := trained.get(reader.fingerprint()):
                raise ValueError(
                    f"valid_data_path: {source} holds the documents of {twin}, which is trained "
                    "on. Fix: other documents, or --data-path with --split."
                )
            parts = opener.split(reader, source, is_split=False)
            if "train" not in parts:
                raise ValueError(
                    f"valid_data_path: {source} has no document. Fix: another range of lengths."
                )
            sets[name].append((_weight(weight, parts["train"]), parts["train"]))
    return sets


def _split_validation(
    parts: Sequence[tuple[float | None, SourceName, DocumentStream]],
) -> dict[str, Blend]:
    """Make validation sets of what --split leaves: one per source, or one blend of very many."""
    if len(parts) == 1:
        return {"valid": [(1.0, parts[0][2])]}
    if len(parts) > NAMED_SPLITS:
        return {"valid": [(_weight(weight, stream), stream) for weight, _, stream in parts]}
    # Named by the last part of the path, or where that is not unique by all of it.
    short = [
        str(SourceName(Path(source.prefix).name, source.low, source.high)) for _, source, _ in parts
    ]
    return {
        name if short.count(name) == 1 else str(source): [(1.0, stream)]
        for name, (_, source, stream) in zip(short, parts, strict=True)
    }


def _check_tokenizer(prefix: str, theirs: dict, ours: dict) -> None:
    """Raise ValueError unless the corpus was made with the run's tokenizer."""
    sizes = {"vocab_size": None}  # rows of the model, which may be more than the corpus needs
    if not same_tokenizer(theirs | sizes, ours | sizes):
        raise ValueError(
            f"{prefix}: was made with another tokenizer: {theirs}; this run has {ours}. Fix: give "
            "the tokenizer that made the corpus, or preprocess the text again."
        )
