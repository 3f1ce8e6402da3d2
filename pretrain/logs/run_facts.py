"""What a run says about itself at each start: run.json in its --save folder.

Who looks at a run from outside learns here what no step repeats: what it runs on, with which code
and settings, and how far its phases reach. Imports no torch: `ithaca watch` reads it, too.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import write_atomically

FILE = "run.json"
CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class PhaseFacts:
    """Tells where a phase lies on the clock, in tokens."""

    name: str
    seq_length: int
    start: int
    end: int


@dataclass(frozen=True)
class RunFacts:
    """Describes the last start of a run."""

    time: float
    """Seconds since 1970 at which the state was ready."""
    host: str
    """The machine of rank 0."""
    pid: int
    """The process of rank 0."""
    records: str | None
    """Folder on that machine with the records of its ranks; None = no launcher watches."""
    device: str
    world_size: int
    machines: int
    """Over which the processes are spread."""
    layout: str
    code: str
    torch: str
    """Version of PyTorch."""
    phases: list[PhaseFacts]
    settings: str
    """The whole configuration, as --config takes it."""

    def write(self, folder: Path) -> None:
        """Replace run.json of a --save folder."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_atomically(folder / FILE, text + "\n")

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "RunFacts":
        """Read what this or a later version wrote.

        Raises:
            ValueError: a field is missing.
        """
        # Keys that this version does not know are left out.
        names = [field.name for field in dataclasses.fields(RunFacts)]
        values = {name: stored[name] for name in names if name in stored}
        try:
            values["phases"] = [PhaseFacts(**phase) for phase in values["phases"]]
            return RunFacts(**values)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{FILE}: is not one of ours ({error})") from None

    @staticmethod
    def read(folder: Path) -> "RunFacts | None":
        """Read run.json of a --save folder; None where an older version wrote none.

        Raises:
            ValueError: the file is not the trainer's.
        """
        try:
            text = (folder / FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return RunFacts.from_json(json.loads(text))


def describe_cpu() -> str:
    """Name the processor of this machine, as the system calls it."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "cpu"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"cpu ({next(names, 'model not known')})"
