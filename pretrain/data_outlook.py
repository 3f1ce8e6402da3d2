"""What a run's phases will draw, known before the first step: forecast, checks and warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from data.blend import SourceName
from data.config import DataConfig, parse_windows
from data.document_cost import DocumentCost
from data.forecast import Forecast, forecast
from data.ledger import Ledger
from data.mixture import Mixture
from data.packing.best_fit import samples_of_window
from data.packing.place import Place
from data.sample_costs import sample_costs
from data.segments import DataSettings
from data.sources import Corpus
from data.stream import DocumentStream
from pretrain.batches import settings_of
from pretrain.planner.documents import StepCosts
from pretrain.schedule.phases import Phase

SHOWN_SOURCES = 32
"""Most sources of a phase that the forecast prints."""
DRAWN_STEPS = 8
"""Most steps of a phase whose samples a plan draws."""
DRAWN_SAMPLES = 4096
"""Most samples of them, where a step has fewer."""
DRAWN_SECONDS = 2.0
"""Most seconds that drawing may take of a plan."""
ORDERED_PER_SECOND = 30e6
"""Documents of a source whose order and offsets are made in a second, measured on a core."""
PACKED_PER_SECOND = 1e6
"""Documents that are found and packed in a second, measured on a core."""

# ---------------------------------------------------------------- the forecast


def forecast_phases(
    ledger: Ledger, corpus: Corpus, clock: int, phases: Sequence[Phase]
) -> list[Forecast]:
    """Forecast what the phases that are not over at `clock` will draw from each source."""
    coming = [
        (phase.name, phase.end, settings_of(phase, corpus)) for phase in phases if phase.end > clock
    ]
    return forecast(ledger, clock, coming)


def describe_forecast(rows: list[Forecast]) -> str:
    """Write a forecast as a table, a line per source."""
    lines = [
        f"{'phase':<12}{'share':>8}{'tokens':>16}{'of an epoch of':>18}{'epochs':>16}   source"
    ]
    shown: dict[str, int] = {}
    for row in rows:
        shown[row.phase] = shown.get(row.phase, 0) + 1
        if shown[row.phase] <= SHOWN_SOURCES:
            share = f"{100 * row.share:>7.2f}%"
            epochs = f"{row.from_epoch:>7.2f} -> {row.to_epoch:>5.2f}"
            lines.append(
                f"{row.phase:<12}{share}{row.tokens:>16,}{row.epoch_tokens:>18,}{epochs}   "
                f"{row.source}"
            )
    for phase, count in shown.items():
        if count > SHOWN_SOURCES:
            lines.append(f"{phase:<12}and {count - SHOWN_SOURCES} more sources")
    return "\n".join(lines)


def forecast_warnings(ledger: Ledger, rows: list[Forecast]) -> list[str]:
    """Warn of sources that will repeat, and of documents that have two names.

    Names of the past count, too.
    """
    found = [
        f"{row.source} will repeat in phase {row.phase}: {row.to_epoch:.2f} epochs at its end"
        for row in rows
        if row.to_epoch > max(1, row.from_epoch)
    ]
    drawn = [name for segment in ledger.segments for name in segment.sources_drawn()]
    to_draw = [row.source for row in rows]
    sources = [SourceName.parse(name) for name in dict.fromkeys([*drawn, *to_draw])]
    for i, one in enumerate(sources):
        for other in sources[:i]:
            if one.overlaps(other):
                found.append(f"{one} and {other} share documents, which both may draw")
    return found


# ---------------------------------------------------------------- windows of --skip-data


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
                f"checkpoint before {start:,} (--load DIR --ckpt-step N and a new --save), or "
                "leave it out."
            )
        phase = next((phase for phase in phases if start < phase.end), None)
        if phase is None:
            raise ValueError(
                f"{where}the run ends at {phases[-1].end:,}. Fix: an earlier window, or leave it "
                "out."
            )
        # Windows skip whole steps, so that the first step from `start` on must begin in it.
        first = max(clock, phase.first_step_from(start))
        if end <= first:
            batch = phase.batch_at(first)
            raise ValueError(
                f"{where}no step begins in it; the next one begins at {first:,} and takes "
                f"{batch:,} tokens. Fix: for example {first}:{first + batch}."
            )


# ---------------------------------------------------------------- what a checkpoint drew from


def blend_change(ledger: Ledger, corpus: Corpus, phase: Phase) -> tuple[list, list] | None:
    """Compare the blend of the open segment with that of the phase that goes on.

    Returns:
        Both, where they are not the same.
    """
    theirs = ledger.open.settings.to_json()["blend"]
    ours = settings_of(phase, corpus).to_json()["blend"]
    return (theirs, ours) if theirs != ours else None


# ---------------------------------------------------------------- targets


def target_problems(corpus: Corpus, phases: Sequence[Phase]) -> list[str]:
    """Name the phases in which no document gives a target, as `name = value: rule. Fix: ...`."""
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
    """Name the sources and validation sets whose documents have no target."""
    # Where documents are joined, a token's target may be the next document's first.
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
    """Tell whether a document has a token after its first one."""
    return int(stream.lengths.max()) > 1


# ---------------------------------------------------------------- how unequal samples are


def draw_step_costs(
    phase: Phase, corpus: Corpus, rows: Sequence[Forecast], cost: DocumentCost
) -> tuple[StepCosts | None, str]:
    """Draw the samples of a phase's first steps, and compute what each of them costs.

    No token is read. A phase that comes later begins where the forecast says, as if all before it
    was read in order.

    Args:
        rows: the forecast.
        cost: of a document to the model.
    Returns:
        The costs; or None, and why they are taken as equal.
    """
    places = {
        row.source: Place(round(row.from_epoch * row.epoch_tokens))
        for row in rows
        if row.phase == phase.name
    }
    if not places:
        return None, "the data was not looked at"
    if not phase.document_masking:
        return None, "without document masking each sample is one document"
    samples = phase.global_batch_tokens // phase.seq_length
    of_phase = (phase.end - phase.start) // phase.global_batch_tokens
    steps = max(1, min(DRAWN_STEPS, DRAWN_SAMPLES // samples, of_phase))
    # Whoever draws past the end repeats: counting all samples would pack the whole source.
    settings = replace(settings_of(phase, corpus, cost), exhausted="repeat")
    streams = {name: corpus.train[name] for name in places}
    seconds = _seconds_to_draw(settings, streams, steps * samples)
    if seconds > DRAWN_SECONDS:
        return None, f"drawing a step of them would take about {seconds:.0f} s"
    mixture = Mixture(settings, streams, places)
    costs = sample_costs(mixture, 0, steps * samples, cost, document_masking=True)
    return StepCosts(costs.reshape(steps, samples)), ""


def _seconds_to_draw(
    settings: DataSettings, streams: Mapping[str, DocumentStream], samples: int
) -> float:
    """Estimate how long samples take to be drawn, on one core."""
    seconds = 0.0
    for name, stream in streams.items():
        tokens = samples * settings.seq_length
        if settings.packing == "best_fit":
            share = settings.share_of(name)
            window = samples_of_window(settings.seq_length, settings.samples_per_step, share)
            tokens = max(tokens, window * settings.seq_length)
        mean = stream.tokens_per_epoch / stream.num_documents
        seconds += stream.num_documents / ORDERED_PER_SECOND
        seconds += min(stream.num_documents, tokens / mean) / PACKED_PER_SECOND
    return seconds
