"""Settings that were given and cannot act beside the others: a table of conditions.

Only what the user wrote is warned of (config.given), not what a preset, a checkpoint or a default
says. A setting that is switched off asks for nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pretrain.config.asked import is_asked_for, text_of, value_text
from pretrain.config.config import Config
from pretrain.config.replaced_by_phases import replaced_by_phases


@dataclass(frozen=True)
class Condition:
    """Says when a setting acts."""

    is_met: Callable[[Config], bool]
    otherwise: str
    """Completes "has no effect": " without ..." or ", since ..."."""


def _style_is(config: Config, style: str) -> bool:
    return config.optimizer.lr_decay_style == style


def _warms_up(config: Config) -> bool:
    optimizer = config.optimizer
    return any(
        (
            optimizer.lr_warmup_iters,
            optimizer.lr_warmup_samples,
            optimizer.lr_warmup_tokens,
            optimizer.lr_warmup_fraction,
        )
    )


def _has_corpora(config: Config) -> bool:
    return not config.data.mock_data


# What settings may need.
WSD = Condition(lambda config: _style_is(config, "WSD"), " without --lr-decay-style WSD")
DECAYS = Condition(
    lambda config: not _style_is(config, "constant"),
    " without a style that decays (--lr-decay-style)",
)
WARMS_UP = Condition(
    _warms_up, " without a warmup (--lr-warmup-iters, -samples, -tokens or -fraction)"
)
EVALUATES = Condition(
    lambda config: config.logging.eval_iters != 0, " without --eval-iters above 0"
)
MEASURES_GAIN = Condition(
    lambda config: config.logging.eval_context_gain, " without --eval-context-gain"
)
ASKS_PASSKEYS = Condition(
    lambda config: bool(config.logging.eval_passkey_lengths), " without --eval-passkey-lengths"
)
WANDB = Condition(
    lambda config: config.logging.wandb_project is not None, " without --wandb-project"
)
PROFILES = Condition(lambda config: config.logging.profile, " without --profile")
RECORDS_MEMORY = Condition(
    lambda config: config.logging.record_memory_history, " without --record-memory-history"
)
WRITES_PROFILE = Condition(
    lambda config: config.logging.profile or config.logging.record_memory_history,
    " without --profile or --record-memory-history",
)
TRACKIO = Condition(
    lambda config: config.logging.trackio_project is not None, " without --trackio-project"
)
SAVES = Condition(lambda config: config.checkpoint.save is not None, " without --save")
EXPORTS = Condition(
    lambda config: config.checkpoint.exports,
    " without --hf-export-interval or --hf-export-phase-ends",
)
EXPORTS_NO_STEPS = Condition(
    lambda config: config.checkpoint.hf_export_interval is None,
    ", since --hf-export-interval exports the ends of phases, too",
)
REWINDS = Condition(
    lambda config: config.guards.spike_policy == "rewind", " without --spike-policy rewind"
)
DELETES = Condition(
    lambda config: not config.checkpoint.keep_all, ", since --keep-all deletes no checkpoint"
)
CORPORA = Condition(_has_corpora, ", since --mock-data reads no files")
TOKENIZES = Condition(
    lambda config: config.data.tokenizer_type != "NullTokenizer",
    ", since a NullTokenizer has no files",
)
SPLITS = Condition(
    lambda config: not config.data.train_data_path, ", since --train-data-path is not split"
)
OFFLOADS = Condition(
    lambda config: bool(config.optimizer.optimizer_cpu_offload or max(_offloaded_layers(config))),
    ", since nothing is offloaded",
)
SELECTS = Condition(
    lambda config: "selective" in _recompute_levels(config),
    " without recompute_granularity selective",
)
TAKES_RUNS_BATCH = Condition(
    lambda config: not all(phase.has_own_batch for phase in config.schedule.entries),
    ", since every phase gives a batch of its own",
)
BATCH_IS_OPEN = Condition(
    lambda config: any(
        phase.global_batch_tokens is None and not phase.step_batch_size_schedule
        for phase in config.schedule.entries
    ),
    ", since every phase gives a batch of its own",
)
CLIPS_QK = Condition(lambda config: config.optimizer.qk_clip, " without --qk-clip")
MUON = Condition(lambda config: config.optimizer.optimizer == "muon", " without --optimizer muon")
NORMS_QK = Condition(lambda config: config.model.qk_layernorm, " without --qk-layernorm")
MUP = Condition(lambda config: config.model.use_mup, " without --use-mup")
MUP_SCALES_SCORES = Condition(
    lambda config: config.model.softmax_scale is None, ", since --softmax-scale says it"
)
MUP_TAKES_HEAD_SIZE = Condition(
    # With the base's heads it is the width that attention's output had: a learning rate's factor.
    lambda config: (
        config.model.softmax_scale is None or bool(config.model.mup_base_num_attention_heads)
    ),
    ", since --softmax-scale says it",
)
HAS_MAIN_ROPE = Condition(
    lambda config: "main" in config.model.layer_ropes, ", since no layer uses this rope"
)
HAS_WINDOW_ROPE = Condition(
    lambda config: "window" in config.model.layer_ropes,
    ", since no layer has both a window and a rope",
)
SKIPS_ROPE = Condition(
    lambda config: "none" in config.model.layer_ropes, ", since it names no layer"
)

CONDITIONS: dict[str, tuple[Condition, ...]] = {
    # The model
    "qk_layernorm_scope": (NORMS_QK,),
    "mup_base_hidden_size": (MUP,),
    "mup_base_ffn_hidden_size": (MUP,),
    "mup_base_num_attention_heads": (MUP,),
    "mup_base_head_dim": (MUP, MUP_TAKES_HEAD_SIZE),
    "mup_attn_scale_power": (MUP, MUP_SCALES_SCORES),
    "rotary_base": (HAS_MAIN_ROPE,),
    "rope_type": (HAS_MAIN_ROPE,),
    "window_rotary_base": (HAS_WINDOW_ROPE,),
    "no_rope_freq": (SKIPS_ROPE,),
    # The learning rate
    "lr_wsd_decay_style": (WSD,),
    "lr_wsd_decay_iters": (WSD,),
    "lr_wsd_decay_samples": (WSD,),
    "lr_wsd_decay_tokens": (WSD,),
    "lr_decay_iters": (DECAYS,),
    "lr_decay_samples": (DECAYS,),
    "lr_decay_tokens": (DECAYS,),
    "min_lr": (DECAYS,),
    "lr_warmup_init": (WARMS_UP,),
    # The update
    "qk_clip_alpha": (CLIPS_QK,),
    "qk_clip_threshold": (CLIPS_QK,),
    "muon_momentum": (MUON,),
    "muon_nesterov": (MUON,),
    "muon_num_ns_steps": (MUON,),
    "muon_coefficient_type": (MUON,),
    "muon_scale_mode": (MUON,),
    "muon_extra_scale_factor": (MUON,),
    "muon_fp32_matmul_prec": (MUON,),
    "muon_per_head": (MUON,),
    # Evaluations and logs
    "eval_interval": (EVALUATES,),
    "eval_seq_lengths": (EVALUATES,),
    "valid_data_path": (EVALUATES,),
    "eval_context_gain": (EVALUATES,),
    "context_gain_cut": (EVALUATES, MEASURES_GAIN),
    "context_gain_documents": (EVALUATES, MEASURES_GAIN),
    "eval_passkey_lengths": (EVALUATES,),
    "eval_passkey_depths": (ASKS_PASSKEYS, EVALUATES),
    "eval_passkey_trials": (ASKS_PASSKEYS, EVALUATES),
    "wandb_exp_name": (WANDB,),
    "wandb_entity": (WANDB,),
    "wandb_save_dir": (WANDB,),
    "trackio_name": (TRACKIO,),
    "profile_step_start": (PROFILES,),
    "profile_step_end": (PROFILES,),
    "profile_ranks": (WRITES_PROFILE,),
    "profile_dir": (WRITES_PROFILE,),
    "memory_snapshot_path": (RECORDS_MEMORY,),
    "save_interval": (SAVES,),
    "save_interval_in_mins": (SAVES,),
    "keep_last": (SAVES, DELETES),
    "keep_every": (SAVES, DELETES),
    "save_retain_interval": (SAVES, DELETES),
    "keep_best": (SAVES, DELETES, EVALUATES),
    "keep_all": (SAVES,),
    "no_save_optim": (SAVES,),
    "hf_export_interval": (SAVES,),
    "hf_export_phase_ends": (SAVES, EXPORTS_NO_STEPS),
    "hf_export_dir": (SAVES, EXPORTS),
    "hf_export_dtype": (SAVES, EXPORTS),
    "max_rewinds": (REWINDS,),
    "rewind_skip_steps": (REWINDS,),
    "async_save": (SAVES,),
    # Data and memory
    "split": (SPLITS,),
    "data_cache_path": (CORPORA,),
    "tokenizer_type": (CORPORA,),
    "tokenizer_model": (CORPORA, TOKENIZES),
    "cpu_offloading_host_memory": (OFFLOADS,),
    "recompute_modules": (SELECTS,),
    "rampup_batch_size": (TAKES_RUNS_BATCH,),
    "step_batch_size_schedule": (TAKES_RUNS_BATCH,),
    "global_batch_size": (BATCH_IS_OPEN,),
    "global_batch_tokens": (BATCH_IS_OPEN,),
}
"""Setting -> what must hold for it to act; the first that does not is named.

