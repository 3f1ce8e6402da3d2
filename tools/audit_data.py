"""Did a run draw each token exactly once? `python -m tools.audit_data --load DIR`.

Reads every step's data again, as the latest checkpoint's account says it was drawn: its digest must
be the one that the run wrote to metrics.jsonl for the batch that the model received, and a counter
per token of each source must find every token that the source's stream has passed exactly once per
epoch. Exit code 1 if not. Run it where the trainer was started, so that relative paths mean the
same. Takes a byte of memory per token of a source.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numba
import numpy as np
from tqdm import tqdm

from data.batch import DIGEST_BITS, digest, read_batch
from data.ledger import Ledger, Mixture
from data.sources import open_corpus
from data.stream import DocumentStream
from data.tokenizers.tokenizer import build_tokenizer
from pretrain.checkpointing.folders import find_published
from pretrain.checkpointing.progress import Progress
from pretrain.config.config import Config
from pretrain.config.load import read_config_yaml
from pretrain.schedule.resolve import resolve_phases
from tools.export_hf import stored_tokenizer
from tools.shared.door import run_door


@dataclass(kw_only=True)
class Arguments:
    load: str
    """Folder of a run's checkpoints (its --save)."""


class Counter:
    """How often each token of a source was drawn."""

    def __init__(self, stream: DocumentStream):
        self.stream = stream
        lengths = np.asarray(stream.reader.document_lengths, dtype=np.int64)
        self.starts = np.cumsum(lengths) - lengths
        self.drawn, self.passed_over = (
            np.zeros(int(lengths.sum()), dtype=np.uint8) for _ in range(2)
        )

    def add(self, intervals: np.ndarray, to: np.ndarray) -> None:
        """intervals: int64 [n, 2], stream position and tokens."""
        spans = self.stream.locate(intervals)
        _add(self.starts[spans.documents] + spans.offsets, spans.lengths, to)

    def expected(self, position: int, held: np.ndarray) -> np.ndarray:
        """How often each token should have been drawn when the stream stands at `position` with
        `held` unread."""
        expected = np.zeros_like(self.drawn)
        epoch = self.stream.tokens_per_epoch
        for start in range(0, position, epoch):
            self.add(np.array([[start, min(epoch, position - start)]]), expected)
        unread = np.zeros_like(self.drawn)
        self.add(held, unread)
        return expected - unread - self.passed_over


@numba.njit(nogil=True, cache=True)
def _add(starts, lengths, out):
    for i in range(len(starts)):
        for token in range(starts[i], starts[i] + lengths[i]):
            out[token] += 1


