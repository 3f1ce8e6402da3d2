"""What a run's plan allows, but perhaps not as it was meant: the warnings at the start."""

import os

from pretrain.checkpointing.resume_contract import needless_acceptance
from pretrain.checkpointing.setting_changes import is_same
from pretrain.checkpointing.spent_tokens import spent_tokens_warnings
from pretrain.config.asked import is_asked_for
from pretrain.config.checkpoint_config import CheckpointConfig
from pretrain.config.config_yaml import read_config_yaml
from pretrain.config.effects import effect_warnings
from pretrain.data_outlook import forecast_warnings, target_warnings
from pretrain.evaluation.lengths import length_warnings as evaluation_warnings
from pretrain.logs.wandb_sink import wandb_warnings
from pretrain.plan import Plan
from pretrain.planner.check_phases import length_warnings, rope_warnings
from pretrain.schedule.phases import Phase

_EFFECT_ALONE = {"deal": "has no effect", "window": "deals no samples"}
"""Value of --balance -> what is said of it where there is nobody to deal samples to."""


def warnings_about(plan: Plan) -> list[str]:
    """List what runs, but perhaps not as meant."""
    config = plan.config
    return [
        *plan.start.notes,
        *_warnings_without_save(config.checkpoint),
        *effect_warnings(config),
        *rope_warnings(plan.phases),
        *length_warnings(plan.phases),
        *_warnings_of_one_step(plan.phases),
        *plan.memory.warnings,
        *plan.disk.warnings,
        *_warnings_on_cpu(plan),
        *_warnings_of_restart(plan),
        *_warnings_of_start(plan),
        *spent_tokens_warnings(plan.start, plan.resumed, plan.phases[-1].end),
        *_warnings_of_data(plan),
        *_warnings_of_dealing(plan),
        *evaluation_warnings(config.logging, plan.phases),
        *_warnings_of_decay(plan),
        *_warnings_without_validation(plan),
        *wandb_warnings(config),
    ]


def _warnings_without_save(settings: CheckpointConfig) -> list[str]:
    """Warn of a run of which nothing stays."""
    if settings.save:
        return []
    return ["there is no --save: nothing is saved, and whatever ends the run loses its state"]


def _warnings_of_one_step(phases: list[Phase]) -> list[str]:
    """Warn of phases whose first step alone is far more than the tokens that are asked for."""
    return [
        f"phase {phase.name!r}: train_tokens = {phase.tokens:,}: one step has "
        f"{phase.global_batch_tokens:,}, and is trained whole: "
        f"{phase.global_batch_tokens / phase.tokens:.0f} times what was asked for"
        for phase in phases
        if phase.global_batch_tokens >= 2 * phase.tokens
    ]


def _warnings_on_cpu(plan: Plan) -> list[str]:
    """Warn of settings that move tensors to the host's memory, where all tensors are already."""
    if not plan.machine.device.hardware.is_cpu:
        return []
    found = ["optimizer_cpu_offload = True"] if plan.config.optimizer.optimizer_cpu_offload else []
    history = []
    if plan.config.logging.record_memory_history:
        history.append(
            "record_memory_history = True: has no effect on a CPU, whose memory torch does not keep"
        )
    for phase in plan.phases:
        if phase.memory.cpu_offloading_num_layers:
            layers = phase.memory.cpu_offloading_num_layers
            found.append(f"phase {phase.name!r}: cpu_offloading_num_layers = {layers}")
    return history + [
        f"{text}: changes nothing on a CPU, where all tensors are in the host's memory"
        for text in found
    ]


def _warnings_of_restart(plan: Plan) -> list[str]:
    """Warn of flags that say where to start, where the run goes on from its own checkpoint."""
    if not plan.start.is_restart:
        return []
    settings = plan.config.checkpoint
    assert plan.start.folder is not None and settings.save is not None
    # The settings with which the checkpoint was saved.
    first = read_config_yaml(str(plan.start.folder / "config.yaml")).checkpoint
    is_own_folder = bool(settings.load) and (
        os.path.abspath(settings.load) == os.path.abspath(settings.save)
    )
    found = []
    for name in ("load", "ckpt_step", "no_load_optim", "finetune", "pretrained_checkpoint"):
        value = getattr(settings, name)
        # The same command goes on: what the first launch gave needs no warning.
        if value in (None, False) or is_same(name, getattr(first, name), value):
            continue
        if name == "load" and is_own_folder:
            continue
        if name == "no_load_optim" and plan.starts_fresh_optimizer:
            continue
        found.append(
            f"{name}: has no effect, since --save already holds a checkpoint of this run, which "
            "goes on"
        )
    return found


