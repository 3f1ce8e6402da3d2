"""Measure attention by kernel: one Qwen3-8B rank, many documents beside one, the crossover."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention_backends.backend import HeadShape
from model.attention_backends.choice import BACKENDS, choose_attention
from model.attention_backends.crossover import crossover_of, measure, padded_lengths
from model.attention_backends.documents import pack_documents
from model.attention_backends.kernel_calls import NEVER, assumed_crossover
from model.attention_backends.mixed import mixed_attention
from tools.bench.contenders import Ours, causal_pairs, lean, make_sample, one_process
from tools.bench.gpu.lines import Report
from tools.bench.gpu.parts import (
    ASSUMED,
    ATTENTION_BACKENDS,
    SEED,
    Card,
    Scale,
    attention_of,
    describe_crossover,
    heads_of_call,
    missing_backend,
)
from tools.bench.products import TimedAttend

QWEN_RANKS = 8
SDPA_KERNELS = {
    "flash of sdpa": SDPBackend.FLASH_ATTENTION,
    "cuDNN of sdpa": SDPBackend.CUDNN_ATTENTION,
}
REPEATS = 3
BACKWARD_PRODUCTS = 5
"""Matrix products of a backward kernel, its recompute of the scores among them, as published rates
count them; forward has 2."""
DOCUMENT = 2048
"""Tokens of each of the many documents."""
EQUAL_LENGTHS = (512, 1024, 2048, 4096)
"""Tokens of the documents that are one call of cuDNN, as they are equal and need no padding."""
EQUAL_TOKENS = 16384
EQUAL_CALLS = 10
"""Calls that are timed together: one alone takes as long to launch as it does to run."""

Forward = Callable[[], torch.Tensor]
"""Compute the output, with its graph."""


@dataclass(frozen=True)
class Heads:
    """Hold one rank's share of a layer's attention: its tensors and its work."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    grad: torch.Tensor
    forward_flops: int
    """Operations of forward, the causal half."""


def qwen_attention(card: Card, scale: Scale, report: Report, *, tokens: int) -> None:
    """Report one layer's attention of rank 0 of cp 8 by kernel, and the crossover of two."""
    heads = make_heads(card, scale, scale.tokens(tokens))
    ways = ways_of_ours(card, scale, report, heads) | ways_of_sdpa(heads)
    for case, way in ways.items():
        with report.trying(case):
            measure_way(card, report, case, way, heads)
    config, _ = scale.model("qwen3-8b")
    report_crossover(card, scale, report, heads_of_call(config, QWEN_RANKS))


def make_heads(card: Card, scale: Scale, tokens: int) -> Heads:
    """Draw q, k, v and the output's gradient of one document."""
    config, _ = scale.model("qwen3-8b")
    size = config.head_size
    query_heads = config.num_attention_heads // QWEN_RANKS
    kv_heads = config.num_kv_heads // QWEN_RANKS
    dtype = getattr(torch, scale.dtype)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, size, device=card.device, dtype=dtype)

    q = draw(query_heads).requires_grad_()
    k = draw(kv_heads).requires_grad_()
    v = draw(kv_heads).requires_grad_()
    # Two products of 2 operations per pair, head and channel.
    work = 4 * query_heads * size * causal_pairs([tokens])
    return Heads(q, k, v, draw(query_heads), work)


def ways_of_ours(card: Card, scale: Scale, report: Report, heads: Heads) -> dict[str, Forward]:
    """Make the calls of our backends; a line each names those that are missing."""
    edges = torch.tensor([0, len(heads.q)], dtype=torch.int32)
    (segments,) = pack_documents(edges, [(0, len(heads.q))], card.device)
    ways: dict[str, Forward] = {}
    for name in dict.fromkeys([*ATTENTION_BACKENDS, *BACKENDS]):
        missing = missing_backend(name, card, scale)
        if missing:
            report.skip(missing, case=name)
            continue
        attend, _ = choose_attention(name, card.device, heads.q.dtype)
        ways[name] = lambda attend=attend: attend(heads.q, heads.k, heads.v, segments)
    return ways


def ways_of_sdpa(heads: Heads) -> dict[str, Forward]:
    """Make the calls of torch's kernels one by one, as [1, heads, tokens, size]."""

    def by(kernel: SDPBackend) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (heads.q, heads.k, heads.v))
        with sdpa_kernel(kernel):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return {name: lambda kernel=kernel: by(kernel) for name, kernel in SDPA_KERNELS.items()}


