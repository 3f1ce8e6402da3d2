"""tools/report.py: what it reads, what it says, that it draws, what it refuses."""

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from pretrain.load_config import dump_yaml, load_config
from tools import number_text, report, report_axes, report_charts, report_page, run_record
from tools.report_axes import LIGHT


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


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
    write_lines(folder / "validation.jsonl", evaluations)
    write_lines(folder / "metrics.jsonl", lines)


NAMES = ("base", "base-ramp", "extend-16", "extend-64", "long-mix", "quarter", "half", "million")


def write_long_run(folder, steps=400):
    """Eight phases from 8Ki to 1Mi, the later ones short, with every kind of record and a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, records, events, account, read = [], [], [], [], {"web": 0, "code": 0}
    tokens = 0
    write_event = lambda event, text="": events.append(  # noqa: E731
        {"time": 1.79e9 + 60 * len(events), "event": event, "step": len(lines), "tokens": tokens, "text": text})
    for index, name in enumerate(NAMES):
        length, batch = 2 ** (13 + index), 2**21 * (1 + index // 4)
        write_event("restart" if index else "start", f"phase {name}")
        records += _evaluations(lines, tokens, name, length, index)
        count = steps // (1, 3, 10, 12, 20, 24, 30, 40)[index]
        for number in range(count):
            tokens += batch
            progress = tokens / (steps * 3e6)
            wave = 0.03 * math.sin(len(lines) * 12.9898) * math.cos(len(lines) * 4.1)
            lines.append({"step": len(lines) + 1, "tokens": tokens, "real_tokens": tokens, "phase": name,
                          "seq_length": length, "loss": 2.2 + 7 * math.exp(-9 * progress) + wave,
                          "grad_norm": 0.4 + abs(wave) * 8 + (6 if len(lines) % 97 == 50 else 0),
                          "lr": 3e-4 * math.cos(progress), "num_targets": batch, "global_batch_tokens": batch,
                          "tokens_per_second": 2e6 / (1 + 0.2 * index) * (1 + wave), "mfu": 0.45 - 0.02 * index + wave,
                          "peak_memory_bytes": int((40 + 4 * index) * 2**30), "step_seconds": 2.0 + wave,
                          "data_seconds": 0.05 + abs(wave), "skipped": len(lines) in (20, 21)})
            if number in (count // 3, count // 2):
                write_event("save", f"iteration {len(lines)}")
            if number == count // 2 and index < 3:
                write_event("restart", "after a failure")
        records += _evaluations(lines, tokens, name, length, index)
        write_event("again" if index + 1 < len(NAMES) else "done")
        for source, share in (("web", 0.7), ("code", 0.3)):
            drawn = int(count * batch * share)
            read[source] += drawn
            account.append({"phase": name, "source": source, "skipped": False, "samples": drawn // length,
                            "tokens": drawn, "documents": drawn // 900, "epochs": read[source] / 3e8})
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "validation.jsonl", records)
    write_lines(folder / "events.jsonl", events)
    write_lines(folder / "ledger.jsonl", [{"step": len(lines), "tokens": tokens, "account": account}])
    write_checkpoint(folder, len(lines), tokens)


def _evaluations(lines, tokens, name, length, index):
    base = {"step": len(lines), "tokens": tokens, "phase": name}
    loss = lines[-1]["loss"] if lines else 9.2
    records = [base | {"kind": "loss", "set": found, "seq_length": 2**power, "num_targets": 1000,
                       "valid_loss": loss + 0.02 * abs(power - 13 - index) + (0.3 if found == "code" else 0)}
               for power in (13, 16, 20) for found in ("valid", "code")] if index else [
        base | {"set": "valid", "seq_length": length, "valid_loss": loss, "num_targets": 1000}]
    gain = 0.02 + 0.03 * index * (len(lines) % 2 + 1)
    records.append(base | {"kind": "context_gain", "set": "valid", "seq_length": length, "cut": 1024,
                           "loss_full": loss, "loss_cut": loss + gain, "gain": gain,
                           "gain_low": None if index == 0 else gain - 0.02,
                           "gain_high": None if index == 0 else gain + 0.03, "documents": 16, "num_targets": 900})
    return records + [base | {"kind": "passkey", "seq_length": 2**power, "depth": depth, "trials": 4,
                              "accuracy": min(1.0, max(0.0, 0.1 * index + 1.3 - (power - 12) / 6 - abs(depth - 0.9))),
                              "answer_loss": 0.2}
                      for power in (12, 14, 16, 18, 20) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)]


def write_checkpoint(folder, step, tokens):
    """What a report reads of a published checkpoint."""
    place = folder / f"iter_{step:07d}"
    place.mkdir()
    phases = folder / "phases.yaml"
    phases.write_text("phases:\n" + "".join(
        f"  - {{name: {name}, seq_length: {2 ** (13 + i)}, train_tokens: 16Mi, global_batch_tokens: 2Mi, "
        f"context_parallel_size: {2 ** i}, rotary_base: {1e4 * 2 ** i}}}\n" for i, name in enumerate(NAMES)))
    config = load_config(["--config", str(phases), "--model", "125m", "--vocab-size", "50304", "--mock-data"])
    phases.unlink()
    (place / "config.yaml").write_text(dump_yaml(config))
    (place / "manifest.json").write_text("{}")
    (place / "progress.json").write_text(json.dumps({"step": step, "clock": tokens, "world_size": 128, "data": {}}))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    return report.main()


class Reader(HTMLParser):
    """Tags, visible words and the table rows of a page; the words inside SVG are kept apart."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self.words, self.pictured = [], [], [], [], []
        self.open = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "br", "use", "path", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "svg" in self.open:
            self.pictured.append(data.strip())
        elif "style" not in self.open:
            self.words.append(data)
            if "td" in self.open or "th" in self.open:
                self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def row(self, *beginning):
        return next(row for row in self.rows if row[:len(beginning)] == list(beginning))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "checkpoints"
    write_long_run(folder)
    return run_record.read_run(folder)