def _warnings_of_start(plan: Plan) -> list[str]:
    """Warn of flags about contents of a checkpoint that this start does not read."""
    settings = plan.config.checkpoint
    folder = plan.start.folder
    # Acceptance of changes that are none, then flags that read a checkpoint which is not there.
    found = needless_acceptance(plan.changes, settings)
    if settings.no_load_optim and (folder is None or plan.start.weights_only):
        without = "no checkpoint" if folder is None else "weights alone"
        found.append(f"no_load_optim = True: has no effect, since the run starts from {without}")
    is_new = plan.start.weights_only or not plan.start.is_restart
    if folder is not None and is_new and "init_method_std" in plan.config.given.settings:
        found.append(
            f"init_method_std = {plan.config.model.init_method_std:g}: has no effect, since "
            f"the weights are those of {folder}"
        )
    if settings.use_checkpoint_args and folder is None:
        found.append(
            "use_checkpoint_args = True: has no effect, since the run starts from no checkpoint"
        )
    if settings.use_checkpoint_opt_param_scheduler and plan.resumed is None:
        found.append(
            "use_checkpoint_opt_param_scheduler = True: has no effect, since no checkpoint's clock "
            "goes on"
        )
    if plan.resumed is not None and plan.changes_optimizer:
        found.append(
            f"optimizer = {plan.config.optimizer.optimizer}: all moments start at zero, since the "
            "checkpoint's are of another optimizer"
        )
    return found


def _warnings_of_data(plan: Plan) -> list[str]:
    """Warn of a tokenizer that cannot be compared, and of documents that are never drawn, drawn
    again, or give nothing to learn."""
    if not plan.has_data:
        return []
    # Corpora of Megatron-LM have no record, so that this is no error.
    not_compared = []
    if unknown := plan.corpus.unknown_tokenizers:
        others = f" and {len(unknown) - 1:,} other corpora" if len(unknown) > 1 else ""
        not_compared = [
            f"{unknown[0]}{others}: no .json beside it says which tokenizer made it, so that it "
            "cannot be compared with this run's"
        ]
    # In the order in which they matter: not drawn, drawn twice, drawn for nothing.
    never_drawn = [
        f"{prefix}: {count:,} documents have no token and are never drawn"
        for prefix, count in plan.corpus.empty.items()
    ]
    repeated = forecast_warnings(plan.ledger, plan.forecast)
    return not_compared + never_drawn + repeated + target_warnings(plan.corpus, plan.phases)


def _warnings_of_dealing(plan: Plan) -> list[str]:
    """Warn of dealing by cost that was asked for where no rank waits for another one."""
    config = plan.config
    pairs = list(zip(config.schedule.entries, plan.phases, strict=True))
    # The run's own setting needs one phase where it acts, a phase's needs that phase.
    asked = [
        (f"phase {phase.name!r}: ", entry.balance, [phase])
        for entry, phase in pairs
        if entry.balance is not None
    ]
    if is_asked_for(config, "balance"):
        taking = [phase for entry, phase in pairs if entry.balance is None]
        asked.insert(0, ("", config.data.balance, taking))
    return [
        f"{where}balance = {balance}: {_EFFECT_ALONE[balance]} with one data rank and no pipeline"
        for where, balance, phases in asked
        if balance in _EFFECT_ALONE and phases
        if not any(
            each.layout.can_deal(each.data_parallel_size(plan.world_size)) for each in phases
        )
    ]


def _warnings_of_decay(plan: Plan) -> list[str]:
    """Warn of a learning-rate decay that ends before or after the run does."""
    # The last arc of the schedule is the decay.
    decay_end = plan.learning_rate.arcs[-1].end
    end = plan.phases[-1].end
    if decay_end == end or plan.config.optimizer.lr_decay_style == "constant":
        return []
    outcome = "the rest is trained at min_lr" if decay_end < end else "min_lr is not reached"
    return [
        f"the learning rate's decay ends at {decay_end:,} tokens, the run at {end:,}: {outcome}"
    ]


def _warnings_without_validation(plan: Plan) -> list[str]:
    """Warn of evaluations that have nothing to measure."""
    # Evaluations are on by default; a run without documents for them should know.
    if not plan.config.logging.eval_iters or plan.corpus.validation or not plan.has_data:
        return []
    return ["there are no validation documents (--split, --valid-data-path): nothing is evaluated"]
