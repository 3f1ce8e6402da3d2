"""Settings of what a run starts from, and where and when it saves."""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.config.facts import setting


@dataclass(kw_only=True)
class CheckpointConfig:
    """What a run starts from, and what it leaves."""

    save: str | None = setting(None, is_path=True)
    """Folder of this run's checkpoints and metrics; a published checkpoint in it is always
    continued."""
    load: str | None = setting(None, is_path=True)
    """Folder to start from when --save holds no checkpoint yet; the same folder as --save may be
    empty."""
    pretrained_checkpoint: str | None = setting(None, is_path=True)
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
    save_interval: int | None = setting(None, above=0)
    """Steps between checkpoints; one is always written at a phase's and the run's end."""
    exit_interval: int | None = setting(None, above=0)
    """Save and stop when the step is a multiple of this."""
    exit_duration_in_mins: int | None = setting(None, above=0)
    """Save and stop after this many minutes."""
    exit_signal_handler: bool = True
    """Save and stop on SIGTERM, SIGINT, SIGHUP or SIGUSR1."""

    def validate(self) -> list[str]:
        """List settings that contradict each other, as `name = value: rule. Fix: ...`."""
        problems = []
        # What chooses a part of --load needs --load.
        if self.finetune and not self.load:
            problems.append(
                "finetune = True: takes the weights of --load, which is not given. "
                "Fix: give --load."
            )
        if self.ckpt_step is not None and not self.load:
            problems.append(
                f"ckpt_step = {self.ckpt_step}: chooses an iteration of --load, which is not "
                "given. Fix: give --load."
            )
        # A run has one start, and one learning rate: of two the user must choose.
        if self.load and self.pretrained_checkpoint:
            problems.append(
                f"pretrained_checkpoint = {self.pretrained_checkpoint}: a run starts from one "
                f"place, and --load = {self.load}. Fix: remove one of them."
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            problems.append(
                "override_opt_param_scheduler = True: takes this run's learning rate, but "
                "use_checkpoint_opt_param_scheduler takes the checkpoint's. Fix: remove one of "
                "them."
            )
        return problems