@pytest.fixture(scope="module")
def long_page(long_run):
    return report_page.page(long_run)


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
    drawn = {line.get_label(): list(line.get_ydata()) for line in report_charts.draw_sheet(run).axes[0].lines}
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
    assert figure.axes[0].get_position().height * figure.get_size_inches()[1] > 1.8, "the labels left no room"


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
    (tmp_path / "validation.jsonl").write_text('{"step": 7, "kind": "passkey", "tokens": 1, "seq_length": 8}\n')
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
    late = run_record.Run("late", run.steps[10:])  # its clock began in another folder
    assert late.batches() == [1_000_000] * 30 and late.phases()[0].begin == 10_000_000
    run.steps[0]["global_batch_tokens"] = 250_000
    assert run.batches()[:2] == [250_000, 1_000_000] and run.phases()[0].begin == 750_000


def test_before_and_after_belong_to_the_phase():
    records = [{"tokens": at, "phase": phase, "gain": gain} for at, phase, gain in (
        (0, "a", 1), (10, "a", 2), (10, "b", 3), (15, "b", 4), (20, "b", 5), (20, "c", 6))]
    stretch = run_record.Stretch("b", 8, 10, 20)
    assert [record["gain"] for record in run_record.before_and_after(records, stretch)] == [3, 5]
    assert run_record.before_and_after([], stretch) == (None, None)


def test_repeated_tokens_are_those_of_later_epochs():
    def row(source, tokens, epochs, skipped=False):
        return {"source": source, "tokens": tokens, "epochs": epochs, "skipped": skipped}

    account = [row("web", 60, 0.6), row("books", 30, 3.0), row("web", 20, 0.8, True), row("web", 50, 1.3),
               row("none", 0, 0.0)]
    assert run_record.repeated_tokens(account) == {"web": (30, 110), "books": (20, 30), "none": (0, 0)}


def test_restarts_for_another_layout_are_told_apart():
    events = [{"event": name} for name in ("start", "again", "restart", "save", "restart", "stopped", "restart")]
    unplanned, planned = run_record.Run("run", [], events=events).restarts()
    assert (len(unplanned), len(planned)) == (2, 1)


@pytest.mark.parametrize("number, text", [(999_700, "1M"), (999_400, "999K"), (1500, "1.5K"), (-2e9, "-2B"), (7, "7")])
def test_short_numbers(number, text):
    assert number_text.short(number) == text


# ---------------------------------------------------------------- the page


def test_the_page_stands_alone_and_its_charts_lie_beside_it(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "report-passkey.png").write_bytes(b"of an earlier report")
    assert call(monkeypatch, "--load", tmp_path / "run") == 0
    written = tmp_path / "run" / "report.html"
    assert f"wrote {written}" in capsys.readouterr().out
    drawn = {"loss", "late-loss", "validation", "rate", "memory", "time", "learning-rate", "gradient", "batch"}
    assert {path.name for path in written.parent.glob("*.png")} == {f"report-{name}.png" for name in drawn}
    assert not [path for path in written.parent.iterdir() if path.name.startswith(".")]
    page = Reader(written.read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags) and page.open == []
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links and all(value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)|@import|@font-face", written.read_text(encoding="utf-8"))


