"""tools/watch.py: what it says of a run's folder in every state, and how it ends."""

import io
import json
import os
import socket
import subprocess
import sys

import pytest

from tests.run_folders import write_facts, write_lines, write_run
from tools import watch
from tools.watching.run_files import read_files, read_tail
from tools.watching.screen import ASCII, UNICODE, bar, clock, screen, signs_for, sparkline

BEGUN = 1.79e9
"""Seconds since 1970 at which the runs of these tests start."""


def event(kind, seconds, step=0, text=""):
    return {"time": BEGUN + seconds, "event": kind, "step": step, "tokens": 0, "text": text}


def read_steps(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A run of 40 steps of 10 s that goes on: its last step came 400 s after its start."""
    write_run(tmp_path)
    write_facts(tmp_path, read_steps(tmp_path))
    write_lines(tmp_path / "events.jsonl", [event("start", 0, text="fresh weights")])
    set_times(tmp_path, metrics=400, validation=300)
    return tmp_path


def set_times(folder, **seconds):
    for name, passed in seconds.items():
        os.utime(folder / f"{name}.jsonl", (BEGUN + passed, BEGUN + passed))


def seen(folder, seconds=405, columns=200):
    return screen(read_files(folder), BEGUN + seconds, columns, ASCII)


def row(text, label):
    """The text beside a label, with the lines below that have none."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{label:<12}"))
    return lines[at][12:]


def test_a_run_that_goes_on_is_one_screen(folder):
    # The last phase is twice as long as what is trained of it: 10M of 20M tokens, at 100K a second.
    write_facts(folder, read_steps(folder))
    facts = json.loads((folder / "run.json").read_text())
    facts["phases"][-1]["end"] = 50_000_000
    (folder / "run.json").write_text(json.dumps(facts))
    text = seen(folder)
    assert row(text, "state") == "training: last step 5.0 s ago (a step takes 10 s)"
    assert row(text, "step") == "40, 40M of 50M tokens"
    assert row(text, "phase").startswith(
        "long (2 of 2), context 1Mi  ############------------ 50.0 %"
    )
    assert row(text, "phase").endswith("1 min 40 s left at this pace")
    assert "80.0 %, 1 min 40 s left" in row(text, "run")
    assert row(text, "loss").startswith("5.1000  @")
    assert row(text, "speed") == "100K tokens/s, 1.0 % of the time waiting for data"
    assert row(text, "validation") == "5.0000 of valid at step 40"
    assert row(text, "checkpoint") == "none yet"
    assert "128 process(es) on 16 machine(s), rank 0 on node-0" in row(text, "devices")
    assert row(text, "events").endswith("start     step 0: fresh weights")


def test_waits_and_the_losses_of_sources_are_the_median_of_the_last_steps(folder):
    steps = read_steps(folder)
    assert "sources" not in seen(folder)
    for number, step in enumerate(steps[-3:]):
        step["communication_share"] = (0.2, 0.4, 0.9)[number]
        step["source_losses"] = {"web": (2.0, 3.0, 9.0)[number], "code": (None, 1.5, None)[number]}
    write_lines(folder / "metrics.jsonl", steps)
    set_times(folder, metrics=400)
    text = seen(folder)
    assert row(text, "speed").endswith("waiting for data, 40.0 % for other ranks")
    assert row(text, "sources") == "web 3.0000, code 1.5000"


def test_the_times_left_need_no_run_json_to_be_left_out(folder):
    (folder / "run.json").unlink()
    text = seen(folder)
    assert row(text, "step") == "40, 40M tokens"
    assert row(text, "phase") == "long, context 1Mi"
    assert "left at this pace" not in text


@pytest.mark.parametrize(
    "events, seconds, state",
    [
        ([event("done", 401, 40, "done: 40 steps")], 461, "done, 1 min ago: 40 steps"),
        ([event("stopped", 401, 40, "as asked")], 411, "stopped in order, 10 s ago: as asked"),
        ([event("refused", 401, 40, "NaN")], 411, "refused, 10 s ago: NaN"),
        ([event("again", 401, 40)], 411, "starting again, 10 s ago"),
        ([event("again", 401), event("restart", 402)], 432, "started 30 s ago, no step yet"),
        ([], 449, "training: last step 49 s ago (a step takes 10 s)"),
        ([], 501, "no step for 1 min 41 s (a step takes 10 s): it evaluates, saves"),
    ],
)
def test_the_state_is_told_from_events_and_ages(folder, events, seconds, state):
    with open(folder / "events.jsonl", "a") as file:
        file.writelines(json.dumps(each) + "\n" for each in events)
    assert row(seen(folder, seconds), "state").startswith(state)


def test_an_evaluation_and_a_failure_explain_why_no_step_comes(folder):
    set_times(folder, validation=490)
    assert row(seen(folder, 510), "state").endswith("(a step takes 10 s), evaluates")
    set_times(folder, validation=300)
    (folder / "errors" / "launch1").mkdir(parents=True)
    assert row(seen(folder, 510), "state").endswith("failed meanwhile: errors/launch1")


