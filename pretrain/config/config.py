"""The run's configuration: one dataclass field = one YAML key = one flag, in Megatron-LM's
spellings.

Precedence: preset < YAML file < flags. The sections belong to the folders that read them.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Annotated, Literal

import tyro

from data.config import DataConfig
from model.activation_memory.settings import MemoryConfig
from model.config import ModelConfig
from model.rope import PARAMETERS
from parallel.config import LayoutConfig
from pretrain.config.megatron_flags import Given
from pretrain.config.phase_config import PhaseConfig, Tokens


@dataclass(kw_only=True)
class ScheduleConfig:
    """How much is trained, in what portions. One phase from the flat fields, or several from
    `phases`."""

    seq_length: Tokens | None = None
    """Tokens of one sample."""
    micro_batch_size: int = 1
    """Samples that a rank packs into one microbatch."""
    global_batch_size: int | None = None
    """Samples per optimizer step over all ranks (or give --global-batch-tokens)."""
    global_batch_tokens: Tokens | None = None
    """Tokens per optimizer step over all ranks."""
    rampup_batch_size: list[int] = field(default_factory=list)
    """START INCREMENT SAMPLES: grow the batch from START samples to the full one over SAMPLES
    samples."""
    step_batch_size_schedule: str | None = None
    """"0:768 250B:1536": from 0 tokens on 768 samples per step, from 250B tokens on 1,536."""
    train_iters: int | None = None
    """Optimizer steps (or give --train-samples or --train-tokens)."""
    train_samples: int | None = None
    """Samples to train on."""
    train_tokens: Tokens | None = None
    """Tokens to train on."""
    manual_gc: bool = False
    """Collect Python's garbage at evaluations and saves only, so that no rank pauses by itself in
    between."""
    phases: Annotated[list[PhaseConfig], tyro.conf.Suppress] = field(default_factory=list)
    """Consecutive phases; YAML only."""


@dataclass(kw_only=True)
class OptimizerConfig:
    optimizer: Literal["adam"] = "adam"
    """AdamW (decoupled weight decay, arXiv 1711.05101), Megatron-LM's adam."""
    lr: float = 3e-4
    """Highest learning rate; a phase may change it."""
    min_lr: float = 0.0
    """Learning rate where a decay ends."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape between warmup and end; WSD = warmup, stable, decay."""
    lr_warmup_iters: int | None = None
    """Warmup in steps of the first phase's global batch (or samples, tokens, fraction)."""
    lr_warmup_samples: int | None = None
    """Warmup in samples of the first phase's length."""
    lr_warmup_tokens: Tokens | None = None
    """Warmup in tokens."""
    lr_warmup_fraction: float | None = None
    """Warmup as a share of the decay's length."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of the warmup."""
    lr_decay_iters: int | None = None
    """Where the decay ends, in steps of the first phase's global batch; by default the end of the
    run."""
    lr_decay_samples: int | None = None
    """Where the decay ends, in samples of the first phase's length."""
    lr_decay_tokens: Tokens | None = None
    """Where the decay ends, in tokens."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of WSD's final decay."""
    lr_wsd_decay_iters: int | None = None
    """Length of WSD's final decay in steps of the first phase's global batch."""
    lr_wsd_decay_samples: int | None = None
    """Length of WSD's final decay in samples of the first phase's length."""
    lr_wsd_decay_tokens: Tokens | None = None
    """Length of WSD's final decay in tokens."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms and biases have none."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    bf16: bool = False
    """Compute in bf16 over fp32 master weights and optimizer state."""
    fp64: bool = False
    """Everything in double precision, to compare layouts exactly."""
    accumulate_allreduce_grads_in_fp32: bool = True
    """Gradients are always accumulated and reduced over dp x cp in fp32; an error when turned
    off."""
    calculate_per_token_loss: bool = True
    """Loss = sum / global target count, our only way; a warning when turned off."""
    optimizer_cpu_offload: bool = False
    """Master weights, their gradients and moments live in the host's memory, and AdamW runs there;
    on a GPU."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a gradient norm that is not finite; one more ends the
    run."""
    seed: int = 1234
    """Of initial weights, document order and data split."""


@dataclass(kw_only=True)
class CheckpointConfig:
    save: str | None = None
    """Folder of this run's checkpoints and metrics; a published checkpoint in it is always
    continued."""
    load: str | None = None
    """Folder to start from when --save holds no checkpoint yet; the same folder as --save may be
    empty."""
    pretrained_checkpoint: str | None = None
    """Folder whose weights start a new run: clock 0, fresh optimizer."""
    finetune: bool = False
    """Take only the weights of --load: clock 0, fresh optimizer."""
    no_load_optim: bool = False
    """Do not load the optimizer state."""
    no_save_optim: bool = False
    """Leave the optimizer state out of checkpoints; none of them can go on without
    --no-load-optim."""
    use_checkpoint_args: bool = False
    """Take settings of the model that are not given from the checkpoint that is started from."""
    accept_changes: list[Literal["data", "tokenizer", "optimization"]] = field(default_factory=list)
    """Continue although this changed since the checkpoint; a changed corpus is drawn from its
    beginning."""
    override_opt_param_scheduler: bool = False
    """Continue with this run's learning rate and weight decay where they differ from the
    checkpoint's."""
    use_checkpoint_opt_param_scheduler: bool = False
    """Continue with the checkpoint's learning rate and weight decay, whatever this run's settings
    say."""
    ckpt_step: int | None = None
    """Iteration of --load to start from, instead of the latest."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at a phase's and the run's end."""
    exit_interval: int | None = None
    """Save and stop when the step is a multiple of this."""
    exit_duration_in_mins: int | None = None
    """Save and stop after so many minutes."""
    exit_signal_handler: bool = True
    """Save and stop on SIGTERM, SIGINT, SIGHUP or SIGUSR1."""


