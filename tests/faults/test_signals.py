"""A run that is stopped at random moments: the short form of tests/faults/signals.sh."""

import pytest

from tests.faults.signals import main


@pytest.mark.long  # test_nodes.py stops nodes in every run
def test_a_run_that_is_stopped_again_and_again_loses_nothing(tmp_path, capfd):
    code = main(["--stops", "18", "--folder", str(tmp_path / "signals")])
    said = capfd.readouterr().out
    assert code == 0, said
