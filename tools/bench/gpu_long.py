"""Steps on long samples with few layers, scaled to all of them by the difference that two layers
make.

One rank of Qwen3-8B at a million tokens (standin.py), and 1B at half a million.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from data.batch import Batch
from model.config import ModelConfig
from model.estimate import step_flops
from model.kernels import choose_attention
from model.layer_memory import Load
from model.rank_memory import MemoryModel, show_bytes
from parallel.config import LayoutConfig
from tools.bench.contenders import STRATEGY, Ours, causal_pairs, lean, make_sample, one_process
from tools.bench.gpu_attention import QWEN_RANKS
from tools.bench.gpu_parts import GIB, SEED, Card, Scale
from tools.bench.lease_lines import Report
from tools.bench.products import TimedAttend
from tools.bench.standin import one_rank_of

ELEMENT = 2
"""Bytes of a bf16 number."""
QWEN_STRATEGY = "optim_grads_params"
WIRE = 350e9
"""Bytes per second and direction that a rank is taken to exchange with others in the model of
communication time."""
WARM_UP_TOKENS = 2048


@dataclass(frozen=True)
class Cost:
    """What one step takes, as far as it grows with the layers."""

    seconds: float
    peak: int
    """Bytes."""

    def report(self, report: Report, case: str, *, is_scaled: bool = False) -> None:
        """Report both figures."""
        kind = "scaled" if is_scaled else "measured"
        report.add("seconds", self.seconds, "s", case=case, kind=kind)
        report.add("peak", self.peak / 1e9, "GB", case=case, kind=kind)


def scale_to(costs: dict[int, Cost], layers: int) -> Cost:
    """The cost of `layers` layers by the line through two measured numbers of layers."""
    few, more = sorted(costs)
    share = (layers - few) / (more - few)
    first = costs[few]
    second = costs[more]
    return Cost(
        first.seconds + share * (second.seconds - first.seconds),
        round(first.peak + share * (second.peak - first.peak)),
    )


def name_case(layers: int) -> str:
    return f"{layers} layers"


def measure_layers(
    card: Card, report: Report, layers: Sequence[int], full: int, measure: Callable[[int], Cost]
) -> None:
    """Report the cost with each number of layers; from two of them, also that of the full model."""
    costs: dict[int, Cost] = {}
    for count in layers:
        with report.trying(name_case(count)):
            costs[count] = measure(count)
            costs[count].report(report, name_case(count))
        card.clear()
    if len(costs) == 2 and full not in costs:
        scale_to(costs, full).report(report, name_case(full), is_scaled=True)


# ---- one rank of Qwen3-8B ----


def qwen_rank(
    card: Card, scale: Scale, report: Report, *, tokens: int, layers: Sequence[int] | None
) -> None:
    """Report a whole step of rank 0 of cp 8, exchanges replaced; None stands for all layers."""
    config, _ = scale.model("qwen3-8b")
    full = config.num_layers
    measure_layers(
        card,
        report,
        layers or [full],
        full,
        lambda count: step_of_qwen_rank(card, scale, report, scale.tokens(tokens), count),
    )


def step_of_qwen_rank(card: Card, scale: Scale, report: Report, total: int, layers: int) -> Cost:
    """One step on one document; a layer's weights are gathered for its use, its kept tensors
    offloaded."""
    config, vocabulary = scale.model("qwen3-8b", num_layers=layers)
    settings = lean(config, total // QWEN_RANKS, cp_size=QWEN_RANKS)
    config = replace(config, **settings, cpu_offloading_num_layers=layers)
    card.pin_ahead(offloaded_bytes(config, total, QWEN_RANKS, ELEMENT))
    attend, chosen = choose_attention(
        config.attention_backend, card.device, getattr(torch, scale.dtype)
    )
    clock = TimedAttend(attend, card.device)
    with one_rank_of(QWEN_RANKS, card.device) as (layout, sent):
        contender = Ours(
            config, vocabulary, scale.dtype, layout, SEED, clock, strategy=QWEN_STRATEGY
        )
        warm_up = slice_of(
            min(total, QWEN_RANKS * WARM_UP_TOKENS), QWEN_RANKS, vocabulary, card.device
        )
        contender.step(warm_up)
        sent.clear()
        sample = slice_of(total, QWEN_RANKS, vocabulary, card.device)
        with clock.counting() as inside:
            seconds, peak = card.peak(lambda: contender.step(sample))
    heads = config.num_attention_heads // QWEN_RANKS
    work = 12 * layers * heads * config.head_size * causal_pairs([total])
    case = name_case(layers)
    report.add("attention seconds", inside[0], "s", case=case, note=chosen)
    report.add(
        "attention rate",
        work / inside[0] / 1e12,
        "TFLOP/s",
        case=case,
        note="forward and backward, no recompute counted",
    )
    for kind, size in sent.items():
        report.add(
            f"{kind} sent", size / 1e9, "GB", case=case, note="exchanged within the card here"
        )
    report.add(
        "wire seconds",
        sum(sent.values()) / WIRE,
        "s",
        case=case,
        kind="calculated",
        note=f"at {WIRE / 1e9:.0f} GB/s, if nothing overlapped",
    )
    return Cost(seconds, peak)


def slice_of(total: int, ranks: int, vocabulary: int, device: torch.device) -> Batch:
    """Rank 0's slice of one document of `total` tokens."""
    keep = total // ranks
    own = make_sample([keep + 1], vocabulary, SEED)
    edges = torch.tensor([0, total], dtype=torch.int32)
    return Batch(own.tokens[:keep], own.labels[:keep], own.positions[:keep], edges).to(device)


def offloaded_bytes(config: ModelConfig, total: int, ranks: int, element: int) -> list[int]:
    """The sizes of all large blocks that a context-parallel rank keeps on the host: each layer's
    input and each chunk's output."""
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
        lambda count: step_of_one_b(card, scale, report, total, count),
    )


def predicted_bytes(config: ModelConfig, vocabulary: int, tokens: int) -> int:
    """What the memory model says that one process needs."""
    layout = LayoutConfig(data_parallel_sharding_strategy=STRATEGY)
    load = Load(
        layout,
        data_parallel_size=1,
        seq_length=tokens,
        micro_batch_size=1,
        num_microbatches=1,
        memory=config.memory,
    )
    return MemoryModel(config, vocabulary).worst(load).total


def step_of_one_b(card: Card, scale: Scale, report: Report, total: int, layers: int) -> Cost:
    """One step on one document."""
    config, vocabulary = scale.model("1b", num_layers=layers)
    config = replace(config, **lean(config, total))
    case = name_case(layers)
    with one_process() as layout:
        before = card.held()
        contender = Ours(config, vocabulary, scale.dtype, layout, SEED)
        report.add("weights and moments", (card.held() - before) / GIB, "GiB", case=case)
        contender.step(make_sample([64], vocabulary, SEED, card.device))
        sample = make_sample([total], vocabulary, SEED, card.device)
        seconds, peak = card.peak(lambda: contender.step(sample))
    rate = step_flops(config, vocabulary, total, causal_pairs([total])) / seconds / 1e12
    report.add("rate", rate, "TFLOP/s", case=case)
    return Cost(seconds, peak)
