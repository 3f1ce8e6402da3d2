"""The packings that a run may choose from, by the name of the setting `packing`."""

from data.packing.best_fit import BestFit
from data.packing.concat import Concat
from data.packing.place import Mark, Packer, Place
from data.segments import DataSettings
from data.stream import DocumentStream


def make_packer(
    settings: DataSettings,
    name: str,
    stream: DocumentStream,
    place: Place,
    mark: Mark | None = None,
) -> Packer:
    """Make the packer that turns what is unread of a stream into samples.

    Args:
        name: of the source, in the blend.
        mark: from `Packer.mark` of an earlier packer at the same place; saves packing again.
    """
    if settings.packing == "concat":
        return Concat(stream, place, settings.seq_length, mark)
    return BestFit(
        stream,
        place,
        settings.seq_length,
        mark,
        max_documents=settings.max_documents_per_sample,
        cost=settings.equal_cost,
        samples_per_step=settings.samples_per_step,
        share=settings.share_of(name),
    )
