"""When a checkpoint is due within a phase: after so many steps or so many minutes."""

import time

from pretrain.config.checkpoint_config import CheckpointConfig

SECONDS_PER_MINUTE = 60


class SaveSchedule:
    """Counts the steps and the time between two checkpoints; time begins with the object."""

    def __init__(self, settings: CheckpointConfig):
        self.settings = settings
        self.restart()

    def restart(self) -> None:
        """Count the minutes from here: a checkpoint is written, or there was nothing to write."""
        self._since = time.monotonic()

    @property
    def is_late(self) -> bool:
        """Are the minutes over by this rank's clock? All ranks must hear of it before they act."""
        minutes = self.settings.save_interval_in_mins
        passed = time.monotonic() - self._since
        return minutes is not None and passed >= minutes * SECONDS_PER_MINUTE

    def is_due(self, step: int, *, some_rank_is_late: bool) -> bool:
        """Tell whether a checkpoint follows `step`, the same on all ranks."""
        interval = self.settings.save_interval
        return some_rank_is_late or (interval is not None and step % interval == 0)
