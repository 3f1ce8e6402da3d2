"""What a plan says of a run, as values: the text, the JSON file and the HTML page read these.

Names carry their unit (`_bytes`, `_seconds`, `_tokens`) and are stable: they are the keys of the
JSON file. Ranks are numbered as in parallel/layout.py: tp fastest, then cp, dp, pp.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pretrain.planner.hardware import Hardware
from pretrain.planner.rank_bytes import RankMemory
from pretrain.planner.step_time import StepTime

FORMAT = 1
"""Number of the JSON file's format."""

# ---------------------------------------------------------------- the layout


@dataclass(frozen=True)
class AxisPlan:
    """Describes one process axis: who talks to whom about what."""

    name: str
    """tp, cp, cp_a2a, cp_gather, dp, dp_cp, dp_cp_tp or pp, as in parallel/layout.py."""
    size: int
    """Ranks of a group."""
    stride: int
    """Distance between two neighbours of a group."""
    num_groups: int
    purpose: str
    """What the ranks of a group split, and what they send."""
    first_group: tuple[int, ...]
    """The ranks of rank 0's group: at most 16 of them."""
    nodes_of_first_group: tuple[int, ...]
    """The nodes on which those are."""
    is_inside_node: bool
    """Is every group of the axis inside one node?"""


@dataclass(frozen=True)
class LayoutPlan:
    """Describes the layout of a phase."""

    description: str
    """As the plan's table of phases writes it: "tp 8 pp 4 cp 1 dp 32 optim"."""
    tp: int
    pp: int
    cp: int
    cp_a2a: int
    """Ranks of a group that trade tokens for heads."""
    cp_gather: int
    """Groups that gather keys and values from each other; 1 = one level."""
    dp: int
    sharding_strategy: str
    schedule: str
    """The pipeline schedule."""
    stages_per_rank: int
    layers_per_stage: tuple[int, ...]
    """Layers of each pipeline stage, first to last."""
    sequence_parallel: bool
    recompute_granularity: str | None
    is_chosen: bool
    """Did `layout: auto` choose it?"""
    axes: tuple[AxisPlan, ...]
    """Those of more than one rank."""


# ---------------------------------------------------------------- memory and time


@dataclass(frozen=True)
class MemoryPlan:
    """Estimates the memory of the rank that needs most, and of a node's host."""

    pipeline_rank: int
    """The pipeline rank that needs most."""
    parts_bytes: RankMemory
    """The memory by part; `host` is not on the device."""
    total_bytes: int
    limit_bytes: int
    """Memory of the device."""
    usable_bytes: int
    """What a layout may fill: all but the margin for libraries and fragmentation."""
    is_checked: bool
    """Is the device's memory a limit? A CPU's is not, without --device-memory-gib."""
    host_offload_bytes: int
    """What the processes of a node offload to its host."""
    host_copy_bytes: int
    """What the copies for saves in the background take of a node's host."""
    host_limit_bytes: int


@dataclass(frozen=True)
class TrafficPlan:
    """Estimates what one rank sends for one purpose, in a whole step."""

    axis: str
    what: str
    operation: str
    """all-reduce, all-gather + reduce-scatter, all-to-all, send, ..."""
    collectives: float
    """Calls of a rank; a half is an all-gather without its reduce-scatter."""
    sent_bytes: float
    """Bytes that a rank sends."""
    between_nodes_bytes: float
    """Those of them that leave the node; of a ring, what passes between two neighbouring nodes over
    the ranks that share it."""
    is_inside_node: bool
    seconds: float
    """Time of all of it, alone."""
    is_overlapped: bool
    """Does it run beside computing? Then only a part of its time is seen."""


@dataclass(frozen=True)
class BatchPlan:
    """Describes what a step is made of."""

    seq_length: int
    global_batch_tokens: int
    """Tokens of the largest step."""
    micro_batch_size: int
    num_microbatches: int
    """Microbatches of each data-parallel rank in the largest step."""
    pairs_per_token: float
    """Tokens that a token sees on average: causal pairs inside documents."""


@dataclass(frozen=True)
class BalancePlan:
    """Says how long the data ranks of a phase wait for the one with most work."""

    is_dealt: bool
    """Are a step's samples dealt by their cost?"""
    slowest_over_mean: float
    """Work that a step waits for over that of the average data rank; 1 = nobody waits."""
    slowest_over_mean_in_order: float
    """The same of samples that are dealt in the order of the stream."""
    steps: int
    """Steps at the start of the phase that were drawn for it; 0 = all ranks are taken as equal."""
    why_equal: str
    """Why they are; empty where steps were drawn."""


