"""The table "On one H200": one run a call, each of at most 9 minutes, resumable. tools/bench/gpu.sh makes all of them.

A finished run leaves NAME.json in the folder and is skipped from then on; one that failed or met a slow card is made
again. Without --run the table of what is there is printed; runs that are not there stand in it as "not run".
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tools.bench.report import describe_machine, markdown_table, publish


@dataclass(kw_only=True)
class Arguments:
    run: str | None = None
    """Run to make; --names lists them."""
    names: bool = False
    """Print the runs that are not finished, each with the seconds that it needs at least, and end."""
    folder: str = "runs/bench-gpu"
    """A JSON file per run."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu: only with --scale toy, to try the code out."""
    scale: Literal["full", "toy"] = "full"
    """toy: small models and lengths; its figures mean nothing."""
    output: str | None = None
    """File to append the table to, as Markdown."""


def run(arguments: Arguments) -> int:
    """Make one run, or print the table; 0, or 1 where the run failed or is void, or 2."""
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read at torch's first look for a GPU
    from tools.bench.gpu_runs import RUNS

    folder = Path(arguments.folder)
    problem = find_problem(arguments, list(RUNS))
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if arguments.names:
        print("\n".join(f"{name} {entry.least}" for name, entry in RUNS.items() if not is_finished(read(folder, name))))
        return 0
    if arguments.run is None:
        publish(describe(folder), arguments.output)
        return 0
    if is_finished(read(folder, arguments.run)):
        print(f"{arguments.run}: finished before, in {folder}")
        return 0
    return make(arguments.run, folder, arguments)


def find_problem(arguments: Arguments, names: list[str]) -> str | None:
    """Why the benchmark cannot run, with a fix, or None."""
    import torch

    if arguments.run is not None and arguments.run not in names:
        return f"--run {arguments.run}: no such run. Fix: of {', '.join(names)}."
    if arguments.device == "cpu" and arguments.scale == "full":
        return "--device cpu --scale full: would take days. Fix: --scale toy."
    if arguments.run is not None and arguments.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: there is no GPU. Fix: --device cpu --scale toy, to try the code out."
    return None


def make(name: str, folder: Path, arguments: Arguments) -> int:
    """Measure and leave the record, also of a failure."""
    import torch

    from tools.bench.gpu_parts import LEAST_TFLOPS, Card, Scale
    from tools.bench.gpu_runs import RUNS

    card, scale = Card(torch.device(arguments.device)), Scale(arguments.scale == "toy")
    record = {"run": name, "machine": describe_machine([]), "card": card.describe(), "scale": arguments.scale}
    try:
        record["product_tflops"] = card.product_tflops(256 if scale.toy else 8192)
        record["void"] = not scale.toy and record["product_tflops"] < LEAST_TFLOPS
        if not record["void"]:
            record["outcome"] = RUNS[name].measure(card, scale, record["product_tflops"]).to_json()
    except Exception as error:  # out of memory, a package that is missing: the next run may do better
        traceback.print_exc()
        record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    write(folder, record)
    print(json.dumps(record, indent=1))
    return 0 if is_finished(record) else 1


def is_finished(record: dict | None) -> bool:
    return record is not None and "outcome" in record


def read(folder: Path, name: str) -> dict | None:
    """The record of a run, or None."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write(folder: Path, record: dict) -> None:
    """A call may be killed at any moment: the record is there whole, or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['run']}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1), encoding="utf-8")
    beside.replace(path)


def describe(folder: Path) -> str:
    """The table as Markdown."""
    from tools.bench.gpu_runs import RUNS

    rows, details, machines, scales = [], [], [], set()
    for name, entry in RUNS.items():
        record = read(folder, name)
        rows.append([entry.title, entry.bar, *cells(record)])
        if record is not None:
            scales.add(record["scale"])
            machines.append(f"{record['card']}; {record['machine']}")
        if is_finished(record):
            details += [f"- {entry.title}: {line}" for line in record["outcome"]["details"]]
    lines = ["## On one H200", ""]
    lines += [machines[0], ""] if machines else []
    if "toy" in scales:
        lines += ["**Made at toy scale: the figures mean nothing.**", ""]
    return "\n".join([*lines, "Before each run the card's 8192^3 bf16 product is measured; below 750 TFLOP/s a run is "
                      "void. MFU: model FLOPs with the causal half of the attention, no recompute, over that rate.", "",
                      markdown_table(["run", "bar", "measured", "", "product TFLOP/s"], rows), "", *details])


def cells(record: dict | None) -> tuple[str, str, str]:
    """(measured, its bar, TFLOP/s of the product) of a run."""
    if record is None:
        return "not run", "", ""
    tflops = f"{record['product_tflops']:.0f}" if "product_tflops" in record else ""
    if "error" in record:
        return f"not run ({record['error']})", "", tflops
    if record["void"]:
        return "not run (void: the card was slow)", "", tflops
    outcome = record["outcome"]
    return outcome["measured"], {True: "reached", False: "NOT reached", None: ""}[outcome["reached"]], tflops
