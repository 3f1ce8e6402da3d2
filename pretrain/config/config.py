"""The run's configuration: one field = one YAML key = one flag, in Megatron-LM's spellings.

Precedence: preset < YAML file < flags. The sections belong to the folders that read them.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_type_hints

import tyro

from data.config import DataConfig
from model.activation_memory.settings import MemoryConfig
from model.config import ModelConfig
from model.hf.choice import export_form
from model.rope import PARAMETERS
from parallel.config import LayoutConfig
from pretrain.config.checkpoint_config import CheckpointConfig
from pretrain.config.facts import Section, problems_of, setting
from pretrain.config.guards_config import GuardsConfig
from pretrain.config.logging_config import LoggingConfig
from pretrain.config.megatron_flags import Given
from pretrain.config.optimizer_config import OptimizerConfig
from pretrain.config.phase_config import PhaseConfig, ScheduleConfig


@dataclass(frozen=True)
class GivenSettings:
    """What the user wrote, in the YAML file or as flags."""

    settings: frozenset[str] = frozenset()
    """Names of settings; not what a preset or a checkpoint gave."""
    megatron: dict[str, Given] = field(default_factory=dict)
    """Flags of Megatron-LM that are no settings here but are accepted (megatron_flags.yaml)."""
    flags: frozenset[str] = frozenset()
    """Those of the settings that were given as flags."""

    def renamed(self, name: str, to: str) -> "GivenSettings":
        """Return the record where the value of one setting has become that of another one."""
        settings = frozenset(to if each == name else each for each in self.settings)
        flags = frozenset(to if each == name else each for each in self.flags)
        return replace(self, settings=settings, flags=flags)


@dataclass(kw_only=True)
class Config:
    """Pretrain a GPT. Give a YAML file with --config and override any field by its flag.

    pretrain/config/FLAGS.md lists all flags, and those of Megatron-LM's scripts that are only
    answered.
    """

    model: ModelConfig = setting(ModelConfig, resume="forbidden")
    memory: MemoryConfig = setting(MemoryConfig, resume="free")
    layout: LayoutConfig = setting(LayoutConfig, resume="free")
    data: DataConfig = setting(DataConfig, resume="data")
    schedule: ScheduleConfig = setting(ScheduleConfig)
    optimizer: OptimizerConfig = setting(OptimizerConfig, resume="optimization")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, resume="free")
    logging: LoggingConfig = setting(LoggingConfig, resume="free")
    guards: GuardsConfig = setting(GuardsConfig, resume="free")
    given: Annotated[GivenSettings, tyro.conf.Suppress] = field(
        default_factory=GivenSettings, compare=False
    )
    """What of all this the user wrote; no setting."""

    def validate(self) -> list[str]:
        """List all problems that show without touching the disk: `name = value: rule. Fix: ...`."""
        # Each section by itself, then the rules between sections.
        problems = [text for section in self.sections.values() for text in problems_of(section)]
        problems += self._unused_rope_parameters()
        problems += self._passkeys_without_text()
        problems += self._rewinds_without_save()
        problems += self._profile_without_folder()
        problems += self._exports_without_architecture()
        problems += self._qk_clip_behind_norms()
        return problems + self._contradicting_offload()

    @property
    def sections(self) -> dict[str, Section]:
        """The sections by name; not the record of what was given."""
        return {name: value for name, value in vars(self).items() if name != "given"}

    def _contradicting_offload(self) -> list[str]:
        """List Megatron-LM's switch for offloading where the number of layers says otherwise."""
        # The switch is about the run: one phase that offloads is enough.
        asked = self.memory.cpu_offloading
        layers = [
            entry.with_memory(self.memory).cpu_offloading_num_layers
            for entry in self.schedule.entries
        ]
        if asked is None or asked == (max(layers) > 0):
            return []
        return [
            f"cpu_offloading = {asked}: but cpu_offloading_num_layers = "
            f"{' '.join(map(str, layers))}. Fix: remove one of them."
        ]

    def _passkeys_without_text(self) -> list[str]:
        """List an evaluation that asks in words where the data has none."""
        lengths = self.logging.eval_passkey_lengths
        has_text = not self.data.mock_data and self.data.tokenizer_type != "NullTokenizer"
        if not lengths or has_text:
            return []
        kind = "mock_data" if self.data.mock_data else "NullTokenizer"
        return [
            f"eval_passkey_lengths = {' '.join(map(str, lengths))}: asks in words, and {kind} has "
            "no text. Fix: a corpus with a text tokenizer, or leave it out."
        ]

    def _rewinds_without_save(self) -> list[str]:
        """List a policy that goes back to a checkpoint where none is written."""
        if self.guards.spike_policy != "rewind" or self.checkpoint.save:
            return []
        return [
            "spike_policy = rewind: goes back to a checkpoint of --save, which is not given. Fix: "
            "give --save, or --spike-policy skip."
        ]

    def _exports_without_architecture(self) -> list[str]:
        """List exports to Hugging Face of a model that no architecture of transformers is."""
        settings = self.checkpoint
        if not settings.exports or problems_of(self.model):
            return []
        try:
            export_form(self.model)
        except ValueError as error:
            name = "hf_export_phase_ends"
            if settings.hf_export_interval is not None:
                name = "hf_export_interval"
            given = f"{name} = {getattr(settings, name)}"
            return [f"{given}: cannot export, {line}" for line in str(error).splitlines()]
        return []

    def _qk_clip_behind_norms(self) -> list[str]:
        """List a clip of weights whose size the norms behind them take out again."""
        if not (self.optimizer.qk_clip and self.model.qk_layernorm):
            return []
        return [
            "qk_clip = True: the norms of qk_layernorm take any factor on the weights before them "
            "out again, so that the logits stay as they are. Fix: remove one of them; "
            "--log-max-attention-logit measures the logits."
        ]

    def _profile_without_folder(self) -> list[str]:
        """List a profile or a memory history that has no place to be written to."""
        logging = self.logging
        if logging.profile_dir or self.checkpoint.save:
            return []
        asked = ["profile"] if logging.profile else []
        if logging.record_memory_history and not logging.memory_snapshot_path:
            asked.append("record_memory_history")
        return [
            f"{name} = True: is written inside --save, which is not given. Fix: --profile-dir DIR, "
            "or --save."
            for name in asked
        ]

    def _unused_rope_parameters(self) -> list[str]:
        """List parameters that no rotary embedding reads.

        A phase's own are read by its type of embedding, the run's by the type of any phase.
        """
        entries = self.schedule.entries
        types: list[str] = [entry.with_rope(self.model).rope.type for entry in entries]
        # (where it is written, who wrote it, the types that could read it)
        places: list[tuple[str, Any, list[str]]] = [("", self.model, types)]
        for entry, kind in zip(entries, types, strict=True):
            places.append((f"phase {entry.name!r}: ", entry, [kind]))
        return [
            f"{where}{name} = {getattr(section, name)}: rope_type "
            f"{' or '.join(dict.fromkeys(used))} does not use it. "
            f"Fix: remove it, or rope_type {' or '.join(users)}."
            for where, section, used in places
            for name, (_, users) in PARAMETERS.items()
            if getattr(section, name) is not None and not set(used) & set(users)
        ]

    def open_settings(self, phase: PhaseConfig) -> tuple[str, ...]:
        """Name the settings of a phase that `layout: auto` chooses: those that nobody gives."""
        layout = phase.over(self.layout)
        if layout.layout != "auto":
            return ()
        found = []
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
        ):
            # A size of 1 counts as given in a phase only.
            if getattr(phase, name) is None and getattr(self.layout, name) == 1:
                found.append(name)
        # Two levels of given sizes say what cp is.
        if layout.hierarchical_context_parallel_sizes and "context_parallel_size" in found:
            found.remove("context_parallel_size")
        if (
            layout.data_parallel_sharding_strategy is None
            and layout.use_distributed_optimizer is None
        ):
            found.append("data_parallel_sharding_strategy")
        # "none" is a choice, and so is Megatron-LM's switch.
        memory = phase.over(self.memory)
        if memory.recompute_granularity is None and not memory.recompute_activations:
            found.append("recompute_granularity")
        return tuple(found)


@functools.cache
def section_types() -> dict[str, type]:
    """Return the sections by name; not the record of what was given."""
    return {name: cls for name, cls in get_type_hints(Config).items() if cls is not GivenSettings}
