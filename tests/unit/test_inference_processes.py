"""The processes that a command starts: of several that end, the one that explains is told of."""

import signal
from types import SimpleNamespace

import pytest

from tools.inference.processes import _tell
from tools.shared.door import READER_GONE

SIGTERM = SimpleNamespace(
    exitcode=-signal.SIGTERM, message="Signal 15 received", timestamp=9, local_rank=1
)


def failure(exitcode: int, text: str, timestamp: int = 5) -> SimpleNamespace:
    message = {"message": text, "extraInfo": {"py_callstack": "Traceback\n"}}
    return SimpleNamespace(exitcode=exitcode, message=message, timestamp=timestamp, local_rank=0)


def test_an_error_is_told_and_not_the_end_of_those_that_waited(capsys):
    """The launcher ends them with SIGTERM."""
    first = failure(2, "OutOfMemoryError: no room")
    lost_peer = failure(2, "RuntimeError: connection closed", timestamp=6)
    assert _tell([SIGTERM, lost_peer, first]) == 1
    assert capsys.readouterr().err == "Traceback\nerror: rank 0: OutOfMemoryError: no room\n"


def test_a_killed_process_is_told_before_those_that_lost_it(capsys):
    killed = SimpleNamespace(
        exitcode=-signal.SIGKILL, message="Signal 9 received", timestamp=9, local_rank=3
    )
    code = _tell([failure(2, "RuntimeError: connection closed"), SIGTERM, killed])
    assert code == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "error: rank 3: Signal 9 received\n"


def test_input_that_one_refused_is_the_error():
    with pytest.raises(ValueError, match="^top_k = -1: must be$"):
        _tell([SIGTERM, failure(2, "ValueError: top_k = -1: must be")])


def test_a_reader_that_has_gone_is_no_error(capsys):
    assert _tell([SIGTERM, failure(READER_GONE, "")]) == READER_GONE
    assert capsys.readouterr().err == ""
