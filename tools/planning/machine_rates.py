"""Measures what the processes of a machine reach, all of them at once: the figures of a row.

Each runs this in a process of its own, `python -m tools.planning.machine_rates FILE`; the file says
what is to be measured, the processes find each other by FILE.meeting, and rank 0 writes FILE.json.
Every figure is taken while all processes do the same, so that what they share (cores, memory,
links) is shared as in a run.
"""

import json
import math
import pickle
import statistics
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from parallel.config import LayoutConfig
from parallel.layout import end_world, launched_rank, launched_world_size, start_world
from tools.planning.computing_rates import Computing
from tools.planning.rank_work import Work
from tools.planning.reference_step import ReferenceJob, time_step
from tools.planning.sending_rates import Sending

SHORT = 4
"""Part of the tokens at which layers run again, to tell the host's calls from the rest."""


@dataclass(frozen=True)
class Rates:
    """Holds what one process reached while all did the same."""

    plain_flops: float
    """FLOP/s of one square product."""
    product_flops: float
    """FLOP/s of a layer's products, forward and backward."""
    attention_flops: float
    attention_backend: str
    layer_seconds: float
    """One layer, forward and backward."""
    short_layer_seconds: float
    """The same with a part of the tokens (SHORT)."""
    short_product_seconds: float
    """The products of it, alone."""
    short_attention_seconds: float
    loss_flops: float
    """FLOP/s of the logits' products, with the loss and its gradient."""
    copy_bytes_per_second: float
    """Read and written by a copy."""
    weights_bytes_per_second: float
    """Read and written by copies of weights into new memory."""
    update_parameters_per_second: float
    """Clipping and AdamW."""
    ring_bytes_per_second: float | None = None
    """Sent in all-gathers and all-reduces; None = one process."""
    reduction_bytes_per_second: float | None = None
    """Sent in reduce-scatters."""
    exchange_bytes_per_second: float | None = None
    """Sent in all-to-alls."""
    step_seconds: float = math.nan
    """A training step with one layer in each stage."""
    latency_seconds: float | None = None
    """What a collective of a few bytes takes."""


def measure_rates(work: Work, device: torch.device) -> list[Rates]:
    """Measure this process with all others -> the figures of each, on every one."""
    computing = Computing(work, device)
    short_tokens = max(1, work.tokens // SHORT)
    stage = computing.make_stage()
    attention_seconds, backend = computing.attention(work.tokens)
    rates = Rates(
        plain_flops=computing.plain_flops(),
        product_flops=work.layer_product_flops / computing.product_seconds(work.tokens),
        attention_flops=work.layer_attention_flops / attention_seconds,
        attention_backend=backend,
        layer_seconds=computing.layer_seconds(stage, work.tokens),
        short_layer_seconds=computing.layer_seconds(stage, short_tokens),
        short_product_seconds=computing.product_seconds(short_tokens),
        short_attention_seconds=computing.attention(short_tokens)[0],
        loss_flops=computing.loss_flops(),
        copy_bytes_per_second=computing.copy_rate(),
        weights_bytes_per_second=computing.weights_rate(),
        update_parameters_per_second=computing.update_rate(),
    )
    if computing.world_size > 1:
        sent: dict[str, Any] = Sending(work, device).rates()
        rates = replace(rates, **sent)
    found: list[Any] = [None] * computing.world_size
    dist.all_gather_object(found, rates)
    return found


def middle(rates: list[Rates]) -> Rates:
    """Return the median of each figure over the processes."""
    middles: dict[str, Any] = {}
    for each in fields(Rates):
        values = [getattr(one, each.name) for one in rates]
        is_number = isinstance(values[0], float)
        middles[each.name] = statistics.median(values) if is_number else values[0]
    return Rates(**middles)


def measure_here(work: Work, job: ReferenceJob, meeting: Path) -> Rates | None:
    """Join the processes that the environment names, and measure; rank 0 gets the figures.

    Args:
        meeting: path of a file by which the processes find each other; it must not exist. A port
            agreed on before could be taken by another program until it is opened.
    """
    processes = launched_world_size()
    store = dist.FileStore(str(meeting), processes)
    world = start_world(LayoutConfig(), store, launched_rank(), processes)
    try:
        found = measure_rates(work, world.device)
        step_seconds = time_step(job, world)
    finally:
        end_world()
    return replace(middle(found), step_seconds=step_seconds) if world.rank == 0 else None


def main() -> int:
    # Written by the process that started this one (calibrate.py).
    file = sys.argv[1]
    work, job = pickle.loads(Path(file).read_bytes())
    rates = measure_here(work, job, Path(f"{file}.meeting"))
    if rates is not None:
        Path(f"{file}.json").write_text(json.dumps(asdict(rates)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
