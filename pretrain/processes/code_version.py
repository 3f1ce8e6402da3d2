"""Which code trains: a hash of the source files, and the commit that is checked out."""

import subprocess
from pathlib import Path

import xxhash

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("parallel", "data", "model", "pretrain")
"""What a training process imports."""
GIT_SECONDS = 20
"""Time for git to answer, which a network file system may need."""


def source_digest(root: Path) -> str:
    """Hash the names and bytes of the source files that training runs."""
    digest = xxhash.xxh3_128()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit_of(root: Path) -> str | None:
    """Ask git for the commit that is checked out.

    Returns:
        With a + where files were changed since; None without git or a repository.
    """
    options = "describe --always --abbrev=10 --exclude=* --dirty=+"
    command = ["git", "-C", str(root), *options.split()]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def describe_commit(root: Path) -> str:
    """Name the commit, or say that it is not known."""
    commit = commit_of(root)
    if commit is None:
        return "commit unknown (warning: git does not tell it)"
    return f"commit {commit}"


def describe_code() -> str:
    """Name the code that trains, so that a run can be told from its log."""
    return f"{source_digest(ROOT)}, {describe_commit(ROOT)}"