def test_eight_phases_in_words_and_figures(long_run, long_page):
    page = Reader(long_page)
    assert len(long_page) < 3e6
    assert [row[0] for row in page.rows if row[0] in NAMES][:8] == list(NAMES)
    row = page.row("million", "1Mi")
    assert row[3:6] == ["4Mi", "tp 1, pp 1, cp 128", "base 1,280,000"] and row[7] == "68.00 GiB"
    assert re.fullmatch(r"valid: 2\.\d{4} → 2\.\d{4}code: 2\.\d{4} → 2\.\d{4}", row[8])
    assert re.fullmatch(r"(\+0\.\d{3} \[\+0\.\d{3}, \+0\.\d{3}\]( →)?){2}", row[9])
    text = page.text
    assert "A model of 124M parameters" in text and "over 8 phases" in text and "128 processes" in text
    assert "restarted 3 times, and 7 times for another layout" in text and "2 steps were skipped" in text
    again = sum(pair[0] for pair in run_record.repeated_tokens(long_run.account).values())
    assert f"{again:,} of the" in text and again > 0
    assert [row for row in page.rows if row[3:4] == ["done"]] == [page.rows[-1]], "the newest event is last"
    assert "details" in page.tags and ("open", None) not in page.attributes


def test_the_charts_of_eight_phases(long_run):
    def drawn(name):
        return report_charts.chart_figure(report_charts.CHARTS[name], long_run, LIGHT, 9, 4).axes[0]

    loss = {line.get_label(): line for line in drawn("loss").lines}
    assert len(loss["restart"].get_xdata()) == 3 and len(loss["restart for another layout"].get_xdata()) == 7
    assert {"training, running median", "validation", "validation: code", "checkpoint", "skipped step"} <= loss.keys()
    labels = drawn("validation").get_legend_handles_labels()[1]
    assert labels == ["valid, 8Ki", "valid, 64Ki", "valid, 1Mi", "code, 8Ki", "code, 64Ki", "code, 1Mi"]
    gain = drawn("gain")
    assert len([line for line in gain.get_legend_handles_labels()[1]]) == 8
    bars = [len(bar.get_segments()) for bar in gain.collections]
    assert bars == [2] * 7, "an interval at each evaluation but those of the first phase, which have none"
    cells = {text.get_text() for text in drawn("passkey-map").texts}
    assert len(drawn("passkey-map").texts) == 25 and "100 %" in cells and "0 %" in cells
    assert drawn("passkey").get_legend_handles_labels()[1] == ["4Ki", "16Ki", "64Ki", "256Ki", "1Mi"]
    # Both curves of the times lie within the axis.
    assert drawn("time").get_ylim()[1] > 2


def test_an_untrained_model_does_not_flatten_the_validation_chart(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)

    def drawn():
        return list(report_charts.chart_figure(report_charts.CHARTS["validation"], run, LIGHT, 5, 3).axes[0]
                    .lines[0].get_ydata())

    assert drawn() == [6.0, 5.0]
    run.evaluations[0]["valid_loss"] = 7.0
    assert drawn() == [7.0, 6.0, 5.0]


def test_the_label_of_a_set_with_an_underscore_is_shown(long_run):
    run = dataclasses.replace(long_run, evaluations=[record | {"set": "_" + record.get("set", "valid")}
                                                     for record in long_run.evaluations])
    axes = report_charts.chart_figure(report_charts.CHARTS["validation"], run, LIGHT, 9, 4).axes[0]
    assert " _code, 8Ki" in axes.get_legend_handles_labels()[1]


def test_a_short_phase_can_be_seen(long_run):
    scale = report_axes.TokenScale(long_run)
    phases = long_run.phases()
    assert scale.is_stretched and (phases[-1].end - phases[-1].begin) / phases[-1].end < 0.04
    widths = [scale.place(phase.end) - scale.place(phase.begin) for phase in phases]
    assert min(widths) > 0.04 and sum(widths) == pytest.approx(1)
    assert max(widths) == widths[0]


def test_a_minimal_run_says_what_is_missing(tmp_path):
    write_run(tmp_path)
    (tmp_path / "validation.jsonl").unlink()
    kept = ("step", "tokens", "phase", "seq_length", "loss", "lr", "tokens_per_second")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "metrics.jsonl", [{name: step[name] for name in kept} for step in steps])
    page = Reader(report_page.page(run_record.read_run(tmp_path)))
    for sentence in ("There is no validation.jsonl in the folder.", "There is no events.jsonl in the folder.",
                     "No checkpoint is published in the folder.", "No validation loss was recorded in this run.",
                     "Context gain was not evaluated in this run", "Passkey retrieval was not evaluated in this run",
                     "MFU is not known", "metrics.jsonl holds no peak_memory_bytes.", "metrics.jsonl holds no step_sec",
                     "metrics.jsonl holds no finite grad_norm.", "No account of the data was found",
                     "No event was recorded", "Restarts and saves are not marked"):
        assert sentence in page.text
    for heading in ("Loss", "Context gain", "Passkey retrieval", "How it ran", "Data drawn", "Events"):
        assert heading in page.words
    assert page.row("base", "8Ki")[3:] == ["1,000,000", "–", "–", "100K", "–", "–", "–"]