What is not here always acts, is checked in validate(), or is judged where the layout, the data or
the checkpoint are known (plan.py).
"""

NEEDS_SIZE = {
    "sequence_parallel": "tensor_model_parallel_size",
    "pipeline_schedule": "pipeline_model_parallel_size",
    "num_virtual_stages_per_pipeline_rank": "pipeline_model_parallel_size",
    "cp_comm_type": "context_parallel_size",
    "hierarchical_context_parallel_sizes": "context_parallel_size",
}
"""Setting -> the size that must be above 1 in some phase, or in the phase that gives it."""


def effect_warnings(config: Config) -> list[str]:
    """Return a line for each setting that was given and does nothing, or less than it seems to."""
    # By the tables, then by phases, then Megatron-LM's own.
    found = [text for name in CONDITIONS for text in _unmet(config, name)]
    found += [*_size_warnings(config), *_phase_warnings(config), *replaced_by_phases(config)]
    found += [text for given in config.given.megatron.values() for text in [given.warning] if text]
    found += _window_warnings(config)
    # Settings that act, but not as a user may think.
    if set(config.memory.recompute_modules) == {"core_attn"} and SELECTS.is_met(config):
        found.append(
            "recompute_modules = core_attn: nothing is computed again, since no attention kernel "
            "keeps the scores"
        )
    if config.checkpoint.no_save_optim and config.checkpoint.save:
        found.append("no_save_optim = True: a run that stops cannot go on with its optimizer state")
    if is_asked_for(config, "use_mup") and not _has_mup_base(config):
        found.append(
            "use_mup = True: nothing is scaled by width, since without --mup-base-hidden-size the "
            "base is as wide as the model itself"
        )
    if not config.optimizer.calculate_per_token_loss:
        found.append(
            "calculate_per_token_loss = False: the loss is always the sum over targets / the "
            "global target count"
        )
    return found


def _unmet(config: Config, name: str) -> list[str]:
    """Return the warning about a setting that was given and whose conditions do not all hold."""
    if not is_asked_for(config, name):
        return []
    # One reason is enough.
    unmet = [condition for condition in CONDITIONS[name] if not condition.is_met(config)]
    return [
        f"{value_text(config, name)}: has no effect{condition.otherwise}" for condition in unmet[:1]
    ]


def can_act(config: Config, name: str) -> bool:
    """Return whether all that a setting needs holds; True where the table says nothing of it."""
    return all(condition.is_met(config) for condition in CONDITIONS.get(name, ()))


def _has_mup_base(config: Config) -> bool:
    """Return whether any size of muP's base model is given."""
    model = config.model
    return any(
        (
            model.mup_base_hidden_size,
            model.mup_base_ffn_hidden_size,
            model.mup_base_num_attention_heads,
            model.mup_base_head_dim,
        )
    )


