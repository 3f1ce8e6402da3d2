"""What all processes of a run must share, compared as soon as they have met.

Ranks that differ in a setting, in their data or in their code train on without a word: each shard
of the weights is updated by another optimizer, or some ranks wait for others until the time-out. So
each process writes down everything that must be the same as name -> text, and one digest of 16
bytes goes to everybody. Only where digests differ are the texts exchanged, and the differences
named with their ranks, on every rank alike.
"""

import dataclasses
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from data.sources import Corpus
from data.stream import DocumentStream
from model.compiled import describe as describe_pointwise
from parallel.collectives import all_reduce
from parallel.layout import Axis, device_here, environment_of_numbers
from pretrain.config.config import Config
from pretrain.plan import Plan
from pretrain.schedule.phases import Phase

MAY_DIFFER = {
    "data_cache_path": "a folder on the node's own disk",
    "cpu_offloading_host_memory": "bounds the node's own memory",
    "tokenizer_model": "a path; the tokenizer itself is compared by its fingerprint",
    "tensorboard_dir": "written by rank 0 alone",
    "wandb_save_dir": "written by rank 0 alone",
}
"""Setting -> why nodes may differ in it."""

ESTIMATES = {"auto", "predicted_bytes"}
"""Fields of a phase that say how it came about, and not what is trained."""

ROOT = Path(__file__).resolve().parents[2]
CODE_FOLDERS = ("parallel", "data", "model", "pretrain")
"""What a training process imports."""

PACKAGES = (
    "torch",
    "megatron-core",
    "einops",
    "numpy",
    "numba",
    "xxhash",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "triton",
    "flash-attn",
    "transformer-engine",
    "liger-kernel",
)
"""Packages that compute or exchange numbers, or decide a token's id; they may be absent, but then
everywhere."""

SHOWN_DIFFERENCES = 8
SHOWN_CHARACTERS = 100
SHOWN_RUNS = 6
"""Runs of consecutive ranks that are named for one value."""


class Refused(ValueError):
    """Bad input that all ranks of all nodes know of and raise together."""


@contextmanager
def known_to_all() -> Iterator[None]:
    """Turn bad input that all ranks find inside together into `Refused`."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


@dataclasses.dataclass(frozen=True)
class Shared:
    """What must be the same, by kind: name -> text."""

    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the user gives: settings, tokenizer, code, packages, kind of device."""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the files of the data hold, in the order of this run."""
    start: dict[str, str] = dataclasses.field(default_factory=dict)
    """The checkpoint that the run starts from; another may be published while processes start."""
    derived: dict[str, str] = dataclasses.field(default_factory=dict)
    """What follows from the two, and from the memory of the machine where that decides."""
    problem: str | None = None
    """Why this process cannot train at all."""

    def digest(self) -> bytes:
        parts = [self.settings, self.data, self.start, self.derived]
        text = repr(([sorted(part.items()) for part in parts], self.problem))
        return xxhash.xxh3_128_digest(text.encode())


def require_agreement(shared: Shared, world: Axis) -> None:
    """Compare `shared` with that of all other ranks; collective over `world`, on CPU tensors alone.

    Raises:
        Refused: a rank has a problem, or ranks differ in what the user gives; a line each.
        RuntimeError: ranks found different checkpoints to start from; another start may mend it.
    """
    # All of them come to this point, so a problem of all ranks goes the same way as one of a few.
    if _all_equal(shared.digest(), world):
        if shared.problem is not None:
            raise Refused(_describe_problems([shared.problem] * world.size))
        return
    found = _gather(shared, world)
    if any(other.problem is not None for other in found):
        raise Refused(_describe_problems([other.problem for other in found]))
    # What is named first explains what comes after it: another seed is another order of the
    # documents.
    if lines := describe_differences(
        [other.settings for other in found], "the same command and code"
    ):
        raise Refused("\n".join(lines))
    if lines := describe_differences([other.data for other in found], "the same files"):
        raise Refused("\n".join(lines))
    by_restart = (
        "a restart mends it where a checkpoint was published meanwhile; else let --save be the "
        "same folder"
    )
    if lines := describe_differences([other.start for other in found], by_restart):
        raise RuntimeError("\n".join(lines))
    by_memory = "where machines differ in memory, --device-memory-gib, to choose alike"
    raise Refused("\n".join(describe_differences([other.derived for other in found], by_memory)))


def _gather(shared: Shared, world: Axis) -> list[Shared]:
    """What each rank shares, in the order of the ranks."""
    # As plain values: another version of this file may have other classes.
    own = (dataclasses.asdict(shared), describe_commit(ROOT))
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, own, group=world.group)
    names = [field.name for field in dataclasses.fields(Shared)]
    found = []
    for parts, commit in everyone:
        known = {name: parts[name] for name in names if name in parts}
        found.append((Shared(**known), commit))
    return _with_commits(found)


def _all_equal(digest: bytes, world: Axis) -> bool:
    """Is the digest that of all ranks? The highest of the ranks is then the lowest, too."""
    halves = [int.from_bytes(digest[at : at + 8]) >> 1 for at in (0, 8)]
    own = torch.tensor([*halves, *(-half for half in halves)], dtype=torch.int64, device="cpu")
    highest = all_reduce(own, world, dist.ReduceOp.MAX)
    return bool((highest[:2] == -highest[2:]).all())


def _describe_problems(problems: Sequence[str | None]) -> str:
    """The lines of the ranks that cannot train, each once, with their ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, problem in enumerate(problems):
        for line in (problem or "").splitlines():
            ranks.setdefault(line, []).append(rank)
    return "\n".join(f"on {describe_ranks(found)}: {line}" for line, found in ranks.items())


