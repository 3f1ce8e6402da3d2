"""Show a run: `bash launch/ithaca.sh report --load DIR [--output FILE.html]`.

Reads what the run wrote into its --save folder (metrics.jsonl, validation.jsonl, ledger.jsonl,
events.jsonl and the latest checkpoint's settings) and writes one page that needs nothing else, with
each of its charts as a PNG beside it (FILE-loss.png, ...). With `--output FILE.png` it writes one
picture instead: loss, throughput and learning rate over tokens. Prints the run in a few lines.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from data.files import write_atomically
from tools.outputs.files import check_file, is_own_page, is_own_picture
from tools.reporting.axes import LIGHT, to_png
from tools.reporting.charts import CHARTS, chart_figure, draw_sheet
from tools.reporting.page import page, sizes
from tools.reporting.run_record import RunRecord, read_run, summary
from tools.shared.door import run_door

MAKER = "tools.report"


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    load: str
    """Folder of a run's checkpoints (its --save), with metrics.jsonl in it."""
    output: str | None = None
    """HTML file to write (by default report.html in that folder), or a PNG file for one picture."""


def chart_path(output: Path, name: str) -> Path:
    """Name the file of a chart of the page `output`."""
    return output.with_name(f"{output.stem}-{name}.png")


def check_outputs(output: Path) -> Path:
    """Check every file that would be written; returns the path of the output, without `..`.

    Raises:
        ValueError: a file would be written over, or removed, that no report wrote.
    """
    if output.suffix.lower() == ".png":
        return check_file("output", output, MAKER, is_own_picture)
    # A chart without data removes the file of an earlier report: all names are checked.
    for name in CHARTS:
        check_file("output", chart_path(output, name), MAKER, is_own_picture)
    return check_file("output", output, MAKER, is_own_page)


def write_page(run: RunRecord, output: Path) -> None:
    """Write the page, and its charts as PNGs.

    Charts of an earlier report that have nothing to show now are removed.
    """
    for name, chart in CHARTS.items():
        path = chart_path(output, name)
        if chart.missing(run):
            path.unlink(missing_ok=True)
        else:
            width, height = next(iter(sizes(chart, run).values()))
            to_png(chart_figure(chart, run, LIGHT, width, height), path)
    write_atomically(output, page(run))


def write_report(arguments: Arguments) -> None:
    """Write the page or the picture, and print the run in a few lines.

    Raises:
        ValueError: nothing to read, or a place that may not be written.
    """
    folder = Path(arguments.load)
    output = Path(arguments.output) if arguments.output else folder / "report.html"
    if output.suffix.lower() not in (".html", ".png"):
        raise ValueError(
            f"output = {output}: a page or a picture is written. "
            "Fix: end the name in .html or .png."
        )
    place = check_outputs(output)
    run = read_run(folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".png":
        to_png(draw_sheet(run), place)
    else:
        write_page(run, place)
    print(summary(run))
    print(f"wrote {output}")


def main(argv: list[str] | None = None) -> int:
    return run_door(Arguments, write_report, name="tools.report", description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
