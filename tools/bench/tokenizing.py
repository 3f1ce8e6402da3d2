"""Measure tools.preprocess_data beside Hugging Face's tokenizers, by single texts and batches.

All on one corpus in one run: Python's standard library in pieces with varied names, as JSON lines,
under a byte-level BPE tokenizer trained on it. Every row counts bytes of text (UTF-8, without the
JSON around it).
"""

import json
import os
import random
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data.indexed import IndexedReader
from data.stream import usable_cores
from data.tokenizers.tokenizer import build_tokenizer
from tools.preprocess_data import Arguments as PreprocessArguments
from tools.preprocess_data import preprocess

HEADER = ["tokenizer", "MB of text", "seconds", "MB/s", "MB per CPU second", "ids identical"]
TRAINING_BYTES = 12_000_000
"""Bytes of the corpus that train the tokenizer: more takes minutes and changes nothing here."""
BATCH = 1000
"""Texts in a batch of Hugging Face's."""
END = "<|endoftext|>"


@dataclass(frozen=True)
class Row:
    """Hold what one contender took."""

    name: str
    text_bytes: int
    """UTF-8 bytes of the text."""
    seconds: float
    cpu_seconds: float
    """CPU time of all threads."""
    identical: bool
    """Are its ids those of Hugging Face one by one?"""

    def cells(self) -> list[str]:
        """Spell the row for markdown_table, under HEADER."""
        size = self.text_bytes / 1e6
        return [
            self.name,
            f"{size:,.0f}",
            f"{self.seconds:.2f}",
            f"{size / self.seconds:.1f}",
            f"{size / self.cpu_seconds:.1f}",
            "yes" if self.identical else "NO",
        ]


def measure(
    corpus_bytes: int = 500_000_000,
    peer_bytes: int = 20_000_000,
    vocab_size: int = 32_000,
    workers: int | None = None,
    folder: str | None = None,
    repeats: int = 3,
) -> list[Row]:
    """Tokenize the corpus with ours, and its first `peer_bytes` with Hugging Face's.

    Args:
        corpus_bytes: size of the JSON lines to make.
        workers: threads of ours, and of Hugging Face's batches; default: the usable cores.
        repeats: of ours; the rows are the run with the median time of tokenizing.
        folder: to work in, kept with its corpus and tokenizer, which the next call finds; default:
            a temporary one.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ithaca-bench-") as temporary:
            return measure(corpus_bytes, peer_bytes, vocab_size, workers, temporary, repeats)
    workers = workers or usable_cores()
    # Read once, by Hugging Face's first batch.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    corpus = Path(folder) / f"corpus-{corpus_bytes}.jsonl"
    model = Path(folder) / f"tokenizer-{vocab_size}"
    # Kept for the next call.
    if not model.is_dir():
        train_tokenizer(model, vocab_size)
    text_bytes = write_corpus(corpus, corpus_bytes)
    prefix = str(Path(folder) / "tokens")
    arguments = PreprocessArguments(
        input=[str(corpus)],
        output_prefix=prefix,
        workers=workers,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(model),
        overwrite=True,
    )
    runs = []
    for _ in range(repeats):
        began = time.process_time()
        # Files to files, as a user runs it.
        summary = preprocess(arguments)
        tokenizing = summary.seconds - summary.prepare_seconds
        all_cpu = time.process_time() - began
        runs.append((tokenizing, summary.cpu_seconds, summary.seconds, all_cpu))
    # The run with the median time.
    seconds, cpu, all_seconds, all_cpu = sorted(runs)[len(runs) // 2]
    # Hugging Face one by one gives the ids that count.
    theirs, expected = measure_peers(corpus, peer_bytes, str(model), workers)
    same = starts_with(prefix, expected)
    name = f"ours, {workers} workers"
    return [
        Row(name, text_bytes, seconds, cpu, same),
        Row(f"{name}, with preparation", text_bytes, all_seconds, all_cpu, same),
        *theirs,
    ]


def measure_peers(
    corpus: Path, peer_bytes: int, model: str, workers: int
) -> tuple[list[Row], list[list[int]]]:
    """Measure Hugging Face's tokenizers; returns their rows, and the ids of the first documents."""
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer("HuggingFaceTokenizer", model, None)
    # In memory, so that no side waits for the disk.
    texts = list(read_texts(corpus, peer_bytes))
    size = sum(len(text.encode()) for text in texts)
    loaded: Any = AutoTokenizer.from_pretrained(model)
    backend = loaded.backend_tokenizer

    def in_batches() -> list[list[int]]:
        batches = [
            backend.encode_batch_fast(texts[first : first + BATCH], add_special_tokens=False)
            for first in range(0, len(texts), BATCH)
        ]
        return [encoding.ids for batch in batches for encoding in batch]

    expected, seconds, cpu = _timed(lambda: [tokenizer.encode(text) for text in texts])
    rows = [Row("Hugging Face, one by one", size, seconds, cpu, True)]
    found, seconds, cpu = _timed(in_batches)
    return [
        *rows,
        Row(f"Hugging Face, batches, {workers} threads", size, seconds, cpu, found == expected),
    ], expected


def _timed(work: Callable[[], list[list[int]]]) -> tuple[list[list[int]], float, float]:
    """Run the work; returns its result, wall seconds and CPU seconds."""
    wall = time.perf_counter()
    cpu = time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def starts_with(prefix: str, expected: Sequence[list[int]]) -> bool:
    """Tell whether the first documents of a token file are these."""
    reader = IndexedReader(prefix)
    lengths = reader.document_lengths[: len(expected)].tolist()
    same = all(
        np.array_equal(reader.read(number, 0, length), ids)
        for number, (length, ids) in enumerate(zip(lengths, expected, strict=True))
    )
    reader.close()
    return same


def standard_library() -> list[str]:
    """Read Python's own sources, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    return [text for path in paths if (text := path.read_text(encoding="utf-8", errors="ignore"))]


def train_tokenizer(folder: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer of Hugging Face's on the corpus's sources."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = standard_library()
    # A share of every kind of source.
    random.Random(0).shuffle(texts)
    mean = sum(map(len, texts)) / len(texts)
    tokenizer.train_from_iterator(islice(texts, int(TRAINING_BYTES / mean)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


def write_corpus(path: Path, size: int) -> int:
    """JSON lines of `size` bytes: pieces of 500 to 8,000 letters, two of whose names vary -> their
    bytes of text."""
    sources = standard_library()
    draw = random.Random(1)
    written = text_bytes = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            source = draw.choice(sources)
            start = draw.randrange(len(source))
            text = source[start : start + draw.randrange(500, 8000)]
            number = draw.randrange(10_000)
            text = text.replace("self", f"self{number % 100}").replace("name", f"name{number}")
            written += file.write(
                json.dumps({"id": written, "text": text}) + "\n"
            )  # ASCII: a letter is a byte
            text_bytes += len(text.encode())
    return text_bytes


def read_texts(path: Path, size: int) -> Iterator[str]:
    """Read the texts of the first `size` bytes of the lines."""
    with open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]
            size -= len(line)
            if size <= 0:
                return
