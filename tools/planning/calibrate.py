"""Measures this machine and writes what it reaches as a row that `--hardware-file` reads.

One process per device runs (on a CPU as many as the run will have), each on its part of the cores,
and all measure at the same time (machine_rates.py), at the shapes of one rank of the run. At last
they train a few steps of the run with one layer in each stage (reference_step.py). A row is for
that many processes and that run; more layers, longer phases and other batches are what it predicts.
"""

import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data.stream import usable_cores
from data.units import show_bytes
from parallel.config import LayoutConfig
from parallel.layout import device_here
from pretrain.planner.hardware import CPU, TABLE, Hardware, find_hardware
from pretrain.planner.muon_cost import MuonCost
from pretrain.planner.pointwise import layer_bytes
from pretrain.planner.rank_bytes import MemoryModel
from pretrain.planner.step_time import UPDATE_BYTES, estimate_step
from pretrain.planner.traffic import layers_of_slowest_rank
from pretrain.planner.workload import Workload
from pretrain.state import compute_dtype
from tools.planning.machine_rates import SHORT, Rates
from tools.planning.phases import PhaseEstimate
from tools.planning.rank_work import Work
from tools.planning.reference_step import ReferenceJob

ROOT = Path(__file__).parents[2]
MOST_TOKENS = 8192
"""Tokens at which a process is measured at most: longer samples take long and say no more."""
MOST_PROCESSES_OF_CORE = 4
"""Processes that may share a core: with more, nothing but waiting is measured."""
TITLE = "# What a machine reaches, measured by `ithaca plan --calibrate`"
"""First line of a file that this module wrote."""
NAMES = {
    "node_bytes_per_second": "sent in all-gathers and all-reduces",
    "exchanges": "all-to-alls, as a share of them",
    "reductions": "reduce-scatters, as a share of them",
    "collective_latency_seconds": "a collective of a few bytes, for each doubling of its ranks",
    "memory_bytes_per_second": "read and written by a copy",
    "flops": "square product, or layer's products, whichever is faster",
    "products": "products of a layer, each alone, forward and backward",
    "attention": "kernel by head size, forward and backward",
    "varlen_attention": "kernel by head size, forward and backward",
    "flash_attention": "kernel by head size, forward and backward",
    "loss": "products of the logits, with the loss and its gradient",
    "weights": "copies of weights into new memory",
    "memory": "clipping and AdamW",
    "pointwise": "what a layer takes beside its products and its attention",
    "layer_overhead_seconds": "what a layer takes however few its tokens",
    "step_factor": "a step with one layer in each stage, over its parts",
    "crowding": "threads of all processes over the cores",
}
"""Key -> what it was measured with."""


@dataclass(frozen=True)
class Processes:
    """Says how a machine's processes share its cores."""

    count: int
    cores: int

    @property
    def threads(self) -> int:
        """Threads of each."""
        return max(1, self.cores // self.count)

    @property
    def crowding(self) -> float:
        """Threads of all of them over the cores."""
        return max(1.0, self.count * self.threads / self.cores)


def measure_machine(work: Work, job: ReferenceJob, processes: Processes) -> Rates:
    """Run the processes, and return the median of their figures.

    Raises:
        ValueError: one of them failed; what it said stands on stderr.
    """
    common = os.environ | {
        "WORLD_SIZE": str(processes.count),
        "LOCAL_WORLD_SIZE": str(processes.count),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(processes.threads),
    }
    folder = tempfile.TemporaryDirectory(prefix="ithaca-calibrate-")
    file = Path(folder.name) / "work.pickle"
    file.write_bytes(pickle.dumps((work, job)))
    command = [sys.executable, "-m", "tools.planning.machine_rates", str(file)]
    started: list[subprocess.Popen] = []
    try:
        for rank in range(processes.count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # What they print is not the answer: rank 0 writes it into a file.
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=common | ranks, stdout=subprocess.DEVNULL)
            )
        # Where one of them fails, the others would wait for it.
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            time.sleep(0.05)
    finally:
        # Where this one is stopped, so are they.
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        answer = Path(f"{file}.json")
        said = answer.read_text() if answer.exists() else ""
        folder.cleanup()
    if any(codes):
        raise ValueError(
            f"calibrate: the processes that measure ended with codes {codes}. Fix: what they said "
            "stands above; a smaller model or fewer processes where memory did not suffice."
        )
    return Rates(**json.loads(said))


