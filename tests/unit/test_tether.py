"""launch/tether.py: what a process does whose parent is not, or no longer, the one that is
named."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from launch.tether import end_with_parent
end_with_parent(int(sys.argv[1]))
print("trained")
"""


def run(parent: int, *before: str) -> subprocess.CompletedProcess:
    """Run a process that prints "trained" once it is tied to `parent`."""
    words = [*before, sys.executable, "-c", PROGRAM, str(parent)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)


def test_a_child_of_the_named_process_runs():
    assert run(os.getpid()).stdout == "trained\n"


def test_a_wrapper_in_between_is_no_reason_to_end():
    found = run(os.getpid(), "sh", "-c", '"$@"; exit $?', "sh")
    assert found.stdout == "trained\n", found


def test_a_process_whose_launcher_is_gone_ends_and_says_so():
    gone = subprocess.Popen(["true"])
    gone.wait()
    found = run(gone.pid)
    assert (found.returncode, found.stdout) == (-9, "")
    assert f"process {gone.pid}, the launcher, is gone" in found.stderr
