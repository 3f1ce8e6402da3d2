"""Measure steps on samples of 8K tokens: ours by attention kernel and loss chunk, and a peer."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from parallel.layout import Layout
from pretrain.planner.model_size import ModelSize
from tools.bench.contenders import (
    LOSS_CHUNK,
    Contender,
    Ours,
    causal_pairs,
    make_sample,
    one_process,
)
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import (
    ATTENTION_BACKENDS,
    GIB,
    SEED,
    Card,
    Scale,
    attention_of,
    missing_backend,
)
from tools.bench.peers import PeerOptions, Transformers

LENGTH = 8192
OTHER_CHUNK = 8192
"""Tokens of the loss's chunk that are tried beside LOSS_CHUNK, with the fastest kernel: what the
trainer takes on a GPU by itself where the memory suffices (pretrain/planner/loss_chunks.py)."""
REPEATS = 5
PEER = "transformers + torch.compile"


@dataclass(frozen=True)
class Step:
    """Hold what one contender's step took."""

    seconds: float
    """Median of REPEATS."""
    loss: float
    """Loss of the first step."""
    peak: int
    """Most bytes in tensors during a step."""


def ours(
    card: Card,
    scale: Scale,
    report: Report,
    *,
    model: str,
    samples: int,
    backends: Sequence[str] = ATTENTION_BACKENDS,
) -> None:
    """Report our step by attention kernel; with the fastest, also by another chunk of the loss."""
    row = Row(card, scale, report, model, samples)
    seconds: dict[str, float] = {}
    for backend in backends:
        case = name_case(backend, LOSS_CHUNK)
        # A kernel that is not there is a line, not an end.
        missing = missing_backend(backend, card, scale)
        if missing:
            report.skip(missing, case=case)
            continue
        with report.trying(case):
            seconds[backend] = row.measure_ours(case, backend, LOSS_CHUNK)
    if seconds:
        fastest = min(seconds, key=seconds.__getitem__)
        case = name_case(fastest, OTHER_CHUNK)
        with report.trying(case):
            row.measure_ours(case, fastest, OTHER_CHUNK)


def name_case(backend: str, chunk: int) -> str:
    """Name a case of ours."""
    return f"ours, {backend}, loss by {chunk:,}"


def peer(card: Card, scale: Scale, report: Report, *, model: str, samples: int) -> None:
    """Report transformers' step under torch.compile, with Liger's kernels where they are
    installed: without them, the logits of 4 samples of 8K do not fit 80 GB."""
    row = Row(card, scale, report, model, samples)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    if not has_liger:
        report.skip("liger-kernel is not installed", case=f"{PEER} + Liger")
    # Liger's kernels and torch.compile's code are for a GPU.
    way = PeerOptions(compiled=not scale.toy, batched=True, liger=has_liger and card.is_cuda)
    case = f"{PEER} + Liger" if way.liger else PEER
    with report.trying(case):
        row.measure(case, row.peer(way))


class Row:
    """Measure contenders on samples of one model."""

    def __init__(self, card: Card, scale: Scale, report: Report, model: str, samples: int):
        self.card = card
        self.scale = scale
        self.report = report
        self.config, self.vocabulary = scale.model(model)
        length = scale.tokens(LENGTH)
        self.tokens = samples * length
        self.sample = make_sample([length] * samples, self.vocabulary, SEED, card.device)
        pairs = causal_pairs([length] * samples)
        self.flops = ModelSize(self.config, self.vocabulary).step_flops(self.tokens, pairs)
        # Clocks differ from card to card: shares are of this one's rate.
        self.tflops = card.product_tflops(scale)
        report.add("product", self.tflops, "TFLOP/s")

    def measure_ours(self, case: str, backend: str, chunk: int) -> float:
        """Report our trainer's step; returns its seconds."""
        changes: dict[str, Any] = {"attention_backend": backend, "loss_chunk_tokens": chunk}
        config = replace(self.config, **changes)
        attend, chosen = attention_of(config, self.card, self.scale)

        def build(layout: Layout) -> Contender:
            return Ours(config, self.vocabulary, self.scale.dtype, layout, SEED, attend)

        return self.measure(case, build, note=chosen)

    def peer(self, way: PeerOptions) -> Callable[..., Contender]:
        """Make the function that builds transformers' model."""
        return lambda layout: Transformers(
            self.config, self.vocabulary, self.scale.dtype, way, self.card.device, SEED
        )

    def measure(self, case: str, build: Callable[..., Contender], *, note: str = "") -> float:
        """Report a contender's step; returns its seconds."""
        # The contender before left its memory to the allocator.
        self.card.clear()
        with one_process() as layout:
            step = timed_steps(self.card, lambda: build(layout), self.sample)
        rate = self.flops / step.seconds / 1e12
        self.report.add("seconds", step.seconds, "s", case=case, note=note)
        self.report.add("tokens", self.tokens / step.seconds, "tokens/s", case=case)
        self.report.add("rate", rate, "TFLOP/s", case=case)
        self.report.add("share", rate / self.tflops, "of the product's rate", case=case)
        self.report.add("peak", step.peak / GIB, "GiB", case=case)
        self.report.add("loss", step.loss, "nats", case=case)
        return step.seconds


def timed_steps(card: Card, make: Callable[[], Contender], sample) -> Step:
    """Build a contender and time its step after two."""
    contender = make()
    # Compiles, and makes the moments.
    loss = contender.step(sample)
    contender.step(sample)
    # The peak of a warm step, then the times.
    _, peak = card.peak(lambda: contender.step(sample))
    seconds = card.median(lambda: contender.step(sample), repeats=REPEATS, warm_ups=0)
    return Step(seconds, loss, peak)