def row_of(work: Work, rates: Rates, processes: Processes, base: Hardware) -> Hardware:
    """Turn what was measured into a row; what was not measured is the base's."""
    flops = base.flops
    if base.is_cpu:
        flops = max(rates.plain_flops, rates.product_flops)
    # What the shares are of: a GPU has another rate for each dtype, a CPU that of the run's.
    peak = flops if base.is_cpu else base.product_flops(element_bytes(work))
    shares: dict[str, Any] = {"products": rates.product_flops / peak}
    shares["loss"] = rates.loss_flops / peak
    by_head_size = {work.config.head_size: rates.attention_flops / peak}
    # The line that says which backend was chosen begins with its name.
    backend = rates.attention_backend.removeprefix("attention: ").split()[0]
    kind = f"{backend}_attention" if backend in ("varlen", "flash") else "attention"
    shares[kind] = by_head_size
    # Copies set the memory's rate, the update and the layer their shares of it.
    memory = rates.copy_bytes_per_second if base.is_cpu else base.memory_bytes_per_second
    shares["weights"] = rates.weights_bytes_per_second / memory
    shares["memory"] = UPDATE_BYTES * rates.update_parameters_per_second / memory
    pointwise, overhead = split_rest(work, rates, with_overhead=base.is_cpu)
    shares["pointwise"] = pointwise_bytes(work) / pointwise / memory
    if overhead > 0:
        shares["layer_overhead_seconds"] = overhead
    values: dict[str, Any] = {
        "name": f"{base.name}, {processes.count} processes",
        "flops": flops,
        "memory_bytes_per_second": memory,
        "devices_per_node": processes.count,
    }
    if base.is_cpu:
        values["crowding"] = processes.crowding
    if rates.ring_bytes_per_second and rates.exchange_bytes_per_second and rates.latency_seconds:
        values["node_bytes_per_second"] = rates.ring_bytes_per_second
        shares["links"] = 1.0
        assert rates.reduction_bytes_per_second is not None
        shares["reductions"] = rates.reduction_bytes_per_second / rates.ring_bytes_per_second
        shares["exchanges"] = rates.exchange_bytes_per_second / rates.ring_bytes_per_second
        doublings = (processes.count - 1).bit_length()
        shares["collective_latency_seconds"] = rates.latency_seconds / doublings
    return replace(base, **values, efficiency=replace(base.efficiency, **shares))


def split_rest(work: Work, rates: Rates, *, with_overhead: bool) -> tuple[float, float]:
    """Split what a layer takes beside its kernels -> by its bytes, and however few its tokens.

    Two lengths tell them apart. Where they do not (all is noise), all of it goes by bytes.
    """
    kernels = (
        work.layer_product_flops / rates.product_flops
        + work.layer_attention_flops / rates.attention_flops
    )
    rest = max(rates.layer_seconds - kernels, 1e-9)
    short = rates.short_layer_seconds - rates.short_product_seconds - rates.short_attention_seconds
    overhead = (SHORT * short - rest) / (SHORT - 1)
    if not with_overhead or not 0 < overhead < rest:
        return rest, 0.0
    return rest - overhead, overhead


def pointwise_bytes(work: Work) -> float:
    """Count what one layer moves, as the plan counts it."""
    model = MemoryModel(work.config, work.vocabulary_rows, compute_bytes=element_bytes(work))
    return layer_bytes(model, Workload(LayoutConfig(), 1, work.tokens, 1, 1))


def element_bytes(work: Work) -> int:
    """Return the size of an activation."""
    return torch.finfo(getattr(torch, work.dtype)).bits // 8


def write_row(row: Hardware, work: Work, rates: Rates, processes: Processes) -> str:
    """Write the row as YAML, with when, where and with what it was measured."""
    base = "cpu" if row.is_cpu else next(name for name in TABLE if row.name.startswith(name))
    lines = [
        f"{TITLE}; --hardware-file reads it.",
        f"# {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.node()}, {device_here()[0]}, "
        f"{processes.cores} cores",
        f"# torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}",
        f"# {processes.count} processes of {processes.threads} threads, all at once; one process's "
        "figures",
        f"# layer: hidden {work.hidden_size}, MLP {work.ffn_hidden_size}, "
        f"{work.num_attention_heads} heads, {work.tokens} tokens in documents of "
        f"{work.document_tokens}, {work.dtype}; "
        f"{rates.attention_backend}",
        f"# copies of {show_bytes(work.buffer_bytes)}; not measured: what the base says",
        f"base: {base}",
    ]
    known = asdict(CPU if row.is_cpu else TABLE[base])
    found = asdict(row)
    shares = found.pop("efficiency")
    of_base = known.pop("efficiency")
    lines += [_line(key, value) for key, value in found.items() if value != known[key]]
    lines.append("efficiency:")
    lines += [f"  {_line(key, value)}" for key, value in shares.items() if value != of_base[key]]
    return "\n".join(lines) + "\n"


def _line(key: str, value: object) -> str:
    """Write one key, and what it was measured with."""
    if isinstance(value, dict):
        text = "{" + ", ".join(f"{size}: {share!r}" for size, share in value.items()) + "}"
    else:
        text = json.dumps(value)
    note = NAMES.get(key)
    return f"{key}: {text}" + (f"  # {note}" if note else "")