def test_a_process_of_this_machine_that_is_gone_is_told(folder):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / ".lock").write_text(f"process {ended.pid} on {socket.gethostname()}")
    assert row(seen(folder), "state").startswith(f"process {ended.pid} on ")
    assert "has ended without a word" in row(seen(folder), "state")
    # Of another machine's process nothing is known from here.
    (folder / ".lock").write_text(f"process {ended.pid} on another-host")
    assert row(seen(folder), "state").startswith("training")


def test_what_is_missing_half_written_or_foreign_is_left_out(tmp_path):
    assert "the folder does not exist" in seen(tmp_path / "later")
    assert "no run has started in this folder" in seen(tmp_path)
    (tmp_path / "events.jsonl").write_text(json.dumps(event("start", 0)) + '\n{"time": 17')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tok')
    (tmp_path / "run.json").write_text("{")
    assert row(seen(tmp_path, 60), "state") == "started 1 min ago, no step yet"
    (tmp_path / "metrics.jsonl").write_text(
        '[1]\n{"step": 1}\n{"step": 2, "tokens": 9, "phase": "a"}'
    )
    assert row(seen(tmp_path), "step") == "2, 9 tokens"


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": number} for number in range(10_000)])
    # A line has 14 bytes and its end: of 100 bytes six are whole.
    assert [line["step"] for line in read_tail(path, most_bytes=100)] == list(range(9994, 10_000))
    assert read_tail(path, most_bytes=10**6)[0] == {"step": 0}


def test_lines_are_cut_to_the_terminal_and_carry_no_control_characters(folder):
    write_lines(folder / "events.jsonl", [event("start", 0, text="a\x1b[2Jb\nc" + "d" * 300)])
    text = seen(folder, columns=80)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) == 80
    assert "a [2Jb c" in text


@pytest.mark.parametrize(
    "seconds, text",
    [(-3, "0.0 s"), (2.34, "2.3 s"), (59, "59 s"), (3600, "1 h"), (93784, "1 d 2 h")],
)
def test_times_have_their_two_largest_units(seconds, text):
    assert clock(seconds) == text


def test_curves_and_bars_have_one_character_a_value():
    assert sparkline([0.0, 1.0, 7.0, 3.0], 8, ASCII) == "_.@="
    assert sparkline([9.0, 0.0, 7.0], 2, ASCII) == "_@"
    assert sparkline([float("nan"), 1.0], 8, ASCII) == " _"
    assert sparkline([], 8, ASCII) == ""
    assert bar(0.25, 8, ASCII) == "##------"
    assert signs_for("ascii") is ASCII
    assert signs_for("utf-8") is UNICODE


# ---------------------------------------------------------------- the command


def test_once_prints_the_screen_and_ends(folder, capsys):
    assert watch.main([str(folder), "--once"]) == 0
    assert row(capsys.readouterr().out, "step").startswith("40, ")


def test_a_log_gets_a_line_where_there_is_something_new_until_the_run_is_done(folder):
    out = io.StringIO()
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            with open(folder / "events.jsonl", "a") as file:
                file.write(json.dumps(event("done", 401, 40, "done: 40 steps")) + "\n")

    watch.watch(watch.Arguments(folder=folder, interval=2), out, sleep)
    lines = out.getvalue().splitlines()
    assert looks == [2, 2]
    assert len(lines) == 2, lines
    assert " | step 40 | long (2 of 2), context 1Mi | tokens 40M | loss 5.1000 | " in lines[0]
    assert lines[1].endswith(": 40 steps")


def test_a_log_says_at_once_that_it_waits_for_a_folder_that_is_not_there(tmp_path):
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    def interrupt(_):
        raise KeyboardInterrupt

    out = Pipe()
    watch.watch(watch.Arguments(folder=tmp_path / "misspelled"), out, interrupt)
    said = f"the folder does not exist ({tmp_path / 'misspelled'}); waiting for it"
    assert said in out.flushed, out.getvalue()


def test_a_terminal_gets_the_screen_in_place_and_ctrl_c_ends_it(folder):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def interrupt(_):
        raise KeyboardInterrupt

    out = Terminal()
    watch.watch(watch.Arguments(folder=folder), out, interrupt)
    assert out.getvalue().count(watch.CLEAR) == 1
    assert row(out.getvalue().removeprefix(watch.CLEAR), "step").startswith("40, ")


@pytest.mark.parametrize(
    "words, message",
    [
        (["{folder}/none", "--once"], "no such folder. Fix: "),
        (["{folder}/metrics.jsonl"], "is not a folder. Fix: "),
        (["{folder}", "--interval", "0"], "interval = 0.0: must be above 0. Fix: "),
        ([], "Missing from bash launch/ithaca.sh watch"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, words, message):
    assert watch.main([word.format(folder=folder) for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_it_starts_without_torch():
    code = "import sys, tools.watch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
