"""Run Megatron-Core's side of the data benchmark: its IndexedDataset and GPTDataset.

No process group is made.

Each function runs in a process of its own (fresh.py). Its index cache is off: a config without a
blend sets `mock`, by which GPTDataset keeps its indices in memory; the dataset handed to it is a
real one anyway.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    _get_ltor_masks_and_position_ids,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from tools.bench.data_engine.corpus import EOD, VOCAB_SIZE
from tools.bench.fresh import measured

logging.disable(logging.WARNING)


class Ids:
    """Stand for a tokenizer, as far as GPTDataset asks for one."""

    vocab_size = VOCAB_SIZE
    eod = EOD
    pad = -1
    unique_identifiers = {"class": "Ids"}


def index(prefix: str, warm_up: str, seq_length: int, next_length: int) -> dict:
    """Measure from opening the files to sample 0; then another length, with the files open."""
    # Both lengths once on a small corpus: what is compiled is not measured.
    for length in (seq_length, next_length):
        build(open_files(warm_up), warm_up, length)[0]
    with measured() as found:
        # The first sample is what a run waits for.
        files = open_files(prefix)
        dataset = build(files, prefix, seq_length)
        dataset[0]
    samples = len(dataset)
    # As a run would, before it builds the next one.
    del dataset
    with measured() as again:
        build(files, prefix, next_length)[0]
    return {
        **found,
        "samples": samples,
        **{f"again_{name}": value for name, value in again.items()},
    }


def read(prefix: str, warm_up: str, seq_length: int, samples: int, reset_positions: bool) -> dict:
    """Time each of the first `samples` samples, after one that is not timed."""
    torch.set_num_threads(1)
    dataset = build(open_files(prefix), prefix, seq_length, reset_positions)
    seconds = []
    cpu_seconds = []
    for number in range(samples + 1):
        start = time.perf_counter()
        cpu = time.process_time()
        item = dataset[number]
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu)
        assert len(item["tokens"]) == len(item["position_ids"]) == seq_length
    return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:]}


def positions(tokens: np.ndarray) -> np.ndarray:
    """Compute Megatron-Core's positions per document, int64 [tokens], to compare with."""
    return _get_ltor_masks_and_position_ids(
        torch.from_numpy(tokens), EOD, True, False, False, False
    )[2].numpy()


def open_files(prefix: str) -> IndexedDataset:
    """Open a pair of files through a memory map."""
    return IndexedDataset(prefix, multimodal=False, mmap=True)


def build(
    files: IndexedDataset, prefix: str, seq_length: int, reset_positions: bool = True
) -> GPTDataset:
    """Build the dataset of one epoch of all documents, shuffled, at one length."""
    # As much of a tokenizer as GPTDataset asks for, whatever its annotation says.
    tokenizer: Any = Ids()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=seq_length,
        tokenizer=tokenizer,
        reset_position_ids=reset_positions,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    assert not (Path(prefix) / "cache").exists(), "the index cache must be off"
    documents = np.arange(GPTDataset.numel_low_level_dataset(files), dtype=np.int32)
    return GPTDataset(files, prefix, documents, None, Split.train, config)
