"""tools/report.py: what it reads, what it says, that it draws, what it refuses."""

import json
import sys

from matplotlib.image import imread

from tools import report


def write_run(folder):
    """Two phases of 30 and 10 steps, evaluated before, between and after."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, evaluations, tokens = [], [{"step": 0, "tokens": 0, "phase": "base", "valid_loss": 9.0}], 0
    for name, length, steps in (("base", 8192, 30), ("long", 2**20, 10)):
        for _ in range(steps):
            tokens += 1_000_000
            lines.append({"step": len(lines) + 1, "tokens": tokens, "real_tokens": tokens, "phase": name,
                          "seq_length": length, "loss": 9 - 0.1 * len(lines), "grad_norm": 1.0, "lr": 3e-4,
                          "num_targets": 10, "tokens_per_second": 1e5, "mfu": None, "peak_memory_bytes": 1,
                          "step_seconds": 10.0, "data_seconds": 0.1, "skipped": len(lines) == 20})
        evaluations.append({"step": len(lines), "tokens": tokens, "phase": name, "valid_loss": 9 - 0.1 * len(lines)})
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return report.main()


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
    run = report.read_run(tmp_path)
    assert run.phases() == [("base", 8192, 0, 30_000_000), ("long", 2**20, 30_000_000, 40_000_000)]
    loss, rate, learning = report.draw(run, "title").axes
    assert [text.get_text() for text in loss.texts] == ["base, 8Ki", "long, 1Mi"]
    drawn = {line.get_label(): line for line in loss.lines}
    assert list(drawn["training"].get_ydata()) == [step["loss"] for step in run.steps]
    assert list(drawn["validation"].get_ydata()) == [9.0, 6.0, 5.0]
    assert list(drawn["skipped step"].get_xdata()) == [21_000_000]
    assert list(learning.lines[0].get_ydata()) == [3e-4] * 40


def test_each_validation_set_has_its_own_marks(tmp_path):
    write_run(tmp_path)
    run = report.read_run(tmp_path)
    for evaluation in run.evaluations[1:]:
        evaluation["set"] = "code"
    drawn = {line.get_label(): list(line.get_ydata()) for line in report.draw(run, "title").axes[0].lines}
    assert drawn["validation"] == [9.0] and drawn["validation: code"] == [6.0, 5.0]
    assert "validation loss of code 6.0000" in report.summary(run)


def test_labels_of_short_phases_do_not_overlap(tmp_path):
    write_run(tmp_path)
    run = report.read_run(tmp_path)
    for i, step in enumerate(run.steps):
        step["phase"] = f"number-{min(i // 2, 6)}"
    figure = report.draw(run, "title")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 8  # the length changes within the last
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_line_still_being_written_is_left_out(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "tok')
    assert len(report.read_run(tmp_path).steps) == 40


def test_a_loss_that_is_not_finite_is_drawn_around(tmp_path):
    write_run(tmp_path)
    run = report.read_run(tmp_path)
    run.steps[3]["loss"] = float("nan")
    run.steps[4]["loss"] = float("inf")
    figure = report.draw(run, "title")
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < high < 12, "the axis must follow the finite losses"


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
    assert ".png" in refused("--output", "loss.pdf")


def test_only_losses_are_drawn_as_losses(tmp_path):
    write_run(tmp_path)
    before = report.read_run(tmp_path).evaluations
    with open(tmp_path / "validation.jsonl", "a") as file:
        for kind in ("context_gain", "passkey"):
            file.write(json.dumps({"step": 40, "tokens": 40_000_000, "phase": "long", "kind": kind}) + "\n")
    assert report.read_run(tmp_path).evaluations == before and len(before) == 3