@dataclass(kw_only=True)
class LoggingConfig:
    log_interval: int = 1
    """Steps between console lines; metrics.jsonl has every step."""
    eval_interval: int | None = None
    """Steps between evaluations; without it only at the start and end of phases."""
    eval_iters: int = 4
    """Global batches per validation loss; 0 switches every evaluation off."""
    eval_seq_lengths: list[Tokens] = field(default_factory=list)
    """Sample lengths of the validation loss, below or beyond the phase's own; by default only that
    one."""
    eval_context_gain: bool = True
    """Measure how much lower the loss is with a document's whole beginning than with the last
    --context-gain-cut tokens before the target, where validation documents and the phase are long
    enough."""
    context_gain_cut: Tokens = 1024
    """Context of the cut pass of the context gain; documents and samples must have twice as many
    tokens."""
    context_gain_documents: int | None = None
    """Validation documents of each set that the context gain is measured on, those that fill most
    of the phase's length, two microbatches each; by default as many as a global batch has samples,
    at least 4 and at most 16."""
    eval_passkey_lengths: list[Tokens] = field(default_factory=list)
    """Lengths at which a number hidden in validation text is asked for; by default none."""
    eval_passkey_depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where in the text the number is hidden, 0 = at its beginning, 1 = at its end."""
    eval_passkey_trials: int = 2
    """Numbers hidden at each depth of each length."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard's files."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (offline by itself when it cannot be reached)."""
    wandb_exp_name: str | None = None
    """Name of the wandb run."""
    wandb_entity: str | None = None
    """wandb entity."""
    wandb_save_dir: str | None = None
    """Folder of wandb's files; by default inside --save."""


@dataclass(frozen=True)
class GivenSettings:
    """What the user wrote, in the YAML file or as flags."""

    settings: frozenset[str] = frozenset()
    """Names of settings; not what a preset or a checkpoint gave."""
    megatron: dict[str, Given] = field(default_factory=dict)
    """Flags of Megatron-LM that are no settings here but are accepted (megatron_flags.yaml)."""


