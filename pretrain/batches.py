"""What a run's processes are fed: the loaders of a phase, validation sets, and the account of what
was drawn."""

from collections.abc import Sequence

from data.batch import Batch
from data.blend import SourceName
from data.config import DataConfig, parse_windows
from data.first_pass import FirstPass
from data.forecast import Forecast, forecast
from data.ledger import Ledger
from data.loader import Loader
from data.mixture import Mixture
from data.segments import DataSettings
from data.sources import Corpus
from data.stream import DocumentStream
from parallel.context import token_pieces
from parallel.layout import Layout
from pretrain.schedule.phases import Phase

SHOWN_SOURCES = 32
"""Up to so many sources stand in each line of metrics.jsonl; the account in each checkpoint has
all."""


class Feed:
    """Reads this rank's batches of one phase at a time, and opens the ledger's segments on the
    way."""

    def __init__(
        self,
        config: DataConfig,
        corpus: Corpus,
        ledger: Ledger,
        layout: Layout,
        *,
        eod: int | None,
        vocab_size: int,
    ):
        self.config = config
        self.corpus = corpus
        self.ledger = ledger
        self.layout = layout
        self.eod = eod
        self.vocab_size = vocab_size
        self._windows = parse_windows(config.skip_data)
        self._slice = {"eod": eod, "eod_mask_loss": config.eod_mask_loss, "vocab_size": vocab_size}
        self._phase: Phase | None = None
        self._loader: Loader | None = None

    def enter(self, phase: Phase, clock: int) -> bool:
        """Draw by the settings of `phase` from `clock` on -> does the phase begin here?

        Raises:
            ValueError: its sources do not have what it is to draw (`data_exhausted` stop or error).
        """
        self._phase = phase
        begins = all(segment.phase != phase.name for segment in self.ledger.segments)
        self.ledger.enter(clock, phase.name, settings_of(phase, self.corpus))
        self._check(clock)
        self._loader = None
        return begins

    def _check(self, clock: int) -> None:
        """Raises ValueError unless the sources have what the steps from `clock` to the phase's end
        draw. The last step may reach beyond that end, where the batch was changed within the
        phase."""
        phase = self._phase
        opened = self.ledger.open
        self.ledger.mixture().check((phase.end_of_steps(clock) - opened.start) // phase.seq_length)

    def read(self, clock: int) -> list[Batch]:
        """The microbatches of the step at `clock`; the first one at or after a window of
        --skip-data passes it over."""
        if _pass_over(self.ledger, self._windows, clock):
            self._check(clock)
            self._loader = None
        phase = self._phase
        batch = phase.batch_at(clock)
        if self._loader is None or self._loader.global_batch_tokens != batch:
            self._loader = self._make(
                self.ledger.mixture(),
                self.ledger.open.start,
                phase.micro_batch_size,
                batch,
                phase.document_masking,
                prefetch=True,
            )
        return self._loader.read(clock)

    def validation(
        self, phase: Phase, seq_length: int, micro_batch_size: int, global_batch_tokens: int
    ) -> dict[str, tuple[Loader, FirstPass]]:
        """Name of each validation set -> its loader in that shape, and its samples."""
        found = {}
        for name, blend in self.corpus.validation.items():
            samples = FirstPass(blend, seq_length)
            loader = self._make(
                samples,
                0,
                micro_batch_size,
                global_batch_tokens,
                phase.document_masking,
                prefetch=False,
            )
            found[name] = loader, samples
        return found

    def tokens_by_source(self, clock: int) -> dict[str, int]:
        """Real tokens that the model received before `clock`."""
        return self.ledger.tokens_by_source(clock)

    def _make(
        self,
        mixture: Mixture | FirstPass,
        start: int,
        micro_batch_size: int,
        global_batch_tokens: int,
        document_masking: bool,
        prefetch: bool,
    ) -> Loader:
        layout = self.layout
        return Loader(
            mixture,
            start,
            micro_batch_size=micro_batch_size,
            global_batch_tokens=global_batch_tokens,
            dp_rank=layout.dp.rank,
            dp_size=layout.dp.size,
            pieces=token_pieces(mixture.settings.seq_length * micro_batch_size, layout),
            document_masking=document_masking,
            prefetch=prefetch,
            **self._slice,
        )


def _pass_over(ledger: Ledger, windows: list[tuple[int, int]], clock: int) -> bool:
    """Skip the windows that have come at the step at `clock` -> were there any?"""
    due = [end for start, end in windows if start <= clock and not ledger.has_skipped(end)]
    for end in due:
        ledger.skip(clock, end)
    return bool(due)


def ledger_at(
    config: DataConfig,
    corpus: Corpus,
    ledger: Ledger,
    begun: int,
    phases: Sequence[Phase],
    clock: int,
) -> Ledger:
    """The ledger as a run has it, or will have it, at the step at `clock`.

    Args:
        ledger: as it stands at clock `begun`; it is changed where `clock` is later.
    """
    if clock < begun:
        return ledger.as_of(clock)
    windows = parse_windows(config.skip_data)
    for phase in phases:
        if phase.end <= begun or phase.start > clock:
            continue
        ledger.enter(max(begun, phase.start), phase.name, settings_of(phase, corpus))
        for window in windows:
            at = phase.first_step_from(window[0])
            if max(begun, phase.start) <= at < phase.end and at <= clock:
                _pass_over(ledger, [window], at)
    return ledger


def settings_of(phase: Phase, corpus: Corpus) -> DataSettings:
    return corpus.settings(
        phase.seq_length,
        phase.data_path,
        f"phase {phase.name!r}: data_path",
        phase.packing,
        phase.data_exhausted,
    )


def check_windows(
    config: DataConfig, ledger: Ledger, clock: int, last_batch: int, phases: Sequence[Phase]
) -> None:
    """Check the windows of --skip-data against the steps of the run, which are skipped whole.

    Args:
        clock: where the run starts.
        last_batch: tokens of the step before it, 0 if there was none.

    Raises:
        ValueError: a window was trained on already, holds the start of no step, or lies beyond the
        run.
    """
    for start, end in parse_windows(config.skip_data):
        if ledger.has_skipped(end):
            continue
        where = f"skip_data = {start}:{end}: "
        if last_batch and start <= clock - last_batch:
            raise ValueError(
                f"{where}the run is at {clock:,} already and was trained on it. Fix: start from a "
                f"checkpoint before {start:,} (--load DIR --ckpt-step N and a new --save), or leave it "
                "out."
            )
        phase = next((phase for phase in phases if start < phase.end), None)
        if phase is None:
            raise ValueError(
                f"{where}the run ends at {phases[-1].end:,}. Fix: an earlier window, or leave it out."
            )
        first = max(clock, phase.first_step_from(start))
        if end <= first:
            batch = phase.batch_at(first)
            raise ValueError(
                f"{where}no step begins in it; the next one begins at {first:,} and takes {batch:,} "
                f"tokens. Fix: for example {first}:{first + batch}."
            )


def blend_change(ledger: Ledger, corpus: Corpus, phase: Phase) -> tuple[list, list] | None:
    """The blends of the open segment and of the phase that goes on, where they are not the same."""
    theirs = ledger.open.settings.to_json()["blend"]
    ours = settings_of(phase, corpus).to_json()["blend"]
    return (theirs, ours) if theirs != ours else None


def forecast_phases(
    ledger: Ledger, corpus: Corpus, clock: int, phases: Sequence[Phase]
) -> list[Forecast]:
    """`data.forecast.forecast` of the phases that are not over at `clock`."""
    coming = [
        (phase.name, phase.end, settings_of(phase, corpus)) for phase in phases if phase.end > clock
    ]
    return forecast(ledger, clock, coming)


def describe_forecast(rows: list[Forecast]) -> str:
    """What each phase will draw, a line per source, at most SHOWN_SOURCES per phase."""
    lines = [
        f"{'phase':<12}{'share':>8}{'tokens':>16}{'of an epoch of':>18}{'epochs':>16}   source"
    ]
    shown: dict[str, int] = {}
    for row in rows:
        shown[row.phase] = shown.get(row.phase, 0) + 1
        if shown[row.phase] <= SHOWN_SOURCES:
            lines.append(
                f"{row.phase:<12}{100 * row.share:>7.2f}%{row.tokens:>16,}{row.epoch_tokens:>18,}"
                f"{row.from_epoch:>7.2f} -> {row.to_epoch:>5.2f}   {row.source}"
            )
    lines += [
        f"{phase:<12}and {count - SHOWN_SOURCES} more sources"
        for phase, count in shown.items()
        if count > SHOWN_SOURCES
    ]
    return "\n".join(lines)


def target_problems(corpus: Corpus, phases: Sequence[Phase]) -> list[str]:
    """The phases in which no document gives a target, as `name = value: rule. Fix: ...`."""
    problems = []
    for phase in phases:
        names = [name for _, name in settings_of(phase, corpus).blend]
        if phase.document_masking and not any(_gives_targets(corpus.train[name]) for name in names):
            problems.append(
                f"phase {phase.name!r}: data_path = {' '.join(names)}: no document gives a target, "
                "since all have a single token. Fix: longer documents (--append-eod when they are "
                "made), or --no-document-masking."
            )
    return problems


def target_warnings(corpus: Corpus, phases: Sequence[Phase]) -> list[str]:
    """Sources and validation sets whose documents have no target."""
    masked = [phase for phase in phases if phase.document_masking]
    if not masked:
        return []
    drawn = dict.fromkeys(name for phase in masked for _, name in settings_of(phase, corpus).blend)
    found = [
        f"{name}: no document gives a target, since all have a single token"
        for name in drawn
        if not _gives_targets(corpus.train[name])
    ]
    found += [
        f"validation set {name}: has no target, since all its documents have a single token, "
        "and no loss is measured on it"
        for name, blend in corpus.validation.items()
        if not any(_gives_targets(stream) for _, stream in blend)
    ]
    return found


def _gives_targets(stream: DocumentStream) -> bool:
    """Does a document have a token after its first one?"""
    return int(stream.lengths.max()) > 1


def forecast_warnings(ledger: Ledger, rows: list[Forecast]) -> list[str]:
    """Sources that will repeat, and documents that are drawn under different names, in the past or
    the future."""
    found = [
        f"{row.source} will repeat in phase {row.phase}: {row.to_epoch:.2f} epochs at its end"
        for row in rows
        if row.to_epoch > max(1, row.from_epoch)
    ]
    drawn = [name for segment in ledger.segments for name in segment.sources_drawn()]
    sources = [
        SourceName.parse(name) for name in dict.fromkeys([*drawn, *(row.source for row in rows)])
    ]
    found += [
        f"{one} and {other} share documents, which both may draw"
        for i, one in enumerate(sources)
        for other in sources[:i]
        if one.overlaps(other)
    ]
    return found
