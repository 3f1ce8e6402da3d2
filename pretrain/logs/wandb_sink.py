"""A run's numbers in Weights & Biases."""

import os
import socket
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from data.files import write_atomically
from pretrain.config.config import Config
from pretrain.config.flat import to_flat

RUN_ID_FILE = "wandb-run.txt"
PORTS = {"https": 443, "http": 80}
REACHABLE_SECONDS = 5


def wandb_warnings(config: Config) -> list[str]:
    """Say on the machine that would log whether wandb will do so offline."""
    reason = _why_offline() if config.logging.wandb_project else None
    if reason is None:
        return []
    return [
        f"wandb_project = {config.logging.wandb_project}: {reason} on {socket.gethostname()}, so "
        "wandb logs offline and `wandb sync` uploads it later. Fix: `wandb login`, or "
        "WANDB_MODE=offline if it is meant so."
    ]


class Wandb:
    """The wandb run, started or continued, each step once.

    Offline where its server cannot be reached or no key is known.
    """

    def __init__(self, config: Config, run_id: str | None, told_until: int):
        import wandb

        # None leaves the mode to WANDB_MODE and to wandb's own default, online.
        mode: Literal["offline"] | None = None if _why_offline() is None else "offline"
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
        self._told_until = told_until if run_id is not None else -1

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        # wandb keeps what it was told first: steps that are done again are the same.
        if step > self._told_until:
            self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def read_run_id(save: str) -> str | None:
    """Return the id of the wandb run that a --save folder notes; None without one."""
    path = Path(save) / RUN_ID_FILE
    return path.read_text(encoding="utf-8").strip() or None if path.exists() else None


def write_run_id(save: str, run_id: str) -> None:
    """Note the id of the wandb run in the --save folder, for a start without a checkpoint."""
    write_atomically(Path(save) / RUN_ID_FILE, run_id + "\n")


def _why_offline() -> str | None:
    """Say why wandb cannot log online; None = it can, or the user has chosen its mode."""
    import wandb

    if "WANDB_MODE" in os.environ:
        return None
    if not wandb.login(prompt=False, verify=False):
        return "no key is known"
    url = urlsplit(wandb.Settings().base_url)
    port = url.port or PORTS[url.scheme]
    try:
        socket.create_connection((url.hostname, port), timeout=REACHABLE_SECONDS).close()
    except OSError as error:
        return f"{url.hostname}:{port} cannot be reached ({error})"
    return None