def describe_differences(texts: Sequence[Mapping[str, str]], remedy: str) -> list[str]:
    """A line for each name whose text is not the same on all ranks.

    Args:
        texts: name -> text of each rank, in the order of the ranks.
        remedy: what to give to every node.
    """
    names = dict.fromkeys(name for found in texts for name in found)
    lines = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, found in enumerate(texts):
            ranks.setdefault(found.get(name, "absent"), []).append(rank)
        if len(ranks) > 1:
            values = ", ".join(
                f"{describe_ranks(at)}: {_short(text)}" for text, at in ranks.items()
            )
            lines.append(
                f"{name}: must be the same on all ranks ({values}). Fix: {remedy} on every node."
            )
    if len(lines) > SHOWN_DIFFERENCES:
        rest = [line.split(": must be")[0] for line in lines[SHOWN_DIFFERENCES:]]
        left_out = f"and {len(rest)} more differ: {_short(', '.join(rest))}"
        lines = [*lines[:SHOWN_DIFFERENCES], left_out]
    return lines


def describe_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks as runs: "rank 3", "ranks 0-3, 8"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    shown = ", ".join(
        str(low) if low == high else f"{low}-{high}" for low, high in runs[:SHOWN_RUNS]
    )
    more = ", ..." if len(runs) > SHOWN_RUNS else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def _short(text: str) -> str:
    """The text, cut where it is long; the hash tells long texts with one beginning apart."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}... (hash {xxhash.xxh3_64_hexdigest(text.encode())[:8]})"


# ---------------------------------------------------------------- what is shared


def shared_by_all(plan: Plan) -> Shared:
    """Everything that all ranks of this run must share."""
    settings = setting_texts(plan.config)
    settings["tokenizer"] = str(plan.tokenizer_description)
    device = "cpu" if device_here()[0] == "cpu" else "cuda"
    settings["device"] = device
    # Whether kernels are fused depends on torch's own variables, and decides where bf16 is rounded.
    settings["kernels"] = describe_pointwise(torch.device(device))
    settings |= version_texts() | environment_of_numbers()
    settings["code"] = source_digest(ROOT)
    clock = plan.progress.clock if plan.progress else 0
    start = {"start": f"{plan.start.reason}, token {clock:,}"}
    derived = {"vocab_size": str(plan.vocab_size), "choice of layouts": str(plan.layouts)}
    for phase in plan.phases:
        derived |= phase_texts(phase)
    return Shared(settings, data_texts(plan.corpus), start, derived)


def setting_texts(config: Config) -> dict[str, str]:
    """Every setting of the run and of its phases -> its value."""
    found = {}
    for section in dataclasses.fields(config):
        if section.name == "given":  # how a setting was spelled, which decides nothing
            continue
        for name, value in vars(getattr(config, section.name)).items():
            if name == "phases":
                found |= _entry_texts(value)
            elif name not in MAY_DIFFER:
                found[name] = _text(value)
    return found


def _entry_texts(phases: Sequence[Any]) -> dict[str, str]:
    found = {"number of phases": str(len(phases))}
    for number, entry in enumerate(phases):
        found |= {f"phases[{number}]: {name}": _text(value) for name, value in vars(entry).items()}
    return found


def phase_texts(phase: Phase) -> dict[str, str]:
    """Every field of a phase as it came out, those of its parts one by one."""
    found = {}
    for name, value in vars(phase).items():
        if name in ESTIMATES:
            continue
        parts = vars(value) if dataclasses.is_dataclass(value) else {"": value}
        for part, text in parts.items():
            if part not in MAY_DIFFER:
                found[f"phase {phase.index}: {name}{'.' if part else ''}{part}"] = _text(text)
    return found


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(str(item) for item in value)
    return str(value)


def data_texts(corpus: Corpus) -> dict[str, str]:
    """Every source and validation set -> what it is, whatever its path says."""
    found = {f"data of {name}": _stream_text(stream) for name, stream in corpus.train.items()}
    for name, blend in corpus.validation.items():
        parts = [f"{weight:g} x {_stream_text(stream)}" for weight, stream in blend]
        found[f"validation set {name}"] = ", ".join(parts)
    return found


def _stream_text(stream: DocumentStream) -> str:
    digest = xxhash.xxh3_64_hexdigest(str(stream.fingerprint()).encode())
    size = f"{stream.tokens_per_epoch:,} tokens in {stream.num_documents:,} documents"
    return f"{size}, hash {digest[:12]}"


def version_texts() -> dict[str, str]:
    """Python, the packages that decide numbers or ids, and what torch was built for."""
    found = {
        "version of python": platform.python_version(),
        "version of CUDA": str(torch.version.cuda),
    }
    for name in PACKAGES:
        found[f"version of {name}"] = _version(name)
    # The build is in torch's own name for itself: 2.13.0+cpu and 2.13.0+cu130 compute differently.
    found["version of torch"] = str(torch.__version__)
    return found


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def source_digest(root: Path) -> str:
    """The names and bytes of the source files that training runs, as a hash."""
    digest = xxhash.xxh3_128()
    for folder in CODE_FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit_of(root: Path) -> str | None:
    """The commit that is checked out, with a + where files were changed since; None without git or
    a repository."""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=10",
        "--exclude=*",
        "--dirty=+",
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def describe_code() -> str:
    """Which code trains, so that a run can be told from its log."""
    return f"{source_digest(ROOT)}, {describe_commit(ROOT)}"


def describe_commit(root: Path) -> str:
    commit = commit_of(root)
    return (
        "commit unknown (warning: git does not tell it)" if commit is None else f"commit {commit}"
    )


def _with_commits(found: Sequence[tuple[Shared, str]]) -> list[Shared]:
    """What each rank shares, its code named by the commit too where ranks differ in their code.

    Where the source files are the same it does not matter which commit a node believes to be at.
    """
    everyone = [shared for shared, _ in found]
    if len({shared.settings.get("code") for shared in everyone}) == 1:
        return everyone
    named = []
    for shared, commit in found:
        code = f"{shared.settings.get('code')} ({commit})"
        named.append(dataclasses.replace(shared, settings=shared.settings | {"code": code}))
    return named
