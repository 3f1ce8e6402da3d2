"""Show a run: `bash launch/ithaca.sh report --load DIR [--output FILE.html] [--follow]`.

Reads what the run wrote into its --save folder (metrics.jsonl, validation.jsonl, ledger.jsonl,
events.jsonl and the latest checkpoint's settings) and writes one page that needs nothing else, with
each of its charts as a PNG beside it (FILE-loss.png, ...). With `--output FILE.png` it writes one
picture instead: loss, throughput and learning rate over tokens. Prints the run in a few lines.
With `--follow` it writes the page again and again until the run ends, and the page reads itself
again in the browser.
"""

import sys
import time
from collections.abc import Callable
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
HEAD_BYTES = 1 << 16
"""Bytes in which the first line of metrics.jsonl ends."""


@dataclass(kw_only=True)
class Arguments:
    """Hold the options of the command line."""

    load: str
    """Folder of a run's checkpoints (its --save), with metrics.jsonl in it."""
    output: str | None = None
    """HTML file to write (by default report.html in that folder), or a PNG file for one picture."""
    follow: bool = False
    """Write the page again every --interval seconds until the run is done, stopped or refused; its
    charts as PNGs only then."""
    interval: int = 60
    """Seconds between two pages of --follow."""


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


def follow(folder: Path, place: Path, interval: int, sleep: Callable[[float], None]) -> None:
    """Write the page until the run ends, or until Ctrl-C; the caller writes the last one."""
    print(f"writing {place} every {interval} s until the run ends; Ctrl-C ends it, too", flush=True)
    try:
        while True:
            # Before its first step a run has nothing to show.
            if has_steps(folder):
                run = read_run(folder)
                if run.outcome() is not None:
                    return
                write_atomically(place, page(run, refresh_seconds=interval))
            sleep(interval)
    except KeyboardInterrupt:
        print()


def has_steps(folder: Path) -> bool:
    """Tell whether a run has written a step into the folder."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return False
    with open(metrics, "rb") as file:
        return b"\n" in file.read(HEAD_BYTES)


def write_report(arguments: Arguments, sleep: Callable[[float], None] = time.sleep) -> None:
    """Write the page or the picture, and print the run in a few lines.

    Args:
        sleep: waits between two pages of --follow.

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
    if arguments.follow and output.suffix.lower() == ".png":
        raise ValueError(f"follow = True: refreshes a page, not {output}. Fix: leave it out.")
    if arguments.interval < 1:
        raise ValueError(f"interval = {arguments.interval}: must be at least 1. Fix: 60.")
    place = check_outputs(output)
    if arguments.follow:
        if not folder.is_dir():
            raise ValueError(f"load = {folder}: no such folder. Fix: give the --save of a run.")
        place.parent.mkdir(parents=True, exist_ok=True)
        follow(folder, place, arguments.interval, sleep)
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