@dataclass(frozen=True)
class SpeedPlan:
    """Estimates how fast the largest step of a phase is."""

    parts_seconds: StepTime
    """The step by part; `step_seconds` is their sum without what is hidden."""
    step_seconds: float
    model_flops: float
    """FLOPs of forward and backward without what is recomputed, of all ranks."""
    model_flops_utilization: float
    """MFU: model FLOPs over what all devices could do in that time."""
    tokens_per_second: float
    tokens_per_second_per_device: float


@dataclass(frozen=True)
class SourcePlan:
    """Says what a phase draws of a source."""

    name: str
    share: float
    tokens: int
    epoch_tokens: int
    from_epoch: float
    """Epochs of the source that are read before the phase."""
    to_epoch: float
    """Epochs of the source that are read at its end."""


# ---------------------------------------------------------------- what it comes to


@dataclass(frozen=True)
class CostPlan:
    """Says what a phase or the run takes."""

    tokens: int
    steps: int
    train_seconds: float
    """Time of the steps alone."""
    save_seconds: float
    """Time that saves keep the steps waiting."""
    failure_seconds: float
    """Time away after failures, and time trained again."""
    days: float
    """All three together."""
    device_hours: float
    price: float | None
    """At the given price of a device's hour; None = no price is given."""


@dataclass(frozen=True)
class CandidatePlan:
    """Describes a layout that a phase could have, among the others that it could have."""

    description: str
    fits: bool
    is_own: bool
    """Is it the phase's own?"""
    memory_bytes: int
    step_seconds: float
    parts_seconds: StepTime
    why: str
    """Why it loses against the best; empty for the best."""


@dataclass(frozen=True)
class SearchPlan:
    """Ranks the layouts of a phase, the best first."""

    legal: int
    """Layouts that can run the phase, with all strategies and levels of recompute."""
    fitting: int
    """Those of them that fit into memory."""
    leaves_node: bool
    """May tp and the all-to-all leave a node, as was asked for or since nothing else fits?"""
    rows: tuple[CandidatePlan, ...]


@dataclass(frozen=True)
class PhasePlan:
    """Says everything that the plan knows of a phase."""

    name: str
    layout: LayoutPlan
    memory: MemoryPlan
    batch: BatchPlan
    balance: BalancePlan
    speed: SpeedPlan
    traffic: tuple[TrafficPlan, ...]
    cost: CostPlan
    sources: tuple[SourcePlan, ...]
    """Empty where data was not looked at."""
    search: SearchPlan | None
    """None without --search."""


@dataclass(frozen=True)
class CheckpointPlan:
    """Says what the run's checkpoints take."""

    size_bytes: int
    bytes_per_device: int
    """What the rank that writes most writes of one."""
    saves: int
    """Checkpoints that the whole run writes."""
    kept: int
    """Those that are on the disk at once, at most."""
    kept_bytes: int
    interval_seconds: float | None
    """Time between two; None = only at the ends of phases."""
    is_in_background: bool
    stall_seconds: float
    """Time that one keeps the steps waiting."""
    write_seconds: float
    """Time until one is on the disk."""


@dataclass(frozen=True)
class FailurePlan:
    """Estimates what failures take of a run, and what is left to train."""

    hours_to_failure: float
    """Mean hours between two failures of the whole run."""
    failures: float
    """Failures that are expected in the whole run."""
    restart_seconds: float
    """From a failure to the first new step."""
    again_seconds: float
    """Training that is done again after a failure, on average."""
    effective_share: float
    """Share of the time in which the run makes progress."""
    arithmetic: tuple[str, ...]
    """The same as lines of arithmetic."""


@dataclass(frozen=True)
class RunPlan:
    """Says everything that the plan knows of a run."""

    config: str
    """The file, as it was named."""
    model: str
    parameters: int
    world_size: int
    devices_per_node: int
    nodes: int
    hardware: Hardware
    price_per_device_hour: float | None
    phases: tuple[PhasePlan, ...]
    """Those that are still to be trained."""
    total: CostPlan
    checkpoints: CheckpointPlan | None
    """None without --save."""
    failures: FailurePlan
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    """What was not looked at, and why."""
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values, under the names of the fields."""
        return {"format": FORMAT} | dataclasses.asdict(self)
