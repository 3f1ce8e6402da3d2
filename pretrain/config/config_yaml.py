"""The configuration as a YAML file: what a user writes, and what a checkpoint keeps."""

import os
from typing import Any

import yaml

from pretrain.config.config import Config
from pretrain.config.flat import from_flat, to_flat


class _TextLoader(yaml.BaseLoader):
    """Reads scalars as text; a key that appears twice in a mapping is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # YAML itself would let the last one win, without a word.
        keys = [key.value for key, _ in node.value]
        twice = [
            (key, key_node.start_mark.line + 1)
            for (key_node, _), key in zip(node.value, keys, strict=True)
            if keys.count(key) > 1
        ]
        if twice:
            lines = " and ".join(str(line) for _, line in twice)
            raise ValueError(
                f"{self.name}: {twice[0][0]}: is given twice, in lines {lines}. Fix: keep one."
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict[str, Any]:
    """Return the file's keys with every scalar as text: each field's type decides what it means.

    Raises:
        ValueError: there is no such file, or it does not hold a mapping.
    """
    if not os.path.isfile(path):
        raise ValueError(f"config = {path}: no such file. Fix: give the path of a YAML file.")
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_TextLoader)
    # A file in another encoding is no YAML either.
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config = {path}: not valid YAML: {error}. Fix: mend the file.") from None
    # An empty file says nothing.
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise ValueError(
            f"config = {path}: must hold `key: value` lines, holds a {type(values).__name__}. "
            "Fix: one setting per line."
        )
    return values


def dump_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML text, one key per line."""
    return yaml.safe_dump(
        to_flat(config), sort_keys=False, default_flow_style=None, allow_unicode=True
    )


def read_config_yaml(path: str) -> Config:
    """Return a configuration that `dump_yaml` wrote."""
    return from_flat(read_yaml(path), path)


def read_config_text(text: str, origin: str) -> Config:
    """Return a configuration from text that `dump_yaml` wrote.

    Args:
        origin: where the text stood, for messages.

    Raises:
        ValueError: it is not one of this version.
    """
    try:
        return from_flat(yaml.load(text, Loader=_TextLoader), origin)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin}: not valid YAML: {error}") from None
