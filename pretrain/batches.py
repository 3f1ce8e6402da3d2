"""What a run's processes are fed: the batches of each phase, and the validation sets."""

from collections.abc import Sequence

from data.batch import Batch
from data.config import DataConfig, parse_windows
from data.dealing import Dealing, Dealt
from data.document_cost import DocumentCost
from data.first_pass import FirstPass
from data.ledger import Ledger, Window
from data.loader import Loader
from data.mixture import Mixture
from data.segments import DataSettings
from data.sources import Corpus
from parallel.context import token_pieces
from parallel.layout import Layout
from pretrain.guards.rewinds import Rewind
from pretrain.schedule.phases import Phase

SHOWN_SOURCES = 32
"""Most sources in a line of metrics.jsonl; the account in each checkpoint has all."""


class Feed:
    """Reads this rank's batches, phase by phase, and opens the ledger's segments for them."""

    def __init__(
        self,
        config: DataConfig,
        corpus: Corpus,
        ledger: Ledger,
        layout: Layout,
        *,
        eod: int | None,
        vocab_size: int,
        cost: DocumentCost,
        rewinds: Sequence[Rewind] = (),
    ):
        self.config = config
        self.corpus = corpus
        self.ledger = ledger
        self.layout = layout
        self.eod = eod
        self.vocab_size = vocab_size
        self.cost = cost
        self._windows = windows_of(config, rewinds)
        self._phase: Phase | None = None
        self._loader: Loader | None = None

    @property
    def phase(self) -> Phase:
        """The phase that was entered last."""
        assert self._phase is not None, "enter a phase first"
        return self._phase

    def enter(self, phase: Phase, clock: int) -> bool:
        """Draw by the settings of `phase` from `clock` on.

        Returns:
            Whether the phase begins here.

        Raises:
            ValueError: its sources do not have what it is to draw (`data_exhausted` stop or error).
        """
        # A phase that goes on after a restart has a segment already.
        self._phase = phase
        begins = all(segment.phase != phase.name for segment in self.ledger.segments)
        self.ledger.enter(clock, phase.name, settings_of(phase, self.corpus, self.cost))
        self._check(clock)
        self._loader = None
        return begins

    def _check(self, clock: int) -> None:
        """Raise ValueError unless the sources have what the rest of the phase draws.

        The last step may reach beyond the phase's end, where the batch was changed within it.
        """
        # The number of samples from the open segment's start on.
        phase = self.phase
        to_draw = phase.end_of_steps(clock) - self.ledger.open.start
        self.ledger.mixture().check(to_draw // phase.seq_length)

    def read(self, clock: int) -> list[Batch]:
        """Read the microbatches of the step at `clock`.

        The first step at or after the start of a window, of --skip-data or of a rewind, passes it
        over.
        """
        if _pass_over(self.ledger, self._windows, clock):
            self._check(clock)
            self._loader = None
        phase = self.phase
        batch_tokens = phase.batch_at(clock)
        # A new loader where the batch grows: the samples go on where they were.
        if self._loader is None or self._loader.global_batch_tokens != batch_tokens:
            self._loader = self._make_loader(
                self.ledger.mixture(),
                start=self.ledger.open.start,
                micro_batch_size=phase.micro_batch_size,
                global_batch_tokens=batch_tokens,
                document_masking=phase.document_masking,
                prefetch=True,
                dealing=self.dealing(phase, train=True),
            )
        return self._loader.read(clock)

    def validation(
        self, phase: Phase, seq_length: int, micro_batch_size: int, global_batch_tokens: int
    ) -> dict[str, tuple[Loader, FirstPass]]:
        """Open the validation sets in batches of that shape.

        Returns:
            Name of each set -> its loader, and its samples.
        """
        found = {}
        # From the start of the set each time: evaluations score the same tokens.
        for name, blend in self.corpus.validation.items():
            samples = FirstPass(blend, seq_length)
            loader = self._make_loader(
                samples,
                start=0,
                micro_batch_size=micro_batch_size,
                global_batch_tokens=global_batch_tokens,
                document_masking=phase.document_masking,
                prefetch=False,
                dealing=self.dealing(phase, train=False),
            )
            found[name] = loader, samples
        return found

    def dealing(self, phase: Phase, *, train: bool) -> Dealing | None:
        """Find what a phase's samples are dealt by (`dealing_of`)."""
        return dealing_of(phase, self.layout.dp.size, self.cost, train=train)

    @property
    def dealt(self) -> Dealt:
        """How the step that was read last was dealt."""
        assert self._loader is not None, "read a step first"
        return self._loader.dealt

    @property
    def shown_sources(self) -> list[str]:
        """The sources whose losses are reported, by their numbers in the blend; empty if there is
        one, which the loss is of, or too many."""
        names = self.ledger.mixture().names
        return names if 1 < len(names) <= SHOWN_SOURCES else []

    def tokens_by_source(self, clock: int) -> dict[str, int]:
        """Count the real tokens of each source that the model received before `clock`."""
        return self.ledger.tokens_by_source(clock)

    def _make_loader(
        self,
        samples: Mixture | FirstPass,
        *,
        start: int,
        micro_batch_size: int,
        global_batch_tokens: int,
        document_masking: bool,
        prefetch: bool,
        dealing: Dealing | None,
    ) -> Loader:
        """Make a loader of this rank's slices.

        Args:
            start: the clock at the first of the samples.
        """
        # The rank's slices of a microbatch, as context parallelism deals them.
        layout = self.layout
        tokens = samples.settings.seq_length * micro_batch_size
        return Loader(
            samples,
            start,
            micro_batch_size=micro_batch_size,
            global_batch_tokens=global_batch_tokens,
            dp_rank=layout.dp.rank,
            dp_size=layout.dp.size,
            pieces=token_pieces(tokens, layout),
            document_masking=document_masking,
            prefetch=prefetch,
            eod=self.eod,
            eod_mask_loss=self.config.eod_mask_loss,
            vocab_size=self.vocab_size,
            dealing=dealing,
        )


def dealing_of(phase: Phase, dp_size: int, cost: DocumentCost, *, train: bool) -> Dealing | None:
    """Find what the samples of a phase's steps are dealt by; None = they stay in their order.

    Args:
        train: is there a backward?
    """
    layout = phase.layout
    if phase.balance == "none" or not layout.can_deal(dp_size):
        return None
    meets_often = layout.meets_in_microbatches(train=train)
    return Dealing(cost, "microbatch" if meets_often else "step")


def settings_of(phase: Phase, corpus: Corpus, cost: DocumentCost | None = None) -> DataSettings:
    """Make the data settings of a phase, over the sources that the run has opened.

    Args:
        cost: of the model's documents; None where no samples are packed.
    """
    return corpus.settings(
        phase.seq_length,
        phase.data_path,
        f"phase {phase.name!r}: data_path",
        phase.packing,
        phase.data_exhausted,
        phase.max_documents_per_sample,
        cost if phase.balance_window else None,
        phase.global_batch_tokens // phase.seq_length if phase.balance_window else None,
    )


def ledger_at(
    config: DataConfig,
    corpus: Corpus,
    ledger: Ledger,
    begun: int,
    phases: Sequence[Phase],
    clock: int,
    rewinds: Sequence[Rewind] = (),
    *,
    cost: DocumentCost,
) -> Ledger:
    """Return the ledger as a run has it, or will have it, at the step at `clock`.

    Args:
        ledger: as it is at clock `begun`; it is changed where `clock` is later.
        cost: of the model's documents.
    """
    if clock < begun:
        return ledger.as_of(clock)
    windows = windows_of(config, rewinds)
    for phase in phases:
        if phase.end <= begun or phase.start > clock:
            continue  # over already, or not begun by then
        # What the run does: enter the phase, then skip each window at its first step.
        entered = max(begun, phase.start)
        ledger.enter(entered, phase.name, settings_of(phase, corpus, cost))
        places = [(max(entered, phase.first_step_from(window.start)), window) for window in windows]
        # In the order of the steps; at one step those of --skip-data come first, as in a run.
        for at, window in sorted(places, key=lambda place: place[0]):
            if entered <= at < phase.end and at <= clock:
                _pass_over(ledger, [window], at)
    return ledger


def windows_of(config: DataConfig, rewinds: Sequence[Rewind]) -> list[Window]:
    """List all data that the run passes over: those of --skip-data, and those of its rewinds."""
    given = [Window(start, end) for start, end in parse_windows(config.skip_data)]
    return given + [rewind.window for rewind in rewinds]


def _pass_over(ledger: Ledger, windows: Sequence[Window], clock: int) -> bool:
    """Skip the windows whose time has come at the step at `clock` -> were there any?"""
    due = [window for window in windows if window.start <= clock and not ledger.has_passed(window)]
    for window in due:
        ledger.skip(clock, window.end, window.rewind)
    return bool(due)
