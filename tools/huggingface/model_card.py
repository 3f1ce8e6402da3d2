"""The README.md of an exported folder: its model card, with the facts of the training.

The front matter is that of the Hugging Face Hub. Nothing in it comes from the user's machine:
sources are named by the last part of their path.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from data.blend import SourceName
from data.ledger import StoredLedger
from data.segments import ClosedSegment, Segment
from model.config import ModelConfig
from pretrain.checkpointing.model_files import CARD, CONFIG
from pretrain.logs.run_facts import FILE as RUN_FILE
from pretrain.logs.run_facts import RunFacts
from pretrain.planner.model_size import ModelSize
from pretrain.processes.code_version import describe_code
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases
from tools.huggingface.export_files import parse_json
from tools.huggingface.stored_model import StoredModel

KEPT_KEYS = ("license", "license_name", "license_link", "language")
"""Keys of the source's card that hold for a model trained from it, too."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""A name on the Hub: owner and model."""
Row = tuple[str, str]


def write_model_card(
    stored: StoredModel, folder: Path, config: Mapping[str, Any], name: str, base_model: str | None
) -> None:
    """Write README.md.

    Args:
        config: the content of the folder's config.json.
        name: what the model is called.
        base_model: name on the Hub of the model that training began with; None = as its
            config.json says.
    """
    front = yaml.safe_dump(_front_matter(stored, config, base_model), sort_keys=False)
    parts = [
        f"---\n{front}---",
        f"# {name}",
        _table("model", "", _model_rows(stored, config)),
        f"## Training\n{_origin(stored, base_model)}",
        *_training_parts(stored),
        f"## Use\n```python\n{_usage(stored)}\n```",
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the front matter


def _front_matter(
    stored: StoredModel, config: Mapping[str, Any], base_model: str | None
) -> dict[str, Any]:
    """Make what the Hub reads."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    source_card = read_front_matter(stored.carried.get(CARD, b""))
    front |= {key: source_card[key] for key in KEPT_KEYS if key in source_card}
    base_model = base_model or _base_model(stored)
    if base_model is not None:
        front["base_model"] = base_model
    return front | {"tags": ["ithaca", str(config["model_type"]), *_kind_of_training(stored)]}


def _kind_of_training(stored: StoredModel) -> list[str]:
    """Return the tag of the training; none where an import was not trained."""
    if not _is_imported(stored):
        return ["pretraining"]
    return [] if stored.progress.data is None else ["continued-pretraining"]


def read_front_matter(card: bytes) -> dict[str, Any]:
    """Read the front matter of a model card; empty where there is none that can be read."""
    match = re.match(rb"---\r?\n(.*?)\r?\n---\s", card, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
        return {}
    return content if isinstance(content, dict) else {}


def _base_model(stored: StoredModel) -> str | None:
    """Return the name on the Hub that the source's config.json gives; None where it is a path."""
    name = parse_json(stored.carried.get(CONFIG)).get("_name_or_path")
    is_name = isinstance(name, str) and HUB_NAME.fullmatch(name)
    return name if is_name and not name.startswith(".") else None


def _is_imported(stored: StoredModel) -> bool:
    return CONFIG in stored.carried


# ---------------------------------------------------------------- the model


def _model_rows(stored: StoredModel, config: Mapping[str, Any]) -> list[Row]:
    """Describe the model."""
    model = stored.config.model
    parameters = ModelSize(model, stored.vocab_size).num_parameters
    return [
        ("architecture", str(config["architectures"][0])),
        ("parameters", f"{parameters:,}"),
        (
            "shape",
            f"{model.num_layers} layers, width {model.hidden_size:,}, "
            f"{model.num_attention_heads} heads, {model.num_kv_heads} key/value heads, "
            f"MLP {model.ffn_hidden_size:,}",
        ),
        ("vocabulary", f"{stored.vocab_size:,}"),
        ("context", f"{config['max_position_embeddings']:,} tokens; rope {stored.rope.describe()}"),
        ("weights", str(config["torch_dtype"])),
    ]


# ---------------------------------------------------------------- the training


def _origin(stored: StoredModel, base_model: str | None) -> str:
    """Say what training began with, and what of the source's own card is here."""
    if not _is_imported(stored):
        return "Trained from scratch."
    name = base_model or _base_model(stored) or "another model"
    text = f"Continued from {name}"
    if stored.progress.data is None:
        text = f"The weights of {name}, not trained since"
    if CARD in stored.carried:
        text += "; its model card is not repeated here, but for license and language"
    return f"{text}."


def _training_parts(stored: StoredModel) -> list[str]:
    """Describe what was trained; nothing where the checkpoint is an import."""
    progress = stored.progress
    if progress.data is None:
        return []
    segments = StoredLedger.from_json(progress.data).segments
    parts = [_table("", "", _run_rows(stored)), _phase_table(stored, segments)]
    return [part for part in parts if part]


def _run_rows(stored: StoredModel) -> list[Row]:
    """Describe the run as a whole."""
    progress = stored.progress
    optimizer = stored.config.optimizer
    muon = ""
    if optimizer.optimizer == "muon":
        muon = f"Muon of the layers' matrices, momentum {optimizer.muon_momentum}; for the rest "
    rows = [
        ("checkpoint", f"step {progress.step:,}, after {progress.clock:,} tokens"),
        (
            "optimizer",
            f"{muon}AdamW, betas {optimizer.adam_beta1} and {optimizer.adam_beta2}, epsilon "
            f"{optimizer.adam_eps}, weight decay {optimizer.weight_decay}, gradients clipped at "
            f"norm {optimizer.clip_grad}",
        ),
        ("precision", "bfloat16, fp32 master weights" if optimizer.bf16 else _full(optimizer.fp64)),
    ]
    if stored.config.model.use_mup:
        rows.append(("muP", _describe_base(stored.config.model)))
    if optimizer.qk_clip:
        limit = f"attention logits above {optimizer.qk_clip_threshold:g}"
        rows.append(("QK-clip", f"queries and keys of heads with {limit} are scaled"))
    loss = _training_loss(stored)
    if loss is not None:
        rows.append(("training loss of the last step", f"{loss:.4f}"))
    score = progress.validation
    if score is not None:
        place = f"{short_source(score.set)} at {score.seq_length:,} tokens"
        rows.append(("validation", f"loss {score.loss:.4f} of {place}"))
    return [*rows, ("code", _trained_with(stored)), ("exported with", describe_code())]


def _describe_base(model: ModelConfig) -> str:
    """Describe the model whose learning rate muP carries over to this one."""
    given = {
        "MLP": model.mup_base_ffn_hidden_size,
        "heads": model.mup_base_num_attention_heads,
        "head size": model.mup_base_head_dim,
    }
    parts = [f", {name} {value:g}" for name, value in given.items() if value is not None]
    return f"learning rate of a base of width {model.base_hidden_size:,}{''.join(parts)}"


def _full(is_fp64: bool) -> str:
    return "fp64" if is_fp64 else "fp32"


def _training_loss(stored: StoredModel) -> float | None:
    """Find the loss of the checkpoint's step in the run's metrics; None where it is not there."""
    path = stored.folder.parent / "metrics.jsonl"
    if not path.is_file():
        return None
    begin = f'"step": {stored.progress.step},'
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if begin in line:
                loss = parse_json(line.encode()).get("loss")
                return loss if isinstance(loss, float) else None
    return None


def _trained_with(stored: StoredModel) -> str:
    """Name the code of the run's last start."""
    path = stored.folder.parent / RUN_FILE
    try:
        return RunFacts.from_json(json.loads(path.read_text(encoding="utf-8"))).code
    except (OSError, ValueError, TypeError):
        return "unknown"


def _phase_table(stored: StoredModel, segments: Iterable[Segment]) -> str:
    """Describe the phases: how far each went, and with what."""
    try:
        phases = {phase.name: phase for phase in resolve_phases(stored.config)}
    except ValueError:  # a configuration of an earlier version
        phases = {}
    drawn: dict[str, dict[str, int]] = {}
    lengths: dict[str, int] = {}
    for segment in segments:
        of_phase = drawn.setdefault(segment.phase, {})
        lengths[segment.phase] = segment.settings.seq_length
        for source, tokens in _tokens_drawn(segment).items():
            of_phase[source] = of_phase.get(source, 0) + tokens
    lines = [
        "| phase | context | tokens | batch | learning rate | sources |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, sources in drawn.items():
        total = sum(sources.values())
        batch, rate = _settings_of(phases.get(name), stored)
        shown = ", ".join(_shares(sources, total))
        lines.append(f"| {name} | {lengths[name]:,} | {total:,} | {batch} | {rate} | {shown} |")
    return "\n".join(lines)


def _tokens_drawn(segment: Segment) -> dict[str, int]:
    """Return the tokens that a segment gave the model, by source."""
    if isinstance(segment, ClosedSegment):
        drawn = {} if segment.skipped_until is not None else segment.drawn
    else:
        drawn = segment.saved.drawn if segment.saved else {}
    return {name: entry.tokens for name, entry in drawn.items()}


def _settings_of(phase: Phase | None, stored: StoredModel) -> tuple[str, str]:
    """Describe a phase's batch and learning rate; the run's settings may not have it any more."""
    if phase is None:
        return "?", "?"
    batches = [f"{batch:,}" for batch in phase.batches]
    style = stored.config.optimizer.lr_decay_style
    rate = f"{phase.lr:g}" if style == "constant" else f"{phase.lr:g} to {phase.min_lr:g}, {style}"
    return f"{' to '.join(dict.fromkeys((batches[0], batches[-1])))} tokens", rate


def _shares(sources: Mapping[str, int], total: int) -> list[str]:
    """Write what each source gave, the most first; equal names are numbered."""
    found = []
    seen: dict[str, int] = {}
    for source, tokens in sorted(sources.items(), key=lambda entry: -entry[1]):
        if tokens == 0:
            continue
        name = short_source(source)
        seen[name] = seen.get(name, 0) + 1
        number = f" ({seen[name]})" if seen[name] > 1 else ""
        found.append(f"{name}{number} {tokens / total:.1%}")
    return found


def short_source(source: str) -> str:
    """Name a source without its folders: /data/web[64Ki:] is web[64Ki:]."""
    try:
        name = SourceName.parse(source)
    except ValueError:
        return Path(source).name
    return str(SourceName(Path(name.prefix).name, name.low, name.high))


# ---------------------------------------------------------------- use


def _usage(stored: StoredModel) -> str:
    """Write how the model is loaded."""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
    ]
    if stored.tokenizer is not None:
        lines += [
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
            'ids = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))",
        ]
    else:
        lines[0] = "from transformers import AutoModelForCausalLM"
    return "\n".join(lines)


def _table(first: str, second: str, rows: Iterable[Row]) -> str:
    """Write a table of two columns."""
    lines = [f"| {first} | {second} |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])
