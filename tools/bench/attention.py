"""Measure Ulysses attention beside DeepSpeed's DistributedAttention, on CPU processes.

Both run in the same processes, on the same q, k, v and output gradient, around the same local
kernel; in turns, so that whatever else the machine does meets both. Outputs and gradients are
compared before anything is timed.

Legend (parallel/ulysses.py): t tokens of this rank, N query heads, K key/value heads, T all tokens,
m and k heads of this rank after the exchange, H head size.
"""

import gc
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, spawn

from data.stream import usable_cores
from model.attention_backends.choice import choose_attention
from model.attention_backends.documents import pack_documents
from parallel.config import LayoutConfig
from parallel.layout import Axis, build_layout, end_world, start_world
from parallel.ulysses import HeadSplit, heads_to_seq, seq_to_heads
from tools.bench.attention_report import (
    ADDITION,
    ATTENTION,
    OURS,
    REPEATED,
    SHAPES,
    THEIRS,
    Result,
    Shape,
    describe,
)
from tools.bench.counted_collectives import counted_collectives
from tools.bench.fresh import KEEP_MEMORY
from tools.bench.option_checks import find_too_small
from tools.bench.report import describe_machine, publish

TOLERANCE = 1e-5
"""Largest difference allowed in an output or gradient, as a share of its largest element; both
compute in fp32."""

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Compute the output from q, k, v.

With its exchanges [t, N or K, H] -> [t, N, H]; a local kernel [T, m or k, H] -> [T, m, H].
"""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    processes: tuple[int, ...] = (2, 4)
    """Process counts, one after the other; each must divide the query heads of every shape."""
    repeats: int = 11
    """Timed repeats of each shape and contender."""
    warm_ups: int = 2
    """Repeats before them that are not timed."""
    seed: int = 1234
    """Seed of the tensors."""
    output: str | None = None
    """File to append the result to, as Markdown."""


def run(arguments: Arguments) -> int:
    """Measure every shape on every process count and publish the result.

    Returns:
        the exit code: 0, 1 where the two disagree, 2 where it cannot run.
    """
    problem = find_problem(arguments)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    machine = describe_machine(["deepspeed"])
    results = []
    for processes in arguments.processes:
        try:
            results += run_processes(processes, arguments)
        except (ProcessRaisedException, ProcessExitedException) as failure:
            print(f"error: {processes} processes: {failure}", file=sys.stderr)
            return 1
    publish(describe(results, machine, arguments.repeats), arguments.output)
    return 0


def find_problem(arguments: Arguments) -> str | None:
    """Say why the benchmark cannot run, with a fix; None = it can."""
    if importlib.util.find_spec("deepspeed") is None:
        return (
            "deepspeed is not installed, and this benchmark compares with it. "
            "Fix: pip install -r tools/bench/requirements.txt"
        )
    too_small = find_too_small(arguments, repeats=1, warm_ups=0, processes=2)
    if too_small:
        return too_small
    # A count of processes must divide the heads of every shape.
    common = math.gcd(*(shape.heads for shape in SHAPES))
    for processes in arguments.processes:
        if common % processes:
            return (
                f"processes = {processes}: DeepSpeed splits heads evenly, and there are multiples "
                f"of {common}. "
                f"Fix: {' or '.join(str(n) for n in range(2, common + 1) if common % n == 0)}."
            )
    return None


def run_processes(processes: int, arguments: Arguments) -> list[Result]:
    """Measure in one world of processes; `spawn` ends the others when one fails."""
    with tempfile.TemporaryDirectory(prefix="ithaca-bench-") as folder:
        # Read by each process's allocator when it starts.
        os.environ.update(KEEP_MEMORY)
        spawn(work, args=(processes, folder, arguments), nprocs=processes)
        rows = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return [Result(shape=Shape(**row.pop("shape")), **row) for row in rows]


def work(rank: int, processes: int, folder: str, arguments: Arguments) -> None:
    """Measure as one process of a world; rank 0 leaves the results in `folder`."""
    # Read by DeepSpeed at its import and by torch at its first look for a GPU: both use the CPU.
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(max(1, usable_cores() // processes))
    world = start_world(
        LayoutConfig(), dist.FileStore(str(Path(folder) / "store"), processes), rank, processes
    )
    try:
        axis = build_layout(LayoutConfig(context_parallel_size=processes), world).cp
        start_deepspeed()
        rows = [
            measure_shape(shape, kernel, axis, arguments)
            for kernel in (ATTENTION, ADDITION)
            for shape in SHAPES
        ]
        if rank == 0:
            (Path(folder) / "results.json").write_text(json.dumps(rows), encoding="utf-8")
    finally:
        gc.collect()
        end_world()


def start_deepspeed() -> None:
    """Let deepspeed.comm use the process group that exists, and say nothing about it."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # Otherwise it compiles its shared-memory all-reduce for a minute, which nothing here calls.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)


