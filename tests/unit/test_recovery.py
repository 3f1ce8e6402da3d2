"""pretrain/processes/recovery.py: what a restart says of its time; and what a full disk is."""

import errno
import time

from pretrain.processes.outcome import is_full_disk
from pretrain.processes.recovery import Recovery


def test_a_first_launch_says_nothing():
    recovery = Recovery()
    recovery.mark("plan")
    assert recovery.describe(1) == ""


def test_the_parts_of_a_standstill_add_up_and_are_said_once(monkeypatch):
    recovery = Recovery(
        reason="failure",
        failed=100.0,
        noticed=102.0,
        ended=102.5,
        launched=103.0,
        met=104.0,
        opened=104.5,
        marks=[("imports", 108.0)],
    )
    monkeypatch.setattr(time, "time", lambda: 110.0)
    recovery.mark("state")
    monkeypatch.setattr(time, "time", lambda: 111.0)
    assert recovery.describe(121) == (
        "back at step 121 after 11.0 s: 2.0 s to notice, 0.5 s to end, 0.5 s to launch, "
        "5.0 s imports, 2.0 s state, 1.0 s first step"
    )
    assert recovery.describe(122) == ""


def test_a_full_disk_is_found_behind_what_it_led_to():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the checkpoint was not written") from error
    except RuntimeError as caught:
        assert is_full_disk(caught)
    assert not is_full_disk(OSError(errno.EIO, "Input/output error"))