def measure_way(card: Card, report: Report, case: str, way: Forward, heads: Heads) -> None:
    """Report the median seconds and the rates of forward, backward and both."""
    # The kernel before left its memory to the allocator.
    card.clear()
    forward: list[float] = []
    backward: list[float] = []
    for _ in range(1 + REPEATS):
        outputs: list[torch.Tensor] = []
        forward.append(card.seconds(lambda outputs=outputs: outputs.append(way())))
        backward.append(card.seconds(lambda outputs=outputs: outputs.pop().backward(heads.grad)))
    total = 0.0
    for name, times, flops in (
        ("forward", forward, heads.forward_flops),
        ("backward", backward, BACKWARD_PRODUCTS * heads.forward_flops // 2),
    ):
        # The first round warmed up.
        seconds = statistics.median(times[1:])
        total += seconds
        report.add(f"{name} seconds", seconds, "s", case=case)
        report.add(f"{name} rate", flops / seconds / 1e12, "TFLOP/s", case=case)
    rate = 3 * heads.forward_flops / total / 1e12
    report.add("model rate", rate, "TFLOP/s", case=case, note="of both, no recompute counted")


def report_crossover(card: Card, scale: Scale, report: Report, heads: HeadShape) -> tuple[int, str]:
    """Report from how many tokens on cuDNN is faster, found as the trainer does at its start.

    Returns:
        the tokens, and where they are from.
    """
    dtype = getattr(torch, scale.dtype)
    query, kv, size = heads
    case = f"crossover, {query} query and {kv} key/value heads of {size}"
    missing = BACKENDS["mixed"].missing(card.device, dtype, heads=heads)
    if missing:
        report.skip(missing, case=case)
        return assumed_crossover(heads), ASSUMED
    milliseconds: dict[int, tuple[float, float]] = {}
    with report.trying(case):
        milliseconds = measure(heads, card.device, dtype)
    if not milliseconds:
        return assumed_crossover(heads), ASSUMED
    for length, (of_cudnn, of_varlen) in milliseconds.items():
        note = f"cuDNN; varlen {of_varlen:.3f} ms"
        report.add(f"documents of {length:,}", of_cudnn, "ms", case=case, note=note)
    found = crossover_of(milliseconds)
    note = f"forward and backward, {padded_lengths(heads)[-1]:,} tokens a call"
    report.add("to cuDNN from", describe_crossover(found), case=case, note=note)
    return found, "measured"


def report_equal_documents(card: Card, scale: Scale, report: Report, heads: HeadShape) -> None:
    """Report documents of equal length as one call of cuDNN, beside the varlen op.

    The crossover's documents are each a call of cuDNN. This says what short documents would take
    if those of about one length were padded into one call.
    """
    dtype = getattr(torch, scale.dtype)
    query, kv, size = heads
    case = f"equal documents, {query} query and {kv} key/value heads of {size}"
    missing = BACKENDS["mixed"].missing(card.device, dtype, heads=heads)
    if missing:
        report.skip(missing, case=case)
        return
    total = scale.tokens(EQUAL_TOKENS)
    q, k, v = (
        torch.randn(total, count, size, device=card.device, dtype=dtype).requires_grad_()
        for count in (query, kv, kv)
    )
    for length in EQUAL_LENGTHS:
        bounds = torch.arange(0, total + 1, length, dtype=torch.int32, device="cpu")
        (packed,) = pack_documents(bounds, [(0, total)], card.device)
        milliseconds: dict[int, float] = {}
        for crossover in (1, NEVER):
            attend = mixed_attention(crossover)

            def calls(attend=attend, packed=packed) -> None:
                for _ in range(EQUAL_CALLS):
                    out = attend(q, k, v, packed)
                    torch.autograd.grad(out, (q, k, v), out.detach())

            seconds = card.median(calls, repeats=REPEATS, warm_ups=1)
            milliseconds[crossover] = 1e3 * seconds / EQUAL_CALLS
        note = f"one call of cuDNN; varlen {milliseconds[NEVER]:.3f} ms"
        report.add(f"documents of {length:,}", milliseconds[1], "ms", case=case, note=note)


def documents(card: Card, scale: Scale, report: Report, *, tokens: int) -> None:
    """Report attention's time in a step of 2 layers of 1B, in one document and in many."""
    total = scale.tokens(tokens)
    many = 4 if scale.toy else total // DOCUMENT
    config, vocabulary = scale.model("1b", num_layers=2)
    config = replace(config, **lean(config, total))
    # With the crossover that a run would find for these heads.
    crossover, how = report_crossover(card, scale, report, heads_of_call(config))
    with report.trying("equal documents"):
        report_equal_documents(card, scale, report, heads_of_call(config))
    attend, chosen = attention_of(config, card, scale, crossover=crossover, how=how)
    clock = TimedAttend(attend, card.device)
    times: dict[int, list[float]] = {1: [], many: []}
    with one_process() as layout:
        contender = Ours(config, vocabulary, scale.dtype, layout, SEED, clock)
        samples = {
            count: make_sample([total // count] * count, vocabulary, SEED, card.device)
            for count in times
        }
        for turn in range(1 + REPEATS):
            for count in list(times)[:: -1 if turn % 2 else 1]:
                with clock.counting() as inside:
                    contender.step(samples[count])
                # The first turn warms up.
                times[count] += inside if turn else []
    one = statistics.median(times[1])
    other = statistics.median(times[many])
    report.add("seconds", one, "s", case="1 document", note=chosen)
    report.add("seconds", other, "s", case=f"{many} documents")
    # The sum of squares is 1 / many of one document's
    report.add("ratio", other / one * many, "of what the sum of squares predicts")
