"""Imports all that a rehearsal needs, once for all processes (multiprocessing's forkserver)."""

import os
import warnings

# torch reads it when it is loaded: no rank of a world that does not exist warns of its groups.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# torch's own libraries call what torch has renamed.
warnings.simplefilter("ignore", FutureWarning)

from parallel.layout import import_parallel_state  # noqa: E402
from tools.plan_verify import rehearsal  # noqa: E402

import_parallel_state()
MODULES = (rehearsal,)
"""Modules that are loaded."""
