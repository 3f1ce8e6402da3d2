"""Settings of what a run starts from, and where and when it saves."""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.config.facts import setting
from pretrain.config.token_count import Tokens


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
    """Take settings of the model that are not given from the checkpoint that is started from, and
    its tokenizer where none is given."""
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
    save_interval_in_mins: float | None = setting(None, above=0)
    """Minutes between checkpoints, from the start of training or the last one; with --save-interval
    whichever comes first."""
    keep_last: int = setting(3, at_least=1, fix="give 1 or more; --keep-all deletes none")
    """Newest checkpoints that are kept. Older ones are deleted once a newer one is published and
    its files were read again, unless another setting keeps them; those that another run wrote
    never."""
    keep_phase_ends: bool = True
    """Keep the checkpoint at the end of each phase."""
    keep_every: Tokens | None = setting(None, above=0)
    """Keep the first checkpoint after each multiple of this many consumed tokens."""
    save_retain_interval: int | None = setting(None, above=0)
    """Keep the checkpoints of steps that are multiples of this."""
    keep_best: int = setting(0, at_least=0)
    """Keep this many checkpoints with the lowest validation loss, of the first validation set at
    the longest length of the evaluation at their step; losses at different lengths are not
    compared, and each length has its own best."""
    keep_all: bool = False
    """Delete no checkpoint."""
    async_save: bool = True
    """Write checkpoints in the background, from a copy of the state in the host's memory; without
    it training waits until each is published, and needs no copy."""
    hf_export_interval: int | None = setting(None, above=0)
    """Steps between exports to Hugging Face's format, a multiple of --save-interval; there is one
    at each phase's end, too. A process of its own writes them from published checkpoints, at the
    lowest priority and without a GPU, while training goes on."""
    hf_export_phase_ends: bool = False
    """Export to Hugging Face's format at the end of each phase; --hf-export-interval does so,
    too."""
    hf_export_dir: str | None = setting(None, is_path=True)
    """Folder of these exports, step_00001000 and so on; by default `hf` in --save."""
    hf_export_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights in these exports; checkpoints keep them in float32."""
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
        return problems + self._unreachable_intervals()

    @property
    def exports(self) -> bool:
        """Are checkpoints exported to Hugging Face's format?"""
        return self.hf_export_interval is not None or self.hf_export_phase_ends

    def _unreachable_intervals(self) -> list[str]:
        """List intervals that choose among steps that are not saved."""
        if self.hf_export_interval is not None and self.save_interval is None:
            return [
                f"hf_export_interval = {self.hf_export_interval}: exports checkpoints of these "
                "steps, and save_interval is not given. Fix: give it, or --hf-export-phase-ends "
                "alone."
            ]
        saved = self.save_interval
        if saved is None or saved < 1:
            return []
        found = []
        for name in ("save_retain_interval", "hf_export_interval"):
            chosen = getattr(self, name)
            if chosen is not None and chosen % saved:
                found.append(
                    f"{name} = {chosen}: must be a multiple of save_interval = {saved}, whose "
                    f"steps are saved. Fix: for example {(chosen // saved + 1) * saved}."
                )
        return found
