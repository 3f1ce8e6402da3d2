"""Run one item in its own process: `python -m tools.bench.gpu.work TASK`, by gpu/lease.py."""

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.bench.gpu.lines import Report, first_line


@dataclass(frozen=True, kw_only=True)
class Task:
    """Hold what the process is told."""

    item: str
    function: str
    """module:function, called as function(card, scale, report, **options)."""
    options: dict
    lines: str
    """File to append the figures to."""
    date: str
    card: str
    """The card's name; "" where this process has to ask for it."""
    device: str
    scale: str

    def to_json(self) -> str:
        """Write the task as a word of the command line."""
        return json.dumps(asdict(self))


def work(task: Task) -> int:
    """Run the item; 0, or 1 after a line that says why it failed."""
    report = Report(Path(task.lines), task.item, task.scale, date=task.date, card=task.card)
    try:
        import torch

        from tools.bench.gpu.parts import Card, Scale

        report.torch = torch.__version__
        card = Card(torch.device(task.device))
        # Asking makes a context on the card, which some items leave to processes of their own.
        report.card = task.card or card.describe()
        module, _, name = task.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        function(card, Scale(task.scale == "toy"), report, **task.options)
    except Exception as error:
        # The whole reason is in the log, one line of it beside the figures.
        traceback.print_exc()
        report.fail(first_line(error))
        return 1
    return 0


def main(text: str) -> int:
    """Do the task of the command line; returns the exit code."""
    task = Task(**json.loads(text))
    if task.device == "cpu":
        # Read at torch's first look for a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return work(task)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
