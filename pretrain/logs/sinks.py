"""Where a run's numbers also go: Weights & Biases and TensorBoard.

Each is imported only when its flag is given.
"""

import os
import socket
from typing import Any, Literal, Protocol

from pretrain.config.config import Config
from pretrain.config.flat import to_flat
from pretrain.config.load import warn

HTTPS_PORT = 443
REACHABLE_SECONDS = 5


class Sink(Protocol):
    """A place outside of the run's own files where its numbers go."""

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        """Take the numbers of one step, by the names of their curves."""
        ...

    def close(self) -> None: ...


def open_sinks(
    config: Config, last_step: int, wandb_run_id: str | None
) -> tuple[list[Sink], str | None]:
    """Open what the flags ask for.

    Args:
        last_step: step of the checkpoint that the run starts from: later ones will be done again.

    Returns:
        The sinks, and the id of the wandb run for the next start.
    """
    sinks: list[Sink] = []
    if config.logging.wandb_project:
        wandb_sink = Wandb(config, wandb_run_id)
        sinks.append(wandb_sink)
        wandb_run_id = wandb_sink.id
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, last_step))
    return sinks, wandb_run_id


class TensorBoard:
    """Numbers of each step under their names.

    After a restart, steps that are done again are not shown twice.
    """

    def __init__(self, folder: str, last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what earlier files say of purge_step and later ones.
        self.writer = SummaryWriter(folder, purge_step=last_step + 1)

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        # A killed run does not come back to write what it had before its last checkpoint.
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """The wandb run, started or continued.

    Offline where its server cannot be reached or no key is known.
    """

    def __init__(self, config: Config, run_id: str | None):
        import wandb

        # None leaves the mode to WANDB_MODE and to wandb's own default, online.
        mode: Literal["offline"] | None = None
        if "WANDB_MODE" not in os.environ and not _is_reachable(wandb):
            warn("wandb: no key or no network; logging offline, `wandb sync` uploads it later")
            mode = "offline"
        logging = config.logging
        # With the id of the checkpoint's run it goes on, without one it begins.
        self.run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            entity=logging.wandb_entity,
            dir=logging.wandb_save_dir or config.checkpoint.save,
            id=run_id,
            resume="allow",
            mode=mode,
            config=to_flat(config),
        )
        self.id: str = self.run.id

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _is_reachable(wandb: Any) -> bool:
    """Tell whether there is a key and the server answers."""
    if not wandb.api.api_key:
        return False
    host = wandb.Settings().base_url.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, HTTPS_PORT), timeout=REACHABLE_SECONDS).close()
    except OSError:
        return False
    return True
