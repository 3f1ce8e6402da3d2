"""One entry of `phases:` as a user writes it, and the section that holds the list of them."""

from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro

from data.config import DataConfig
from model.activation_memory.settings import MemoryConfig, MemorySettings, Recompute
from model.config import ModelConfig
from parallel.config import LayoutConfig
from pretrain.config.facts import facts_of_section, setting
from pretrain.config.optimizer_config import OptimizerConfig
from pretrain.config.schedule_config import FlatScheduleConfig

# Sections that have settings of a phase, in the order in which an entry lists them.
_SECTIONS = (
    FlatScheduleConfig,
    LayoutConfig,
    MemoryConfig,
    ModelConfig,
    DataConfig,
    OptimizerConfig,
)
SomeSection = TypeVar("SomeSection", LayoutConfig, MemoryConfig, ModelConfig, DataConfig)


def _settings_of_a_phase() -> list[tuple[str, Any, Any]]:
    """List the settings declared with per_phase, as fields that are None unless given."""
    found = []
    for section in _SECTIONS:
        types = get_type_hints(section, include_extras=True)
        for name, facts in facts_of_section(section).items():
            if facts.per_phase:
                found.append((name, types[name] | None, field(default=None)))
    return found


# Any: a type checker does not see the fields, which are those of the sections.
_PhaseSettings: Any = make_dataclass(
    "_PhaseSettings", [("name", str, field(default="")), *_settings_of_a_phase()], kw_only=True
)


@dataclass(kw_only=True)
class PhaseConfig(_PhaseSettings):
    """One entry of `phases:`; what it leaves out is taken from the run's own settings.

    Its keys are the settings that their sections declare with per_phase=True, and these:
    """

    name: str = ""
    """What logs, metrics and messages call the phase; by default phase0, phase1, ..."""
    recompute_granularity: Literal["none", Recompute] | None = None
    """As the run's; none computes nothing again where the run does."""
    lr_schedule: Literal["continue", "rewarm", "decay"] | None = None
    """What the learning rate does at the phase's start; by default it continues."""

    @property
    def has_own_batch(self) -> bool:
        """Whether the phase replaces the run's batch and its schedule."""
        return bool(
            self.global_batch_tokens is not None
            or self.rampup_batch_size
            or self.step_batch_size_schedule
        )

    def over(self, section: SomeSection) -> SomeSection:
        """Return a section of the run with what the phase says for itself."""
        own = {declared.name: getattr(self, declared.name, None) for declared in fields(section)}
        return replace(section, **{name: value for name, value in own.items() if value is not None})

    def with_memory(self, memory: MemoryConfig) -> MemorySettings:
        """Return the memory settings that hold in the phase."""
        return self.over(memory).settings

    def with_rope(self, model: ModelConfig) -> ModelConfig:
        """Return the run's model with the phase's rotary embedding.

        Parameters of the embedding that the phase leaves out are the run's own.
        """
        if self.rope_type is not None or self.use_rope_scaling is not None:
            # One choice under two names: the phase's stands alone.
            model = replace(model, rope_type=None, use_rope_scaling=None)
        return self.over(model)


@dataclass(kw_only=True)
class ScheduleConfig(FlatScheduleConfig):
    """How much is trained: one phase from the flat fields, or several from `phases`."""

    phases: Annotated[list[PhaseConfig], tyro.conf.Suppress] = setting(list, resume="effect")
    """Consecutive phases; YAML only."""

    @property
    def entries(self) -> list[PhaseConfig]:
        """The phases; without a list of them the one that the flat settings describe."""
        return self.phases or [PhaseConfig(name="main")]
