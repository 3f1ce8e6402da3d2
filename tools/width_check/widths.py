"""One model at several widths: what each width's settings are, and a few steps of the trainer."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.batch import Batch
from data.ledger import Ledger
from model.attention_backends.choice import choose_attention
from model.config import ModelConfig
from parallel.layout import Layout
from parallel.shard import own_shard
from pretrain.batches import Feed
from pretrain.plan import Plan
from pretrain.planner.model_size import document_cost_of
from pretrain.state import TrainState, build_state, compute_dtype
from pretrain.step import Stepper, train_step
from tools.width_check.activations import (
    Activations,
    Comparison,
    Keep,
    MeanSquares,
    draw_measured,
    observed,
)

SCALED = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""Sizes that grow with the width; heads keep their size."""


def at_width(model: ModelConfig, width: int, base: int, *, mup: bool) -> ModelConfig:
    """Return the model at another width, with as many heads more or less, of the same size.

    Args:
        base: the width at which muP scales nothing.

    Raises:
        ValueError: a size of the model would not be whole.
    """
    sizes: dict[str, Any] = {}
    for name in SCALED:
        size = getattr(model, name)
        if size is None:
            continue
        sizes[name], rest = divmod(size * width, model.hidden_size)
        if rest or sizes[name] == 0:
            raise ValueError(
                f"widths = {width}: the model has {name} = {size} at hidden_size = "
                f"{model.hidden_size}, which is no whole number there. Fix: another width, or a "
                "model whose sizes divide."
            )
    return dataclasses.replace(
        model,
        hidden_size=width,
        kv_channels=model.head_size,
        use_mup=mup,
        mup_base_hidden_size=base if mup else None,
        # Heads have one size at all widths.
        mup_base_head_dim=float(model.head_size),
        mup_base_ffn_hidden_size=None,
        mup_base_num_attention_heads=None,
        **sizes,
    )


@dataclass(frozen=True)
class Data:
    """What every width is trained on."""

    steps: list[list[Batch]]
    probe: list[Batch]
    """Microbatches of a step that is not trained, on which activations are measured."""
    measured: list[torch.Tensor]
    """Places of the tokens of each of them whose activations are measured."""


def read_data(plan: Plan, layout: Layout, count: int) -> Data:
    """Read the batches of the run's first steps, as training does."""
    eod = plan.tokenizer.eod if plan.tokenizer else None
    feed = Feed(
        plan.config.data,
        plan.corpus,
        # Not the plan's, which goes on where a run with checkpoints is.
        Ledger(plan.corpus.train),
        layout,
        eod=eod,
        vocab_size=plan.vocab_size,
        cost=document_cost_of(plan.config.model, plan.vocab_size),
    )
    phase = plan.phases[0]
    feed.enter(phase, 0)
    batches = []
    clock = 0
    for _ in range(count + 1):
        batches.append([part.to(layout.device) for part in feed.read(clock)])
        clock += phase.batch_at(clock)
    probe = batches[-1]
    return Data(batches[:-1], probe, draw_measured([len(batch.tokens) for batch in probe]))


class Trainer:
    """Trains one model of one width, with the trainer's own parts."""

    def __init__(self, plan: Plan, model: ModelConfig, layout: Layout, seed: int):
        optimizer = dataclasses.replace(plan.config.optimizer, seed=seed)
        config = dataclasses.replace(plan.config, model=model, optimizer=optimizer)
        phase = plan.phases[0]
        dtype = compute_dtype(optimizer)
        attend, _ = choose_attention(
            model.attention_backend, layout.device, dtype, needs=model.scoring_needs
        )
        own_plan = dataclasses.replace(plan, config=config)
        self.state: TrainState = build_state(own_plan, phase, layout, attend)
        for stage in self.state.stages:
            stage.rope = phase.rope
            stage.memory = phase.memory
        self.clip_grad = optimizer.clip_grad
        self.stepper = Stepper(
            self.state.stages, layout, model.hidden_size, dtype, phase.layout.sharding_strategy
        )

    def clear_output(self) -> None:
        """Set an untied output's weight to 0."""
        (stage,) = self.state.stages
        with torch.no_grad():
            own_shard(stage.output.weight).zero_()

    def losses(self, steps: Sequence[list[Batch]], lr: float) -> Iterator[float]:
        """Train with a constant learning rate, and yield each step's loss."""
        for batches in steps:
            optimizer = self.state.optimizer
            yield train_step(self.stepper, optimizer, batches, lr, self.clip_grad).loss

    def activations(self, data: Data) -> Activations:
        """Run forward on the probe and return the activations of its measured tokens."""
        kept: Activations = defaultdict(list)
        self._observe(data, lambda kind, x: kept[kind].append(x))
        return kept

    def mean_squares(self, data: Data, before: Activations) -> dict[str, MeanSquares]:
        """Run forward on the probe and measure the activations of its measured tokens.

        Args:
            before: those of an earlier pass, which are freed.
        """
        comparison = Comparison(before)
        self._observe(data, comparison.add)
        return comparison.mean_squares()

    def _observe(self, data: Data, keep: Keep) -> None:
        (stage,) = self.state.stages
        with observed(stage, data.measured, keep):
            self.stepper.run(data.probe, train=False)
