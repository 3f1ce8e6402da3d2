"""The microbatches of a step: a pure function of the clock, the tokens consumed before it."""

from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread

from data.batch import Batch, Sample, read_batch
from data.digest import digest
from data.first_pass import FirstPass
from data.mixture import Mixture


class Loader:
    """Reads the microbatches of one rank, in the shape of one phase.

    Sample m of the step at clock c is the mixture's number (c - start) / seq_length + m. Microbatch
    j of data rank d holds samples (j x dp_size + d) x micro_batch_size and the next
    micro_batch_size - 1.
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
    ):
        """
        Args:
            start: clock of the mixture's first sample.
            pieces: ranges of a microbatch's tokens that this rank holds (see `read_batch`).
            prefetch: read the next step in a thread while this one is trained; changes no result.

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
        self.document_masking = document_masking
        self.pieces = [(0, micro_batch_size * seq_length)] if pieces is None else pieces
        self._eod = eod
        self._eod_mask_loss = eod_mask_loss
        self._vocab_size = vocab_size
        self._next: tuple[int, Future] | None = None

    def read(self, clock: int) -> list[Batch]:
        """Read the microbatches of the step that begins at `clock`, in order.

        Raises:
            ValueError: a token id is too large (see `read_batch`).
        """
        # Usually the step that was read ahead; after a skipped window another one.
        expected = self._next
        self._next = None
        if expected and expected[0] == clock:
            batches = expected[1].result()
        else:
            batches = self._read(clock)
        if self.prefetch:
            self._start_reading(clock + self.global_batch_tokens)
        return batches

    def _read(self, clock: int) -> list[Batch]:
        """Read the microbatches of a step now."""
        number, rest = divmod(clock - self.start, self.seq_length)
        assert number >= 0 and rest == 0, (clock, self.start, self.seq_length)
        # The first sample of each of this data rank's microbatches.
        firsts = [
            number + (j * self.dp_size + self.dp_rank) * self.micro_batch_size
            for j in range(self.num_microbatches)
        ]
        # All samples of the step at once: finding their sources takes one pass.
        samples = self.mixture.samples(
            [first + i for first in firsts for i in range(self.micro_batch_size)]
        )
        batches = [
            self._read_microbatch(samples[begin : begin + self.micro_batch_size])
            for begin in range(0, len(samples), self.micro_batch_size)
        ]
        # What metrics.jsonl keeps of the data, to be audited later.
        for batch, first in zip(batches, firsts, strict=True):
            batch.digest = digest(batch, self.pieces, (first - number) * self.seq_length)
        return batches

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
