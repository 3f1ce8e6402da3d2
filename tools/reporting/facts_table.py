"""Say what a run is and runs on: the rows of facts below the page's first figures."""

from collections.abc import Iterable

from pretrain.config.config import Config
from pretrain.planner.model_size import ModelSize
from pretrain.schedule.phases import Phase
from tools.reporting.phase_table import planned_phases
from tools.reporting.run_record import RunRecord
from tools.shared.number_text import duration, length, moment, short

MOST_SOURCES = 6
"""Words of a blend that are shown; of more, how many there are."""
WARMUPS = ("iters", "samples", "tokens", "fraction")
"""Units of a warmup, the last words of its settings' names."""

Row = tuple[str, str]
"""What is told, and its value."""


def about(run: RunRecord) -> list[Row]:
    """List (what, value) of the model, its training, the machines and the time."""
    rows = []
    # Without readable settings, only what the steps and events say is known.
    if run.config is not None:
        phases = list(planned_phases(run).values())
        rows += _model_rows(run.config)
        rows.append(("learning rate", _rate_text(run.config, phases)))
        rows.append(("optimizer", _optimizer_text(run.config)))
    rows.append(("batch", _batch_text(run)))
    if run.config is not None:
        rows.append(("data", _data_text(run.config)))
    rows.append(("tokens trained", _tokens_text(run)))
    rows += _machine_rows(run)
    if wall := _wall_text(run):
        rows.append(("wall time", wall))
    if run.progress is not None:
        world = run.progress.world_size
        by = f", written by {world:,} process{'' if world == 1 else 'es'}" if world else ""
        rows.append(("latest checkpoint", f"step {run.progress.step:,}{by}"))
    return rows


def parameters(run: RunRecord) -> str | None:
    """Spell the number of parameters; None where the configuration is not known."""
    if run.config is None or run.config.data.vocab_size is None:
        return None
    return short(ModelSize(run.config.model, run.config.data.vocab_size).num_parameters)


# ---------------------------------------------------------------- what is trained


def _model_rows(config: Config) -> list[Row]:
    model = config.model
    vocab_size = config.data.vocab_size
    exact = ModelSize(model, vocab_size).num_parameters if vocab_size else None
    name = f"{model.model}: " if model.model else ""
    return [
        ("parameters", f"{exact:,}" if exact else "not known"),
        (
            "model",
            f"{name}{model.num_layers} layers, width {model.hidden_size:,}, "
            f"{model.num_attention_heads} heads, {model.num_kv_heads} key/value heads, "
            f"vocabulary {vocab_size or 0:,}",
        ),
    ]


def _rate_text(config: Config, phases: list[Phase]) -> str:
    """Spell the learning rate: its highest values, its shape, where it ends, its warmup."""
    optimizer = config.optimizer
    # A phase may have its own.
    highest = _distinct(f"{phase.lr:g}" for phase in phases) or f"{optimizer.lr:g}"
    lowest = _distinct(f"{phase.min_lr:g}" for phase in phases) or f"{optimizer.min_lr:g}"
    parts = [f"up to {highest}, {optimizer.lr_decay_style}"]
    if optimizer.lr_decay_style != "constant":
        parts.append(f"down to {lowest}")
    for unit in WARMUPS:
        value = getattr(optimizer, f"lr_warmup_{unit}")
        if value:
            name = {"iters": "steps", "fraction": "of the decay"}.get(unit, unit)
            parts.append(f"after a warmup of {value:,} {name}")
    return " ".join(parts)


def _distinct(texts: Iterable[str]) -> str:
    """Join texts, each once, in the order in which they first come."""
    return ", ".join(dict.fromkeys(texts))


def _optimizer_text(config: Config) -> str:
    settings = config.optimizer
    precision = "fp64" if settings.fp64 else "bf16" if settings.bf16 else "fp32"
    clip = f"gradients clipped at {settings.clip_grad:g}" if settings.clip_grad else "no clipping"
    muon = ""
    if settings.optimizer == "muon":
        muon = f"Muon, momentum {settings.muon_momentum:g}, and "
    return (
        f"{muon}AdamW, betas {settings.adam_beta1:g} and {settings.adam_beta2:g}, weight decay "
        f"{settings.weight_decay:g}, {clip}; computes in {precision}; seed {settings.seed}"
    )


def _batch_text(run: RunRecord) -> str:
    """Spell the tokens of a step, and how many samples of which length they are."""
    texts = [
        f"{length(batch)} tokens ({batch / step['seq_length']:,.5g} × {length(step['seq_length'])})"
        for batch, step in zip(run.batches(), run.steps, strict=True)
    ]
    kinds = list(dict.fromkeys(texts))
    shown = kinds if len(kinds) <= 4 else [kinds[0], "…", kinds[-1]]
    return ", then ".join(shown)


def _data_text(config: Config) -> str:
    """Spell where the tokens come from, and how they are cut into samples."""
    data = config.data
    if data.mock_data:
        sources = "synthetic documents (mock data)"
    else:
        words = data.train_data_path or data.data_path
        sources = " ".join(words[:MOST_SOURCES])
        if len(words) > MOST_SOURCES:
            sources += f" … ({len(words):,} words)"
    parts = [sources]
    if not data.mock_data and not data.train_data_path:
        parts.append(f"split {data.split}")
    if data.valid_data_path:
        parts.append(f"validation {' '.join(data.valid_data_path[:MOST_SOURCES])}")
    if not data.mock_data:
        model = f" {data.tokenizer_model}" if data.tokenizer_model else ""
        parts.append(f"{data.tokenizer_type}{model}")
    masking = "within documents" if data.document_masking else "across documents"
    parts.append(f"attention {masking}")
    parts.append("whole documents in bins" if data.packing != "concat" else "windows of the stream")
    return "; ".join(parts)


def _tokens_text(run: RunRecord) -> str:
    trained = f"{run.steps[-1]['tokens']:,} positions"
    real = run.steps[-1].get("real_tokens")
    if real is not None:
        trained += f", {real:,} of them not padding"
    return trained


# ---------------------------------------------------------------- on what, and how long


def _machine_rows(run: RunRecord) -> list[Row]:
    """List what the last start said of its devices, host and code."""
    facts = run.facts
    if facts is None:
        return []
    processes = f"{facts.world_size:,} process{'' if facts.world_size == 1 else 'es'}"
    machines = f"{facts.machines:,} machine{'' if facts.machines == 1 else 's'}"
    return [
        ("devices", f"{facts.device}; {processes} on {machines}, {facts.layout}"),
        ("host of rank 0", facts.host),
        ("code", f"{facts.code}; PyTorch {facts.torch}"),
    ]


def _wall_text(run: RunRecord) -> str | None:
    """Spell the whole time of the run, and the share of it that steps took; None = not known."""
    times = run.wall_times()
    if times is None:
        return None
    begun, ended = times
    text = f"{duration(ended - begun)}, {moment(begun)} to {moment(ended)} UTC"
    seconds = sum(step.get("step_seconds") or 0 for step in run.steps)
    if seconds and ended > begun:
        text += f"; steps that count took {100 * seconds / (ended - begun):.0f} % of it"
    return text
