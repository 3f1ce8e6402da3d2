"""The microbatches of a step: a pure function of the clock, the tokens consumed before it."""

from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread

import numpy as np

from data.batch import Batch, Sample, read_batch
from data.dealing import Dealing, Dealt, StepShape, deal, imbalance
from data.digest import digest
from data.first_pass import FirstPass
from data.mixture import Mixture
from data.sample_costs import sample_costs


class Loader:
    """Reads the microbatches of one rank, in the shape of one phase.

    Sample m of the step at clock c is the mixture's number (c - start) / seq_length + m. Microbatch
    j of data rank d has slots (j x dp_size + d) x micro_batch_size and the next micro_batch_size -
    1. Sample m has slot m, unless the samples are dealt by their cost (dealing.py).

    Attributes: dealt, how the step that was read last was dealt.
    """

    def __init__(
        self,
        mixture: Mixture | FirstPass,
        start: int = 0,
        *,
        micro_batch_size: int,
        global_batch_tokens: int,
        dp_rank: int,
        dp_size: int,
        pieces: list[tuple[int, int]] | None = None,
        document_masking: bool = True,
        eod: int | None = None,
        eod_mask_loss: bool = False,
        vocab_size: int | None = None,
        prefetch: bool = True,
        dealing: Dealing | None = None,
    ):
        """
        Args:
            start: clock of the mixture's first sample.
            pieces: ranges of a microbatch's tokens that this rank holds (see `read_batch`).
            prefetch: read the next step in a thread while this one is trained; changes no result.
            dealing: what samples are dealt by; None = they are dealt in their order.

        Raises:
            ValueError: global_batch_tokens is not a multiple of seq_length x micro_batch_size x
            dp_size.
        """
        seq_length = mixture.settings.seq_length
        # Tokens of one microbatch on each data rank: the least global batch.
        unit = seq_length * micro_batch_size * dp_size
        microbatches = global_batch_tokens // unit
        if global_batch_tokens < 1 or global_batch_tokens % unit:
            raise ValueError(
                f"global_batch_tokens = {global_batch_tokens}: must be a multiple of seq_length x "
                f"micro_batch_size x data-parallel size = {seq_length} x {micro_batch_size} x "
                f"{dp_size} = {unit}. Fix: {max(1, microbatches) * unit} or "
                f"{(microbatches + 1) * unit}."
            )
        self.mixture = mixture
        self.start = start
        self.seq_length = seq_length
        self.micro_batch_size = micro_batch_size
        self.global_batch_tokens = global_batch_tokens
        self.num_microbatches = microbatches
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.prefetch = prefetch
        self.dealing = dealing
        self._shape = StepShape(
            dp_size=dp_size,
            num_microbatches=microbatches,
            micro_batch_size=micro_batch_size,
            meeting=dealing.meeting if dealing else "step",
        )
        self.dealt = Dealt(np.arange(self._shape.samples))
        self.document_masking = document_masking
        self.pieces = [(0, micro_batch_size * seq_length)] if pieces is None else pieces
        self._eod = eod
        self._eod_mask_loss = eod_mask_loss
        self._vocab_size = vocab_size
        self._next: tuple[int, Future[tuple[list[Batch], Dealt]]] | None = None

    def read(self, clock: int) -> list[Batch]:
        """Read the microbatches of the step that begins at `clock`, in order.

        Raises:
            ValueError: a token id is too large (see `read_batch`).
        """
        # Usually the step that was read ahead; after a skipped window another one.
        expected = self._next
        self._next = None
        if expected and expected[0] == clock:
            batches, self.dealt = expected[1].result()
        else:
            batches, self.dealt = self._read(clock)
        if self.prefetch:
            self._start_reading(clock + self.global_batch_tokens)
        return batches

    def own_samples(self) -> np.ndarray:
        """List which samples of the step that was read last are this data rank's.

        Returns:
            Numbers counted from the step's first, int64 [num_microbatches, micro_batch_size].
        """
        return self._own_samples(self.dealt)

    def _own_samples(self, dealt: Dealt) -> np.ndarray:
        cells = dealt.slots.reshape(self.num_microbatches, self.dp_size, self.micro_batch_size)
        return cells[:, self.dp_rank]

    def _read(self, clock: int) -> tuple[list[Batch], Dealt]:
        """Read the microbatches of a step now."""
        number, rest = divmod(clock - self.start, self.seq_length)
        assert number >= 0 and rest == 0, (clock, self.start, self.seq_length)
        dealt = self._deal(number)
        own = self._own_samples(dealt)
        # All of the rank's samples at once: finding their sources takes one pass.
        samples = self.mixture.samples((number + own.reshape(-1)).tolist())
        batches = [
            self._read_microbatch(samples[begin : begin + self.micro_batch_size])
            for begin in range(0, len(samples), self.micro_batch_size)
        ]
        # What metrics.jsonl keeps of the data, to be audited later.
        for batch, numbers in zip(batches, own.tolist(), strict=True):
            places = [number * self.seq_length for number in numbers]
            batch.digest = digest(batch, self.pieces, places, self.seq_length)
        return batches, dealt

    def _deal(self, number: int) -> Dealt:
        """Deal the samples of the step whose first sample has this number."""
        shape = self._shape
        if self.dealing is None:
            return Dealt(np.arange(shape.samples))
        # All samples of the step: every rank has to come to the same result by itself.
        costs = sample_costs(
            self.mixture,
            number,
            shape.samples,
            self.dealing.cost,
            document_masking=self.document_masking,
        )
        slots = deal(costs, shape)
        if shape.dp_size == 1:
            return Dealt(slots)  # nobody waits for another rank
        return Dealt(slots, imbalance(costs, slots, shape), imbalance(costs, None, shape))

    def _read_microbatch(self, samples: Sequence[Sample]) -> Batch:
        """Read this rank's slice of a microbatch."""
        return read_batch(
            samples,
            self.seq_length,
            self.pieces,
            document_masking=self.document_masking,
            eod=self._eod,
            eod_mask_loss=self._eod_mask_loss,
            vocab_size=self._vocab_size,
        )

    def _start_reading(self, clock: int) -> None:
        """Read a step in a thread of its own, which ends with it; errors wait in the future."""
        future: Future = Future()

        def work() -> None:
            try:
                future.set_result(self._read(clock))
            except BaseException as error:
                future.set_exception(error)

        self._next = clock, future
        Thread(target=work, name="data-prefetch").start()