def work_of(estimate: PhaseEstimate) -> Work:
    """Say at which shapes a machine is measured for a phase: those of one rank."""
    config = estimate.config.model
    phase = estimate.phase
    tp, _, cp = phase.layout.sizes
    tokens = min(MOST_TOKENS, phase.seq_length * phase.micro_batch_size // cp)
    heads = max(1, config.num_attention_heads // tp)
    groups = max(1, config.num_kv_heads // tp)
    dtype = compute_dtype(estimate.config.optimizer)
    untied = ["output"] if config.untie_embeddings_and_output_weights else []
    return Work(
        layers=layers_of_slowest_rank(estimate.model, estimate.load),
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size // tp,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config.head_size,
        vocabulary_rows=config.padded_vocab_size(estimate.model.vocab_size) // tp,
        loss_tokens=phase.memory.loss_tokens,
        tokens=tokens,
        document_tokens=min(tokens, document_tokens_of(estimate)),
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        attention_backend=config.attention_backend,
        gathered_elements=estimate.model.count_elements("layers", tp),
        around_elements=sum(
            estimate.model.count_elements(part, tp) for part in ("embedding", *untied)
        ),
        exchanged_elements=tokens * (heads + 2 * groups) * config.head_size,
    )


def document_tokens_of(estimate: PhaseEstimate) -> int:
    """Return the length of a phase's documents, if all were of one length.

    A token of a document of n tokens sees (n + 1) / 2 on average.
    """
    seen = estimate.load.tokens_seen((None,))
    return max(1, min(estimate.phase.seq_length, round(2 * seen - 1)))


def base_here() -> Hardware:
    """Return the row of this machine's device.

    Raises:
        ValueError: a GPU that the table does not have.
    """
    name, _ = device_here()
    base = CPU if name == "cpu" else find_hardware(name)
    if base is None:
        raise ValueError(
            f"calibrate: the GPU {name} is not in the table. Fix: write a row by hand for "
            "--hardware-file, or add it to pretrain/planner/hardware.py."
        )
    return base


def is_own_row(path: Path) -> bool:
    """Tell whether a file is a row that was measured before."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().startswith(TITLE)


def with_step_factor(
    row: Hardware, rates: Rates, model: MemoryModel, job: ReferenceJob
) -> Hardware:
    """Set how much longer a step takes than its measured parts say.

    Args:
        model: of the run, with all its layers.
    """
    few = MemoryModel(
        job.config.model,
        job.vocab_size,
        master_bytes=model.master_bytes,
        compute_bytes=model.compute_bytes,
        on_gpu=model.on_gpu,
        optimizer_on_host=model.optimizer_on_host,
        muon=MuonCost.of_run(job.config, job.vocab_size, on_gpu=model.on_gpu),
    )
    predicted = estimate_step(few, job.load, row).total
    efficiency = replace(row.efficiency, step_factor=rates.step_seconds / predicted)
    return replace(row, efficiency=efficiency)


def calibrate(path: Path, estimate: PhaseEstimate) -> str:
    """Measure this machine with as many processes as a phase has, and write the row -> its text.

    Raises:
        ValueError: more processes than this machine can run, or a GPU without a row.
    """
    if estimate.config.model.window_size:
        raise ValueError(
            f"window_size = {estimate.config.model.window_size}: attention with a window is not "
            "measured yet. Fix: calibrate without it; a plan with the row counts the windows."
        )
    if estimate.config.model.attn_logit_softcapping:
        raise ValueError(
            f"attn_logit_softcapping = {estimate.config.model.attn_logit_softcapping}: attention "
            "with capped scores is not measured yet. Fix: calibrate without it."
        )
    if estimate.config.model.has_sinks:
        raise ValueError(
            "softmax_type = learnable: attention with sinks is not measured yet. Fix: calibrate "
            "without it."
        )
    base = base_here()
    count = estimate.world_size
    if not base.is_cpu and count > torch.cuda.device_count():
        raise ValueError(
            f"world_size = {count}: a row is measured on one machine, which has "
            f"{torch.cuda.device_count()} GPUs. Fix: at most so many."
        )
    processes = Processes(count, usable_cores())
    most = MOST_PROCESSES_OF_CORE * processes.cores
    if base.is_cpu and count > most:
        raise ValueError(
            f"world_size = {count}: a row is measured on one machine, which has {processes.cores} "
            f"cores. Fix: at most {most}."
        )
    work = work_of(estimate)
    job = ReferenceJob.of(estimate, document_tokens_of(estimate))
    rates = measure_machine(work, job, processes)
    row = with_step_factor(row_of(work, rates, processes, base), rates, estimate.model, job)
    text = write_row(row, work, rates, processes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text
