"""The page of a plan: what stands in its words, tables, bars and pictures."""

import dataclasses
import itertools
import os
import re
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pretrain.planner.rank_bytes import RankMemory
from pretrain.planner.step_time import StepTime
from tools import plan
from tools.planning import page
from tools.planning.layout_picture import coordinates, layout_picture, ordinal
from tools.reporting.axes import COLORS

PHASES = """
phases:
  - {name: base, seq_length: 8Ki, train_tokens: 800B, global_batch_tokens: 8Mi}
  - name: "<long>"
    seq_length: 1Mi
    train_tokens: 20B
    global_batch_tokens: 32Mi
    context_parallel_size: 32
    cp_comm_type: a2a+allgather
    hierarchical_context_parallel_sizes: [4, 8]
    pipeline_model_parallel_size: 2
    recompute_granularity: full
"""


PARTS_OF_STEP = [each.name for each in fields(StepTime) if each.name != "sharding_hidden"]
PARTS_OF_MEMORY = [each.name for each in fields(RankMemory) if each.name != "host"]


class Reader(HTMLParser):
    """Tags with their attributes, and the visible words of a page; drawings are kept apart."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.words = []
        self.pictured = []
        self.open = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "svg" in self.open:
            self.pictured.append(data.strip())
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    config = folder / "run.yaml"
    config.write_text(
        "model: llama3-8b\nmock_data: true\nvocab_size: 128256\nbf16: true\n"
        f"save: {folder}/save\nsave_interval: 200\ntensor_model_parallel_size: 8\n{PHASES}"
    )
    arguments = plan.Arguments(world_size=1024, hardware="h100", price_per_gpu_hour=2.5)
    return plan.plan_run(arguments, ["--config", str(config)])


@pytest.fixture(scope="module")
def html(report):
    text = page.plan_page(report)
    if folder := os.environ.get("ITHACA_KEEP_PAGES"):
        (Path(folder) / "plan.html").write_text(text)
    return text


def test_the_page_stands_alone(html):
    read = Reader(html)
    assert read.open == []
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in read.tags}
    assert not re.search(r"url\(|@import|@font-face|href=|src=", html)
    # What comes from the run cannot become part of the page.
    assert "Phase <long>" in read.text and "<long>" not in html


def test_the_figures_of_the_plan_are_told(report, html):
    text = Reader(html).text
    assert "devices 1,024 H100, 128 nodes" in text
    assert f"days {report.total.days:,.1f} {report.total.device_hours:,.0f} GPU hours" in text
    # 2.5 for each GPU's hour.
    assert f"price {2.5 * report.total.device_hours:,.0f} at 2.5" in text
    for phase in report.phases:
        assert f"{100 * phase.speed.model_flops_utilization:.1f} %" in text
        assert phase.layout.description in text
        for each in phase.traffic:
            assert each.what in text
    for sentence in (*report.assumptions, *report.failures.arithmetic, *report.warnings):
        assert " ".join(sentence.split()) in text


def test_every_bar_and_picture_has_a_text_alternative_with_its_numbers(report, html):
    labels = [each["aria-label"] for tag, each in Reader(html).tags if each.get("role") == "img"]
    # A picture, a step and a memory for each phase.
    assert len(labels) == 3 * len(report.phases)
    picture, step, memory = labels[3:]
    assert "tp: 128 groups of 8 ranks, every 1st rank, inside one node." in picture
    assert "cp_gather: 128 groups of 8 ranks, every 32nd rank, over several nodes." in picture
    assert "pp: 512 groups of 2 ranks, every 512th rank, over several nodes." in picture
    assert step.startswith("A step of ") and "pipeline bubble" in step
    assert re.search(r"parameters [\d.]+ [GM]iB \([\d.]+ %\)", memory)


def test_bars_fill_their_width(html):
    spans = re.findall(r'class="stack".*?</div>', html, re.DOTALL)
    assert len(spans) == 4
    for bar in spans:
        widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
        # Parts that are too thin to draw are left out.
        assert 99.5 < sum(widths) < 100.01, widths


def test_every_part_of_a_bar_has_a_colour_of_its_own():
    """By what is drawn: no two names share a colour, on a light ground or on a dark one."""
    of_step = {name: page.STEP_COLORS[name] for name in PARTS_OF_STEP}
    of_memory = {name: page.MEMORY_COLORS[name] for name in PARTS_OF_MEMORY}
    # Free memory and the margin stand in the same bar.
    of_memory |= {"free": "ground", "margin": "grid"}
    for parts in (of_step, of_memory):
        for ground in (0, 1):
            drawn = [COLORS[color][ground] for color in parts.values()]
            assert len(set(drawn)) == len(drawn), parts


def test_the_picture_fills_in_the_group_of_rank_0_and_nothing_leaves_the_view(html):
    pictures = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)".*?</svg>', html, re.DOTALL)
    drawings = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    assert len(drawings) == 2
    for (width, height), drawing in zip(pictures, drawings, strict=True):
        rows = re.findall(r'translate\(0 (\d+)\)">(.*?)</g>', drawing, re.DOTALL)
        for top, row in rows:
            for x, y, w, h in re.findall(
                r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', row
            ):
                assert float(x) + float(w) <= float(width)
                assert int(top) + float(y) + float(h) <= float(height)
    # In the second layout cp_a2a has the ranks 0, 8, 16, 24: one on each of four nodes.
    row = next(
        row for row in re.findall(r"<g .*?</g>", drawings[1], re.DOTALL) if ">cp_a2a<" in row
    )
    filled = re.findall(r'fill:var\(--ground\);font-size:\d+px">(\d+)<', row)
    assert filled == ["0", "8", "16", "24"]
    assert re.findall(r">node (\d+)<", row) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("per_node, nodes", [(1, 4), (4, 4), (8, 4), (16, 2), (72, 2)])
def test_nodes_of_any_size_stay_within_the_picture(report, per_node, nodes):
    (phase, _) = report.phases
    axis = dataclasses.replace(
        phase.layout.axes[-1],
        size=1024,
        first_group=tuple(number * per_node for number in range(16)),
        nodes_of_first_group=tuple(range(16)),
    )
    layout = dataclasses.replace(phase.layout, axes=[axis])
    drawing = layout_picture(dataclasses.replace(phase, layout=layout), 16 * per_node, per_node)
    (width,) = re.findall(r'viewBox="0 0 (\d+) ', drawing)
    boxes = re.findall(r'<rect x="([\d.]+)" y="6" width="([\d.]+)"', drawing)
    assert len(boxes) == nodes
    ends = [float(x) + float(wide) for x, wide in boxes]
    assert ends[-1] < float(width) - 40, "the dots have room"
    # No name of a node reaches into the next one: some 6 units a letter.
    names = re.findall(r'<text x="([\d.]+)" y="50"[^>]*>([^<]*)<', drawing)
    for (x, name), (next_x, _) in itertools.pairwise(names):
        assert float(x) + 6 * len(name) < float(next_x), name


def test_a_rank_stands_on_the_axes_as_the_layout_counts(report):
    layout = report.phases[1].layout
    # tp 8 fastest, then cp 32, dp 2, pp 2: 8 + 8 x 3 + 256 x 1 + 512 x 1 is ...
    assert coordinates(5 + 8 * 3 + 256 * 1 + 512 * 1, layout) == {
        "tp": 5,
        "cp": 3,
        "dp": 1,
        "pp": 1,
    }


@pytest.mark.parametrize(
    "number, text", [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (32, "32nd"), (512, "512th")]
)
def test_places_in_a_row_are_spelled(number, text):
    assert ordinal(number) == text


SMALL = (
    "--model tiny --mock-data --vocab-size 100 --seq-length 64 --train-iters 3 "
    "--global-batch-size 4"
).split()
"""A run of one process."""


def test_the_command_writes_the_page_and_only_over_its_own(tmp_path, capsys):
    place = tmp_path / "pages" / "plan.html"
    for _ in range(2):
        assert plan.main([*SMALL, "--html", str(place)]) == 0
    assert "<h1>Plan of a run without a file</h1>" in place.read_text()
    place.write_text("mine")
    assert plan.main([*SMALL, "--html", str(place)]) == 2
    assert "exists, and was not made by tools.plan. Fix: " in capsys.readouterr().err
    assert place.read_text() == "mine"


def test_a_plan_of_one_process_has_no_axes():
    read = Reader(page.plan_page(plan.plan_run(plan.Arguments(world_size=1), SMALL)))
    assert "One process: it talks to nobody." in read.text
    assert "Nothing: one process." in read.text
    assert "No checkpoint is written" in read.text
