"""Muon (arXiv 2502.16982) for hidden matrices, AdamW for everything else.

An update is the momentum of a whole matrix, made nearly orthogonal, times a scale that gives it the
size of AdamW's updates, so that learning rate and weight decay carry over. Momentum is sharded as
the weights are. Bucket by bucket the owners gather whole matrices (exchange.py), orthogonalize them
(newton_schulz.py) and give the results back; the next bucket is sent while one is computed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from parallel.layout import Layout, has_bf16_units
from parallel.shard import own_shard
from parallel.tensor import tp_placement
from pretrain.config.optimizer_config import OptimizerConfig
from pretrain.muon.exchange import Bucket
from pretrain.muon.newton_schulz import orthogonalize_all, steps_of
from pretrain.muon.owners import Matrix, assign_owners, make_buckets
from pretrain.parameter_groups import ParameterGroup

ScaleMode = Literal["spectral", "shape_scaling", "unit_rms_norm"]
MOMENTUM = "momentum_buffer"
"""Name of the only state of a matrix, in a checkpoint."""


def scale_of(rows: int, columns: int, mode: ScaleMode, extra: float) -> float:
    """Return what an orthogonal matrix of this shape is multiplied by.

    With `spectral` and 0.2 the root mean square of its elements becomes 0.2, about that of AdamW's
    updates.
    """
    if mode == "spectral":
        return extra * max(rows, columns) ** 0.5
    if mode == "shape_scaling":
        return extra * max(1.0, rows / columns) ** 0.5
    return extra * (rows / columns) ** 0.5


def dtype_of_products(
    master: torch.dtype, device: torch.device, precision: Literal["medium", "highest"]
) -> torch.dtype:
    """Choose the dtype of Newton-Schulz: bf16 where the device has units for it.

    fp64 weights have fp64 updates, to compare layouts exactly.
    """
    if master == torch.float32 and precision == "medium" and has_bf16_units(device):
        return torch.bfloat16
    return master


@dataclass(frozen=True)
class Hidden:
    """Describes a matrix that Muon updates."""

    parameter: nn.Parameter
    matrix: Matrix
    group: dict[str, Any]
    """The parameter group, which has its learning rate and weight decay."""
    scale: float


class Muon(torch.optim.Optimizer):
    """Updates the groups marked `by_muon` by Muon, and the others by an AdamW.

    As with torch's fused AdamW, a step changes nothing where `found_inf`, on the device, is not 0.
    """

    found_inf: torch.Tensor

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        make_adamw: Callable[[list[dict[str, Any]]], torch.optim.AdamW],
        layout: Layout,
        config: OptimizerConfig,
        heads: Callable[[str], int],
    ):
        """
        Args:
            groups: of this rank's parameters; the groups and their order are the same on all ranks.
            heads: name of a parameter -> the heads that its rows are made of, 1 where it has none.
        """
        super().__init__([dict(group) for group in groups], {"lr": config.lr})
        # AdamW has some of the same group objects, and its state holds the momenta, too.
        self.adamw = make_adamw([group for group in self.param_groups if not group["by_muon"]])
        self.state = self.adamw.state
        self.momentum = config.muon_momentum
        self.nesterov = config.muon_nesterov
        self.steps = steps_of(config.muon_coefficient_type, config.muon_num_ns_steps)
        self.hidden = [
            self._describe(name, parameter, group, layout, config, heads)
            for group in self.param_groups
            if group["by_muon"]
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        self.buckets = self._make_buckets(layout, config)
        for hidden in self.hidden:
            self.state[hidden.parameter] = {MOMENTUM: torch.zeros_like(hidden.parameter)}

    @staticmethod
    def _describe(
        name: str,
        parameter: nn.Parameter,
        group: dict[str, Any],
        layout: Layout,
        config: OptimizerConfig,
        heads: Callable[[str], int],
    ) -> Hidden:
        if parameter.dim() != 2:
            raise ValueError(
                f"{name} of shape {list(parameter.shape)}: Muon updates matrices, with 2 dims. "
                "Fix: another role than hidden in model/sharding.py, which AdamW updates."
            )
        assert isinstance(parameter, DTensor)
        rows, columns = parameter.shape
        cut = tp_placement(parameter)
        tp_dim = cut.dim if isinstance(cut, Shard) and layout.tp.size > 1 else None
        blocks = heads(name) if config.muon_per_head else 1
        matrix = Matrix(rows, columns, tp_dim, blocks)
        scale = scale_of(
            matrix.block_rows, columns, config.muon_scale_mode, config.muon_extra_scale_factor
        )
        return Hidden(parameter, matrix, group, scale)

    def _make_buckets(self, layout: Layout, config: OptimizerConfig) -> list[Bucket]:
        """Share the matrices out among the ranks of the stage, and cut the work into buckets."""
        if not self.hidden:
            return []
        matrices = [hidden.matrix for hidden in self.hidden]
        ranks = layout.dp_cp_tp.size
        owners = assign_owners([matrix.cost() for matrix in matrices], ranks)
        dtype = dtype_of_products(
            self.hidden[0].parameter.dtype, layout.device, config.muon_fp32_matmul_prec
        )
        return [
            Bucket(matrices, by_owner, layout, dtype)
            for by_owner in make_buckets(matrices, owners, ranks)
        ]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyrefly: ignore[bad-override]
        """Update all parameters by their gradients."""
        assert closure is None, "forward and backward run before the step, not in it"
        # The name under which the fused kernel looks for it.
        self.adamw.found_inf = self.found_inf  # pyrefly: ignore[missing-attribute]
        self.adamw.step()
        if not self.buckets:
            return
        self._decay()
        # While a bucket is computed the next one is gathered, and the last one scattered.
        gathered = self._start(self.buckets[0])
        scattered: Callable[[], None] | None = None
        for bucket, following in zip(self.buckets, [*self.buckets[1:], None], strict=True):
            wholes = gathered()
            if following is not None:
                gathered = self._start(following)
            pieces = bucket.scatter(self._orthogonalize(bucket, wholes))
            if scattered is not None:
                scattered()
            scattered = self._make_add(bucket, pieces)
        assert scattered is not None
        scattered()

    def _decay(self) -> None:
        """Apply the weight decay to the matrices of Muon, unless the step is skipped."""
        for group in self.param_groups:
            shards = [own_shard(parameter) for parameter in group["params"]]
            if group["by_muon"] and shards:
                is_good = (self.found_inf == 0).to(shards[0].dtype)
                torch._foreach_mul_(shards, 1 - is_good * (group["lr"] * group["weight_decay"]))

    def _hidden_of(self, bucket: Bucket) -> list[Hidden]:
        return [self.hidden[number] for number in bucket.numbers]

    def _start(self, bucket: Bucket) -> Callable[[], list[torch.Tensor]]:
        """Update the momenta of a bucket, and start to gather them."""
        is_good = self.found_inf == 0
        hiddens = self._hidden_of(bucket)
        momenta = [own_shard(self.state[each.parameter][MOMENTUM]) for each in hiddens]
        # In a skipped step the momentum takes the gradient's place, which leaves it unchanged.
        grads = [
            torch.where(is_good, own_shard(each.parameter.grad), momentum)
            for each, momentum in zip(hiddens, momenta, strict=True)
        ]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        if self.nesterov:
            torch._foreach_lerp_(grads, momenta, self.momentum)
        return bucket.gather(grads if self.nesterov else momenta)

    def _orthogonalize(self, bucket: Bucket, wholes: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Orthogonalize this rank's own matrices of a bucket, or each of their blocks."""
        blocks = [
            whole.view(matrix.blocks, matrix.block_rows, matrix.columns)
            for whole, matrix in zip(wholes, bucket.owned_matrices, strict=True)
        ]
        return [found.flatten(0, 1) for found in orthogonalize_all(blocks, self.steps)]

    def _make_add(self, bucket: Bucket, finish: Callable[[], torch.Tensor]) -> Callable[[], None]:
        """Make a function that waits for this rank's updates of a bucket and adds them."""

        def add() -> None:
            hiddens = self._hidden_of(bucket)
            weights = [own_shard(hidden.parameter) for hidden in hiddens]
            pieces = finish().to(weights[0].device, weights[0].dtype)
            shards = bucket.shards_of(pieces, weights)
            torch._foreach_mul_(shards, [-each.group["lr"] * each.scale for each in hiddens])
            # In a skipped step -0 is added, which changes no bit of a weight.
            pieces = torch.where(self.found_inf == 0, pieces, -0.0)
            torch._foreach_add_(weights, bucket.shards_of(pieces, weights))

        return add
