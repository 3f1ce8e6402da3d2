"""Choose the folders of one launch on this node, before its processes start.

ITHACA_ERRORS is for what goes wrong, and train.sh makes it. ITHACA_RECORDS is for what each rank
does, which the watchdog reads.
"""

import os
import tempfile
from pathlib import Path

FLIGHT_RECORDER = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": "{folder}/nccl",
    "TORCH_FR_DUMP_TEMP_FILE": "{errors}/nccl_rank_",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "{errors}/nccl_rank_",
}
"""What torch's flight recorder of NCCL reads from the environment, under its old and new names."""


def open_records() -> Path:
    """Make the folder of the ranks' records, and let the processes know it -> that folder."""
    # train.sh removes its own folder at its end.
    outcome = os.environ.get("ITHACA_OUTCOME_FILE")
    folder = tempfile.mkdtemp(prefix="records.", dir=os.path.dirname(outcome) if outcome else None)
    os.environ["ITHACA_RECORDS"] = folder
    # NCCL keeps its last collectives, and writes them when asked by a pipe. Whoever has chosen
    # otherwise decides.
    for name, value in FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value.format(folder=folder, errors=errors_folder()))
    return Path(folder)


def errors_folder() -> Path:
    """Name this node's own folder for what goes wrong in this launch."""
    return Path(os.environ.get("ITHACA_ERRORS") or tempfile.gettempdir())
