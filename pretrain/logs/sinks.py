"""Where a run's numbers also go: wandb, TensorBoard, trackio, OpenTelemetry.

Each is imported only when its flag is given, and gets the same numbers under the same names, those
of metrics.jsonl. None of them can end a run: what one does not take is counted and said.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from pretrain.config.config import Config
from pretrain.config.load import warn
from pretrain.logs.otlp_sink import Otlp
from pretrain.logs.tensorboard_sink import TensorBoard
from pretrain.logs.trackio_sink import Trackio
from pretrain.logs.wandb_sink import Wandb

Values = dict[str, float | str | bool]
"""Numbers by the names of their curves."""


class Sink(Protocol):
    """A place outside of the run's own files where its numbers go."""

    def log(self, values: Values, step: int) -> None:
        """Take the numbers of one step, by the names of their curves."""
        ...

    def close(self) -> None:
        """Hand on what was taken."""
        ...


S = TypeVar("S", bound=Sink)


@dataclass(frozen=True)
class Told:
    """How far a run is, for sinks that keep what an earlier start of it told them."""

    last_step: int
    """Step of the checkpoint that the run starts from: later ones will be done again."""
    until: int
    """The last step that an earlier start has told; sinks that cannot go back have it already."""


class SafeSink:
    """A sink whose errors are warned of once, and counted, and never raised."""

    def __init__(self, name: str, sink: Sink):
        self.name = name
        self.sink = sink
        self.taken = 0
        self.lost = 0

    def log(self, values: Values, step: int) -> None:
        try:
            self.sink.log(values, step)
            self.taken += 1
        except Exception as error:
            if not self.lost:
                warn(
                    f"{self.name}: does not take step {step:,} ({_shown(error)}); the run goes on, "
                    "and metrics.jsonl has all numbers"
                )
            self.lost += 1

    def close(self) -> None:
        try:
            self.sink.close()
        except Exception as error:
            warn(f"{self.name}: may lack its last numbers ({_shown(error)})")
        if self.lost:
            total = self.lost + self.taken
            warn(f"{self.name}: did not take {self.lost:,} of {total:,} records")


def open_sinks(
    config: Config, told: Told, wandb_run_id: str | None
) -> tuple[list[SafeSink], str | None]:
    """Open what the flags ask for.

    Args:
        wandb_run_id: of the wandb run that goes on; None = a new one.

    Returns:
        The sinks, and the id of the wandb run for the next start.
    """
    logging = config.logging
    sinks: list[SafeSink] = []
    if logging.wandb_project:
        wandb_sink = _open(sinks, "wandb", lambda: Wandb(config, wandb_run_id, told.until))
        if wandb_sink is not None:
            wandb_run_id = wandb_sink.id
    if folder := logging.tensorboard_dir:
        _open(sinks, "TensorBoard", lambda: TensorBoard(folder, told.last_step))
    if logging.trackio_project:
        _open(sinks, "trackio", lambda: Trackio(config, told.until))
    if endpoint := logging.otlp_endpoint:
        _open(sinks, "OpenTelemetry", lambda: Otlp(endpoint))
    return sinks, wandb_run_id


def _open(sinks: list[SafeSink], name: str, make: Callable[[], S]) -> S | None:
    """Open a sink and add it; None with a warning where it cannot be opened."""
    try:
        sink = make()
    except Exception as error:
        warn(f"{name}: cannot be opened ({_shown(error)}); the run goes on without it")
        return None
    sinks.append(SafeSink(name, sink))
    return sink


def _shown(error: Exception) -> str:
    """Describe an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
