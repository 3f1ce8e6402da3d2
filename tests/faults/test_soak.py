"""Runs that are killed in everything that they do: the short form of tests/faults/soak.sh."""

import pytest

from tests.faults.soak import main


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.long)])
def test_no_kill_shows_in_a_run(tmp_path, capfd, kills):
    code = main(["--kills", str(kills), "--folder", str(tmp_path / "soak")])
    said = capfd.readouterr().out
    assert code == 0, said
    assert f"{kills} kills" in said