@dataclass(kw_only=True)
class Config:
    """Pretrain a GPT. Give a YAML file with --config and override any field by its flag.

    pretrain/config/FLAGS.md lists all flags, and those of Megatron-LM's scripts that are only answered.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    given: Annotated[GivenSettings, tyro.conf.Suppress] = field(
        default_factory=GivenSettings, compare=False
    )
    """What of all this the user wrote; no setting."""

    def validate(self) -> list[str]:
        """All problems that show without touching the disk, as `name = value: rule. Fix: ...`."""
        problems = [
            problem
            for section in (self.model, self.memory, self.layout, self.data)
            for problem in section.validate()
        ]
        optimizer = self.optimizer
        schedule = self.schedule
        checkpoint = self.checkpoint
        positive = [
            ("micro_batch_size", schedule.micro_batch_size),
            ("lr", optimizer.lr),
            ("log_interval", self.logging.log_interval),
            ("adam_eps", optimizer.adam_eps),
        ]
        positive += [
            (name, getattr(section, name))
            for section, names in (
                (
                    schedule,
                    (
                        "seq_length",
                        "global_batch_size",
                        "global_batch_tokens",
                        "train_iters",
                        "train_samples",
                        "train_tokens",
                    ),
                ),
                (
                    optimizer,
                    (
                        "lr_decay_iters",
                        "lr_decay_samples",
                        "lr_decay_tokens",
                        "lr_wsd_decay_iters",
                        "lr_wsd_decay_samples",
                        "lr_wsd_decay_tokens",
                    ),
                ),
                (checkpoint, ("save_interval", "exit_interval", "exit_duration_in_mins")),
                (
                    self.logging,
                    (
                        "eval_interval",
                        "context_gain_cut",
                        "context_gain_documents",
                        "eval_passkey_trials",
                    ),
                ),
            )
            for name in names
        ]
        positive += [
            (name, value)
            for name in ("eval_seq_lengths", "eval_passkey_lengths")
            for value in getattr(self.logging, name)
        ]
        problems += [
            f"{name} = {value}: must be above 0. Fix: give a positive number."
            for name, value in positive
            if value is not None and not value > 0
        ]
        problems += [
            f"{name} = {value}: must be at least 0. Fix: give 0 or more."
            for name, value in (
                *(
                    (name, getattr(optimizer, name) or 0)
                    for name in (
                        "lr_warmup_iters",
                        "lr_warmup_samples",
                        "lr_warmup_tokens",
                        "lr_warmup_fraction",
                    )
                ),
                ("min_lr", optimizer.min_lr),
                ("clip_grad", optimizer.clip_grad),
                ("weight_decay", optimizer.weight_decay),
                ("seed", optimizer.seed),
                ("eval_iters", self.logging.eval_iters),
                ("lr_warmup_init", optimizer.lr_warmup_init),
            )
            if not value >= 0
        ]
        problems += [
            f"{name} = {value}: must be in [0, 1). Fix: 0.9 and 0.95 are common."
            for name, value in (
                ("adam_beta1", optimizer.adam_beta1),
                ("adam_beta2", optimizer.adam_beta2),
            )
            if not 0 <= value < 1
        ]
        if optimizer.bf16 and optimizer.fp64:
            problems.append("bf16 = True: cannot be combined with fp64. Fix: remove one of them.")
        if not optimizer.accumulate_allreduce_grads_in_fp32:
            problems.append(
                "accumulate_allreduce_grads_in_fp32 = False: gradients are always reduced in fp32. "
                "Fix: remove it."
            )
        if optimizer.min_lr > optimizer.lr:
            problems.append(
                f"min_lr = {optimizer.min_lr}: must not exceed lr = {optimizer.lr}. Fix: lower it."
            )
        problems += self._out_of_range() + self._one_of_each() + self._unused_rope_parameters()
        problems += self._passkey_problems() + self._offloading_problems()
        if checkpoint.finetune and not checkpoint.load:
            problems.append(
                "finetune = True: takes the weights of --load, which is not given. Fix: give --load."
            )
        if checkpoint.ckpt_step is not None and not checkpoint.load:
            problems.append(
                f"ckpt_step = {checkpoint.ckpt_step}: chooses an iteration of --load, which is not given. "
                "Fix: give --load."
            )
        if checkpoint.load and checkpoint.pretrained_checkpoint:
            problems.append(
                f"pretrained_checkpoint = {checkpoint.pretrained_checkpoint}: a run starts from one place, "
                f"and --load = {checkpoint.load}. Fix: remove one of them."
            )
        if (
            checkpoint.override_opt_param_scheduler
            and checkpoint.use_checkpoint_opt_param_scheduler
        ):
            problems.append(
                "override_opt_param_scheduler = True: takes this run's learning rate, but "
                "use_checkpoint_opt_param_scheduler takes the checkpoint's. Fix: remove one of them."
            )
        return problems

    def _offloading_problems(self) -> list[str]:
        asked = self.memory.cpu_offloading
        layers = [
            phase.with_memory(self.memory).cpu_offloading_num_layers
            for phase in self.schedule.phases or [PhaseConfig()]
        ]
        if asked is None or asked == (max(layers) > 0):
            return []
        return [
            f"cpu_offloading = {asked}: but cpu_offloading_num_layers = {' '.join(map(str, layers))}. Fix: remove "
            "one of them."
        ]

    def _passkey_problems(self) -> list[str]:
        logging = self.logging
        problems = []
        if logging.eval_passkey_lengths and (
            self.data.mock_data or self.data.tokenizer_type == "NullTokenizer"
        ):
            kind = "mock_data" if self.data.mock_data else "NullTokenizer"
            problems.append(
                f"eval_passkey_lengths = {' '.join(map(str, logging.eval_passkey_lengths))}: asks in "
                f"words, and {kind} has no text. Fix: a corpus with a text tokenizer, or leave it out."
            )
        depths = logging.eval_passkey_depths
        if not depths or not all(0 <= depth <= 1 for depth in depths):
            problems.append(
                f"eval_passkey_depths = {' '.join(map(str, depths))}: must be numbers from 0 to 1. Fix: "
                "for example 0.1 0.5 0.9."
            )
        return problems

    def _out_of_range(self) -> list[str]:
        """Numbers that no field means: infinite or not a number, or beyond what the generator
        takes."""
        problems = []
        for section in (self.model, self.memory, self.layout, self.schedule, self.optimizer):
            problems += [
                f"{name} = {value}: must be a finite number. Fix: give one."
                for name, value in vars(section).items()
                if isinstance(value, float) and not isfinite(value)
            ]
        if self.optimizer.seed >= 2**63:
            problems.append(
                f"seed = {self.optimizer.seed}: must be below 2^63. Fix: a smaller number."
            )
        if self.optimizer.max_skipped_steps < 0:
            problems.append(
                f"max_skipped_steps = {self.optimizer.max_skipped_steps}: must be at least 0. Fix: give 0 "
                "or more."
            )
        return problems

    def _unused_rope_parameters(self) -> list[str]:
        """Rope parameters that no rope reads: of a phase whose type does not use them, or of the
        run for no phase."""
        entries = self.schedule.phases or [PhaseConfig()]
        types = [entry.with_rope(self.model).rope.type for entry in entries]
        places = [("", self.model, types)] + [
            (f"phase {entry.name!r}: ", entry, [kind])
            for entry, kind in zip(entries, types, strict=True)
        ]
        return [
            f"{where}{name} = {getattr(section, name)}: rope_type {' or '.join(dict.fromkeys(used))} does not use "
            f"it. Fix: remove it, or rope_type {' or '.join(users)}."
            for where, section, used in places
            for name, (_, users) in PARAMETERS.items()
            if getattr(section, name) is not None and not set(used) & set(users)
        ]

    def open_settings(self, phase: PhaseConfig) -> tuple[str, ...]:
        """Names of the settings of a phase that `layout: auto` chooses: those that neither it nor
        the run gives."""
        if (phase.layout or self.layout.layout) != "auto":
            return ()
        levels = (
            phase.hierarchical_context_parallel_sizes
            or self.layout.hierarchical_context_parallel_sizes
        )
        found = [
            name
            for name in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "context_parallel_size",
            )
            if getattr(phase, name) is None
            and getattr(self.layout, name) == 1
            and not (name == "context_parallel_size" and levels)
        ]
        if (
            phase.data_parallel_sharding_strategy
            or self.layout.data_parallel_sharding_strategy
            or self.layout.use_distributed_optimizer
        ) is None:
            found.append("data_parallel_sharding_strategy")
        if not (
            phase.recompute_granularity
            or self.memory.recompute_granularity
            or self.memory.recompute_activations
        ):
            found.append("recompute_granularity")
        return tuple(found)

    def _one_of_each(self) -> list[str]:
        """Settings that say the same thing in different units: at most one of each may be given."""
        problems = []
        for section, names in (
            (self.schedule, ("train_iters", "train_samples", "train_tokens")),
            (self.schedule, ("global_batch_size", "global_batch_tokens")),
            (
                self.optimizer,
                ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens", "lr_warmup_fraction"),
            ),
            (self.optimizer, ("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens")),
            (self.optimizer, ("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_tokens")),
        ):
            given = [
                f"{name} = {getattr(section, name)}"
                for name in names
                if getattr(section, name) is not None
            ]
            if len(given) > 1:
                problems.append(
                    f"{', '.join(given)}: at most one of these may be given. Fix: keep one."
                )
        return problems
