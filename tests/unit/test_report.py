"""tools/report.py: what it reads, what it says, that it draws, what it refuses."""

import json
import sys

import pytest
from matplotlib.image import imread

from tests.run_folders import write_run
from tools import report
from tools.reporting import charts as report_charts
from tools.reporting import page as report_page
from tools.reporting import run_record
from tools.reporting.axes import LIGHT
from tools.shared import number_text


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return report.main()


# ---------------------------------------------------------------- one picture


def test_draws_and_sums_up(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    output = tmp_path / "plots" / "loss.png"
    assert call(monkeypatch, "--load", tmp_path / "run", "--output", output) == 0
    picture = imread(output)
    assert min(picture.shape[:2]) > 800 and picture[..., :3].std() > 0.02  # not an empty sheet
    assert [path.name for path in output.parent.iterdir()] == ["loss.png"]
    said = capsys.readouterr().out
    assert "40 steps, 40M tokens, training loss 9.0000 -> 5.1000" in said
    assert "validation loss 9.0000 (step 0) -> 5.0000 (step 40)" in said
    assert "phase long: length 1,048,576, 10M tokens" in said


def test_the_picture_shows_what_the_run_did(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    assert run.phases() == [("base", 8192, 0, 30_000_000), ("long", 2**20, 30_000_000, 40_000_000)]
    loss, rate, learning = report_charts.draw_sheet(run).axes
    assert [text.get_text() for text in loss.texts] == ["base, 8Ki", "long, 1Mi"]
    drawn = {line.get_label(): line for line in loss.lines}
    assert list(drawn["training"].get_ydata()) == [step["loss"] for step in run.steps]
    assert list(drawn["validation"].get_ydata()) == [9.0, 6.0, 5.0]
    assert list(drawn["skipped step"].get_xdata()) == [21_000_000]
    assert list(learning.lines[0].get_ydata()) == [3e-4] * 40


def test_each_validation_set_has_its_own_marks(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    for evaluation in run.evaluations[1:]:
        evaluation["set"] = "code"
    drawn = {
        line.get_label(): list(line.get_ydata())
        for line in report_charts.draw_sheet(run).axes[0].lines
    }
    assert drawn["validation"] == [9.0] and drawn["validation: code"] == [6.0, 5.0]
    assert "validation loss of code 6.0000" in run_record.summary(run)


def test_the_summary_compares_equal_lengths(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    for evaluation, length in zip(run.evaluations, (8192, 8192, 2**20), strict=True):
        evaluation["seq_length"] = length
    said = run_record.summary(run)
    assert "validation loss at 8Ki 9.0000 (step 0) -> 6.0000 (step 30)" in said
    assert "validation loss at 1Mi 5.0000 (step 40) -> 5.0000 (step 40)" in said


@pytest.mark.parametrize("width", [4.7, 9.4, 11.0])
def test_labels_of_short_phases_do_not_overlap(tmp_path, width):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    for i, step in enumerate(run.steps):
        step["phase"] = f"number-{min(i // 2, 6)}"
    figure = report_charts.chart_figure(report_charts.CHARTS["loss"], run, LIGHT, width, 4)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 8  # the length changes within the last
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert figure.axes[0].get_position().height * figure.get_size_inches()[1] > 1.8, (
        "the labels left no room"
    )


def test_a_loss_that_is_not_finite_is_drawn_around(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    run.steps[3]["loss"] = float("nan")
    run.steps[4]["loss"] = float("inf")
    figure = report_charts.draw_sheet(run)
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < high < 12, "the axis must follow the finite losses"
    assert "<svg" in report_page.page(run)


def test_user_errors_take_one_line(tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        assert call(monkeypatch, "--load", tmp_path, *arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    assert "no metrics.jsonl" in refused()
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no step yet" in refused()
    (tmp_path / "metrics.jsonl").write_text("nonsense\n{}\n")
    assert "line 1 is not JSON" in refused()
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert "step 3 has no tokens" in refused()
    write_run(tmp_path)
    (tmp_path / "validation.jsonl").write_text(
        '{"step": 7, "kind": "passkey", "tokens": 1, "seq_length": 8}\n'
    )
    assert "step 7 has no depth, accuracy" in refused()
    assert "name in .html or .png" in refused("--output", "loss.pdf")
    assert not list(tmp_path.glob("*.html")) and not list(tmp_path.glob("*.png"))


# ---------------------------------------------------------------- reading


def test_a_line_still_being_written_is_left_out(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "tok')
    assert len(run_record.read_run(tmp_path).steps) == 40


def test_batches_come_from_the_record_or_from_the_clock(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    assert run.batches() == [1_000_000] * 40
    late = run_record.RunRecord("late", run.steps[10:])  # its clock began in another folder
    assert late.batches() == [1_000_000] * 30 and late.phases()[0].begin == 10_000_000
    run.steps[0]["global_batch_tokens"] = 250_000
    assert run.batches()[:2] == [250_000, 1_000_000] and run.phases()[0].begin == 750_000


def test_before_and_after_belong_to_the_phase():
    records = [
        {"tokens": at, "phase": phase, "gain": gain}
        for at, phase, gain in (
            (0, "a", 1),
            (10, "a", 2),
            (10, "b", 3),
            (15, "b", 4),
            (20, "b", 5),
            (20, "c", 6),
        )
    ]
    span = run_record.PhaseSpan("b", 8, 10, 20)
    assert [record["gain"] for record in run_record.before_and_after(records, span)] == [3, 5]
    assert run_record.before_and_after([], span) == (None, None)


def test_repeated_tokens_are_those_of_later_epochs():
    def row(source, tokens, epochs, skipped=False):
        return {"source": source, "tokens": tokens, "epochs": epochs, "skipped": skipped}

    account = [
        row("web", 60, 0.6),
        row("books", 30, 3.0),
        row("web", 20, 0.8, True),
        row("web", 50, 1.3),
        row("none", 0, 0.0),
    ]
    assert run_record.repeated_tokens(account) == {
        "web": (30, 110),
        "books": (20, 30),
        "none": (0, 0),
    }


def test_restarts_for_another_layout_are_told_apart():
    events = [
        {"event": name}
        for name in ("start", "again", "restart", "save", "restart", "stopped", "restart")
    ]
    unplanned, planned = run_record.RunRecord("run", [], events=events).restarts()
    assert (len(unplanned), len(planned)) == (2, 1)


@pytest.mark.parametrize(
    "number, text", [(999_700, "1M"), (999_400, "999K"), (1500, "1.5K"), (-2e9, "-2B"), (7, "7")]
)
def test_short_numbers(number, text):
    assert number_text.short(number) == text


# ---------------------------------------------------------------- while the run goes on


def test_follow_refreshes_the_page_until_the_run_ends(tmp_path):
    """Before the first step there is nothing to show; the last page reads itself no more."""
    folder = tmp_path / "run"
    folder.mkdir()
    page = folder / "report.html"
    seen = []

    def sleep(seconds):
        seen.append((seconds, page.exists() and 'http-equiv="refresh"' in page.read_text()))
        if len(seen) == 1:
            write_run(folder)
        if len(seen) == 2:
            ending = {"time": 1.79e9, "event": "done", "step": 40, "tokens": 40_000_000}
            (folder / "events.jsonl").write_text(json.dumps(ending) + "\n")

    report.write_report(report.Arguments(load=str(folder), follow=True, interval=7), sleep)
    assert seen == [(7, False), (7, True)]
    assert 'http-equiv="refresh"' not in page.read_text()
    assert "The run is done since " in page.read_text()
    assert (folder / "report-loss.png").exists()


def test_ctrl_c_ends_following_with_a_page_that_stays(tmp_path, capsys):
    write_run(tmp_path)

    def sleep(_):
        raise KeyboardInterrupt

    report.write_report(report.Arguments(load=str(tmp_path), follow=True), sleep)
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
    assert "wrote " in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--follow", "--output", "{folder}/a.png"], "refreshes a page, not "),
        (["--follow", "--interval", "0"], "interval = 0: must be at least 1"),
    ],
)
def test_follow_refuses_what_it_cannot_do(tmp_path, monkeypatch, capsys, words, message):
    write_run(tmp_path)
    words = [word.format(folder=tmp_path) for word in words]
    assert call(monkeypatch, "--load", tmp_path, *words) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- what stands at the output


def test_only_an_earlier_report_is_written_over(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    for output in (tmp_path / "page.html", tmp_path / "sheet.png"):
        for _ in range(2):
            assert call(monkeypatch, "--load", tmp_path / "run", "--output", output) == 0
        output.write_text("mine")
        assert call(monkeypatch, "--load", tmp_path / "run", "--output", output) == 2
        assert "exists, and was not made by tools.report. Fix: " in capsys.readouterr().err
        assert output.read_text() == "mine"


@pytest.mark.parametrize("name", ["page-loss.png", "page-passkey.png"])
def test_a_foreign_picture_under_a_charts_name_stays(tmp_path, monkeypatch, capsys, name):
    """The first would be written over; the second removed, as that chart has nothing to show."""
    write_run(tmp_path / "run")
    (tmp_path / name).write_text("mine")
    output = tmp_path / "page.html"
    assert call(monkeypatch, "--load", tmp_path / "run", "--output", output) == 2
    assert f"{name}: exists, and was not made by tools.report" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert not output.exists()


@pytest.mark.parametrize(
    "name, message",
    [
        ("link.html", "is a link"),
        ("broken.html", "is a link"),
        ("folder.html", "is not a file"),
        ("file/page.html", "is not a folder"),
        ("folder.png", "is not a file"),
    ],
)
def test_outputs_that_cannot_be_files_are_one_line(tmp_path, monkeypatch, capsys, name, message):
    write_run(tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link.html").symlink_to("file")
    (tmp_path / "broken.html").symlink_to("nowhere")
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, "--load", tmp_path / "run", "--output", tmp_path / name) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"
