"""Count whether a run drew each token exactly once: `bash launch/ithaca.sh audit --load DIR`.

Reads every step's data again, as the latest checkpoint's account says it was drawn: its digest must
be the one that the run wrote to metrics.jsonl for the batch that the model received, and a counter
per token of each source must find every token that the source's stream has passed exactly once per
epoch. Exit code 1 if not. Run it where the trainer was started, so that relative paths mean the
same. Takes a byte of memory per token of a source.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from tqdm import tqdm

from data.batch import Sample, read_batch
from data.digest import DIGEST_BITS, digest
from data.ledger import Ledger
from data.mixture import Mixture
from data.packing.place import Place
from data.segments import ClosedSegment
from data.sources import open_corpus
from data.stream import DocumentStream
from data.tokenizers.tokenizer import build_tokenizer
from pretrain.checkpointing.damage import find_verified
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.config_yaml import read_config_yaml
from pretrain.schedule.phases import Phase
from pretrain.schedule.resolve import resolve_phases
from tools.huggingface.stored_model import stored_tokenizer
from tools.shared.door import run_door


@dataclass(kw_only=True)
class Arguments:
    load: str
    """Folder of a run's checkpoints (its --save)."""


# ---------------------------------------------------------------- counting


class Counter:
    """How often each token of a source was drawn."""

    def __init__(self, stream: DocumentStream):
        self.stream = stream
        lengths = np.asarray(stream.reader.document_lengths, dtype=np.int64)
        self.starts = np.cumsum(lengths) - lengths
        tokens = int(lengths.sum())
        self.drawn = np.zeros(tokens, dtype=np.uint8)
        self.passed_over = np.zeros(tokens, dtype=np.uint8)

    def add(self, intervals: np.ndarray, to: np.ndarray) -> None:
        """Count the tokens of intervals, int64 [n, 2] (stream position and tokens), in `to`."""
        spans = self.stream.locate(intervals)
        _add(self.starts[spans.documents] + spans.offsets, spans.lengths, to)

    def expected(self, place: Place) -> np.ndarray:
        """Compute how often each token should have been drawn before `place`."""
        expected = np.zeros_like(self.drawn)
        epoch = self.stream.tokens_per_epoch
        for start in range(0, place.position, epoch):
            self.add(np.array([[start, min(epoch, place.position - start)]]), expected)
        unread = np.zeros_like(self.drawn)
        self.add(place.held, unread)
        return expected - unread - self.passed_over


@numba.njit(nogil=True, cache=True)
def _add(starts, lengths, out):
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            out[token] += 1


class Counters:
    """The counters of all sources of a run."""

    def __init__(self, streams: dict[str, DocumentStream]):
        self.by_name = {name: Counter(stream) for name, stream in streams.items()}

    def _of(self, sample: Sample) -> Counter:
        return next(counter for counter in self.by_name.values() if counter.stream is sample.stream)

    def add_drawn(self, sample: Sample) -> None:
        """Count a sample that the model received."""
        counter = self._of(sample)
        counter.add(sample.intervals, counter.drawn)

    def add_passed_over(self, sample: Sample) -> None:
        """Count a sample that --skip-data passed over."""
        counter = self._of(sample)
        counter.add(sample.intervals, counter.passed_over)


# ---------------------------------------------------------------- a run


@dataclass
class Audited:
    """What a run left, opened again to be compared."""

    progress: Progress
    config: Config
    phases: list[Phase]
    ledger: Ledger
    counters: Counters
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl up to the checkpoint."""
    eod: int | None
    """Id that ends documents."""

    @property
    def begun(self) -> int:
        """Consumed tokens where this folder's metrics.jsonl begins."""
        if not self.steps:
            return self.progress.clock
        return self.steps[0]["tokens"] - self.steps[0]["global_batch_tokens"]


def audit(folder: str) -> tuple[list[str], bool]:
    """Audit a run -> (what was found, a line each; is all well).

    Raises:
        ValueError: there is no checkpoint, or its data is not there any more.
    """
    # Count every token that the run drew or passed over ...
    run = _open_run(folder)
    _count_before(run.ledger, run.begun, run.counters)
    wrong = _compare_steps(run)
    for mixture, samples in _passed_over(run.ledger):
        for sample in mixture.samples(range(samples)):
            run.counters.add_passed_over(sample)
    # ... and compare with where the sources stand now.
    lines = _describe_steps(run, wrong)
    well = not wrong
    for name, place in run.ledger.places_at(run.progress.clock).items():
        line, once = _describe_source(name, run.counters.by_name[name], place)
        lines.append(line)
        well = well and once
    return lines, well


