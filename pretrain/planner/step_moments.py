"""The moments of a step at which a rank holds most, and what it holds then.

Where microbatches follow each other, most is held in the middle: the gradients of those before are
there, and all that the next one's backward needs. Where all forwards are over before the first
backward, what waits for backward goes while gradients come: most is held at one of its ends.
"""

from dataclasses import dataclass

from pretrain.planner.activation_bytes import LayerMemory


@dataclass(frozen=True)
class Moment:
    """Holds the bytes of a moment, without the shards of parameters and moments."""

    gathered: int
    activations: int
    loss: int
    gradients: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.gathered + self.activations + self.loss + self.gradients + self.buffers


@dataclass(frozen=True)
class GradientSizes:
    """Says how large the gradients of a rank's parameters are, and how they are kept."""

    layer: int
    """Elements of a layer."""
    around: int
    """Elements around the layers."""
    waiting: int
    """Elements of the output projection, whose gradient waits for the embedding's."""
    master_bytes: int
    compute_bytes: int
    shards: int
    """Ranks that share them once they are reduced; 1 where they are kept whole."""
    are_whole: bool
    """Are they reduced once per step?"""
    is_first_in_place: bool
    """Is the buffer of a unit's first reduction the gradient itself (parallel/one_rank.py)?"""

    @property
    def result(self) -> int:
        """Bytes of an element that a first reduction gives, beside what it is given."""
        return 0 if self.is_first_in_place else self.master_bytes


@dataclass(frozen=True)
class StepMoments:
    """Works out the moments of one rank's step.

    The bytes are those of all microbatches in flight, and of the gradients when all are there.
    """

    layers: LayerMemory
    sizes: GradientSizes
    gathered: int
    activations: int
    loss: int
    gradients: int
    in_flight: int
    """Pairs of a stage and a microbatch that wait for backward."""

    def fullest(self, microbatches: int, *, has_pipeline: bool) -> Moment:
        """Return the moment at which most is held.

        Args:
            microbatches: pairs of a stage of this rank and a microbatch, in a step.
        """
        if microbatches > self.in_flight:
            return self._in_the_middle(follows_first=microbatches == self.in_flight + 1)
        moments = [self._first_layer(), self._last_layer(has_pipeline=has_pipeline)]
        if not self.sizes.are_whole:
            moments.append(self._end())
        return max(moments, key=lambda moment: moment.total)

    def _in_the_middle(self, *, follows_first: bool) -> Moment:
        """A backward after others, or after one."""
        sizes = self.sizes
        layers = self.layers
        has_loss = self.loss > 0
        if sizes.are_whole:
            buffers = layers.working_set(has_loss=has_loss, with_gradients=True)
        else:
            # The last copy of the backward before is kept until the next one is made.
            # The first one's copy is the gradient where it is the result.
            kept = sizes.result if follows_first else sizes.master_bytes
            sent_before = kept * sizes.around
            of_loss = layers.loss_working_set + sent_before if has_loss else 0
            # What waits for backward is gone when the last gradients are sent; their shard is added
            # to that of the backwards before. On one rank it does not show in a run's peak.
            shard = sizes.result * sizes.around // sizes.shards
            at_the_end = self._sent_at_the_end + shard - self.activations - self.loss
            of_layers = layers.layers_working_set(has_loss=has_loss) + self._copied
            buffers = max(of_layers, of_loss, at_the_end)
        return Moment(self.gathered, self.activations, self.loss, self.gradients, max(0, buffers))

    def _first_layer(self) -> Moment:
        """The loss or the first layer of the first backward: no gradients yet."""
        whole = self.sizes.are_whole
        has_loss = self.loss > 0
        buffers = self.layers.layers_working_set(has_loss=has_loss, with_gradients=whole)
        if not whole:
            sizes = self.sizes
            buffers += sizes.compute_bytes * (sizes.layer + sizes.waiting)
            # Of the second layer: the first one's copy is on its way, and its activations are gone.
            sent = sizes.master_bytes * sizes.layer + sizes.result * sizes.layer // sizes.shards
            buffers += max(0, sent - self.layers.kept.device)
        if has_loss:
            buffers = max(buffers, self.layers.loss_working_set)
        return Moment(self.gathered, self.activations, self.loss, 0, max(0, buffers))

    def _last_layer(self, *, has_pipeline: bool) -> Moment:
        """The last layer of the first backward: all gradients but its own."""
        sizes = self.sizes
        own = sizes.master_bytes * sizes.layer // sizes.shards
        buffers = self.layers.layers_working_set(has_loss=False, with_gradients=sizes.are_whole)
        gathered = self.gathered
        if not sizes.are_whole:
            # The copy of the layer before, on its way.
            buffers += sizes.result * sizes.layer + sizes.compute_bytes * sizes.waiting
        if not has_pipeline:
            # A layer's parameters are freed after its last backward.
            gathered = min(gathered, sizes.compute_bytes * (sizes.around + sizes.layer))
        others = self.activations * (self.in_flight - 1) // self.in_flight
        kept = others + self.layers.kept.device + self.layers.tables
        return Moment(gathered, kept, 0, self.gradients - own, max(0, buffers))

    def _end(self) -> Moment:
        """The gradients around the layers, when nothing waits any more."""
        gathered = self.gathered if self.in_flight > 1 else 0
        sizes = self.sizes
        sent = (sizes.result + sizes.compute_bytes) * sizes.around
        return Moment(gathered, 0, 0, self.gradients, sent)

    @property
    def _copied(self) -> int:
        """Gradients on their way: a layer's is copied to be sent while the next is made."""
        sizes = self.sizes
        own = sizes.compute_bytes * (sizes.layer + sizes.waiting)
        return 2 * sizes.master_bytes * sizes.layer + own

    @property
    def _sent_at_the_end(self) -> int:
        return (self.sizes.master_bytes + self.sizes.compute_bytes) * self.sizes.around
