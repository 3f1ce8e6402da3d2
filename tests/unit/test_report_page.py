"""The page of tools/report.py: what stands in its words, tables and charts, and what it is made
of."""

import dataclasses
import json
import os
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from tests.run_folders import NAMES, write_lines, write_long_run, write_run
from tools import report
from tools.reporting import axes as report_axes
from tools.reporting import charts as report_charts
from tools.reporting import page as report_page
from tools.reporting import run_record
from tools.reporting.axes import LIGHT


class Reader(HTMLParser):
    """Tags, visible words and the table rows of a page; the words inside SVG are kept apart."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.rows = []
        self.words = []
        self.pictured = []
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
        return next(row for row in self.rows if row[: len(beginning)] == list(beginning))


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "checkpoints"
    write_long_run(folder)
    return run_record.read_run(folder)


@pytest.fixture(scope="module")
def long_page(long_run):
    return report_page.page(long_run)


def test_the_page_stands_alone_and_its_charts_lie_beside_it(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run")
    earlier = tmp_path / "run" / "report-passkey.png"
    earlier.write_bytes(b"\x89PNG tEXtSoftware\0Ithaca")
    monkeypatch.setattr(sys, "argv", ["report", "--load", str(tmp_path / "run")])
    assert report.main() == 0
    written = tmp_path / "run" / "report.html"
    assert f"wrote {written}" in capsys.readouterr().out
    drawn = {
        "loss",
        "late-loss",
        "validation",
        "rate",
        "memory",
        "time",
        "learning-rate",
        "gradient",
        "batch",
    }
    assert {path.name for path in written.parent.glob("*.png")} == {
        f"report-{name}.png" for name in drawn
    }
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
    assert (
        row[3:6] == ["4Mi", "tp 2, pp 1, cp 64 (auto)", "base 1,280,000"] and row[7] == "68.00 GiB"
    )
    assert re.fullmatch(r"valid: 2\.\d{4} → 2\.\d{4}code: 2\.\d{4} → 2\.\d{4}", row[8])
    assert re.fullmatch(r"(\+0\.\d{3} \[\+0\.\d{3}, \+0\.\d{3}\]( →)?){2}", row[9])
    text = page.text
    assert (
        "A model of 124M parameters" in text and "over 8 phases" in text and "128 processes" in text
    )
    assert (
        "started again 3 times, and 7 times for another layout" in text
        and "2 steps were skipped" in text
    )
    again = sum(pair[0] for pair in run_record.repeated_tokens(long_run.account).values())
    assert f"{again:,} of the" in text and again > 0
    assert [row for row in page.rows if row[3:4] == ["done"]] == [page.rows[-1]], (
        "the newest event is last"
    )
    assert "details" in page.tags and ("open", None) not in page.attributes


def test_the_charts_of_eight_phases(long_run):
    def drawn(name):
        return report_charts.chart_figure(report_charts.CHARTS[name], long_run, LIGHT, 9, 4).axes[0]

    loss = {line.get_label(): line for line in drawn("loss").lines}
    assert (
        len(loss["restart"].get_xdata()) == 3
        and len(loss["restart for another layout"].get_xdata()) == 7
    )
    assert {
        "training, running median",
        "validation",
        "validation: code",
        "checkpoint",
        "skipped step",
    } <= loss.keys()
    labels = drawn("validation").get_legend_handles_labels()[1]
    assert labels == [
        "valid, 8Ki",
        "valid, 64Ki",
        "valid, 1Mi",
        "code, 8Ki",
        "code, 64Ki",
        "code, 1Mi",
    ]
    gain = drawn("gain")
    assert len([line for line in gain.get_legend_handles_labels()[1]]) == 8
    bars = [len(bar.get_segments()) for bar in gain.collections]
    assert bars == [2] * 7, (
        "an interval at each evaluation but those of the first phase, which have none"
    )
    cells = {text.get_text() for text in drawn("passkey-map").texts}
    assert len(drawn("passkey-map").texts) == 25 and "100 %" in cells and "0 %" in cells
    assert drawn("passkey").get_legend_handles_labels()[1] == [
        "4Ki",
        "16Ki",
        "64Ki",
        "256Ki",
        "1Mi",
    ]
    # Both curves of the times lie within the axis.
    assert drawn("time").get_ylim()[1] > 2


def test_an_untrained_model_does_not_flatten_the_validation_chart(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)

    def drawn():
        return list(
            report_charts.chart_figure(report_charts.CHARTS["validation"], run, LIGHT, 5, 3)
            .axes[0]
            .lines[0]
            .get_ydata()
        )

    assert drawn() == [6.0, 5.0]
    run.evaluations[0]["valid_loss"] = 7.0
    assert drawn() == [7.0, 6.0, 5.0]


def test_the_label_of_a_set_with_an_underscore_is_shown(long_run):
    run = dataclasses.replace(
        long_run,
        evaluations=[
            record | {"set": "_" + record.get("set", "valid")} for record in long_run.evaluations
        ],
    )
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
    for sentence in (
        "There is no validation.jsonl in the folder.",
        "There is no events.jsonl in the folder.",
        "No checkpoint is published in the folder.",
        "No validation loss was recorded in this run.",
        "Context gain was not evaluated in this run",
        "Passkey retrieval was not evaluated in this run",
        "MFU is not known",
        "metrics.jsonl holds no peak_memory_bytes.",
        "metrics.jsonl holds no step_sec",
        "metrics.jsonl holds no finite grad_norm.",
        "No account of the data was found",
        "No event was recorded",
        "Restarts and saves are not marked",
    ):
        assert sentence in page.text
    for heading in (
        "Loss",
        "Context gain",
        "Passkey retrieval",
        "How it ran",
        "Data drawn",
        "Events",
    ):
        assert heading in page.words
    assert page.row("base", "8Ki")[3:] == ["1,000,000", "–", "–", "100K", "–", "–", "–"]


def test_what_the_run_is_and_runs_on_is_told(long_page):
    text = Reader(long_page).text
    for fact in (
        "learning rate up to 0.0003, cosine down to 0",
        "optimizer AdamW, betas 0.9 and 0.95, weight decay 0.1, gradients clipped at 1; "
        "computes in fp32; seed 1234",
        "batch 2Mi tokens (256 × 8Ki), then … , then 4Mi tokens (4 × 1Mi)".replace("… , ", "…, "),
        "data synthetic documents (mock data); attention within documents; windows of the stream",
        "devices NVIDIA H100 80GB HBM3; 128 processes on 16 machines, tp 2 x pp 1 x cp 64 x dp 1",
        "host of rank 0 node-0",
        "code 0123456789ab, commit fedcba9876+; PyTorch 2.13.0",
        "2026-09-21 14:13:20 to ",
    ):
        assert fact in text, fact


def test_the_wall_time_is_from_the_first_start_to_the_last_line(tmp_path):
    write_run(tmp_path)
    write_lines(tmp_path / "events.jsonl", [event("start", 0), event("save", 500)])
    os.utime(tmp_path / "metrics.jsonl", (1.79e9 + 800, 1.79e9 + 800))
    text = Reader(report_page.page(run_record.read_run(tmp_path))).text
    # 40 steps of 10 s.
    assert "wall time 13.3 minutes, 2026-09-21 14:13:20 to 2026-09-21 14:26:40 UTC" in text
    assert "; steps that count took 50 % of it" in text


def test_the_time_of_day_goes_on_to_the_last_step_unless_the_run_has_ended(tmp_path):
    write_run(tmp_path)
    os.utime(tmp_path / "metrics.jsonl", (1.79e9 + 800, 1.79e9 + 800))
    chart = report_charts.CHARTS["progress"]
    for last, minutes, tokens in (("save", 800 / 60, 40_000_000), ("done", 500 / 60, 1)):
        write_lines(tmp_path / "events.jsonl", [event("start", 0), event(last, 500)])
        run = run_record.read_run(tmp_path)
        line = report_charts.chart_figure(chart, run, LIGHT, 5, 3).axes[0].lines[0]
        assert line.get_xdata()[-1] == pytest.approx(minutes)
        assert line.get_ydata()[-1] == tokens


def event(kind, seconds, text=""):
    return {"time": 1.79e9 + seconds, "event": kind, "step": 1, "tokens": 1, "text": text}


@pytest.mark.parametrize(
    "last, state",
    [
        ("save", "No event says that the run has ended."),
        ("done", "The run is done since 2026-09-21 14:13:29 UTC: why."),
        ("stopped", "The run was stopped since 2026-09-21 14:13:29 UTC: why."),
    ],
)
def test_the_page_says_when_it_was_made_and_whether_the_run_goes_on(tmp_path, last, state):
    write_run(tmp_path)
    write_lines(tmp_path / "events.jsonl", [event("start", 0), event(last, 9, "why")])
    page = Reader(report_page.page(run_record.read_run(tmp_path)))
    assert "This page was made at 20" in page.text
    assert state in page.text


def test_a_gain_whose_interval_holds_0_is_not_called_one(long_run):
    tile = lambda run: next(tile for tile in report_page.tiles(run) if tile[0] == "context gain")  # noqa: E731
    gains = [dict(record) for record in long_run.gains]
    for record in gains:
        record |= {"gain": -0.003, "gain_low": -0.01, "gain_high": 0.004}
    run = dataclasses.replace(long_run, gains=gains)
    words = "[-0.010, +0.004]: not distinguishable from 0"
    assert tile(run)[1:] == ("-0.003", f"at 1Mi, {words}")
    assert words.replace("]:", "],") in " ".join(report_page.lead(run))
    # One that is above 0 on both ends is.
    assert "distinguishable" not in " ".join((*tile(long_run), *report_page.lead(long_run)))


def test_what_has_nothing_to_show_has_no_panel_but_a_sentence(tmp_path):
    write_run(tmp_path)
    page = Reader(report_page.page(run_record.read_run(tmp_path)))
    assert "MFU is not known: metrics.jsonl has it as null" in page.text
    assert "Model FLOPs utilization" not in page.text
    assert "Throughput" in page.text


def test_every_chart_has_a_text_alternative_with_its_numbers(long_page):
    page = Reader(long_page)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert len(labels) == page.tags.count("svg") == len(report_charts.CHARTS) + 1
    (rate,) = [label for label in labels if label.startswith("Throughput:")]
    assert re.fullmatch(
        r"Throughput: tokens / s over tokens \(positions consumed\)\. "
        r"from [\d.]+M to [\d.]+K, between [\d.]+K and [\d.]+M\.",
        rate,
    ), rate
    assert all(re.search(r"\d", label) for label in labels)
    (loss, _) = [label for label in labels if label.startswith("Loss:")]
    assert "7 marks: restart for another layout." in loss
    (found,) = [label for label in labels if label.startswith("Passkey retrieval, last")]
    assert "5 rows and 5 columns, between 0 % and 100 %" in found


def test_each_source_has_a_curve_that_steps_without_a_target_do_not_break(tmp_path):
    write_run(tmp_path)
    steps = run_record.read_run(tmp_path).steps
    for step in steps:
        # In some steps only, and never.
        found = {"web": 3.0, "code": 1.0 if step["step"] % 2 else None, "books": None}
        step["source_losses"] = found
    run = run_record.RunRecord("run", steps)
    chart = report_charts.CHARTS["source-loss"]
    axes = report_charts.chart_figure(chart, run, LIGHT, 5, 3).axes[0]
    lines = {line.get_label(): line for line in axes.lines if line.get_label()[0] != "_"}
    assert {name: set(line.get_ydata()) for name, line in lines.items()} == {
        "web": {3.0},
        "code": {1.0},
    }
    assert len(lines["code"].get_xdata()) == 20, "one point a step that has a target"


def test_a_run_that_tells_no_loss_of_a_source_has_no_such_chart(tmp_path, long_page):
    write_run(tmp_path)
    page = Reader(report_page.page(run_record.read_run(tmp_path)))
    assert "Training loss of each source" in Reader(long_page).text
    assert "Training loss of each source" not in page.text
    assert "metrics.jsonl holds no data_share." in page.text


def test_waiting_is_a_share_of_the_step_and_a_gpu_has_that_for_data_alone(tmp_path):
    write_run(tmp_path)
    steps = run_record.read_run(tmp_path).steps
    for step in steps:
        step |= {"data_share": 0.25, "communication_share": None}
    chart = report_charts.CHARTS["waits"]

    def labels() -> list[str]:
        run = run_record.RunRecord("run", steps)
        axes = report_charts.chart_figure(chart, run, LIGHT, 5, 3).axes[0]
        assert axes.get_ylim() == (0, 1)
        return axes.get_legend_handles_labels()[1]

    assert labels() == ["data"]
    steps[0]["communication_share"] = 0.5
    assert labels() == ["other ranks", "data"]


def test_the_work_of_the_slowest_ranks_is_drawn_dealt_and_in_order(tmp_path, long_run):
    chart = report_charts.CHARTS["imbalance"]
    axes = report_charts.chart_figure(chart, long_run, LIGHT, 5, 3).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["in the order drawn", "dealt by cost"]
    write_run(tmp_path)
    page = Reader(report_page.page(run_record.read_run(tmp_path)))
    assert "Samples were not dealt by their cost: --balance none, or one data rank." in page.text


@pytest.mark.parametrize("name", report_charts.CHARTS)
def test_nothing_is_drawn_outside_the_picture(long_run, name):
    for width, height in ((9.4, 4.3), (4.7, 3.9)):
        figure = report_charts.chart_figure(
            report_charts.CHARTS[name], long_run, LIGHT, width, height
        )
        figure.draw_without_rendering()
        drawn = figure.get_tightbbox()
        slack = 0.01
        assert drawn.x0 > -slack and drawn.y0 > -slack, drawn
        assert drawn.x1 < figure.get_figwidth() + slack, drawn
        assert drawn.y1 < figure.get_figheight() + slack, drawn


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
    run.account.append(
        {
            "phase": hostile,
            "source": hostile,
            "skipped": False,
            "samples": 1,
            "tokens": 2,
            "documents": 3,
            "epochs": 1.0,
        }
    )
    run = dataclasses.replace(run, name=hostile, notes=[hostile])
    html = report_page.page(run)
    page = Reader(html)
    assert "script" not in page.tags and "<script" not in html
    assert page.words.count(hostile) >= 6, "the name itself must be readable"
    assert any(text.startswith("<script>alert") for text in page.pictured), "also in the charts"


def test_a_gain_without_an_interval_says_so(tmp_path):
    write_run(tmp_path)
    gains = [
        {
            "step": step,
            "tokens": tokens,
            "phase": "long",
            "set": "valid",
            "seq_length": 2**20,
            "cut": 1024,
            "kind": "context_gain",
            "loss_full": 5.0,
            "loss_cut": 5.0 + gain,
            "gain": gain,
            "gain_low": None,
            "gain_high": None,
            "documents": 1,
            "num_targets": 9,
        }
        for step, tokens, gain in ((30, 30_000_000, 0.01), (40, 40_000_000, -0.25))
    ]
    with open(tmp_path / "validation.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in gains)
    run = run_record.read_run(tmp_path)
    assert len(run.evaluations) == 3, "gains are no losses"
    page = Reader(report_page.page(run))
    assert (
        page.row("long", "1Mi")[-1] == "+0.010 →-0.250"
        and "no interval: too few documents" in page.text
    )
    assert page.row("long", "valid")[4:] == ["+0.010", "-0.250", "-0.260", "5.0000", "4.7500", "1"]
    axes = report_charts.chart_figure(report_charts.CHARTS["gain"], run, LIGHT, 5, 3).axes[0]
    assert list(axes.lines[0].get_ydata()) == [0.01, -0.25] and not axes.collections


def test_one_picture_serves_light_and_dark(long_run):
    figure = report_charts.chart_figure(
        report_charts.CHARTS["loss"], long_run, report_axes.VARIABLES, 9, 4
    )
    svg = report_axes.to_svg(figure, "loss", "a <b>")
    assert 'aria-label="a &#60;b&#62;"' in svg and "#0f0f" not in svg
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert (
        {"ink", "muted", "grid", "band-0", "band-1", "series-0", "raw"}
        <= used
        <= report_axes.COLORS.keys()
    )
    # Nothing but the variables has a color of its own, or it would be lost on one of the grounds.
    assert not re.findall(r"(?:fill|stroke): #[0-9a-f]{3,6}", svg)
    ids = re.findall(r' id="([^"]+)"', svg)
    assert len(ids) == len(set(ids)) and all(name.startswith("loss-") for name in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(ids)


def test_many_steps_stay_small(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    steps = [
        run.steps[0]
        | {"step": i + 1, "tokens": (i + 1) * 1000, "loss": 3 + (i * 7919 % 1000) / 500}
        for i in range(20_000)
    ]
    steps[12_345]["loss"] = 40.0
    axes = report_charts.chart_figure(
        report_charts.CHARTS["loss"], run_record.RunRecord("run", steps), LIGHT, 9, 4
    ).axes[0]
    raw = axes.lines[0]
    median = axes.lines[1]
    assert (
        len(raw.get_xdata()) <= report_axes.POINTS and len(median.get_xdata()) <= report_axes.POINTS
    )
    assert 40.0 in raw.get_ydata(), "a spike must survive the thinning"
    assert list(raw.get_xdata()) == sorted(raw.get_xdata())


def test_the_median_does_not_cross_phases(tmp_path):
    write_run(tmp_path)
    run = run_record.read_run(tmp_path)
    steps = [
        run.steps[0] | {"step": i + 1, "tokens": i + 1, "phase": "ab"[i >= 500]}
        for i in range(1000)
    ]
    values = np.where(np.arange(1000) < 500, 1.0, 5.0)
    centers, medians = report_axes.running_median(run_record.RunRecord("run", steps), values)
    assert set(medians) == {1.0, 5.0} and (medians == values[centers]).all()
