"""Is an exported folder the same model? Logits of transformers against ours, in fp32, on real text.

The yardstick is transformers itself: its sdpa and eager attention paths compute the same model and
differ by rounding only. Ours may differ from its sdpa path by at most 4 times that. Compared at the
first positions and at the last ones of the declared context, where rotary angles are largest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data.batch import IGNORE, Batch
from data.sources import open_corpus
from model.build import build_whole_model
from model.estimate import num_parameters
from model.kernels import choose_attention
from pretrain import checkpoint

if TYPE_CHECKING:
    from tools.export_hf import Source

WINDOW = 1024
"""Tokens per comparison: transformers' eager path keeps a window x window matrix per head."""
ALLOWED = 4.0
"""Largest |ours - sdpa| in units of the largest |sdpa - eager|."""
SMALL_MODEL, ALLOWED_SMALL = 50_000_000, 1e-5
"""Models with fewer parameters sum few terms: theirs may also differ by at most this share of the largest logit."""


def verify(source: Source, exported: Path, max_positions: int, text_file: str | None,
           with_tokenizer: bool = True) -> None:
    """Compare and print.

    Raises:
        ValueError: the logits, or the token ids of the exported tokenizer, differ.
    """
    ids = _real_text(source, text_file)
    window = min(WINDOW, max_positions, len(ids))
    ids = torch.from_numpy(ids[:window])
    problems = []
    for start in dict.fromkeys((0, max_positions - window)):
        positions = torch.arange(start, start + window)
        sdpa = _transformers_logits(exported, "sdpa", ids, positions)
        eager = _transformers_logits(exported, "eager", ids, positions)
        ours = _our_logits(source, exported, ids, positions)
        largest = float(sdpa.abs().max())
        yardstick, difference = float((sdpa - eager).abs().max()), float((ours - sdpa).abs().max())
        # Two paths may agree bit for bit; rounding of one fp32 operation is then the yardstick.
        allowed = ALLOWED * max(yardstick, torch.finfo(torch.float32).eps * largest)
        if num_parameters(source.config.model, source.vocab_size) < SMALL_MODEL:
            allowed = min(allowed, ALLOWED_SMALL * largest)
        verdict = "ok" if difference <= allowed else "DIFFERENT"
        print(f"verify: positions {start:,} to {start + window - 1:,}: ours - transformers {difference:.2e}, "
              f"transformers sdpa - eager {yardstick:.2e}, allowed {allowed:.2e}, largest logit {largest:.2f}: "
              f"{verdict}", flush=True)
        if not difference <= allowed:
            problems.append(f"logits at positions from {start} differ by {difference:.2e}, allowed {allowed:.2e}")
    if with_tokenizer:
        problems += _tokenizer_problems(source, exported, ids)
    if problems:
        raise ValueError(f"verification of the export failed: {'; '.join(problems)}. Fix: this is a defect of the "
                         "conversion; nothing was published.")


def _real_text(source: Source, text_file: str | None) -> np.ndarray:
    """Token ids of real text, int64."""
    if text_file is not None:
        if source.tokenizer is None:
            raise ValueError(f"verify_text = {text_file}: the checkpoint has no tokenizer. Fix: leave it out.")
        path = Path(text_file)
        if not path.is_file():
            raise ValueError(f"verify_text = {text_file}: no such file. Fix: give a text file.")
        ids = source.tokenizer.encode(path.read_text(encoding="utf-8"))
        if len(ids) < 2:
            raise ValueError(f"verify_text = {text_file}: {len(ids)} tokens. Fix: give a longer text.")
        return np.array(ids, dtype=np.int64)
    try:
        corpus = open_corpus(source.config.data, source.config.optimizer.seed, source.vocab_size)
    except ValueError as error:
        raise ValueError(f"verify: the run's own data cannot be read ({error}). Fix: give --verify-text FILE.") \
            from None
    streams = [stream for blend in corpus.validation.values() for _, stream in blend] or list(corpus.train.values())
    stream = streams[0]
    return stream.read(0, min(WINDOW, stream.tokens_per_epoch))


def _transformers_logits(folder: Path, attention: str, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]


def _our_logits(source: Source, exported: Path, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Our model from the checkpoint itself, its weights rounded to the exported dtype."""
    dtype = getattr(torch, json.loads((exported / "config.json").read_text())["torch_dtype"])
    names = checkpoint.tensor_names(source.folder)
    tensors = {name.removeprefix("model."): tensor.to(dtype).float()
               for name, tensor in checkpoint.read_whole_tensors(source.folder, names).items()}
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float32)
    model = build_whole_model(source.config.model, source.vocab_size, tensors, attend, device)
    model.rope = source.rope
    batch = Batch(tokens=ids, labels=torch.full_like(ids, IGNORE), positions=positions,
                  cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32))
    with torch.no_grad():
        return model.logits(model.hidden(ids, batch))[:, :source.vocab_size]


def _tokenizer_problems(source: Source, exported: Path, ids: torch.Tensor) -> list[str]:
    if source.tokenizer is None:
        return []
    from transformers import AutoTokenizer

    text = source.tokenizer.decode([i for i in ids.tolist() if i != source.tokenizer.eod])
    theirs = AutoTokenizer.from_pretrained(exported).encode(text, add_special_tokens=False)
    if theirs == source.tokenizer.encode(text):
        return []
    return ["the exported tokenizer gives other token ids than the one trained with"]
