"""The runs of the table "On one H200": what each measures and its bar. gpu.py starts them, one a call."""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.batch import Batch
from model.config import ModelConfig
from model.estimate import num_parameters, step_flops
from model.kernels import choose_attention, make_segments
from parallel.layout import Layout
from tools.bench.contenders import (
    ALST,
    CHECKPOINTED,
    LOSS_CHUNK,
    LOSS_TOLERANCES,
    MLP_TILE,
    PEERS,
    Contender,
    Dtype,
    Ours,
    Transformers,
    Way,
    causal_pairs,
    lean,
    make_sample,
    one_process,
)
from tools.bench.gpu_parts import GIB, Card, Scale
from tools.bench.memory import ladder
from tools.bench.products import TimedAttend
from tools.bench.standin import one_rank_of

SEED = 1234
ELEMENT = 2
"""Bytes of a bf16 number."""
HOST = 128 * GIB
"""Memory of the host that the run's bar names; what a virtual machine reports may grow with its use."""
FRONTIER_TILES = 64
"""Tiles of the MLP in the search for the longest sample, whose length is not known when the model is built."""
QWEN_RANKS = 8
WIRE = 350e9
"""Bytes per second and direction that a rank is taken to exchange with others in the model of communication time."""


@dataclass
class Outcome:
    """What a run found."""

    measured: str
    """For the table."""
    reached: bool | None = None
    """Its bar; None where it has none, or nothing could be measured."""
    details: list[str] = field(default_factory=list)
    """Lines below the table."""

    def to_json(self) -> dict:
        return asdict(self)


def dtype_of(scale: Scale) -> Dtype:
    return "float32" if scale.toy else "bfloat16"


# ---- 1B and 3B, 8K: the share of the product's rate, beside transformers ----

def packed_8k(name: str, samples: int) -> Callable[[Card, Scale, float], Outcome]:
    """A step on `samples` samples of 8K tokens, each one document."""
    def run(card: Card, scale: Scale, tflops: float) -> Outcome:
        config, vocabulary = scale.model(name)
        length = scale.tokens(8192)
        sample = make_sample([length] * samples, vocabulary, SEED, card.device)
        flops = step_flops(config, vocabulary, samples * length, causal_pairs([length] * samples))
        settings = {"loss_chunk_tokens": LOSS_CHUNK}
        rates, losses, details = {}, {}, []
        with one_process() as layout:
            ways: dict[str, Callable[[], Contender]] = {
                "ours": lambda: Ours(replace(config, **settings), vocabulary, dtype_of(scale), layout, SEED)}
            for label, way in compiled_ways(scale).items():
                ways[label] = lambda way=way: Transformers(config, vocabulary, dtype_of(scale), way, card.device, SEED)
            for label, make in ways.items():
                found = timed_steps(card, make, sample)
                if isinstance(found, str):
                    details.append(f"{label}: {found}")
                    continue
                seconds, losses[label], peak = found
                rates[label] = flops / seconds / 1e12
                details.append(f"{label}: {seconds:.3f} s, {samples * length / seconds:,.0f} tokens/s, "
                               f"{rates[label]:.0f} TFLOP/s, {rates[label] / tflops:.3f} of the product's rate, peak "
                               f"{peak / GIB:.1f} GiB")
        if importlib.util.find_spec("liger_kernel") is None:
            details.append("liger-kernel is not installed: transformers without it")
        return judge_rates(rates, losses, tflops, details)
    return run


def compiled_ways(scale: Scale) -> dict[str, Way]:
    """transformers compiled, and with Liger's kernels where they are installed."""
    found = {"transformers + torch.compile": Way(compiled=not scale.toy, batched=True)}
    if importlib.util.find_spec("liger_kernel") is not None:
        found["transformers + torch.compile + Liger"] = Way(compiled=not scale.toy, batched=True, liger=True)
    return found


