"""A device that is not in the table, or a cluster whose links are other ones: a row in a YAML file.

base: H100                       # what is not written is as there; optional
name: our cluster
network_bytes_per_second: 25e9
efficiency: {products: 0.6, attention: {128: 0.5}}
"""

import dataclasses
import difflib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from pretrain.planner.hardware import CPU, TABLE, Efficiency, Hardware

BY_HEAD_SIZE = ("attention", "varlen_attention", "flash_attention")
"""Shares that depend on the size of a head."""


def named_hardware(name: str) -> Hardware:
    """Return the row of the table.

    Raises:
        ValueError: there is none, with those that there are.
    """
    known = {row.name.lower(): row for row in (*TABLE.values(), CPU)}
    if name.lower() not in known:
        raise ValueError(
            f"hardware = {name}: is not known. Fix: one of {', '.join(known)}, or a row of your "
            "own with --hardware-file."
        )
    return known[name.lower()]


def read_hardware(path: str) -> Hardware:
    """Read a row from a file.

    Raises:
        ValueError: the file cannot be read, or says what a row does not; all problems, a line each.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"hardware_file = {path}: cannot be read ({reason}). Fix: a YAML file."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"hardware_file = {path}: must hold keys and values. Fix: for example base: H100."
        )
    base_name = values.pop("base", None)
    base = named_hardware(str(base_name)) if base_name is not None else None
    shares = values.pop("efficiency", {})
    problems = _unknown_keys(values, Hardware, path) + _unknown_keys(shares, Efficiency, path)
    if base is None:
        missing = [
            field.name
            for field in fields(Hardware)
            if field.default is MISSING and field.name not in values
        ]
        if missing:
            problems.append(
                f"hardware_file = {path}: {', '.join(missing)}: must be given. Fix: give them, or "
                "base: with a row of the table."
            )
    row = {key: _value(key, value, path, problems) for key, value in values.items()}
    efficiency = _efficiency(shares, base, path, problems)
    if problems:
        raise ValueError("\n".join(problems))
    if base is None:
        return Hardware(**row, efficiency=efficiency)
    return dataclasses.replace(base, **row, efficiency=efficiency)


def _efficiency(shares: Any, base: Hardware | None, path: str, problems: list[str]) -> Efficiency:
    """Return the shares of a row's rates, those of its base where nothing is written."""
    given: dict[str, Any] = {}
    for key, value in shares.items() if isinstance(shares, dict) else ():
        if key in BY_HEAD_SIZE and isinstance(value, dict):
            given[key] = {
                int(size): _value(key, share, path, problems) for size, share in value.items()
            }
        else:
            given[key] = _value(key, value, path, problems)
    known = {field.name for field in fields(Efficiency)}
    given = {key: value for key, value in given.items() if key in known}
    return dataclasses.replace(base.efficiency if base else Efficiency(), **given)


def _value(key: str, value: Any, path: str, problems: list[str]) -> Any:
    """Read one value: a name, or a number above 0 (YAML reads 50e9 as text)."""
    if key == "name":
        return str(value)
    if key == "memory_bytes" and value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        problems.append(
            f"hardware_file = {path}: {key} = {value}: must be a number above 0. Fix: give one."
        )
    return int(number) if key in ("memory_bytes", "devices_per_node") else number


def _unknown_keys(values: Any, kind: type, path: str) -> list[str]:
    """Name the keys that a row does not have, each with the nearest that it has."""
    if not isinstance(values, dict):
        return [f"hardware_file = {path}: efficiency: must hold keys and values. Fix: write them."]
    known = [field.name for field in fields(kind)]
    problems = []
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            fix = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}."
            problems.append(f"hardware_file = {path}: {key}: no such key. Fix: {fix}")
    return problems
