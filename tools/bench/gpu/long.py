"""Measure steps on long samples with few layers, scaled to all by what further layers take.

One rank of Qwen3-8B at a million tokens (standin.py), and 1B at half a million.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from data.batch import Batch
from data.units import show_bytes
from parallel.config import LayoutConfig
from pretrain.planner.model_size import ModelSize
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.workload import Workload
from tools.bench.contenders import (
    STRATEGY,
    BenchModel,
    Ours,
    causal_pairs,
    lean,
    make_sample,
    one_process,
)
from tools.bench.gpu.attention import QWEN_RANKS
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import SEED, Card, Scale, attention_of
from tools.bench.products import TimedAttend
from tools.bench.standin import one_rank_of

ELEMENT = 2
"""Bytes of a bf16 number."""
QWEN_STRATEGY = "optim_grads_params"
WIRE = 350e9
"""Bytes per second and direction that a rank is taken to exchange with others in the model of
communication time."""
WARM_UP_TOKENS = 2048
"""Tokens of a rank in a first step, which makes the moments."""


@dataclass(frozen=True)
class Cost:
    """Hold what one step takes, as far as it grows with the layers."""

    seconds: float
    peak: int
    """Bytes."""

    def report(self, report: Report, case: str, *, is_scaled: bool = False) -> None:
        """Report both figures."""
        kind = "scaled" if is_scaled else "measured"
        report.add("seconds", self.seconds, "s", case=case, kind=kind)
        report.add("peak", self.peak / 1e9, "GB", case=case, kind=kind)


def scale_to(costs: dict[int, Cost], layers: int) -> Cost:
    """Scale the cost to `layers` layers, by the line through two measured numbers of layers."""
    few, more = sorted(costs)
    share = (layers - few) / (more - few)
    first = costs[few]
    second = costs[more]
    return Cost(
        first.seconds + share * (second.seconds - first.seconds),
        round(first.peak + share * (second.peak - first.peak)),
    )


def name_case(layers: int) -> str:
    """Name a case by its layers."""
    return f"{layers} layers"


def measure_layers(
    card: Card,
    report: Report,
    layers: Sequence[int],
    full: int,
    *,
    run: Callable[[int], "Run"],
) -> None:
    """Report the cost with each number of layers; from two of them, also that of the full model.

    Before them one layer runs on as many tokens: kernels are compiled, and cuDNN's plans made, when
    a shape is first met. In the first run alone, that time would be scaled as if it were the
    layers' own.
    """
    with report.trying("warm-up"):
        run(1)
    card.clear()
    costs: dict[int, Cost] = {}
    for count in layers:
        with report.trying(name_case(count)):
            found = run(count)
            found.report(report, name_case(count))
            costs[count] = found.cost
        card.clear()
    # Two points give the line.
    if len(costs) == 2 and full not in costs:
        scale_to(costs, full).report(report, name_case(full), is_scaled=True)


# ---- one rank of Qwen3-8B ----


def qwen_rank(
    card: Card, scale: Scale, report: Report, *, tokens: int, layers: Sequence[int] | None
) -> None:
    """Report a whole step of rank 0 of cp 8, exchanges replaced; None stands for all layers."""
    config, _ = scale.model("qwen3-8b")
    full = config.num_layers
    total = scale.tokens(tokens)
    measure_layers(
        card,
        report,
        layers or [full],
        full,
        run=lambda count: step_of_qwen_rank(card, scale, total, count),
    )


@dataclass(frozen=True)
class QwenRun:
    """Hold one step of the rank."""

    cost: Cost
    attention_seconds: float
    attention_flops: int
    """Operations of forward and backward, the causal half."""
    attention: str
    """What was chosen, and why."""
    sent: dict[str, int]
    """Bytes to the other ranks by collective."""

    def report(self, report: Report, case: str) -> None:
        """Report the step, the attention inside it, and what would go over the wire."""
        self.cost.report(report, case)
        seconds = self.attention_seconds
        # No recompute is counted.
        rate = self.attention_flops / seconds / 1e12
        report.add("attention seconds", seconds, "s", case=case, note=self.attention)
        note = "of forward and backward, no recompute counted"
        report.add("attention model rate", rate, "TFLOP/s", case=case, note=note)
        for collective, size in self.sent.items():
            note = "exchanged within the card here"
            report.add(f"{collective} sent", size / 1e9, "GB", case=case, note=note)
        on_wire = sum(self.sent.values()) / WIRE
        note = f"at {WIRE / 1e9:.0f} GB/s, if nothing overlapped"
        report.add("wire seconds", on_wire, "s", case=case, kind="calculated", note=note)


def step_of_qwen_rank(card: Card, scale: Scale, total: int, layers: int) -> QwenRun:
    """Take one step on one document; a layer's weights are gathered for its use, its kept tensors
    offloaded."""
    config, vocabulary = scale.model("qwen3-8b", num_layers=layers)
    settings = lean(config, total // QWEN_RANKS, cp_size=QWEN_RANKS)
    config = replace(config, **settings, cpu_offloading_num_layers=layers)
    # Pinning takes seconds, which a run spends once.
    card.pin_ahead(offloaded_bytes(config, total, QWEN_RANKS, ELEMENT))
    attend, chosen = attention_of(config, card, scale, ranks=QWEN_RANKS)
    clock = TimedAttend(attend, card.device)
    with one_rank_of(QWEN_RANKS, card.device) as (layout, sent):
        contender = Ours(
            config, vocabulary, scale.dtype, layout, SEED, clock, strategy=QWEN_STRATEGY
        )
        warm_up = slice_of(
            min(total, QWEN_RANKS * WARM_UP_TOKENS), QWEN_RANKS, vocabulary, card.device
        )
        # A first step, on few tokens, makes the moments.
        contender.step(warm_up)
        # Only the measured step counts.
        sent.clear()
        sample = slice_of(total, QWEN_RANKS, vocabulary, card.device)
        with clock.counting() as inside:
            seconds, peak = card.peak(lambda: contender.step(sample))
    heads = config.num_attention_heads // QWEN_RANKS
    # Forward 4, backward 8 per pair of a query and a key, head and channel.
    flops = 12 * layers * heads * config.head_size * causal_pairs([total])
    return QwenRun(Cost(seconds, peak), inside[0], flops, chosen, dict(sent))


def slice_of(total: int, ranks: int, vocabulary: int, device: torch.device) -> Batch:
    """Make rank 0's slice of one document of `total` tokens."""
    keep = total // ranks
    own = make_sample([keep + 1], vocabulary, SEED)
    edges = torch.tensor([0, total], dtype=torch.int32)
    return Batch(own.tokens[:keep], own.labels[:keep], own.positions[:keep], edges).to(device)


