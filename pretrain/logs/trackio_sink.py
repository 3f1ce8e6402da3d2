"""A run's numbers in trackio, whose interface is wandb's."""

from pathlib import Path

from pretrain.config.config import Config
from pretrain.config.flat import to_flat


class Trackio:
    """The trackio run, started or continued, each step once.

    Where it goes (a folder, a server, a Space) is for trackio's own variables to say.
    """

    def __init__(self, config: Config, told_until: int):
        import trackio

        logging = config.logging
        # A run is known by its name: without one, every start would be another.
        name = logging.trackio_name
        if name is None and config.checkpoint.save:
            name = Path(config.checkpoint.save).resolve().name
        self.run = trackio.init(
            project=logging.trackio_project,
            name=name,
            resume="allow",
            config=to_flat(config),
            embed=False,
        )
        self._told_until = told_until

    def log(self, values: dict[str, float | str | bool], step: int) -> None:
        if step > self._told_until:
            self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
