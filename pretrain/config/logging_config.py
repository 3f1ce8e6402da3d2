"""Settings of what is measured beside the training loss, and where it is written."""

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from pretrain.config.facts import setting
from pretrain.config.token_count import Tokens


@dataclass(kw_only=True)
class LoggingConfig:
    """What is measured and shown, and where it goes."""

    log_interval: int = setting(1, above=0)
    """Steps between console lines; metrics.jsonl has every step."""
    eval_interval: int | None = setting(None, above=0)
    """Steps between evaluations; without it only at the start and end of phases."""
    eval_iters: int = setting(4, at_least=0)
    """Global batches per validation loss; 0 switches every evaluation off."""
    eval_seq_lengths: list[Tokens] = setting(list, above=0)
    """Sample lengths of the validation loss, below or beyond the phase's own; by default only that
    one."""
    eval_context_gain: bool = True
    """Measure how much lower the loss is with a document's whole beginning than with the last
    --context-gain-cut tokens before the target, where validation documents and the phase are long
    enough."""
    context_gain_cut: Tokens = setting(1024, above=0)
    """Context of the cut pass of the context gain; documents and samples must have twice as many
    tokens."""
    context_gain_documents: int | None = setting(None, above=0)
    """Validation documents of each set that the context gain is measured on, those that fill most
    of the phase's length, two microbatches each; by default as many as a global batch has samples,
    at least 4 and at most 16."""
    eval_passkey_lengths: list[Tokens] = setting(list, above=0)
    """Lengths at which a number hidden in validation text is asked for; by default none."""
    eval_passkey_depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """Where in the text the number is hidden, 0 = at its beginning, 1 = at its end."""
    eval_passkey_trials: int = setting(2, above=0)
    """Numbers hidden at each depth of each length."""
    log_max_attention_logit: bool = False
    """Measure the largest attention logit of each step; --qk-clip does so by itself."""
    tensorboard_dir: str | None = setting(None, is_path=True)
    """Folder for TensorBoard's files."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project (offline by itself when it cannot be reached)."""
    wandb_exp_name: str | None = None
    """Name of the wandb run."""
    wandb_entity: str | None = None
    """wandb entity."""
    wandb_save_dir: str | None = setting(None, is_path=True)
    """Folder of wandb's files; by default inside --save."""
    trackio_project: str | None = None
    """Log to this trackio project (`pip install trackio`); trackio's own variables say where it
    is."""
    trackio_name: str | None = None
    """Name of the trackio run, which a restart goes on with; by default that of the --save
    folder."""
    otlp_endpoint: str | None = None
    """Send metrics to this OpenTelemetry collector by OTLP over HTTP, for example
    http://collector:4318; OTEL_METRIC_EXPORT_INTERVAL has the milliseconds in between."""

    profile: bool = False
    """Record steps with torch's profiler: a trace per rank, for ui.perfetto.dev. It changes no
    number of the run."""
    profile_step_start: int = setting(10, at_least=0)
    """Steps before those that --profile records."""
    profile_step_end: int = setting(12, above=0)
    """The last step that --profile records."""
    profile_ranks: list[int] = field(default_factory=lambda: [0], metadata=dict(at_least=0))
    """Global ranks that --profile records, and whose memory history is written at the
    end."""
    profile_dir: str | None = setting(None, is_path=True)
    """Folder of traces and memory snapshots; by default `profile` inside --save."""
    record_memory_history: bool = False
    """Keep who allocates and frees memory on each GPU, and write it at the end and when it runs
    out, for pytorch.org/memory_viz."""
    memory_snapshot_path: str | None = setting(None, is_path=True)
    """File of the memory history, `-rankN` added to its name; by default memory.pickle in the
    folder of --profile-dir."""

    def validate(self) -> list[str]:
        """List what is no place of a text or no address, as `name = value: rule. Fix: ...`."""
        problems = []
        depths = self.eval_passkey_depths
        if not depths or not all(0 <= depth <= 1 for depth in depths):
            problems.append(
                f"eval_passkey_depths = {' '.join(map(str, depths))}: must be numbers from 0 to 1. "
                "Fix: for example 0.1 0.5 0.9."
            )
        if self.otlp_endpoint is not None and not _is_url(self.otlp_endpoint):
            problems.append(
                f"otlp_endpoint = {self.otlp_endpoint}: must be a URL with http:// or https:// and "
                "a host. Fix: for example http://localhost:4318."
            )
        if self.profile and self.profile_step_end <= self.profile_step_start:
            problems.append(
                f"profile_step_end = {self.profile_step_end}: must be above profile_step_start = "
                f"{self.profile_step_start}. Fix: {self.profile_step_start + 2} records two steps."
            )
        return problems


def _is_url(text: str) -> bool:
    """Tell whether the text is the address of a server that speaks HTTP."""
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        return False
