"""Which attention the run computes with: the backend, and what `mixed` measures once per card.

World rank 0 measures and tells the others, so that all ranks choose alike. What it found lies
beside the checkpoints, so that a run that is started again on the same card chooses as before.
"""

import json
from pathlib import Path
from typing import Any

import torch

from data.files import write_atomically
from model.attention_backends.backend import Attend, HeadShape
from model.attention_backends.choice import pick_backend
from model.attention_backends.crossover import crossover_of, measure, padded_lengths
from model.attention_backends.kernel_calls import NEVER, assumed_crossover
from parallel.collectives import all_reduce
from parallel.layout import Layout
from pretrain.config.config import Config
from pretrain.config.load import warn
from pretrain.planner.head_counts import HeadCounts
from pretrain.schedule.phases import Phase

FILE = "attention_crossover.json"
"""A file in the --save folder: an entry for each card, torch release and numbers of heads."""


def attention_of_run(
    config: Config, phases: list[Phase], phase: Phase, layout: Layout, compute_dtype: torch.dtype
) -> tuple[Attend, str]:
    """Choose this rank's attend function; collective on a GPU.

    Args:
        phases: all that these processes may train.
        phase: the one that they begin with, whose numbers of heads are measured.

    Returns:
        The function, and a line that says why it is this one.

    Raises:
        ValueError: the backend that was asked for cannot run here.
    """
    on_tape = any(each.attention_on_tape for each in phases)
    heads = heads_of_call(config, phase)
    backend, why = pick_backend(
        config.model.attention_backend,
        layout.device,
        compute_dtype,
        heads,
        on_tape=on_tape,
        needs=config.model.scoring_needs,
    )
    line = f"attention: {backend.name} ({why})"
    asked = config.model.attention_crossover_tokens
    if asked is not None and backend.name != "mixed":
        line += f"; attention_crossover_tokens = {asked} has no effect, it is for the backend mixed"
    if layout.device.type != "cuda":
        return backend.make(assumed_crossover(heads)), line
    # Every rank takes part, whatever it chose: where machines differ, some may need the answer.
    tokens = 0
    how = ""
    if layout.world.is_first:
        tokens, how = find_crossover(
            config, heads, layout.device, compute_dtype, is_needed=backend.name == "mixed"
        )
    return backend.make(tell_all(tokens, layout)), f"{line}{how}"


def tell_all(tokens: int, layout: Layout) -> int:
    """Give world rank 0's number to every rank; the others call it with 0."""
    own = torch.tensor(tokens, dtype=torch.int64, device=layout.device)
    return int(all_reduce(own, layout.world))


def heads_of_call(config: Config, phase: Phase) -> HeadShape:
    """Query heads, key/value heads and head size of a call of the rank that has most."""
    # With head chunks a call computes a part of the heads; key/value heads may be repeated for it.
    chunks = phase.memory.attention_head_chunks
    heads = HeadCounts.make(config.model, phase.layout, chunks)
    if chunks > 1:
        query = max(1, heads.m // chunks)
        kv = heads.round_k
    else:
        query = heads.m
        kv = max(heads.k, heads.paired)
    # The rank with most query heads need not be the one with most key/value heads.
    return query, kv if query % kv == 0 else query, config.model.head_size


def find_crossover(
    config: Config, heads: HeadShape, device: torch.device, dtype: torch.dtype, *, is_needed: bool
) -> tuple[int, str]:
    """Find the length of documents from which cuDNN is faster than varlen.

    As asked for, as measured before on such a card, or by measuring now.

    Returns:
        The crossover in tokens, and where it is from as the end of a line.
    """
    asked = config.model.attention_crossover_tokens
    if asked is not None:
        return asked, _describe(asked, "asked for") if is_needed else ""
    assumed = assumed_crossover(heads)
    if not is_needed:
        return assumed, ""
    if config.checkpoint.save is None:
        how = "assumed: without --save nothing is measured"
        return assumed, _describe(assumed, how)

    # Was it measured before, by an earlier start on such a card?
    path = Path(config.checkpoint.save) / FILE
    key = _key_of_measurement(heads, device, dtype)
    entries = read_entries(path)
    for entry in entries:
        if {name: entry.get(name) for name in key} == key:
            return entry["crossover"], _describe(entry["crossover"], f"measured before, {path}")

    try:
        milliseconds = measure(heads, device, dtype)
    except RuntimeError as error:  # a length that a kernel refuses, or no memory for it
        how = f"assumed: measuring failed with {str(error).splitlines()[0]}"
        return assumed, _describe(assumed, how)
    torch.cuda.empty_cache()  # the run's memory begins without holes
    found = crossover_of(milliseconds)
    entries.append(key | {"crossover": found, "milliseconds": milliseconds})
    _keep_entries(path, entries)
    times = ", ".join(
        f"{length:,} {of_cudnn:.2f}/{of_varlen:.2f}"
        for length, (of_cudnn, of_varlen) in milliseconds.items()
    )
    return found, _describe(found, f"measured, ms by cuDNN/varlen for documents of: {times}")


def _key_of_measurement(
    heads: HeadShape, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Collect everything that a measured crossover depends on."""
    return {
        "card": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": str(dtype),
        "heads": list(heads),
        "lengths": padded_lengths(heads),
    }


def _describe(crossover: int, how: str) -> str:
    what = "no document" if crossover >= NEVER else f"documents of at least {crossover:,} tokens"
    return f"; to cuDNN go {what} ({how})"


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Read what was measured before; none, with a warning, from a file that is not ours."""
    if not path.exists():
        return []
    try:
        entries = json.loads(path.read_text())
        numbers = [entry["crossover"] for entry in entries]
        if isinstance(entries, list) and all(type(n) is int and n > 0 for n in numbers):
            return entries
    except (ValueError, TypeError, KeyError):
        pass
    warn(f"{path}: is not a list of measured crossovers, and is replaced by what is measured now")
    return []


def _keep_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write the measurements for the next start; a run goes on without them."""
    try:
        write_atomically(path, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        warn(
            f"{path}: cannot be written ({error.strerror}); a restart measures again, and may "
            "choose otherwise"
        )
