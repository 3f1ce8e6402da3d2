"""What all ranks know after a step in which nothing happened but what a test says."""

from collections.abc import Sequence

from data.batch import Batch
from model.windows import Window
from parallel.layout import Layout
from pretrain.logs.measured import Measured, measure


def measured(
    batches: Sequence[Batch], layout: Layout, windows: Sequence[Window] = (None,), **changes
) -> Measured:
    """Call `measure` with `changes`; collective over the world."""
    arguments = dict(
        wants_stop=False,
        wants_save=False,
        data_seconds=0.0,
        has_failed_save=False,
        busy_seconds=0.0,
    )
    return measure(batches, layout, windows, **(arguments | changes))