def measure_shape(shape: Shape, kernel: str, axis: Axis, arguments: Arguments) -> dict:
    """Compare, count, then time every contender on one shape.

    Returns:
        the fields of a `Result`, the same on every rank.
    """
    contenders = make_contenders(shape, kernel, axis)
    qkv, grad_out = make_tensors(shape, axis, arguments.seed)
    sent = compare(contenders, qkv, grad_out, shape, axis)
    seconds = time_in_turns(contenders, qkv, grad_out, axis, arguments)
    if axis.is_first:
        print(
            f"{axis.size} processes, {kernel}, {shape}: "
            + ", ".join(f"{name} {taken * 1e3:.1f} ms" for name, taken in seconds.items()),
            file=sys.stderr,
        )
    return {
        "processes": axis.size,
        "kernel": kernel,
        "shape": vars(shape),
        "seconds": seconds,
        "sent": sent,
    }


def make_tensors(shape: Shape, axis: Axis, seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Draw this rank's q [t, N, H], k and v [t, K, H], and the gradient [t, N, H]; fp32."""
    generator = torch.Generator().manual_seed(seed + axis.rank)
    tensors = [
        torch.randn(shape.tokens // axis.size, heads, shape.head_size, generator=generator)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


def make_contenders(shape: Shape, kernel: str, axis: Axis) -> dict[str, Attention]:
    """Map contenders to their attention with its exchanges.

    Each repeats K/V for grouped heads inside the local kernel, after the exchange; REPEATED before
    it, as Megatron-DeepSpeed does for models with grouped heads. Key/value heads that the ranks do
    not divide, which DeepSpeed cannot exchange, are first repeated for it as far as it needs.
    """
    from deepspeed.sequence.layer import DistributedAttention

    # Both sides run the same local kernel between their exchanges.
    local = make_kernel(kernel, shape.tokens)
    split = HeadSplit.make(shape.heads, shape.kv_heads, axis.size)

    def ours(q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor) -> torch.Tensor:
        return heads_to_seq(local(*seq_to_heads(q_tNH, k_tKH, v_tKH, split, axis)), split, axis)

    # DeepSpeed's tensors are [tokens, batch, heads, head size]; squeeze and unsqueeze are views.
    module = DistributedAttention(
        lambda q, k, v: local(q.squeeze(1), k.squeeze(1), v.squeeze(1)).unsqueeze(1),
        axis.group,
        scatter_idx=2,
        gather_idx=0,
    )

    enough = math.lcm(shape.kv_heads, axis.size)

    def theirs(q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor) -> torch.Tensor:
        # Key/value heads that the ranks do not divide are repeated as far as it needs.
        k_tKH, v_tKH = (
            x if x.shape[1] % axis.size == 0 else repeat_heads(x, enough) for x in (k_tKH, v_tKH)
        )
        return module(q_tNH.unsqueeze(1), k_tKH.unsqueeze(1), v_tKH.unsqueeze(1), 1).squeeze(1)

    def repeated(q_tNH: torch.Tensor, k_tKH: torch.Tensor, v_tKH: torch.Tensor) -> torch.Tensor:
        return theirs(q_tNH, *(repeat_heads(x, shape.heads) for x in (k_tKH, v_tKH)))

    contenders: dict[str, Attention] = {OURS: ours, THEIRS: theirs}
    if shape.grouped:
        contenders[REPEATED] = repeated
    return contenders


def make_kernel(name: str, tokens: int) -> Attention:
    """Make what runs between the exchanges: causal attention, or an addition that costs little."""
    if name == ADDITION:
        # In groups of query heads, so that nothing is repeated.
        return lambda q, k, v: (q.unflatten(1, (k.shape[1], -1)) + (k + v).unsqueeze(2)).flatten(
            1, 2
        )
    device = torch.device("cpu")
    attend, _ = choose_attention("sdpa", device, torch.float32)
    (segments,) = pack_documents(
        torch.tensor([0, tokens], dtype=torch.int32), [(0, tokens)], device
    )
    return lambda q_TmH, k_TkH, v_TkH: attend(q_TmH, k_TkH, v_TkH, segments)


def repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat heads [T, k, H] -> [T, heads, H], each as often as query heads read it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def forward_backward(
    attention: Attention, qkv: Sequence[torch.Tensor], grad_out: torch.Tensor
) -> torch.Tensor:
    """Run `attention` and its backward into the leaves' `grad`; returns the output."""
    for x in qkv:
        x.grad = None
    out = attention(*qkv)
    out.backward(grad_out)
    return out.detach()


def gradient(leaf: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a leaf that a backward has reached."""
    assert leaf.grad is not None
    return leaf.grad


def compare(
    contenders: dict[str, Attention],
    qkv: list[torch.Tensor],
    grad_out: torch.Tensor,
    shape: Shape,
    axis: Axis,
) -> dict[str, int]:
    """Compare all results with ours; returns the bytes that each contender sends.

    They are those of one forward and backward, from the rank that sends most to others.

    Raises:
        ValueError: on every rank, where an output or a gradient differs from ours by more than
        TOLERANCE.
    """
    found = {}
    counted = []
    for name, attention in contenders.items():
        with counted_collectives() as sent:
            found[name] = [forward_backward(attention, qkv, grad_out), *map(gradient, qkv)]
        counted.append(sum(sent))
    for name, tensors in found.items():
        # Largest differences as shares of our largest element: output, then q, k, v.
        shares = torch.stack(
            [
                (theirs - ours).abs().max() / ours.abs().max()
                for theirs, ours in zip(tensors, found[OURS])
            ]
        )
        dist.all_reduce(shares, dist.ReduceOp.MAX, group=axis.group)
        for what, share in zip(
            ("output", "gradient of q", "gradient of k", "gradient of v"), shares.tolist()
        ):
            if not share <= TOLERANCE:
                raise ValueError(
                    f"{shape}: {what}: {OURS} and {name} differ by {share:.1e} of the largest "
                    "element, "
                    f"allowed are {TOLERANCE:.0e}"
                )
    most = torch.tensor(counted)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=axis.group)
    return dict(zip(contenders, most.tolist()))


def time_in_turns(
    contenders: dict[str, Attention],
    qkv: Sequence[torch.Tensor],
    grad_out: torch.Tensor,
    axis: Axis,
    arguments: Arguments,
) -> dict[str, float]:
    """Take the median seconds of a forward and backward of each contender, by the slowest rank.

    In each round every contender runs once; the order turns from round to round, so none always
    follows another.
    """
    names = list(contenders)
    taken = torch.zeros(arguments.warm_ups + arguments.repeats, len(names), dtype=torch.float64)
    for turn in range(len(taken)):
        # None always follows another.
        order = list(range(len(names)))[:: -1 if turn % 2 else 1]
        for place in order:
            dist.barrier(axis.group)
            start = time.perf_counter()
            forward_backward(contenders[names[place]], qkv, grad_out)
            taken[turn, place] = time.perf_counter() - start
    # As long as the slowest rank.
    dist.all_reduce(taken, dist.ReduceOp.MAX, group=axis.group)
    timed = taken[arguments.warm_ups :].T.tolist()
    return {name: statistics.median(times) for name, times in zip(names, timed)}
