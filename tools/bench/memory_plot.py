"""Plot the result of the memory benchmark."""

from pathlib import Path

from tools.bench.contenders import Dtype
from tools.bench.memory_cells import MIB, Cell, label
from tools.bench.peers import PEERS


def draw(cells: dict[str, dict[int, Cell]], dtype: Dtype, path: Path) -> None:
    """Plot the peaks over the length, both scales logarithmic, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, row in cells.items():
        points = [(tokens, cell.peak / MIB) for tokens, cell in row.items() if cell.runs]
        if points:
            axes.plot(
                *zip(*points),
                marker="o",
                linestyle="--" if name in PEERS else "-",
                label=label(name),
            )
    # A straight line is a power of the length.
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(
        xlabel="tokens",
        ylabel="MiB above the built model",
        title=f"One forward and backward, tiny, {dtype}",
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
