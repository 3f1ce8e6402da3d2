"""Prompts continued token by token, as many at once as a batch holds, on any tp x cp.

The prompts of a batch are read in one forward pass, packed as training's documents are; context
parallelism splits their tokens. After that every rank of cp has the same next tokens and attends
with its heads.

Legend: b sequences, t tokens of this rank, D hidden, v this tp rank's part of the vocabulary, V all
of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from model.gpt import Layer
from model.key_cache import KeyCache, cache_bytes
from parallel.collectives import all_reduce, gather_rows
from parallel.layout import free_memory
from parallel.ulysses import HeadSplit
from tools.inference.open_model import OpenModel
from tools.inference.packed import pack_texts, rows_of_rank
from tools.inference.sampling import Sampling, choose_tokens

TILE_TOKENS = 4096
"""Tokens of a prompt whose MLP is computed at once: its inner width takes the most memory."""


@dataclass
class Continuation:
    """Holds one prompt and what was added to it."""

    number: int
    """Number of the prompt, in the order given: draws depend on it."""
    prompt: list[int]
    limit: int
    """Tokens to add at most."""
    added: list[int] = field(default_factory=list)
    is_stopped: bool = False
    """Did a stop id end it? That id is the last of `added`."""

    @property
    def is_finished(self) -> bool:
        return self.is_stopped or len(self.added) >= self.limit

    @property
    def text_ids(self) -> list[int]:
        """What was added and has a text: without the id that ended it."""
        return self.added[:-1] if self.is_stopped else self.added

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.prompt) + len(self.added)


OnToken = Callable[[Continuation], None]
"""Is told of each token that was added, on every process."""


def _ignore(_: Continuation) -> None:
    return None


@torch.no_grad()
def continue_batch(
    model: OpenModel,
    batch: Sequence[Continuation],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    on_token: OnToken = _ignore,
) -> None:
    """Add tokens to each prompt until a stop id or its limit; every process calls it.

    Raises:
        ValueError: logits that are not finite numbers.
    """
    growing = [each for each in batch if not each.is_finished]
    if not growing:
        return
    seen_bV = _seen_tokens(model, growing) if sampling.repetition_penalty != 1.0 else None
    cache = make_cache(model, growing)
    x_bD = _read_prompts(model, growing, cache)
    while True:
        tokens = _next_tokens(model, x_bD, growing, sampling, seen_bV)
        for each, token in zip(growing, tokens, strict=True):
            each.added.append(token)
            each.is_stopped = token in stop_ids
            on_token(each)
        # What is finished takes no more part.
        rows = [row for row, each in enumerate(growing) if not each.is_finished]
        if not rows:
            return
        if len(rows) < len(growing):
            cache.keep(rows)
            growing = [growing[row] for row in rows]
            tokens = [tokens[row] for row in rows]
            seen_bV = None if seen_bV is None else seen_bV[rows]
        tokens_b = torch.tensor(tokens, device=model.layout.device)
        if seen_bV is not None:
            seen_bV.scatter_(1, tokens_b[:, None], True)
        x_bD = model.stage.hidden_of_next(tokens_b, cache)


def batches(continuations: Sequence[Continuation], size: int) -> Iterator[Sequence[Continuation]]:
    """Cut the prompts into batches, in their order."""
    for begin in range(0, len(continuations), size):
        yield continuations[begin : begin + size]


# ---------------------------------------------------------------- the cache


def make_cache(model: OpenModel, batch: Sequence[Continuation]) -> KeyCache:
    """Allocate the cache of a batch."""
    return KeyCache(
        model.config,
        _head_split(model),
        model.layout.cp_a2a.rank,
        [len(each.prompt) for each in batch],
        _capacity(batch),
        model.dtype,
        model.layout.device,
    )


def _head_split(model: OpenModel) -> HeadSplit:
    """Return which heads each rank attends with; the same in every layer."""
    layer = next(iter(model.stage.layers.values()))
    assert isinstance(layer, Layer)
    return layer.attention.split


def planned_bytes(model: OpenModel, batch: Sequence[Continuation]) -> int:
    """Count the bytes of a batch's cache on the process that keeps most heads."""
    kv_heads = max(stop - start for start, stop in _head_split(model).kv)
    return cache_bytes(model.config, kv_heads, len(batch), _capacity(batch), model.dtype)


