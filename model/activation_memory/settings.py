"""Settings that trade computing for memory: what the run says, and what one phase comes to.

Another value changes no result beyond rounding.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

Recompute = Literal["selective", "full", "attention_kept"]
"""Levels beside none."""
KEEPS_INPUT_ONLY = ("full", "attention_kept")
"""Levels whose kept tensors can be offloaded."""
assert set(KEEPS_INPUT_ONLY) < set(get_args(Recompute))

RECOMPUTE_MODULES = ("mlp", "core_attn")
"""Megatron-LM's modules that --recompute-modules may name."""
LOSS_CHUNK_TOKENS = 2048
"""Tokens whose logits exist at once, unless a setting or the plan says otherwise."""


@dataclass(frozen=True)
class MemorySettings:
    """How a phase trades computing for memory; the names are the configuration's."""

    recompute_granularity: Recompute | None = None
    cpu_offloading_num_layers: int = 0
    """Layers of each stage, from its first."""
    mlp_tiles: int = 1
    attention_head_chunks: int = 1
    loss_chunk_tokens: int | None = None
    """None = LOSS_CHUNK_TOKENS, or what the plan chose (pretrain/planner/loss_chunks.py)."""

    @property
    def loss_tokens(self) -> int:
        """Tokens whose logits exist at once."""
        return self.loss_chunk_tokens or LOSS_CHUNK_TOKENS

    def problems(self) -> list[str]:
        """List values out of range, as `name = value: rule. Fix: ...`."""
        # Checked on what a phase comes to, since the run and the phase may each give a value.
        least = {
            "cpu_offloading_num_layers": 0,
            "mlp_tiles": 1,
            "attention_head_chunks": 1,
            "loss_chunk_tokens": 1,
        }
        given = {name: value for name in least if (value := getattr(self, name)) is not None}
        return [
            f"{name} = {value}: must be at least {least[name]}. Fix: give {least[name]} or more."
            for name, value in given.items()
            if value < least[name]
        ]


@dataclass(kw_only=True)
class MemoryConfig:
    """What the run computes again, offloads or cuts into parts, to need less memory."""

    recompute_granularity: Recompute | None = field(default=None, metadata=dict(per_phase=True))
    """What backward computes again: selective = the MLP; full = the layer, from its input;
    attention_kept = the layer but for the attention's forward, whose output is kept. A phase may
    change it."""
    recompute_activations: bool = False
    """Megatron-LM's switch for recompute_granularity selective; given, it must agree with it."""
    recompute_modules: list[str] = field(default_factory=list)
    """What selective computes again: mlp, by default. core_attn alone is nothing: no kernel keeps
    the scores."""
    cpu_offloading: bool | None = None
    """Megatron-LM's switch beside --cpu-offloading-num-layers; given, it must agree with it."""
    cpu_offloading_num_layers: int = field(default=0, metadata=dict(per_phase=True))
    """Layers of each stage, from its first, whose kept tensors wait in the host's memory; with
    recompute full or attention_kept. A phase may change it."""
    cpu_offloading_host_memory: float | None = field(
        default=None, metadata=dict(above=0, fix="give the GiB that a node can spare")
    )
    """GiB of a node's memory that offloaded tensors may take together; by default all that the node
    has."""
    mlp_tiles: int = field(default=1, metadata=dict(per_phase=True))
    """Parts of the sequence in which the MLP runs, one after the other; above 1 backward computes
    gate and up again. A phase may change it."""
    attention_head_chunks: int = field(default=1, metadata=dict(per_phase=True))
    """Groups of query heads that are projected, exchanged and attended with one after the other. A
    phase may change it."""
    loss_chunk_tokens: int | None = field(default=None, metadata=dict(per_phase=True))
    """Tokens whose logits exist at once; by default 2048, and on a GPU up to 8192 where they fit. A
    phase may change it."""

    @property
    def settings(self) -> MemorySettings:
        """What these settings come to in a phase."""
        return MemorySettings(
            self.recompute_level,
            self.cpu_offloading_num_layers,
            self.mlp_tiles,
            self.attention_head_chunks,
            self.loss_chunk_tokens,
        )

    @property
    def recompute_level(self) -> Recompute | None:
        """What backward computes again; None = nothing."""
        # Megatron-LM's switch counts where no level is named.
        switch = "selective" if self.recompute_activations else None
        asked = self.recompute_granularity or switch
        # No kernel keeps the scores of core attention, so that there is nothing to compute again.
        keeps_all = asked == "selective" and set(self.recompute_modules) == {"core_attn"}
        return None if asked == "none" or keeps_all else asked

    def validate(self) -> list[str]:
        """List what these settings ask for and nobody can do, as `name = value: rule. Fix: ...`."""
        # Ranges first: they are those of a phase.
        problems = self.settings.problems()
        if self.recompute_activations and self.recompute_granularity not in (None, "selective"):
            problems.append(
                "recompute_activations = True: means recompute_granularity selective, but that is "
                f"{self.recompute_granularity}. Fix: remove one of them."
            )
        others = [name for name in self.recompute_modules if name not in RECOMPUTE_MODULES]
        if others:
            problems.append(
                f"recompute_modules = {' '.join(others)}: selective computes the MLP with its "
                f"norm again and nothing else by itself. Fix: {' or '.join(RECOMPUTE_MODULES)}, "
                "or --recompute-granularity full or attention_kept."
            )
        return problems
