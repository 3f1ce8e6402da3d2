"""What failures and saves take of a run: the share of the time in which it makes progress."""

from dataclasses import dataclass

SECONDS_PER_HOUR = 3600
SECONDS_PER_MINUTE = 60
GIGABYTE = 10**9
NOTICE_SECONDS = 30
"""The time until a rank that hangs is found (--watchdog-seconds)."""
GROUPS_SECONDS = 60
"""The time that 1,024 ranks take to make their groups. Assumed, not measured."""


@dataclass(frozen=True, kw_only=True)
class FailureCosts:
    """Holds what one failure and one save of a run cost."""

    hours_to_failure: float
    """Mean hours between two failures of the whole run."""
    notice_seconds: float
    """The time until a rank that hangs is found; one that dies is known at once."""
    own_seconds: float
    """What the launcher and the trainer take: end, launch, import, plan, the first step."""
    groups_seconds: float
    """The time to make the groups of all ranks."""
    read_bytes: float
    """What a node reads of the checkpoint."""
    read_bytes_per_second: float
    """The rate at which a node reads it."""
    save_seconds: float
    """The time between two saves, with one of them; half of it is trained again after a
    failure."""
    stall_seconds: float
    """The time that a save keeps the steps waiting."""

    @property
    def restart_seconds(self) -> float:
        """Seconds from a failure to the first new step."""
        read = self.read_bytes / self.read_bytes_per_second
        return self.notice_seconds + self.own_seconds + self.groups_seconds + read

    @property
    def again_seconds(self) -> float:
        """Seconds of training that a failure makes necessary again, on average."""
        return self.save_seconds / 2

    @property
    def lost_to_failures(self) -> float:
        """Share of the time that failures take."""
        lost = self.restart_seconds + self.again_seconds
        return lost / (self.hours_to_failure * SECONDS_PER_HOUR)

    @property
    def lost_to_saves(self) -> float:
        """Share of the time that saves take."""
        return self.stall_seconds / self.save_seconds

    @property
    def effective_share(self) -> float:
        """Share of the time in which the run makes progress; none is left where failures come
        faster than it is back."""
        return max(0.0, 1 - self.lost_to_failures - self.lost_to_saves)

    def arithmetic(self) -> list[str]:
        """Write how the share comes about, a line each."""
        read = self.read_bytes / self.read_bytes_per_second
        minutes = self.save_seconds / SECONDS_PER_MINUTE
        return [
            f"away per failure: {self.notice_seconds:.0f} s to notice + {self.own_seconds:.1f} s "
            f"of ours (measured) + {self.groups_seconds:.0f} s groups + {read:.0f} s to read and "
            f"verify {self.read_bytes / GIGABYTE:.0f} GB = {self.restart_seconds:.0f} s",
            f"trained again: half of {minutes:.0f} min = {self.again_seconds:.0f} s",
            f"lost to failures: ({self.restart_seconds:.0f} + {self.again_seconds:.0f}) s in "
            f"{self.hours_to_failure:g} h = {100 * self.lost_to_failures:.2f} %",
            f"lost to saves: {self.stall_seconds:.3g} s in {minutes:.0f} min = "
            f"{100 * self.lost_to_saves:.2f} %",
            f"effective training time: {100 * self.effective_share:.2f} %",
        ]
