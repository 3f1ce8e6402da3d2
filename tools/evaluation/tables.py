"""The results of an evaluation as a table of tasks by lengths."""

from collections.abc import Sequence
from typing import Any

from tools.evaluation.ruler import TASKS
from tools.shared.number_text import NOTHING, gain_text, length, loss_text

Record = dict[str, Any]


def results_table(records: Sequence[Record], lengths: Sequence[int]) -> list[str]:
    """Write one line for each task and one column for each length."""
    rows: dict[str, dict[int, str]] = {}
    for record in records:
        name, value = _cell(record)
        rows.setdefault(name, {})[record["length"]] = value
    depths = {name: row for name, row in rows.items() if name.startswith("passkey at")}
    ordered = {}
    for name, row in rows.items():
        if name not in depths:
            ordered[name] = row
    ordered |= _means(records, lengths) | depths
    cells = [["task", *map(length, lengths)]]
    for name, row in ordered.items():
        cells.append([name, *(row.get(each, NOTHING) for each in lengths)])
    return _align(cells)


def describe_record(record: Record) -> str:
    """Write one result in a line."""
    name, value = _cell(record)
    return f"{length(record['length'])}: {name} {value}"


def harness_table(records: Sequence[Record]) -> list[str]:
    """Write a line for each metric of the harness's tasks."""
    cells = [["task", "metric", "value", "stderr"]]
    for record in records:
        metrics = record["metrics"]
        for name, value in metrics.items():
            if "_stderr" in name:
                continue
            # The harness's `metric,filter`, without the filter where it is `none`.
            metric, comma, chosen = name.partition(",")
            error = metrics.get(f"{metric}_stderr{comma}{chosen}")
            cells.append([record["task"], name, f"{value:.6g}", loss_text(error)])
    return _align(cells)


def _cell(record: Record) -> tuple[str, str]:
    """Name the row that a record belongs to, and what stands in it."""
    task = record["task"]
    if task == "loss":
        return "loss", loss_text(record["loss"])
    if task == "context_gain":
        return "context gain", gain_text(record)
    if task == "passkey":
        return f"passkey at {record['depth']:g}", _share(record["accuracy"])
    return task, _share(record["score"])


def _means(records: Sequence[Record], lengths: Sequence[int]) -> dict[str, dict[int, str]]:
    """Write the means over the tasks of RULER, where there are several, and over depths."""
    found = {}
    groups = {
        "mean of RULER's": ([r for r in records if r["task"] in TASKS], "score"),
        "passkey": ([r for r in records if r["task"] == "passkey"], "accuracy"),
    }
    for name, (members, key) in groups.items():
        row = {}
        for each in lengths:
            values = [record[key] for record in members if record["length"] == each]
            if len(values) > 1:
                row[each] = _share(sum(values) / len(values))
        if row:
            found[name] = row
    return found


def _share(value: float) -> str:
    return f"{value:.3f}"


def _align(cells: list[list[str]]) -> list[str]:
    """Set cells in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        rest = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return lines
