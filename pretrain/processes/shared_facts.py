"""What all ranks of a run must share, written down as name -> text for the comparison."""

import dataclasses
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
import xxhash

from data.sources import Corpus
from data.stream import DocumentStream
from model.compiled import describe as describe_pointwise
from parallel.layout import device_here, environment_of_numbers
from pretrain.config.config import Config
from pretrain.plan import Plan
from pretrain.processes.agreement import Shared
from pretrain.processes.code_version import ROOT, source_digest
from pretrain.schedule.phases import Phase

MAY_DIFFER = {
    "data_cache_path": "a folder on the node's own disk",
    "cpu_offloading_host_memory": "bounds the node's own memory",
    "tokenizer_model": "a path; the tokenizer itself is compared by its fingerprint",
    "tensorboard_dir": "written by rank 0 alone",
    "wandb_save_dir": "written by rank 0 alone",
    "profile_dir": "written by each rank for itself",
    "memory_snapshot_path": "written by each rank for itself",
}
"""Setting -> why nodes may differ in it."""

ESTIMATES = {"auto", "predicted_bytes"}
"""Fields of a phase that say how it came about, and not what is trained."""

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


def shared_by_all(plan: Plan) -> Shared:
    """Write down everything that all ranks of this run must share."""
    # What the user gives: settings, tokenizer, code, packages, kind of device.
    settings = setting_texts(plan.config)
    settings["tokenizer"] = str(plan.tokenizer_description)
    device = "cpu" if device_here()[0] == "cpu" else "cuda"
    settings["device"] = device
    # Whether kernels are fused depends on torch's own variables, and decides where bf16 is rounded.
    settings["kernels"] = describe_pointwise(torch.device(device))
    settings |= version_texts() | environment_of_numbers()
    settings["code"] = source_digest(ROOT)

    # Where the run starts, and what follows from both.
    clock = plan.progress.clock if plan.progress else 0
    start = {"start": f"{plan.start.reason}, token {clock:,}"}
    start["rewinds"] = str([rewind.window for rewind in plan.rewinds])
    derived = {"vocab_size": str(plan.vocab_size), "choice of layouts": str(plan.layouts)}
    for phase in plan.phases:
        derived |= phase_texts(phase)
    return Shared(settings, data_texts(plan.corpus), start, derived)


def setting_texts(config: Config) -> dict[str, str]:
    """Write down every setting of the run and of its phases."""
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
    """Write down the entries of `phases:` as they were given."""
    found = {"number of phases": str(len(phases))}
    for number, entry in enumerate(phases):
        found |= {f"phases[{number}]: {name}": _text(value) for name, value in vars(entry).items()}
    return found


def phase_texts(phase: Phase) -> dict[str, str]:
    """Write down every field of a phase as it came out, those of its parts one by one."""
    # A difference in a part of the layout or of the rope is named by itself.
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
    """Write down what every source and validation set is, whatever its path says."""
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
    """Write down Python, the packages that decide numbers or ids, and what torch was built for."""
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
