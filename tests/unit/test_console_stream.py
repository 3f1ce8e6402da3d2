"""launch/console.py: a process outlives its terminal, and whoever read what it prints."""

import errno
import io
import os
import pty
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.console import ConsoleStream

ROOT = Path(__file__).resolve().parents[2]

TALKER = """
import os, sys
sys.stdin.readline()
for number in range(3):
    print("line", number, flush=True)
    print("error", number, file=sys.stderr, flush=True)
with open(os.environ["HERE"] + "/trained", "w") as file:
    file.write(sys.stdout.lost)
"""


def closed_pipe() -> tuple[int, int]:
    """Make a way out that nobody reads -> its end, and the error of writing there."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer, errno.EPIPE


def closed_terminal() -> tuple[int, int]:
    """Make a terminal that is gone -> its end, and the error of writing there."""
    master, slave = pty.openpty()
    os.close(master)
    return slave, errno.EIO


def full_disk() -> tuple[int, int]:
    """Open the device on which nothing has room -> it, and the error of writing there."""
    return os.open("/dev/full", os.O_WRONLY), errno.ENOSPC


GONE = pytest.mark.parametrize("lose", [closed_pipe, closed_terminal, full_disk])


@GONE
def test_a_stream_whose_console_is_gone_drops_lines_and_says_why(lose):
    descriptor, number = lose()
    with io.TextIOWrapper(io.FileIO(descriptor, "wb")) as kept:
        stream = ConsoleStream(kept)
        assert stream.lost == ""
        for line in range(3):
            print("a line", line, file=stream, flush=True)
        assert stream.lost == os.strerror(number)


def test_a_stream_whose_console_is_there_hands_all_on():
    reader, writer = os.pipe()
    with io.TextIOWrapper(io.FileIO(writer, "wb"), encoding="utf-8") as kept:
        stream = ConsoleStream(kept)
        print("größer", file=stream)
        assert os.read(reader, 100) == "größer\n".encode(), "a whole line leaves at once"
        assert stream.lost == ""
        assert stream.fileno() == writer
    os.close(reader)


@GONE
def test_a_worker_whose_console_is_gone_goes_on(lose, tmp_path):
    (tmp_path / "talker.py").write_text(TALKER)
    descriptor, number = lose()
    done = subprocess.run(
        [sys.executable, "-u", "-m", "launch.worker", str(os.getpid()), "talker"],
        input=b"go\n",
        stdout=descriptor,
        stderr=descriptor,
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT}:{tmp_path}",
            "HERE": str(tmp_path),
            "ITHACA_ERRORS": str(tmp_path / "errors"),
            "RANK": "0",
        },
    )
    os.close(descriptor)
    assert done.returncode == 0
    assert (tmp_path / "trained").read_text() == os.strerror(number)


WITHOUT_CONSOLE = """
from launch.console import outlive_console
import sys
outlive_console()
file = open(sys.argv[1], "w")
print("a line", flush=True)
print("an error", file=sys.stderr, flush=True)
sys.exit(1 if sys.stdout.isatty() else 0)
"""


def test_a_process_that_began_without_a_console_goes_on(tmp_path):
    """As `train >&- 2>&-`: Python then has no stream, and the next file could get its number."""
    file = tmp_path / "file"
    words = [sys.executable, "-c", WITHOUT_CONSOLE, str(file)]
    done = subprocess.run(["bash", "-c", f"{shlex.join(words)} >&- 2>&-"], cwd=ROOT)
    assert done.returncode == 0
    assert file.read_text() == ""


def test_a_full_console_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    text = "a line\n" * 30_000
    found: list[bytes] = []

    def read() -> None:
        while part := os.read(reader, 4096):
            found.append(part)

    reading = threading.Thread(target=read)
    with io.TextIOWrapper(io.FileIO(writer, "wb")) as kept:
        stream = ConsoleStream(kept)
        threading.Timer(0.1, reading.start).start()
        print(text, end="", file=stream, flush=True)
        assert stream.lost == ""
    reading.join(20)
    os.close(reader)
    assert b"".join(found).decode() == text
