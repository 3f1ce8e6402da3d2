"""Where a run's numbers also go: Weights & Biases and TensorBoard, imported only when their flags
are given."""

import os
import socket
from typing import Protocol

from pretrain.config.config import Config
from pretrain.config.load import to_flat, warn


class Sink(Protocol):
    def log(self, values: dict[str, float | str | bool], step: int) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    config: Config, last_step: int, wandb_run_id: str | None
) -> tuple[list[Sink], str | None]:
    """What the flags ask for, and the id of the wandb run.

    Args:
        last_step: step of the checkpoint that the run starts from: later ones will be done again.
    """
    sinks: list[Sink] = []
    if config.logging.wandb_project:
        sinks.append(Wandb(config, wandb_run_id))
        wandb_run_id = sinks[0].id
    if config.logging.tensorboard_dir:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, last_step))
    return sinks, wandb_run_id


class TensorBoard:
    """Numbers of each step under their names; after a restart, steps that are done again are not
    shown twice."""

    def __init__(self, folder: str, last_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what earlier files say of purge_step and later ones.
        self.writer = SummaryWriter(folder, purge_step=last_step + 1)

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, step)
        # What a killed run has said up to its last checkpoint is not said again
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """The wandb run, started or continued; offline where its server cannot be reached or no key is
    known."""

    def __init__(self, config: Config, run_id: str | None):
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not _is_reachable(wandb):
            warn("wandb: no key or no network; logging offline, `wandb sync` uploads it later")
            mode = "offline"
        logging = config.logging
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
        self.id = self.run.id

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def _is_reachable(wandb) -> bool:
    if not wandb.api.api_key:
        return False
    host = wandb.Settings().base_url.split("//")[-1].split("/")[0].split(":")[0]
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True