def offloaded_bytes(config: BenchModel, total: int, ranks: int, element: int) -> list[int]:
    """List the bytes of the large blocks that a rank keeps on the host.

    They are each layer's input and each head chunk's output.
    """
    heads = config.num_attention_heads // ranks // config.attention_head_chunks
    of_input = total // ranks * config.hidden_size * element
    of_chunk = total * heads * config.head_size * element
    return [of_input, *[of_chunk] * config.attention_head_chunks] * config.num_layers


# ---- 1B, one document ----


def one_b(
    card: Card, scale: Scale, report: Report, *, tokens: int, layers: Sequence[int] | None
) -> None:
    """Report a whole step of 1B on one document; None stands for all layers, if the memory model
    lets them fit."""
    total = scale.tokens(tokens)
    config, vocabulary = scale.model("1b")
    full = config.num_layers
    if layers is None:
        # All layers are tried only where they should fit.
        needed = predicted_bytes(replace(config, **lean(config, total)), vocabulary, total)
        if needed > card.capacity() and not scale.toy:
            report.skip(
                f"the memory model says {show_bytes(needed)}, and the card has "
                f"{show_bytes(card.capacity())}",
                case=name_case(full),
            )
            return
    measure_layers(
        card,
        report,
        layers or [full],
        full,
        run=lambda count: step_of_one_b(card, scale, total, count),
    )


def predicted_bytes(config: BenchModel, vocabulary: int, tokens: int) -> int:
    """Ask the memory model what one process needs."""
    layout = LayoutConfig(data_parallel_sharding_strategy=STRATEGY)
    load = Workload(
        layout,
        data_parallel_size=1,
        seq_length=tokens,
        micro_batch_size=1,
        num_microbatches=1,
        memory=config.settings,
    )
    return MemoryModel(config, vocabulary).estimate_worst(load).total


@dataclass(frozen=True)
class OneBRun:
    """Hold one step of 1B."""

    cost: Cost
    flops: float
    state_bytes: int
    """Weights, gradients and moments that stay between two steps."""
    attention: str
    """What was chosen, and why."""

    def report(self, report: Report, case: str) -> None:
        """Report the step, its rate, and what of its peak is there between two steps."""
        self.cost.report(report, case)
        rate = self.flops / self.cost.seconds / 1e12
        report.add("rate", rate, "TFLOP/s", case=case, note=self.attention)
        report.add("state", self.state_bytes / 1e9, "GB", case=case)


def step_of_one_b(card: Card, scale: Scale, total: int, layers: int) -> OneBRun:
    """Take one step on one document."""
    config, vocabulary = scale.model("1b", num_layers=layers)
    config = replace(config, **lean(config, total))
    attend, chosen = attention_of(config, card, scale)
    with one_process() as layout:
        before = card.held()
        contender = Ours(config, vocabulary, scale.dtype, layout, SEED, attend)
        contender.step(make_sample([min(total, WARM_UP_TOKENS)], vocabulary, SEED, card.device))
        state = card.held() - before
        sample = make_sample([total], vocabulary, SEED, card.device)
        seconds, peak = card.peak(lambda: contender.step(sample))
    flops = ModelSize(config, vocabulary).step_flops(total, causal_pairs([total]))
    return OneBRun(Cost(seconds, peak), flops, state, chosen)


Run = QwenRun | OneBRun
