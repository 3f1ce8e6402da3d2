"""Which data a rewind passes over, and the note of it."""

import pytest

from pretrain.guards.rewinds import FILE, Rewind, plan_rewind, read_rewinds, write_rewinds


def planned(rewinds=(), passed=(), end=1000, skip_tokens=200, earliest=0) -> Rewind:
    return plan_rewind(
        rewinds,
        passed,
        step=7,
        end=end,
        skip_tokens=skip_tokens,
        earliest=earliest,
        reason="loss",
    )


def test_the_window_ends_with_the_spike_and_never_begins_before_its_phase():
    assert (planned().start, planned().end) == (800, 1000)
    assert planned(earliest=900).start == 900


def test_windows_begin_in_the_order_of_their_numbers():
    first = planned()
    second = planned([first], end=900)
    assert (second.number, second.start, second.end) == (2, 800, 900)
    # A spike before all that was passed over leaves nothing to pass over.
    assert planned([first], end=700).start == 700


def test_numbers_go_on_after_those_of_the_run_that_was_loaded():
    assert planned(passed=[1, 4]).number == 5


def test_the_note_is_read_as_it_was_written(tmp_path):
    assert read_rewinds(str(tmp_path)) == () == read_rewinds(None)
    rewinds = [planned(), planned([planned()])]
    write_rewinds(str(tmp_path), rewinds)
    assert read_rewinds(str(tmp_path)) == tuple(rewinds)


@pytest.mark.parametrize("text", ["", "[{}]", '[{"number": 1}]', "7"])
def test_a_note_that_is_not_ours_is_an_error(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match="rewinds.json: is not a list of rewinds"):
        read_rewinds(str(tmp_path))
