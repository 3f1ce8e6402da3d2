"""Settings of the process layout: how many ranks each axis takes, and how they work together."""

from dataclasses import dataclass, field
from math import lcm, prod
from typing import Literal

import torch

from parallel.schedule import SCHEDULES, ScheduleName, accepts, nearest_counts

ShardingStrategy = Literal["optim", "optim_grads", "optim_grads_params"]
SPLITS_BACKWARD_SINCE = "2.13"
"""The first release of torch that is known to split a backward correctly.

2.11 adds all gradients of a node with several outputs to the first, or refuses; 2.12 was not tried.
"""
CommType = Literal["a2a", "a2a+allgather", "p2p", "allgather", "a2a+p2p"]

_SIZE = dict(per_phase=True, at_least=1, fix="give a positive number")
"""Facts about the settings that count ranks or stages."""


@dataclass(kw_only=True)
class LayoutConfig:
    layout: Literal["auto", "given"] = field(default="given", metadata=dict(per_phase=True))
    """auto = choose tp, pp, cp, the sharding strategy and recompute where they are not given, by
    estimated memory and time; a phase may change it. A size of 1 counts as not given, but in a
    phase. The choice is kept in checkpoints."""
    device_memory_gib: float | None = field(
        default=None, metadata=dict(above=0, fix="give the GiB of one device")
    )
    """GiB that each process may fill: phases that are estimated to need more are refused, and
    --layout auto leaves a tenth free. By default the GPU's memory; on CPUs nothing is refused, and
    auto takes the process's share."""
    tensor_model_parallel_size: int = field(default=1, metadata=_SIZE)
    """Ranks that split every weight matrix and the vocabulary (tp)."""
    pipeline_model_parallel_size: int = field(default=1, metadata=_SIZE)
    """Ranks that split the layers into consecutive stages (pp)."""
    pipeline_schedule: ScheduleName | None = field(default=None, metadata=dict(per_phase=True))
    """Order of the microbatches through the stages; 1F1B by default, interleaved with several
    stages per rank."""
    num_virtual_stages_per_pipeline_rank: int | None = field(default=None, metadata=_SIZE)
    """Stages on each pipeline rank: 1 by default, 2 under interleaved and ZBV."""
    context_parallel_size: int = field(default=1, metadata=_SIZE)
    """Ranks that split the tokens of a sample (cp), by Ulysses all-to-all around the attention."""
    cp_comm_type: CommType = field(default="a2a", metadata=dict(per_phase=True))
    """How attention sees the whole sample: a2a trades tokens for heads; a2a+allgather does so
    inside groups and gathers keys and values between them, for more ranks than heads. The ring
    forms are refused."""
    hierarchical_context_parallel_sizes: list[int] = field(
        default_factory=list, metadata=dict(per_phase=True)
    )
    """Ranks of an all-to-all group and number of groups, for a2a+allgather: for example 4 8 with cp
    32."""
    data_parallel_sharding_strategy: ShardingStrategy | None = field(
        default=None, metadata=dict(per_phase=True)
    )
    """What is sharded over dp x cp: ZeRO 1 (optim), 2 (optim_grads, the default) or 3
    (optim_grads_params)."""
    use_distributed_optimizer: bool | None = None
    """Megatron-LM's spelling of --data-parallel-sharding-strategy optim; the two must agree."""
    sequence_parallel: bool = field(default=False, metadata=dict(per_phase=True))
    """Megatron's sequence parallelism: between the tensor-parallel parts, tokens are split over
    tp."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """nccl on GPUs, gloo on CPUs; naming the one that the machine does not use is an error."""
    distributed_timeout_minutes: int = field(
        default=10, metadata=dict(at_least=1, fix="give a positive number")
    )
    """Minutes after which a collective that does not complete ends the job."""
    watchdog_seconds: int = field(
        default=30, metadata=dict(at_least=0, fix="give a positive number, or 0 for no watchdog")
    )
    """Seconds after which a stopped rank, or a run in which no rank shows a sign of life, is ended
    and started again, with a page that says who is at fault and where every rank is. Silences of
    three times the longest usual one are waited for, too, and slow parts of a run (its start, a
    phase's first steps and evaluation) for nearly --distributed-timeout-minutes, a save for nearly
    an hour, an index of the data for as long as it takes. 0 switches the watchdog off."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """tp, pp, cp."""
        return (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
        )

    @property
    def sharding_strategy(self) -> ShardingStrategy:
        """The level that the two flags mean together."""
        default = "optim" if self.use_distributed_optimizer else "optim_grads"
        return self.data_parallel_sharding_strategy or default

    def meets_in_microbatches(self, *, train: bool) -> bool:
        """Tell whether data ranks wait for each other in every microbatch, and not once a step.

        Args:
            train: is there a backward?
        """
        # ZeRO-3 gathers weights in each microbatch, and ZeRO-2 reduces gradients there, unless a
        # pipeline keeps them to the step's end (parallel/shard.py).
        in_pipeline = self.pipeline_model_parallel_size > 1
        reduces = self.sharding_strategy == "optim_grads" and train and not in_pipeline
        return self.sharding_strategy == "optim_grads_params" or reduces

    def can_deal(self, dp_size: int) -> bool:
        """Tell whether a sample has another data rank, or another place in a pipeline, to go to."""
        return dp_size > 1 or self.pipeline_model_parallel_size > 1

    @property
    def schedule(self) -> ScheduleName:
        """The pipeline schedule that the settings mean; without a pipeline none matters."""
        if self.pipeline_model_parallel_size == 1:
            return "1F1B"
        # Several stages per rank mean interleaved, where no schedule is named.
        several = (self.num_virtual_stages_per_pipeline_rank or 1) > 1
        return self.pipeline_schedule or ("interleaved" if several else "1F1B")

    @property
    def stages_per_rank(self) -> int:
        """Pipeline stages on each rank; 1 without a pipeline."""
        if self.pipeline_model_parallel_size == 1:
            return 1
        default = SCHEDULES[self.schedule].default_per_rank
        return self.num_virtual_stages_per_pipeline_rank or default

    @property
    def context_levels(self) -> tuple[int, int]:
        """Sizes of the two levels of cp: an all-to-all group's ranks, and the number of groups.

        The groups gather keys and values from each other. One level is (cp, 1). Meaningful only
        without `combination_problems`.
        """
        has_one_level = self.cp_comm_type == "a2a" or self.context_parallel_size == 1
        if has_one_level or self._context_problems():
            return self.context_parallel_size, 1
        a2a, gather = self.hierarchical_context_parallel_sizes
        return a2a, gather

    @property
    def token_multiple(self) -> int:
        """A number that must divide a microbatch's tokens, so that all ranks get equally many."""
        tp, _, cp = self.sizes
        return token_multiple(cp, self.context_levels[1], tp if self.sequence_parallel else 1)

    def describe(self) -> str:
        """Write what distinguishes one layout from another, in a few words."""
        tp, pp, cp = self.sizes
        text = f"tp {tp} pp {pp}"
        # The usual schedule and a single level of cp are not worth a word.
        if pp > 1 and self.schedule != "1F1B":
            text += f" {self.schedule} x {self.stages_per_rank}"
        text += f" cp {cp}"
        if self.context_levels[1] > 1:
            text += " ({} x {})".format(*self.context_levels)
        return text

    def validate(self) -> list[str]:
        """Problems of single settings, as `name = value: rule. Fix: ...`."""
        problems = []
        strategy = self.data_parallel_sharding_strategy
        # The flag is Megatron-LM's: it may say what we do anyway, but not the opposite.
        if self.use_distributed_optimizer and strategy not in (None, "optim"):
            problems.append(
                "use_distributed_optimizer = True: means --data-parallel-sharding-strategy optim, "
                f"but that is {strategy}. Fix: name one of the two, or make them agree."
            )
        if self.use_distributed_optimizer is False:
            problems.append(
                "use_distributed_optimizer = False: the optimizer is always sharded here. "
                "Fix: remove the flag."
            )
        return problems

    def combination_problems(self) -> list[str]:
        """List the settings that do not go together.

        Phases are asked, not the run: a phase may replace what the run's settings say.
        """
        return self._context_problems() + self._schedule_problems()

    def _context_problems(self) -> list[str]:
        cp = self.context_parallel_size
        sizes = self.hierarchical_context_parallel_sizes
        # Megatron-LM's other forms are known by name, and refused.
        if self.cp_comm_type not in ("a2a", "a2a+allgather"):
            return [
                f"cp_comm_type = {self.cp_comm_type}: is not built. Fix: a2a, or for more ranks "
                "than heads a2a+allgather with --hierarchical-context-parallel-sizes."
            ]
        if cp == 1:
            return []
        # One level has no sizes, two levels have two.
        if self.cp_comm_type == "a2a" and not sizes:
            return []
        if self.cp_comm_type == "a2a":
            return [
                f"hierarchical_context_parallel_sizes = {sizes}: are for two levels. "
                "Fix: --cp-comm-type a2a+allgather, or remove them."
            ]
        if len(sizes) != 2 or min(sizes) < 1 or prod(sizes) != cp:
            inner = next(n for n in range(2, cp + 1) if cp % n == 0)
            return [
                f"hierarchical_context_parallel_sizes = {sizes}: must be two sizes whose product "
                f"is context_parallel_size = {cp}, the all-to-all group first. "
                f"Fix: for example {inner} {cp // inner}."
            ]
        return []

    def _schedule_problems(self) -> list[str]:
        if self.pipeline_model_parallel_size == 1:
            return []
        schedule = SCHEDULES[self.schedule]
        per_rank = self.stages_per_rank
        if not schedule.allows_per_rank(per_rank):
            name = f"num_virtual_stages_per_pipeline_rank = {per_rank}"
            return [f"{name}: {schedule.per_rank_rule}"]
        if not schedule.splits_backward:
            return []
        # What a split backward needs of torch (whose version compares with a text by its numbers)
        # and of FSDP2.
        if torch.__version__ < SPLITS_BACKWARD_SINCE:
            return [
                f"pipeline_schedule = {self.schedule}: torch {torch.__version__} splits a stage's "
                f"backward wrongly. Fix: torch {SPLITS_BACKWARD_SINCE} or later, or "
                "--pipeline-schedule 1F1B or interleaved."
            ]
        if self.sharding_strategy == "optim_grads_params":
            return [
                f"pipeline_schedule = {self.schedule}: loses gradients with "
                "data_parallel_sharding_strategy = optim_grads_params. Fix: optim or optim_grads, "
                "or --pipeline-schedule interleaved."
            ]
        return []


def token_multiple(cp: int, groups: int, tokens_over_tp: int) -> int:
    """Return a number that must divide a microbatch's tokens, so that all ranks get equally many.

    Args:
        groups: that gather keys and values from each other; 1 with one level of cp.
        tokens_over_tp: ranks that split the tokens of a cp rank: those of tp under Megatron-SP.
    """
    # With two levels each group holds two chunks, one from each end of the sample.
    multiple = lcm(cp, 2 * groups) if groups > 1 else cp
    return lcm(multiple, cp * tokens_over_tp)


def check_world_size(world_size: int, tp: int, pp: int, cp: int) -> str | None:
    """Say why `world_size` ranks cannot be split into tp x pp x cp, or return None."""
    model_size = tp * pp * cp
    if world_size % model_size == 0:
        return None
    return (
        f"world size = {world_size}: must be a multiple of tensor x pipeline x context parallel "
        f"size = {tp} x {pp} x {cp} = {model_size}. Fix: start {model_size} processes or a "
        f"multiple of it, or choose sizes whose product divides {world_size}."
    )


def check_microbatches(layout: LayoutConfig, count: int) -> str | None:
    """Say why the layout cannot run steps of `count` microbatches, or return None."""
    pp = layout.pipeline_model_parallel_size
    if pp == 1 or accepts(layout.schedule, pp, count):
        return None
    # Say the schedule's rule, and the counts on both sides.
    rule = SCHEDULES[layout.schedule].count_rule(pp, count)
    nearest = " or ".join(map(str, nearest_counts(layout.schedule, pp, count)))
    return f"{count} microbatches: {layout.schedule} needs {rule}. Fix: {nearest} microbatches"