def test_a_damaged_checkpoint_is_told_and_not_fatal(tmp_path):
    write_run(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    run = run_record.read_run(tmp_path)
    assert run.config is None
    assert "The latest checkpoint could not be read whole" in Reader(report_page.page(run)).text


def test_names_cannot_become_part_of_the_page(tmp_path):
    write_run(tmp_path)
    hostile = "<script>alert('x')</script>\"&$x^{$"
    run = run_record.read_run(tmp_path)
    for record in (*run.steps[30:], *run.evaluations):
        record |= {"phase": hostile, "set": hostile}
    run.events.append({"time": 0, "event": hostile, "step": 1, "tokens": 2, "text": hostile})
    run.account.append({"phase": hostile, "source": hostile, "skipped": False, "samples": 1, "tokens": 2,
                        "documents": 3, "epochs": 1.0})
    run = dataclasses.replace(run, name=hostile, notes=[hostile])
    html = report_page.page(run)
    page = Reader(html)
    assert "script" not in page.tags and "<script" not in html
    assert page.words.count(hostile) >= 6, "the name itself must be readable"
    assert any(text.startswith("<script>alert") for text in page.pictured), "also in the charts"


def test_a_gain_without_an_interval_says_so(tmp_path):
    write_run(tmp_path)
    gains = [{"step": step, "tokens": tokens, "phase": "long", "set": "valid", "seq_length": 2**20, "cut": 1024,
              "kind": "context_gain", "loss_full": 5.0, "loss_cut": 5.0 + gain, "gain": gain, "gain_low": None,
              "gain_high": None, "documents": 1, "num_targets": 9}
             for step, tokens, gain in ((30, 30_000_000, 0.01), (40, 40_000_000, -0.25))]
    with open(tmp_path / "validation.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in gains)
    run = run_record.read_run(tmp_path)
    assert len(run.evaluations) == 3, "gains are no losses"
    page = Reader(report_page.page(run))
    assert page.row("long", "1Mi")[-1] == "+0.010 →-0.250" and "no interval: too few documents" in page.text
    assert page.row("long", "valid")[4:] == ["+0.010", "-0.250", "-0.260", "5.0000", "4.7500", "1"]
    axes = report_charts.chart_figure(report_charts.CHARTS["gain"], run, LIGHT, 5, 3).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.01, -0.25] and not axes.collections


def test_one_picture_serves_light_and_dark(long_run):
    figure = report_charts.chart_figure(report_charts.CHARTS["loss"], long_run, report_axes.VARIABLES, 9, 4)
    svg = report_axes.to_svg(figure, "loss", "a <b>")
    assert 'aria-label="a &#60;b&#62;"' in svg and "#0f0f" not in svg
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert {"ink", "muted", "grid", "band-0", "band-1", "series-0", "raw"} <= used <= report_axes.COLORS.keys()
    # Nothing but the variables has a color of its own, or it would be lost on one of the grounds.
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", svg)
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("loss-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(ids)


def test_many_steps_stay_small(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    steps = [run.steps[0] | {"step": i + 1, "tokens": (i + 1) * 1000, "loss": 3 + (i * 7919 % 1000) / 500}
             for i in range(20_000)]
    steps[12_345]["loss"] = 40.0
    axes = report_charts.chart_figure(report_charts.CHARTS["loss"], run_record.Run("run", steps), LIGHT, 9, 4).axes[0]
    raw, median = axes.lines[0], axes.lines[1]
    assert len(raw.get_xdata()) <= report_axes.POINTS and len(median.get_xdata()) <= report_axes.POINTS
    assert 40.0 in raw.get_ydata(), "a spike must survive the thinning"
    assert list(raw.get_xdata()) == sorted(raw.get_xdata())


def test_the_median_does_not_cross_phases(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    steps = [run.steps[0] | {"step": i + 1, "tokens": i + 1, "phase": "ab"[i >= 500]} for i in range(1000)]
    values = np.where(np.arange(1000) < 500, 1.0, 5.0)
    centers, medians = report_axes.running_median(run_record.Run("run", steps), values)
    assert set(medians) == {1.0, 5.0} and (medians == values[centers]).all()