def _open_run(folder: str) -> Audited:
    """Open the latest checkpoint, its data and its steps.

    Raises:
        ValueError: there is no checkpoint, or its data is not there any more.
    """
    found = find_verified(folder)
    if found is None:
        raise ValueError(
            f"load = {folder}: no checkpoint is published there. Fix: give the --save folder of a "
            "run."
        )
    progress = Progress.read(found)
    config = read_config_yaml(str(found / "config.yaml"))
    if not progress.data:
        raise ValueError(
            f"load = {folder}: its checkpoint is weights only, which no data was drawn for. Fix: "
            "give the --save folder of a run that trained."
        )
    vocab_size = config.data.vocab_size
    assert vocab_size is not None, "a checkpoint's configuration names its vocabulary"
    phases = resolve_phases(config)
    corpus = open_corpus(
        config.data,
        config.optimizer.seed,
        vocab_size,
        progress.tokenizer,
        [phase.data_path for phase in phases if phase.data_path],
    )
    ledger = Ledger(corpus.train, progress.data)
    drawn = {name for segment in ledger.segments for _, name in segment.settings.blend}
    if gone := sorted(drawn - ledger.streams.keys()):
        raise ValueError(
            f"load = {folder}: drew from {', '.join(gone)}, which its latest configuration does "
            "not name any more, so that it cannot be read again. Fix: an earlier "
            "checkpoint's folder."
        )
    eod = None
    if not config.data.mock_data:
        # Integers as text (NullTokenizer) have no files in the checkpoint.
        tokenizer = stored_tokenizer(found, config) or build_tokenizer(
            config.data.tokenizer_type, None, vocab_size
        )
        eod = tokenizer.eod
    steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return Audited(
        progress=progress,
        config=config,
        phases=phases,
        ledger=ledger,
        counters=Counters(ledger.streams),
        steps=[step for step in steps if step["step"] <= progress.step],
        eod=eod,
    )


# ---------------------------------------------------------------- reading the data again


def _count_before(ledger: Ledger, clock: int, counters: Counters) -> None:
    """Count what was drawn before `clock`, where this folder's metrics.jsonl begins."""
    starts = [*(segment.start for segment in ledger.segments), clock]
    for segment, following in zip(ledger.segments, starts[1:], strict=True):
        start = segment.start
        end = min(following, clock)
        if start < end:  # of several at one place, the last drew
            mixture = ledger.as_of(start).mixture()
            # Sample by sample: all at once would be as much as the run read.
            for number in range((end - start) // segment.settings.seq_length):
                (sample,) = mixture.samples([number])
                counters.add_drawn(sample)


def _compare_steps(run: Audited) -> list[int]:
    """Count what each step drew -> the steps whose digest differs."""
    masking = {phase.name: phase.document_masking for phase in run.phases}
    wrong = []
    mixtures: dict[int, Mixture] = {}  # by the start of their segment
    for step in tqdm(run.steps, desc="reading the data again", unit="step", disable=None):
        # The samples of the step, from the mixture of its segment.
        clock = step["tokens"] - step["global_batch_tokens"]
        starts = [segment.start for segment in run.ledger.segments]
        start = max(start for start in starts if start <= clock)
        if start not in mixtures:
            mixtures[start] = run.ledger.as_of(clock).mixture()
        mixture = mixtures[start]
        length = mixture.settings.seq_length
        first = (clock - start) // length
        samples = mixture.samples(range(first, first + step["global_batch_tokens"] // length))
        # Their digest, which does not depend on how the ranks cut the batch.
        total = 0
        for number, sample in enumerate(samples):
            batch = read_batch(
                [sample],
                length,
                document_masking=masking.get(step["phase"], True),
                eod=run.eod,
                eod_mask_loss=run.config.data.eod_mask_loss,
            )
            total += digest(batch, [(0, length)], [number * length], length)
            run.counters.add_drawn(sample)
        if f"{total % 2**DIGEST_BITS:010x}" != step["data_digest"]:
            wrong.append(step["step"])
    return wrong


def _passed_over(ledger: Ledger) -> list[tuple[Mixture, int]]:
    """List the windows that --skip-data passed over: the mixture of each, and its samples."""
    return [
        (
            ledger.as_of_segment(number).mixture(),
            sum(drawn.samples for drawn in segment.drawn.values()),
        )
        for number, segment in enumerate(ledger.segments)
        if isinstance(segment, ClosedSegment) and segment.skipped_until is not None
    ]


# ---------------------------------------------------------------- what was found


def _describe_steps(run: Audited, wrong: list[int]) -> list[str]:
    """Say how the steps compare."""
    if wrong:
        found = f"the data of {len(wrong):,} differs from metrics.jsonl, first of step {wrong[0]}"
    else:
        found = "the data of each is what metrics.jsonl says the model received"
    lines = [f"{len(run.steps):,} steps read again: {found}"]
    if run.begun:
        lines.append(
            f"the {run.begun:,} tokens before them, of a run in another folder: counted as its "
            "account says, not compared"
        )
    return lines


def _describe_source(name: str, counter: Counter, place: Place) -> tuple[str, bool]:
    """Say what was drawn of a source up to `place` -> (a line, whether each token came once)."""
    difference = counter.drawn.astype(np.int16) - counter.expected(place)
    repeated = int(difference[difference > 0].sum())
    lost = int(-difference[difference < 0].sum())
    epoch = counter.stream.tokens_per_epoch
    line = (
        f"{name}: {int(counter.drawn.sum(dtype=np.int64)):,} tokens drawn, {repeated:,} repeated, "
        f"{lost:,} lost, {int(counter.passed_over.sum(dtype=np.int64)):,} passed over, "
        f"{int(place.held[:, 1].sum()):,} kept for later; "
        f"{place.position / epoch:.2f} epochs of {epoch:,} tokens"
    )
    return line, not repeated and not lost


def audit_and_report(arguments: Arguments) -> int:
    """Audit, then print what was found -> 1 where a token was not drawn exactly once."""
    lines, well = audit(arguments.load)
    print("\n".join(lines))
    print("each token once: yes" if well else "each token once: NO")
    return 0 if well else 1


def main(argv: list[str] | None = None) -> int:
    return run_door(
        Arguments, audit_and_report, name="tools.audit_data", description=__doc__, argv=argv
    )


if __name__ == "__main__":
    sys.exit(main())