def audit(folder: str) -> tuple[list[str], bool]:
    """-> (what was found, a line each; is all well).

    Raises:
        ValueError: there is no checkpoint, or its data is not there any more.
    """
    found = find_published(folder)
    if found is None:
        raise ValueError(
            f"load = {folder}: no checkpoint is published there. Fix: give the --save folder of a run."
        )
    progress = Progress.read(found)
    config = read_config_yaml(str(found / "config.yaml"))
    if not progress.data:
        raise ValueError(
            f"load = {folder}: its checkpoint is weights only, which no data was drawn for. Fix: give the "
            "--save folder of a run that trained."
        )
    phases = resolve_phases(config)
    corpus = open_corpus(
        config.data,
        config.optimizer.seed,
        config.data.vocab_size,
        progress.tokenizer,
        [phase.data_path for phase in phases if phase.data_path],
    )
    ledger = Ledger(corpus.train, progress.data)
    drawn = {name for segment in ledger.segments for _, name in segment["blend"]}
    if gone := sorted(drawn - ledger.streams.keys()):
        raise ValueError(
            f"load = {folder}: drew from {', '.join(gone)}, which its latest configuration does not name "
            "any more, so that it cannot be read again. Fix: an earlier checkpoint's folder."
        )
    counters = {name: Counter(stream) for name, stream in ledger.streams.items()}
    tokenizer = (
        None
        if config.data.mock_data
        else (
            stored_tokenizer(found, config)
            or build_tokenizer(config.data.tokenizer_type, None, config.data.vocab_size)
        )
    )  # integers as text have no files
    masking = {phase.name: phase.document_masking for phase in phases}
    steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["step"] <= progress.step]
    begun = steps[0]["tokens"] - steps[0]["global_batch_tokens"] if steps else progress.clock
    _count_before(ledger, begun, counters)
    wrong = _compare_steps(
        ledger, steps, counters, config, masking, tokenizer.eod if tokenizer else None
    )
    lines = [
        f"{len(steps):,} steps read again: "
        + (
            "the data of each is what metrics.jsonl says the model received"
            if not wrong
            else f"the data of {len(wrong):,} differs from metrics.jsonl, first of step {wrong[0]}"
        )
    ]
    if begun:
        lines.append(
            f"the {begun:,} tokens before them, of a run in another folder: counted as its account says, not "
            "compared"
        )
    well = not wrong
    for segment, mixture in _skipped(ledger):
        for sample in mixture.samples(
            range(sum(drawn["samples"] for drawn in segment["drawn"].values()))
        ):
            counter = next(
                counter for counter in counters.values() if counter.stream is sample.stream
            )
            counter.add(sample.intervals, counter.passed_over)
    for name, place in ledger.places_at(progress.clock).items():
        counter = counters[name]
        difference = counter.drawn.astype(np.int16) - counter.expected(place.position, place.held)
        repeated, lost = (
            int(part.sum()) for part in (difference[difference > 0], -difference[difference < 0])
        )
        well = well and not repeated and not lost
        lines.append(
            f"{name}: {int(counter.drawn.sum(dtype=np.int64)):,} tokens drawn, {repeated:,} repeated, "
            f"{lost:,} lost, {int(counter.passed_over.sum(dtype=np.int64)):,} passed over, "
            f"{int(place.held[:, 1].sum()):,} kept for later; "
            f"{place.position / counter.stream.tokens_per_epoch:.2f} epochs of "
            f"{counter.stream.tokens_per_epoch:,} tokens"
        )
    return lines, well


def _count_before(ledger: Ledger, clock: int, counters: dict[str, Counter]) -> None:
    """Count what was drawn before `clock`, where this folder's metrics.jsonl begins."""
    starts = [*(segment["start"] for segment in ledger.segments), clock]
    for segment, following in zip(ledger.segments, starts[1:], strict=True):
        start = segment["start"]
        end = min(following, clock)
        if start < end:  # of several at one place, the last drew
            mixture = ledger.as_of(start).mixture()
            for number in range((end - start) // segment["seq_length"]):
                (sample,) = mixture.samples([number])
                counter = next(
                    counter for counter in counters.values() if counter.stream is sample.stream
                )
                counter.add(sample.intervals, counter.drawn)


def _compare_steps(
    ledger: Ledger,
    steps: list[dict],
    counters: dict[str, Counter],
    config: Config,
    masking: dict[str, bool],
    eod: int | None,
) -> list[int]:
    """Count what each step drew -> the steps whose digest differs."""
    wrong = []
    mixtures = {}
    for step in tqdm(steps, desc="reading the data again", unit="step", disable=None):
        clock = step["tokens"] - step["global_batch_tokens"]
        start = max(segment["start"] for segment in ledger.segments if segment["start"] <= clock)
        if start not in mixtures:
            mixtures[start] = ledger.as_of(clock).mixture()
        mixture = mixtures[start]
        length = mixture.settings.seq_length
        first = (clock - start) // length
        total = 0
        samples = mixture.samples(range(first, first + step["global_batch_tokens"] // length))
        for number, sample in enumerate(samples):
            batch = read_batch(
                [sample],
                length,
                document_masking=masking.get(step["phase"], True),
                eod=eod,
                eod_mask_loss=config.data.eod_mask_loss,
            )
            total += digest(batch, [(0, length)], number * length)
            counter = next(
                counter for counter in counters.values() if counter.stream is sample.stream
            )
            counter.add(sample.intervals, counter.drawn)
        if f"{total % 2**DIGEST_BITS:010x}" != step["data_digest"]:
            wrong.append(step["step"])
    return wrong


def _skipped(ledger: Ledger) -> Iterator[tuple[dict, Mixture]]:
    """The segments that --skip-data passed over, and what they would have drawn."""
    for number, segment in enumerate(ledger.segments):
        if "skipped_until" in segment:
            then = Ledger(ledger.streams)
            then.segments = ledger.segments[: number + 1]
            yield segment, then.mixture()


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
