"""QK-clip: after an update, heads with too large attention logits get smaller weights of q and k.

    eta = min(1, threshold / largest logit of the step)     of a key head and all that read it
    q *= eta ** alpha, k *= eta ** (1 - alpha)              weights and biases

The same inputs then have eta times their logits: at most the threshold. Query heads that share
a key head are clipped together, as in Megatron-LM: the key's weights serve them all. A logit is
taken before any cap, over all pairs that the step attended to, on all ranks.

Source: MuonClip of Kimi K2 (arXiv 2507.20534). It goes with any optimizer.

Legend: L layers, N query and K key/value heads of the whole model.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from model.attention_logits import LargestLogits
from model.config import ModelConfig
from model.gpt import GPTStage
from parallel.collectives import all_reduce
from parallel.layout import Layout
from parallel.shard import own_shard
from parallel.tensor import tp_placement
from pretrain.config.config import Config


@dataclass(frozen=True)
class _Projection:
    """Describes a weight or bias of q or k, of which this rank holds some rows."""

    parameter: nn.Parameter
    layer: int
    is_query: bool
    kv_heads: torch.Tensor
    """The key/value head that each row of this rank belongs to or reads, int64 [rows]."""


class LogitFacts(TypedDict):
    """Holds what a step's result says of its attention logits (pretrain/step.py: StepResult)."""

    max_attention_logit: float
    qk_clipped_heads: int | None


class LogitWatch:
    """Measures the attention logits of each step, and clips the weights behind them if asked to.

    All ranks take part alike, and the host does not wait for the device, unless the weights are in
    its memory.
    """

    def __init__(
        self,
        stages: Sequence[GPTStage],
        model: ModelConfig,
        layout: Layout,
        compute_dtype: torch.dtype,
        *,
        threshold: float | None = None,
        alpha: float = 0.5,
    ):
        """
        Args:
            threshold: of QK-clip; None = only measure.
            alpha: power of eta that scales the query's weights; the key's get the rest of it.
        """
        self.layout = layout
        self.num_kv_heads = model.num_kv_heads
        self.threshold = threshold
        self.alpha = alpha
        dtype = torch.promote_types(compute_dtype, torch.float32)
        self.largest = LargestLogits(
            model.num_layers, model.num_attention_heads, dtype, layout.device
        )
        self.projections: list[_Projection] = []
        if threshold is not None:
            self.projections = list(_projections(stages, model, layout))

    @staticmethod
    def make(
        config: Config, stages: Sequence[GPTStage], layout: Layout, compute_dtype: torch.dtype
    ) -> "LogitWatch | None":
        """Make what the settings ask for; None where they ask for nothing."""
        settings = config.optimizer
        if not (settings.qk_clip or config.logging.log_max_attention_logit):
            return None
        return LogitWatch(
            stages,
            config.model,
            layout,
            compute_dtype,
            threshold=settings.qk_clip_threshold if settings.qk_clip else None,
            alpha=settings.qk_clip_alpha,
        )

    def begin_step(self) -> None:
        """Forget the logits of the step before."""
        self.largest.clear()

    @torch.no_grad()
    def after_update(self, is_good: torch.Tensor) -> list[torch.Tensor]:
        """Compare the ranks' logits, and clip this rank's rows unless the step was skipped.

        Args:
            is_good: a truth value on the device, the same on all ranks: was anything updated?

        Returns:
            The largest logit of the model and the number of query heads that were clipped, fp64
            scalars on the device, the same on all ranks.
        """
        # Other ranks saw other tokens, or have other heads or layers.
        values_LN = all_reduce(self.largest.values_LN, self.layout.world, dist.ReduceOp.MAX)
        eta_LK = self._eta(values_LN, is_good)
        if self.threshold is not None:
            for_query_LK = eta_LK**self.alpha
            for_key_LK = eta_LK ** (1 - self.alpha)
            for each in self.projections:
                factors_LK = for_query_LK if each.is_query else for_key_LK
                _scale_rows(each.parameter, factors_LK[each.layer][each.kv_heads])
        queries_per_key = values_LN.shape[1] // self.num_kv_heads
        num_clipped = (eta_LK < 1).sum() * queries_per_key
        return [values_LN.max().double(), num_clipped.double()]

    def describe(self, largest: float, num_clipped: float) -> LogitFacts:
        """Name what `after_update` returned, once the host has it."""
        clipped = None if self.threshold is None else int(num_clipped)
        return LogitFacts(max_attention_logit=largest, qk_clipped_heads=clipped)

    def _eta(self, values_LN: torch.Tensor, is_good: torch.Tensor) -> torch.Tensor:
        """Compute the factor on the logits of each key/value head; 1 = unchanged -> [L, K]."""
        largest_LK = values_LN.unflatten(1, (self.num_kv_heads, -1)).amax(-1)
        ones_LK = torch.ones_like(largest_LK)
        if self.threshold is None:
            return ones_LK
        # A negative largest logit gives no factor. Nor does an infinite one, which a cap may have
        # hidden from the loss: its factor would be 0.
        is_above = (largest_LK > self.threshold) & torch.isfinite(largest_LK)
        return torch.where(is_above & is_good, self.threshold / largest_LK, ones_LK)


def _projections(
    stages: Sequence[GPTStage], model: ModelConfig, layout: Layout
) -> Iterator[_Projection]:
    """Yield the weights and biases of q and k in this rank's layers."""
    queries_per_key = model.num_attention_heads // model.num_kv_heads
    for stage in stages:
        for name, parameter in stage.named_parameters():
            found = re.fullmatch(r"layers\.(\d+)\.attention\.([qk])\.(weight|bias)", name)
            if found is None:
                continue
            is_query = found[2] == "q"
            rows = model.head_size * (queries_per_key if is_query else 1)
            kv_heads = _own_rows(parameter, layout) // rows
            yield _Projection(parameter, int(found[1]), is_query, kv_heads)


def _own_rows(parameter: nn.Parameter, layout: Layout) -> torch.Tensor:
    """List the numbers of this rank's rows among those of the whole parameter."""
    assert isinstance(parameter, DTensor)
    # tp cuts the rows first (model/sharding.py), then FSDP2 cuts what is left.
    rows = parameter.shape[0]
    begin = 0
    if isinstance(tp_placement(parameter), Shard):
        rows //= layout.tp.size
        begin = layout.tp.rank * rows
    # The first ranks have equal parts, one may have fewer, and those after it none.
    per_rank = -(-rows // layout.dp_cp.size)
    first = min(layout.dp_cp.rank * per_rank, rows)
    last = min(first + per_rank, rows)
    assert last - first == own_shard(parameter).shape[0], "FSDP2 cuts rows in another way"
    return torch.arange(begin + first, begin + last, device=layout.device)


def _scale_rows(parameter: nn.Parameter, factors: torch.Tensor) -> None:
    """Multiply this rank's rows by a factor each."""
    shard = own_shard(parameter)
    # The shard may be in the host's memory.
    factors = factors.to(shard.device, shard.dtype)
    shard.mul_(factors.view(-1, *[1] * (shard.dim() - 1)))
