"""Settings of the run that phases replace by their own: in all phases, or a flag's in some."""

from collections.abc import Iterator
from dataclasses import fields

from pretrain.config.asked import is_asked_for, value_of, value_text
from pretrain.config.config import Config
from pretrain.config.phase_config import PhaseConfig

OTHER_RULES = (
    "name",
    "train_tokens",  # the run's is compared with the phases' sum
    "lr_warmup_tokens",  # the run's is its beginning, a phase's follows lr_schedule
)
"""Fields of a phase that do not replace the run's setting of the same name."""
REPLACED_AS = {
    "global_batch_size": ("global_batch_tokens", "step_batch_size_schedule"),
    "global_batch_tokens": ("global_batch_tokens", "step_batch_size_schedule"),
    "rampup_batch_size": ("rampup_batch_size", "global_batch_tokens", "step_batch_size_schedule"),
    "step_batch_size_schedule": (
        "step_batch_size_schedule",
        "global_batch_tokens",
        "rampup_batch_size",
    ),
    "train_data_path": ("data_path",),
    "rope_type": ("rope_type", "use_rope_scaling"),
    "use_rope_scaling": ("use_rope_scaling", "rope_type"),
    "recompute_activations": ("recompute_granularity",),
    "use_distributed_optimizer": ("data_parallel_sharding_strategy",),
}
"""Setting -> the keys of a phase that replace it, where that is not its own name alone."""
SAME_AS = {
    ("use_distributed_optimizer", True): ("data_parallel_sharding_strategy", "optim"),
    ("recompute_activations", True): ("recompute_granularity", "selective"),
    ("use_rope_scaling", True): ("rope_type", "llama3"),
}
"""Setting and value -> the key and value of a phase that mean the same."""
STILL_ACTS = (
    "data_path",
    "train_data_path",
    "pipeline_schedule",
    "num_virtual_stages_per_pipeline_rank",
    "cp_comm_type",
    "hierarchical_context_parallel_sizes",
    "sequence_parallel",
    "global_batch_size",
    "global_batch_tokens",
    "rampup_batch_size",
    "step_batch_size_schedule",
)
"""Settings that may act although every phase has its own (validation documents are of the run's
data), or whose effect another rule of effects.py judges."""


def replaced_by_phases(config: Config) -> Iterator[str]:
    """Yield settings of the run that no phase takes, and flags that some phases do not take."""
    phases = config.schedule.phases
    for name in _replaceable():
        keeping = [phase for phase in phases if _has_other(config, phase, name)]
        # A phase that leaves it out takes the run's.
        if phases and all(_has_own(phase, name) for phase in phases) and name not in STILL_ACTS:
            if is_asked_for(config, name) or (name in config.given.flags and keeping):
                given = value_text(config, name)
                yield f"{given}: has no effect, since every phase gives its own"
        elif name in config.given.flags and keeping:
            yield (
                f"{value_text(config, name)}: {_listed(keeping)} its own, since a flag wins over "
                "the run's keys of the YAML file, not over a phase's"
            )


def _replaceable() -> list[str]:
    """List the settings of the run that a phase may replace."""
    own = [field.name for field in fields(PhaseConfig) if field.name not in OTHER_RULES]
    own.remove("lr_schedule")  # the run has none
    return list(dict.fromkeys([*own, *REPLACED_AS]))


def _has_own(phase: PhaseConfig, name: str) -> bool:
    """Return whether the phase gives what replaces the setting."""
    return any(getattr(phase, key) is not None for key in REPLACED_AS.get(name, (name,)))


def _has_other(config: Config, phase: PhaseConfig, name: str) -> bool:
    """Return whether the phase replaces the setting, and not by the same value."""
    if not _has_own(phase, name):
        return False
    value = value_of(config, name)
    if name == "train_data_path":
        return phase.data_path != value
    if not isinstance(value, list) and (name, value) in SAME_AS:
        key, same = SAME_AS[name, value]
        return getattr(phase, key) != same
    return getattr(phase, name, None) != value


def _listed(phases: list[PhaseConfig]) -> str:
    """Return the phases as the subject of a sentence, with "keep"."""
    names = ", ".join(repr(phase.name) for phase in phases)
    return f"phase {names} keeps" if len(phases) == 1 else f"phases {names} each keep"
