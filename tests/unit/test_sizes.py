"""data/sizes.py: which files a run reads, and what tells one corpus from another."""

import os

from data.config import DataConfig
from data.sizes import SHOWN_BYTES, describe_pair, prefixes


def test_every_file_of_a_run_is_named_once():
    config = DataConfig(
        train_data_path=["0.5", "a", "0.5", "b[64:]"], valid_data_path=["own=v", "other=a"]
    )
    assert prefixes(config, [["c"], ["1", "b"]]) == ["a", "b", "c", "v"]
    assert prefixes(DataConfig(data_path=["a"])) == ["a"]
    assert prefixes(DataConfig(mock_data=True)) == []


def write_pair(prefix: str, content: bytes) -> None:
    for suffix in (".bin", ".idx"):
        with open(prefix + suffix, "wb") as file:
            file.write(content)


def test_sizes_and_both_ends_tell_corpora_apart(tmp_path):
    prefix = str(tmp_path / "web")
    content = b"\1" * (4 * SHOWN_BYTES)
    write_pair(prefix, content)
    first = describe_pair(prefix)
    assert first.startswith(
        f"{len(content):,} bytes of .bin, {len(content):,} bytes of .idx, hash "
    )
    for other in (content + b"\0", b"\0" + content[1:], content[:-1] + b"\0"):
        write_pair(prefix, other)
        assert describe_pair(prefix) != first
    write_pair(prefix, content)
    assert describe_pair(prefix) == first


def test_a_file_that_is_not_there_is_said(tmp_path):
    prefix = str(tmp_path / "web")
    write_pair(prefix, b"x")
    os.remove(prefix + ".idx")
    assert describe_pair(prefix) == ".idx cannot be read (No such file or directory)"