def _offloaded_layers(config: Config) -> list[int]:
    return [
        phase.with_memory(config.memory).cpu_offloading_num_layers
        for phase in config.schedule.entries
    ]


def _recompute_levels(config: Config) -> list[str | None]:
    switch = "selective" if config.memory.recompute_activations else None
    return [
        phase.recompute_granularity or config.memory.recompute_granularity or switch
        for phase in config.schedule.entries
    ]


def _size_warnings(config: Config) -> Iterator[str]:
    """Yield settings of an axis that has one rank, in all phases or in the one that gives it."""
    for name, size in NEEDS_SIZE.items():
        without = f"has no effect without {size} above 1"
        phases = config.schedule.entries
        # A size that `layout: auto` chooses may come out above 1.
        sizes = [
            2
            if size in config.open_settings(phase)
            else getattr(phase, size) or getattr(config.layout, size)
            for phase in phases
        ]
        # The run's own needs one phase where it acts, a phase's needs that phase.
        if is_asked_for(config, name) and max(sizes) == 1:
            yield f"{name} = {text_of(getattr(config.layout, name))}: {without}"
        for phase, its_size in zip(phases, sizes, strict=True):
            if getattr(phase, name, None) is not None and its_size == 1:
                yield f"phase {phase.name!r}: {name} = {text_of(getattr(phase, name))}: {without}"


def _phase_warnings(config: Config) -> Iterator[str]:
    """Yield settings of single phases that cannot act."""
    for phase in config.schedule.phases:
        if phase.min_lr and not DECAYS.is_met(config):
            given = f"phase {phase.name!r}: min_lr = {phase.min_lr:g}"
            yield f"{given}: has no effect{DECAYS.otherwise}"


def _window_warnings(config: Config) -> Iterator[str]:
    """Yield phases whose samples cannot be packed to cost the same, though that is asked for."""
    for phase in config.schedule.entries:
        data = phase.over(config.data)
        given = f"phase {phase.name!r}: balance = window: deals samples as deal does, and no more, "
        if data.balance == "window" and data.packing != "best_fit":
            yield given + "without --packing best_fit"
        elif data.balance == "window" and not data.document_masking:
            yield given + "since samples cost the same without document masking"