def timed_steps(card: Card, make: Callable[[], Contender], sample: Batch) -> tuple[float, float, int] | str:
    """(median seconds of 5 steps, loss of the first, peak bytes), or why there are none. Frees the contender."""
    try:
        contender = make()
        loss = contender.step(sample)
        contender.step(sample)
        _, peak = card.peak(lambda: contender.step(sample))
        return card.median(lambda: contender.step(sample), repeats=5, warm_ups=0), loss, peak
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"
    finally:
        contender = None
        card.clear()


def judge_rates(rates: dict[str, float], losses: dict[str, float], tflops: float, details: list[str]) -> Outcome:
    """MFU at least 60 %, ahead of every peer, and the same loss."""
    if "ours" not in rates:
        return Outcome("not run: " + details[-1], None, details)
    wrong = [f"loss {loss:.5f} of {label}, {losses['ours']:.5f} of ours: times say nothing"
             for label, loss in losses.items() if abs(loss - losses["ours"]) > LOSS_TOLERANCES[0] * losses["ours"]]
    peers = [rate for label, rate in rates.items() if label != "ours"]
    ahead = f"{rates['ours'] / max(peers):.2f} times the fastest peer" if peers else "no peer ran"
    share = rates["ours"] / tflops
    complete = any("Liger" in label for label in rates)  # the bar names it
    return Outcome(f"MFU {share:.1%}, {ahead}",
                   share >= 0.6 and rates["ours"] > max(peers) if complete and not wrong else None, [*details, *wrong])


# ---- one rank of Qwen3-8B at a million tokens ----

