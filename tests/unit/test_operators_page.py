"""launch/OPERATORS.md quotes what the code says: each quoted part must be in the code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "launch" / "OPERATORS.md"


def quotes() -> list[str]:
    """List what stands in the second column of the table of what happens."""
    rows = PAGE.read_text().split("## From what you see")[1].split("\n## ")[0].splitlines()
    cells = [row.split(" | ")[1] for row in rows if row.startswith("| ")][2:]
    return [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]


def what_the_code_says() -> str:
    """Join the source files, and the parts of a text that lie on several lines of code."""
    files = [
        path
        for folder in ("launch", "pretrain")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".sh")
    ]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\\?\s*\n\s*f?"', "", code)


CODE = what_the_code_says()


@pytest.mark.parametrize("quote", quotes())
def test_each_quoted_line_is_in_the_code(quote):
    parts = [part.strip(" ,;:().") for part in quote.split("...")]
    missing = [part for part in parts if part and part not in CODE]
    assert not missing, f"no code says {missing}"


def test_the_page_quotes_something():
    assert len(quotes()) > 25


def test_the_page_lists_each_kind_of_event():
    calls = r'(?:[rR]eport|event|[sS]ay)\(\s*(?:root, )?"([a-z ]+)",|\.end\(\s*"([a-z]+)"'
    reported = {first or second for first, second in re.findall(calls, CODE)}
    assert {"save", "spike", "rewind", "recovered", "deleted", "done"} <= reported
    listed = PAGE.read_text().split("Kinds:")[1].split("\n3.")[0]
    missing = [kind for kind in sorted(reported) if f"`{kind}`" not in listed]
    assert not missing, f"not in {PAGE.name}: {missing}"