def check_memory(model: OpenModel, continuations: Sequence[Continuation], size: int) -> int:
    """Return the bytes of the largest batch's cache, per process.

    Raises:
        ValueError: they do not fit.
    """
    needed = max(planned_bytes(model, batch) for batch in batches(continuations, size))
    free = free_memory(model.layout.device)
    if needed > free:
        raise ValueError(
            f"batch_size = {size}: keys and values take {needed:,} bytes per process, and "
            f"{free:,} are free. Fix: a smaller batch, shorter prompts, fewer new tokens, or more "
            "processes (--context-parallel-size, --tensor-model-parallel-size)."
        )
    return needed


def _capacity(batch: Sequence[Continuation]) -> int:
    """Count the tokens that the longest sequence can have; the last one is never attended to."""
    return max(len(each.prompt) + max(1, each.limit) - 1 for each in batch)


# ---------------------------------------------------------------- one step


def _read_prompts(model: OpenModel, batch: Sequence[Continuation], cache: KeyCache) -> torch.Tensor:
    """Run all prompts through the layers, and fill the cache -> their last tokens' rows [b, D]."""
    layout = model.layout
    stage = model.stage
    packed = pack_texts([each.prompt for each in batch], layout)
    usual = stage.memory
    stage.memory = replace(usual, mlp_tiles=-(-len(packed.tokens) // TILE_TOKENS))
    x_tD = stage.hidden(packed.tokens, packed, cache)
    stage.memory = usual
    # The last token of each prompt is on one rank of cp; a sum with zeros is exact.
    lasts = torch.tensor(list(accumulate(len(each.prompt) for each in batch))) - 1
    rows_t = rows_of_rank(int(packed.cu_seqlens[-1]), layout)
    is_here_bt = lasts[:, None] == rows_t
    found, rows = is_here_bt.nonzero(as_tuple=True)
    x_bD = x_tD.new_zeros(len(batch), x_tD.shape[1])
    x_bD[found.to(x_tD.device)] = x_tD[rows.to(x_tD.device)]
    return all_reduce(x_bD, layout.cp)


def _next_tokens(
    model: OpenModel,
    x_bD: torch.Tensor,
    batch: Sequence[Continuation],
    sampling: Sampling,
    seen_bV: torch.Tensor | None,
) -> list[int]:
    """Choose the next token of each sequence; all processes take what the first one chose."""
    layout = model.layout
    logits_bV = all_logits(model, x_bD)
    if not logits_bV.isfinite().all():
        raise ValueError(
            f"load = {model.source}: its logits are NaN or infinite. Fix: another checkpoint, or "
            "--dtype fp32."
        )
    tokens_b = choose_tokens(
        logits_bV,
        sampling,
        [each.number for each in batch],
        [each.length for each in batch],
        seen_bV,
    )
    if not layout.world.is_first:
        tokens_b.zero_()
    return all_reduce(tokens_b, layout.world).tolist()


def all_logits(model: OpenModel, x_bD: torch.Tensor) -> torch.Tensor:
    """Compute the logits of all tokens that exist: [b, D] -> [b, V], on every process."""
    logits_bv = model.stage.logits(x_bD)
    if model.layout.tp.size > 1:
        logits_bv = gather_rows(logits_bv.T, model.layout.tp).T
    return logits_bv[:, : model.vocab_size]


def _seen_tokens(model: OpenModel, batch: Sequence[Continuation]) -> torch.Tensor:
    """Mark the tokens of each prompt: bool [b, V]."""
    seen_bV = torch.zeros(len(batch), model.vocab_size, dtype=torch.bool)
    for row, each in enumerate(batch):
        seen_bV[row, torch.tensor(each.prompt)] = True
    return seen_bV.to(model.layout.device)