def qwen_rank(card: Card, scale: Scale, tflops: float) -> Outcome:
    """A whole step of rank 0 of cp 8, exchanges replaced (standin.py); a layer's weights are gathered for its use."""
    ranks, total, strategy = QWEN_RANKS, scale.tokens(1 << 20), "optim_grads_params"
    config, vocabulary = scale.model("qwen3-8b")
    settings = lean(config, total // ranks, cp_size=ranks) | {"cpu_offloading_num_layers": config.num_layers}
    config = replace(config, **settings)
    card.pin_ahead(offloaded_bytes(config, total, ranks, ELEMENT))
    with one_rank_of(ranks, card.device) as (layout, sent):
        attend, chosen = choose_attention("auto", card.device, getattr(torch, dtype_of(scale)))
        clock = TimedAttend(attend, card.device)
        ours = Ours(config, vocabulary, dtype_of(scale), layout, SEED, clock, strategy=strategy)
        held = card.held()
        ours.step(slice_of(min(total, ranks * 2048), ranks, vocabulary, card.device))
        sent.clear()
        sample = slice_of(total, ranks, vocabulary, card.device)
        with clock.counting() as inside:
            seconds, peak = card.peak(lambda: ours.step(sample))
        ours = None
        card.clear()
    work = 12 * config.num_layers * config.num_attention_heads // ranks * config.head_size * causal_pairs([total])
    wire = sum(sent.values()) / WIRE
    details = [
        f"weights and moments of one of {ranks} ranks: {held / GIB:.1f} GiB; {strategy}; {chosen}",
        f"attention: {inside[0]:.1f} s of {seconds:.1f} s, {work / inside[0] / 1e12:.0f} TFLOP/s (forward and "
        "backward, no recompute counted)",
        "bytes that the rank sends, exchanged within the card here: "
        + ", ".join(f"{kind} {size / GIB:.1f} GiB" for kind, size in sent.items())
        + f"; modelled apart at {WIRE / 1e9:.0f} GB/s: {wire:.1f} s if nothing overlapped"]
    return Outcome(f"{peak / 1e9:.1f} GB, {seconds:.1f} s (without communication time)",
                   peak <= 45e9 and seconds <= 285, details)


def slice_of(total: int, ranks: int, vocabulary: int, device: torch.device) -> Batch:
    """Rank 0's slice of one document of `total` tokens."""
    own = make_sample([total // ranks + 1], vocabulary, SEED)
    keep = total // ranks
    return Batch(own.tokens[:keep], own.labels[:keep], own.positions[:keep],
                 torch.tensor([0, total], dtype=torch.int32)).to(device)


def offloaded_bytes(config: ModelConfig, total: int, ranks: int, element: int) -> list[int]:
    """Of every large block that a context-parallel rank keeps on the host: each layer's input, each chunk's output."""
    chunk = total * config.num_attention_heads // ranks // config.attention_head_chunks * config.head_size
    return [total // ranks * config.hidden_size * element,
            *[chunk * element] * config.attention_head_chunks] * config.num_layers


def qwen_attention(card: Card, scale: Scale, tflops: float) -> Outcome:
    """Forward and backward of one layer's attention of that rank, kernel by kernel."""
    tokens, dtype = scale.tokens(1 << 20), getattr(torch, dtype_of(scale))
    config, _ = scale.model("qwen3-8b")
    heads, kv_heads = (n // QWEN_RANKS for n in (config.num_attention_heads, config.num_kv_heads))
    size = config.head_size
    q, k, v = (torch.randn(tokens, n, size, device=card.device, dtype=dtype, requires_grad=True)
               for n in (heads, kv_heads, kv_heads))
    attend, chosen = choose_attention("auto", card.device, dtype)
    segments = make_segments(torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], card.device)[0]
    grad = torch.randn_like(q)

    def by_sdpa(backend):
        def run():
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True,
                                                     enable_gqa=True)
            out.backward(grad.transpose(0, 1)[None])
        return run

    ways = {"ours": lambda: attend(q, k, v, segments).backward(grad),
            "flash of sdpa": by_sdpa(SDPBackend.FLASH_ATTENTION), "cuDNN of sdpa": by_sdpa(SDPBackend.CUDNN_ATTENTION)}
    work, rates, details = 12 * heads * size * causal_pairs([tokens]), {}, []
    for label, way in ways.items():
        try:
            way()
            rates[label] = f"{label} {work / card.seconds(way) / 1e12:.0f} TFLOP/s"
        except RuntimeError as error:  # no such kernel for this shape or device
            details.append(f"{label} does not run: {str(error).partition(chr(10))[0]}")
    return Outcome(", ".join(rates.values()) or "no kernel runs", None, [*details, chosen])


# ---- 1B at 512K: a whole step, memory broken down ----

def one_b_512k(card: Card, scale: Scale, tflops: float) -> Outcome:
    """One document of 524,288 tokens."""
    tokens = scale.tokens(1 << 19)
    config, vocabulary = scale.model("1b")
    settings = lean(config, tokens)
    with one_process() as layout:
        before = card.held()
        ours = Ours(replace(config, **settings), vocabulary, dtype_of(scale), layout, SEED)
        built_bytes = card.held() - before
        ours.step(make_sample([64], vocabulary, SEED, card.device))
        sample = make_sample([tokens], vocabulary, SEED, card.device)
        rest = card.held()
        seconds, peak = card.peak(lambda: ours.step(sample))
        _, backward_peak = card.peak(lambda: ours.forward_backward(sample)) if scale.toy or seconds < 120 else (0, peak)
    flops = step_flops(config, vocabulary, tokens, causal_pairs([tokens]))
    details = [f"weights and moments {built_bytes / GIB:.1f} GiB, held between steps {rest / GIB:.1f} GiB, peak "
               f"{peak / GIB:.1f} GiB (of forward and backward {backward_peak / GIB:.1f}), so "
               f"{(peak - rest) / GIB:.1f} GiB of gradients, activations and buffers",
               f"{num_parameters(config, vocabulary):,} parameters; {flops / seconds / 1e12:.0f} TFLOP/s, "
               f"{flops / seconds / 1e12 / tflops:.3f} of the product's rate"]
    return Outcome(f"{seconds:.1f} s, peak {peak / GIB:.1f} GiB", seconds <= 195, details)


# ---- 8B: the longest sample that fits, rung by rung ----

def frontier(label: str) -> Callable[[Card, Scale, float], Outcome]:
    """The longest sample of 8K documents whose forward and backward fit beside bf16 weights.

    Optimizer state and masters are thought to be in host memory (12 bytes a parameter); gradients arise in backward.
    """
    def run(card: Card, scale: Scale, tflops: float) -> Outcome:
        config, vocabulary = scale.model("8b")
        if label not in PEERS:
            tokens = scale.tokens(FRONTIER_TILES * MLP_TILE)
            config = replace(config, **ladder(config, tokens, scale.tokens(MLP_TILE))[label])
        document, most = scale.tokens(8192), 16 if scale.toy else 128  # 1M tokens: a longer sample would outlast a call
        by_host = config.cpu_offloading_num_layers > 0 and most_on_host(config, document) < most
        with one_process() as layout:
            def measure(count: int) -> tuple[int, float] | None:
                if config.cpu_offloading_num_layers:
                    card.pin_ahead(offloaded_bytes(config, count * document, 1, ELEMENT))
                return peak_at(card, lambda: frontier_contender(label, config, vocabulary, scale, layout, card),
                               vocabulary, make_sample([document] * count, vocabulary, SEED, card.device))

            if by_host:  # pinned blocks of every length on the way there would stay with torch
                most = most_on_host(config, document)
                found = measure(most)
                fits = [(most, *found)] if found else []
            else:
                fits = longest_that_fits(measure, card.capacity(), most)
        if not fits:
            return Outcome(f"below {(most if by_host else 1) * document:,} tokens", None, [])
        count, peak, seconds = fits[-1]
        details = [f"{seconds:.1f} s at {count * document:,} tokens, {seconds / config.num_layers * 1e3:.0f} ms a "
                   f"layer; peak {peak / GIB:.1f} GiB"]
        if by_host:
            details.append(f"ended by the host's memory ({HOST // GIB} GiB), not by the card's")
        details += [f"{number * document:,} tokens: {at / GIB:.1f} GiB, {took:.1f} s" for number, at, took in fits[:-1]]
        return Outcome(f"{count * document:,} tokens", None, details)
    return run


def longest_that_fits(measure: Callable[[int], tuple[int, float] | None], capacity: int,
                      most: int) -> list[tuple[int, int, float]]:
    """(documents, peak bytes, seconds) of every sample that fitted, the longest last.

    Doubles until one does not fit. The last two then give a line (short samples do not: their peak may be that of the
    gradients, which all have), and its end is tried, then the middle between that and the last that fitted.
    """
    fits, failed, count = [], most + 1, 1
    while count <= most:
        found = measure(count)
        if found is None:
            failed = count
            break
        fits.append((count, *found))
        count *= 2
    if len(fits) < 2:
        return fits
    (before, lower, _), (last, peak, _) = fits[-2:]
    ahead = last + int((0.95 * capacity - peak) * (last - before) / max(peak - lower, 1))
    for count in (min(ahead, failed - 1), (last + min(ahead, failed - 1)) // 2):
        found = measure(count) if count > last else None
        if found is not None:
            return [*fits, (count, *found)]
    return fits


def most_on_host(config: ModelConfig, document: int) -> int:
    """Documents whose kept tensors fit in three quarters of the host's memory: a power of two, as pinned blocks are."""
    kept = sum(offloaded_bytes(config, document, 1, ELEMENT))
    return 1 << max(0, int(0.75 * HOST // kept).bit_length() - 1)


def frontier_contender(label: str, config: ModelConfig, vocabulary: int, scale: Scale, layout: Layout,
                       card: Card) -> Contender:
    """A rung of the ladder, whose settings `config` has, or a peer, without an optimizer."""
    dtype = dtype_of(scale)
    if label in PEERS:
        return Transformers(config, vocabulary, dtype, replace(PEERS[label], batched=True), card.device, SEED,
                            optimizer=False)
    return Ours(config, vocabulary, dtype, layout, SEED, master_dtype=getattr(torch, dtype), optimizer=False,
                strategy="optim_grads_params")  # else the gathered weights would stay beside the shards


def peak_at(card: Card, build: Callable[[], Contender], vocabulary: int, sample: Batch) -> tuple[int, float] | None:
    """(peak bytes, seconds) of a new contender's forward and backward; None where memory does not suffice."""
    contender = None
    try:
        contender = build()
        contender.forward_backward(make_sample([64], vocabulary, SEED, card.device))
        contender.clear()
        seconds, peak = card.peak(lambda: contender.forward_backward(sample))
        return peak, seconds
    except torch.OutOfMemoryError:
        return None
    finally:
        contender = None
        card.clear()


# ---- 512K tokens as 1 document and as 256 ----

def documents(card: Card, scale: Scale, tflops: float) -> Outcome:
    """Attention's time inside the step, on 2 of the 1B model's layers."""
    tokens, many = scale.tokens(1 << 19), 4 if scale.toy else 256
    config, vocabulary = scale.model("1b", num_layers=2)
    settings = lean(config, tokens)
    attend, chosen = choose_attention("auto", card.device, getattr(torch, dtype_of(scale)))
    clock, times = TimedAttend(attend, card.device), {1: [], many: []}
    with one_process() as layout:
        ours = Ours(replace(config, **settings), vocabulary, dtype_of(scale), layout, SEED, clock)
        samples = {count: make_sample([tokens // count] * count, vocabulary, SEED, card.device) for count in times}
        for turn in range(4):
            for count in list(times)[::-1 if turn % 2 else 1]:
                with clock.counting() as inside:
                    ours.step(samples[count])
                times[count] += inside if turn else []  # the first warms up
    one, other = (sorted(found)[len(found) // 2] for found in times.values())
    ratio = other / one * many  # the sum of squares is 1 / many of one document's
    return Outcome(f"{ratio:.3f} of what the sum of squares predicts", ratio <= 1.15,
                   [f"attention {one:.3f} s as 1 document, {other:.4f} s as {many}; {chosen}"])


@dataclass(frozen=True)
class Run:
    title: str
    bar: str
    measure: Callable[[Card, Scale, float], Outcome]
    """(card, scale, TFLOP/s of the product) -> what it found."""
    least: int = 60
    """Seconds without which it is not worth beginning: an estimate, nothing was measured."""


FRONTIER = {"chunked-loss": "+ chunked loss", "tiled-mlp": "+ tiled MLP", "full-recompute": "+ full recompute",
            "head-chunks": "+ head chunks", "attention-kept": "+ attention kept", "offload": "+ offload",
            "checkpointing": CHECKPOINTED, "alst": ALST}
AHEAD = "MFU at least 60 % of the product's rate; ahead of transformers + torch.compile + Liger"
RUNS = {
    "1b-8k": Run("1B, 4 samples of 8K, bf16", AHEAD, packed_8k("1b", 4)),
    "3b-8k": Run("3B, 1 sample of 8K, bf16", AHEAD, packed_8k("3b", 1)),
    "qwen3-8b-rank": Run("one rank of Qwen3-8B, cp 8, S = 1,048,576", "at most 45 GB and 285 s", qwen_rank, 500),
    "qwen3-8b-attention": Run("attention of that rank alone, by kernel", "", qwen_attention),
    "1b-512k": Run("1B, S = 524,288, one document, full step", "at most 195 s", one_b_512k, 300),
    "documents": Run("512K tokens as 1 document and as 256", "follows the sum of squares within 15 %", documents),
    **{f"8b-{name}": Run(f"8B, longest sample of 8K documents: {label}", "", frontier(label), 240)
       for name, label in FRONTIER.items()},
}
"""Name -> run, in the order of the table."""
