"""The packings that a run may choose from, by the name of the setting `packing`."""

from data.config import Packing
from data.packing.best_fit import BestFit
from data.packing.concat import Concat
from data.packing.place import Mark, Packer, Place
from data.stream import DocumentStream

PACKERS: dict[Packing, type[Concat] | type[BestFit]] = {"concat": Concat, "best_fit": BestFit}


def make_packer(
    packing: Packing, stream: DocumentStream, place: Place, seq_length: int, mark: Mark | None
) -> Packer:
    """Make the packer that turns what is unread of a stream into samples.

    Args:
        mark: from `Packer.mark` of an earlier packer at the same place; saves packing again.
    """
    return PACKERS[packing](stream, place, seq_length, mark)
