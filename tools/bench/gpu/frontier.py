"""8B: how long a sample may be on one GPU, rung by rung of the ladder of memory.py, or with
transformers.

A sample is documents of 8K tokens; one forward and backward beside bf16 weights. Optimizer state
and masters are thought to be in host memory (12 bytes a parameter); gradients arise in backward.
Each try is a process of its own: an out-of-memory may leave much allocated.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from data.stream import usable_cores
from parallel.layout import Layout
from tools.bench.contenders import MLP_TILE, BenchModel, Contender, Ours, make_sample, one_process
from tools.bench.fresh import run_fresh
from tools.bench.gpu.lines import Report
from tools.bench.gpu.long import ELEMENT, offloaded_bytes
from tools.bench.gpu.parts import GIB, SEED, Card, Scale
from tools.bench.memory import ladder
from tools.bench.peers import PEERS, Transformers

HOST = 128 * GIB
"""Memory of the host that the bar names; what a virtual machine reports may grow with its use."""
DOCUMENT = 8192
TILES = 64
"""Tiles of the MLP, as of a sample of this many tiles: its length is not known when the model is
built."""
MOST_DOCUMENTS = 128
"""A million tokens: a longer sample would take too long."""


@dataclass(frozen=True)
class Try:
    """Hold one length that fitted."""

    documents: int
    peak: int
    """Most bytes in tensors."""
    seconds: float


def point(card: Card, scale: Scale, report: Report, *, rung: str, documents: int) -> None:
    """Report one length on one rung, in this process."""
    found = try_length(rung, documents, card.device.type, toy=scale.toy)
    tokens = documents * scale.tokens(DOCUMENT)
    if not found["fits"]:
        report.fail("out of memory", case=f"{tokens:,} tokens")
        return
    report_try(report, Try(documents, found["peak"], found["seconds"]), tokens)


def report_try(report: Report, found: Try, tokens: int) -> None:
    """Report what a length that fits took."""
    case = f"{tokens:,} tokens"
    report.add("peak", found.peak / GIB, "GiB", case=case)
    report.add("seconds", found.seconds, "s", case=case)


def search(card: Card, scale: Scale, report: Report, *, rung: str) -> None:
    """Report the longest sample on one rung, and every shorter one that was tried.

    This process leaves the card to those that try: a context of its own would take memory from
    them.
    """
    most = 16 if scale.toy else MOST_DOCUMENTS
    document = scale.tokens(DOCUMENT)
    config = config_of(rung, scale)
    # With offload, the host may be what ends it.
    by_host = config.cpu_offloading_num_layers > 0 and most_on_host(config, document) < most

    def measure(count: int) -> Try | None:
        # A process each: out of memory leaves a card in pieces.
        found = run_fresh(
            try_length,
            usable_cores(),
            on_gpu=card.is_cuda,
            rung=rung,
            documents=count,
            device=card.device.type,
            toy=scale.toy,
        )
        if not found["fits"]:
            return None
        fitting = Try(count, found["peak"], found["seconds"])
        report_try(report, fitting, count * document)
        return fitting

    # The host's memory ends the ladder before the card's.
    if by_host:
        most = most_on_host(config, document)
        only = measure(most)
        fits = [only] if only else []
    else:
        capacity = run_fresh(
            capacity_of, usable_cores(), on_gpu=card.is_cuda, device=card.device.type
        )["bytes"]
        fits = longest_that_fits(measure, capacity, most)
    # Which of the two memories ended it.
    note = f"ended by the host's memory ({HOST // GIB} GiB), not by the card's" if by_host else ""
    if not fits:
        report.fail(f"{(most if by_host else 1) * document:,} tokens do not fit")
        return
    report.add("longest sample", fits[-1].documents * document, "tokens", note=note)


def capacity_of(device: str) -> dict:
    """Return the bytes of the device's memory, for a process that must not make a context."""
    return {"bytes": Card(torch.device(device)).capacity()}


def try_length(rung: str, documents: int, device: str, toy: bool) -> dict:
    """Try a forward and backward on this many documents: fits, and if so peak and seconds."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    card = Card(torch.device(device))
    scale = Scale(toy)
    config = config_of(rung, scale)
    _, vocabulary = scale.model("8b")
    sample = make_sample([scale.tokens(DOCUMENT)] * documents, vocabulary, SEED, card.device)
    if config.cpu_offloading_num_layers:
        card.pin_ahead(offloaded_bytes(config, len(sample.tokens), 1, ELEMENT))
    try:
        with one_process() as layout:
            contender = make_contender(rung, config, vocabulary, scale, layout, card)
            # Compiles, and makes cuDNN's plans.
            contender.forward_backward(sample)
            contender.clear()
            seconds, peak = card.peak(lambda: contender.forward_backward(sample))
    except torch.OutOfMemoryError:
        return {"fits": False}
    return {"fits": True, "peak": peak, "seconds": seconds}


def config_of(rung: str, scale: Scale) -> BenchModel:
    """Make the configuration of 8B with the settings of a rung; for a peer as it is."""
    config, _ = scale.model("8b")
    if rung in PEERS:
        return config
    # Its length is not known when the model is built.
    tokens = scale.tokens(TILES * MLP_TILE)
    return replace(config, **ladder(config, tokens, scale.tokens(MLP_TILE))[rung])


def make_contender(
    rung: str, config: BenchModel, vocabulary: int, scale: Scale, layout: Layout, card: Card
) -> Contender:
    """Make a rung of the ladder, whose settings `config` has, or a peer, without an optimizer."""
    if rung in PEERS:
        way = replace(PEERS[rung], batched=True)
        return Transformers(
            config, vocabulary, scale.dtype, way, card.device, SEED, optimizer=False
        )
    # With another strategy the gathered weights would stay beside the shards.
    return Ours(
        config,
        vocabulary,
        scale.dtype,
        layout,
        SEED,
        master_dtype=getattr(torch, scale.dtype),
        optimizer=False,
        strategy="optim_grads_params",
    )


def longest_that_fits(measure: Callable[[int], Try | None], capacity: int, most: int) -> list[Try]:
    """Find the longest sample that fits; returns all that fitted, the longest last.

    Doubles until one does not fit. The last two then give a line (short samples do not: their peak
    may be that of the gradients, which all have), and its end is tried, then the middle between
    that and the last that fitted.
    """
    fits: list[Try] = []
    failed = most + 1
    count = 1
    while count <= most:
        found = measure(count)
        if found is None:
            failed = count
            break
        fits.append(found)
        count *= 2
    if len(fits) < 2:
        return fits
    before, last = fits[-2:]
    of_document = max(last.peak - before.peak, 1) / (last.documents - before.documents)
    ahead = last.documents + int((0.95 * capacity - last.peak) / of_document)
    end = min(ahead, failed - 1)
    for count in (end, (last.documents + end) // 2):
        found = measure(count) if count > last.documents else None
        if found is not None:
            return [*fits, found]
    return fits


def most_on_host(config: BenchModel, document: int) -> int:
    """Count the documents whose kept tensors fit in three quarters of the host's memory.

    A power of two, as pinned blocks are.
    """
    kept = sum(offloaded_bytes(config, document, 1, ELEMENT))
    return 1 << max(0, int(0.75 * HOST // kept).bit_length() - 1)
