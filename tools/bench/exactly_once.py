"""Count whether every token is exactly once an input and a target, whatever a run changes.

The ids of a made corpus are the tokens' own numbers, so what the batches hold says which tokens the
model received. A run of random phases draws from it: lengths, packings, blends, batches, layouts
change, windows are passed over, the state is thrown away and made again from the ledger's JSON. A
counter per token counts it as input, another as label.

Expected of every token t, at the end of each phase:
- as input: once if the ledger says that it was drawn, else never (still unread, passed over, or
  held out);
- as label: once if t - 1 is of the same document and was an input, else never; but the first token
  of a document may be a label once where a phase has document masking off.
"""

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from data.batch import Batch
from data.config import Packing
from data.dealing import Dealing
from data.document_cost import DocumentCost
from data.indexed import IndexedReader
from data.ledger import Ledger
from data.loader import Loader
from data.segments import DataSettings
from data.stream import DocumentStream
from parallel.context import group_pieces
from tools.bench.data_engine.numbered_corpus import LENGTHS, Source, make_sources
from tools.bench.data_engine.token_counters import count_batch, find_difference, mark_tokens

PHASES = 20
"""Random phases; what they leave of the epoch is then drawn source by source."""


PACKINGS: tuple[Packing, ...] = ("concat", "best_fit")
SAMPLE_COST = DocumentCost(1.0, 1.0, 1e-3, ((None, 1),))
"""What samples cost where they are asked to cost the same: attention as much as the rest at 2,000
tokens of a document."""
DEALINGS = (None, Dealing(SAMPLE_COST, "step"), Dealing(SAMPLE_COST, "microbatch"))
"""What a step's samples are dealt by."""


@dataclass
class Outcome:
    """Hold what a run did, and what was wrong: a line each, none = every token came once."""

    tokens: int = 0
    drawn: int = 0
    passed_over: int = 0
    phases: int = 0
    steps: int = 0
    restarts: int = 0
    lengths: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def run(folder: Path, tokens: int, seed: int = 1, longest: int = LENGTHS[-1], log=None) -> Outcome:
    """Make a corpus of about that many tokens in `folder`, run random phases over an epoch of it,
    and count.

    Args:
        tokens: of the corpus, below 2^31; memory is 3 bytes a token, disk 4.
        longest: sequence length of the phases; others are powers of 2 down to 1/128 of it.
        log: a function of one line of text, called at the end of each phase.
    """
    trial = Trial(
        make_sources(folder, tokens, longest, seed), seed, longest, log or (lambda line: None)
    )
    trial.random_phases()
    trial.drain()
    return trial.outcome


class Trial:
    """Run random phases: the engine's ledger, counters, and what chance decides next."""

    def __init__(self, sources: list[Source], seed: int, longest: int, log):
        self.sources = sources
        self.longest = longest
        self.log = log
        self.seed = seed
        self.chance = random.Random(seed)
        total = sum(int(source.lengths.sum()) for source in sources)
        self.inputs, self.labels, self.passed = (
            np.zeros(total + 1, dtype=np.uint8) for _ in range(3)
        )
        self.starts = np.concatenate([source.starts for source in sources])
        self.clock = 0
        self.masked_only = True
        self.outcome = Outcome(tokens=total)
        self.ledger = self._open(None)

    # ---- what the engine is asked to do ----

    def _open(self, stored: dict | None) -> Ledger:
        """Make files, streams and ledger from nothing but the disk and a checkpoint's JSON."""
        return Ledger(
            {
                source.name: DocumentStream(
                    IndexedReader(source.prefix), source.selected, self.seed
                )
                for source in self.sources
            },
            stored,
        )

    def _samples_left(self) -> int:
        """Count the samples that the open segment may draw before a source begins another epoch."""
        mixture = self.ledger.mixture()
        done = self.ledger.samples_at(self.clock)
        low = done
        # Each source ends with its first epoch: none is without a limit.
        high = sum(limit for limit in mixture.limits if limit is not None)
        # By bisection: the counts of each source grow with the samples.
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(
                count <= limit for count, limit in zip(mixture.order.counts(middle), mixture.limits)
            )
            low, high = (middle, high) if fits else (low, middle - 1)
        return low - done

    def _unread(self) -> dict[str, np.ndarray]:
        """Ask the ledger what of each source's first epoch is unread: stream intervals [n, 2]."""
        found = {}
        for name, place in self.ledger.places_at(self.clock).items():
            rest = [[place.position, self.ledger.streams[name].tokens_per_epoch - place.position]]
            found[name] = np.concatenate(
                [place.held, rest if rest[0][1] > 0 else np.empty((0, 2), np.int64)]
            )
        return found

    def _read_step(
        self,
        seq_length: int,
        micro_batch_size: int,
        dp_size: int,
        microbatches: int,
        cp_size: int,
        balanced: bool,
        document_masking: bool,
    ) -> None:
        """Read one step, as each of its dp x cp ranks does."""
        total = seq_length * micro_batch_size
        dealing = self.chance.choice(DEALINGS)
        for dp_rank in range(dp_size):
            boundaries: list[list] = []
            for cp_rank in range(cp_size):
                # Balanced slices take a piece of each half, as two-level context parallelism does.
                share = total // cp_size
                pieces = (
                    group_pieces(total, cp_rank, cp_size)
                    if balanced and cp_size > 1
                    else [(cp_rank * share, (cp_rank + 1) * share)]
                )
                loader = Loader(
                    self.ledger.mixture(),
                    self.ledger.open.start,
                    micro_batch_size=micro_batch_size,
                    global_batch_tokens=total * dp_size * microbatches,
                    dp_rank=dp_rank,
                    dp_size=dp_size,
                    pieces=pieces,
                    document_masking=document_masking,
                    prefetch=False,
                    dealing=dealing,
                )
                batches = loader.read(self.clock)
                boundaries.append([batch.cu_seqlens.tolist() for batch in batches])
                for batch in batches:
                    self._count(batch, document_masking)
            # Every rank of a microbatch must see the same documents.
            if any(found != boundaries[0] for found in boundaries):
                self.outcome.problems.append(
                    f"clock {self.clock}: the ranks of a microbatch disagree on cu_seqlens"
                )
        self.clock += total * dp_size * microbatches
        self.outcome.steps += 1

    # ---- the run ----

    def random_phases(self) -> None:
        """Run PHASES phases, or fewer where the sources soon have no room for more."""
        failures = 0
        # A setting that no source has room for is drawn again.
        while failures < 8 and self.outcome.phases < PHASES and not self.outcome.problems:
            seq_length = self.longest >> self.chance.randrange(8)
            names = self.chance.sample(
                [source.name for source in self.sources], self.chance.randint(1, 3)
            )
            packing = self.chance.choice(PACKINGS)
            blend = tuple((round(self.chance.uniform(0.1, 1), 3), name) for name in names)
            # Best-fit samples are meant to keep documents apart.
            masking = packing == "best_fit" or self.chance.random() < 0.7
            if not self._enter(self._settings(seq_length, blend, packing)):
                failures += 1
                continue
            failures = 0
            self.masked_only = self.masked_only and masking
            # A third of what there is, on average: many phases, and sources at many places.
            budget = int(self._samples_left() * self.chance.uniform(0.05, 0.6)) + 1
            self._run_phase(seq_length, budget, masking)

    def drain(self) -> None:
        """Draw the rest of each source by itself, so that the whole epoch has been drawn."""
        for source in self.sources:
            if not self.outcome.problems:
                seq_length = self.longest >> 7
                if self._enter(
                    DataSettings(seq_length, ((1.0, source.name),), "best_fit", "error")
                ):
                    self._run_phase(seq_length, self._samples_left(), True, single=True)
        left = {name: int(intervals[:, 1].sum()) for name, intervals in self._unread().items()}
        if any(left.values()) and not self.outcome.problems:
            self.outcome.problems.append(f"not drawn at the end of the epoch: {left}")

    def _settings(
        self, seq_length: int, blend: tuple[tuple[float, str], ...], packing: Packing
    ) -> DataSettings:
        """Draw what else samples are asked for: few documents, equal cost, steps by cost."""
        settings = DataSettings(seq_length, blend, packing, "error")
        if packing == "concat":
            return settings
        most = self.chance.choice([None, None, 4, 32])
        cost = self.chance.choice([None, SAMPLE_COST])
        step = self.chance.choice([None, 1, 6]) if cost else None
        return replace(
            settings, max_documents_per_sample=most, equal_cost=cost, samples_per_step=step
        )

    def _enter(self, settings: DataSettings) -> bool:
        """Open a segment of the ledger; False where it has no sample left."""
        self.ledger.enter(self.clock, f"phase {self.outcome.phases}", settings)
        if self._samples_left() == 0:
            return False
        self.outcome.phases += 1
        self.outcome.lengths.add(settings.seq_length)
        return True

    def _run_phase(self, seq_length: int, budget: int, masking: bool, single: bool = False) -> None:
        """Take steps over up to `budget` samples, with other batches, layouts and restarts."""
        layout = None
        while budget > 0 and not self.outcome.problems:
            if layout is None or self.chance.random() < 0.3:
                # Another batch and layout from here on.
                layout = self._draw_layout(budget, single)
            micro_batch_size, dp_size, microbatches, cp_size, balanced = layout
            samples = micro_batch_size * dp_size * microbatches
            if samples > budget:
                layout = None
                continue
            self._read_step(
                seq_length, micro_batch_size, dp_size, microbatches, cp_size, balanced, masking
            )
            budget -= samples
            if self.chance.random() < 0.08:
                self._restart()
            if self.chance.random() < 0.03 and budget > 1 and not single:
                budget -= self._pass_over(
                    seq_length, self.chance.randint(1, max(1, min(budget - 1, 64)))
                )
        self._restart()
        self._check()

    def _draw_layout(self, budget: int, single: bool) -> tuple[int, int, int, int, bool]:
        """Draw micro batch size, dp, microbatches, cp, and whether slices are balanced.

        A step then takes at most `budget` samples.
        """
        while True:
            micro = self.chance.choice([1, 2, 4])
            dp = self.chance.choice([1, 2, 3, 4])
            cp = self.chance.choice([1, 2, 4, 8])
            most = min(budget // (micro * dp), 64)
            if most >= 1:
                return (
                    micro,
                    dp,
                    self.chance.randint(max(1, most // 2), most),
                    cp,
                    self.chance.random() < 0.5,
                )

    def _restart(self) -> None:
        """Throw everything away but what a checkpoint has."""
        self.ledger = self._open(json.loads(json.dumps(self.ledger.to_json(self.clock))))
        self.outcome.restarts += 1

    def _pass_over(self, seq_length: int, samples: int) -> int:
        """Skip a window of the clock, and note which tokens it held; returns its samples."""
        # What is unread before and not after was passed over.
        before = self._marked(self._unread())
        self.ledger.skip(self.clock, self.clock + samples * seq_length)
        skipped = before - self._marked(self._unread())
        # They are expected nowhere.
        self.passed += skipped
        self.outcome.passed_over += int(skipped.sum(dtype=np.int64))
        return samples

    # ---- counting and checking, which knows nothing of the engine's ways ----

    def _count(self, batch: Batch, document_masking: bool) -> None:
        """Count a batch's inputs and labels."""
        wrong = count_batch(
            batch.tokens.numpy(),
            batch.labels.numpy(),
            document_masking,
            self.starts,
            self.inputs,
            self.labels,
        )
        if wrong >= 0:
            self.outcome.problems.append(
                f"clock {self.clock}: the label of {self._name(int(batch.tokens[wrong]))} is "
                f"{self._name(int(batch.labels[wrong]))}"
            )

    def _marked(self, unread: dict[str, np.ndarray]) -> np.ndarray:
        """Mark the tokens of the given intervals of the streams: uint8 [tokens + 1]."""
        out = np.zeros_like(self.inputs)
        for source in self.sources:
            spans = self.ledger.streams[source.name].locate(unread[source.name])
            mark_tokens(source.starts[spans.documents] + spans.offsets, spans.lengths, out)
        return out

    def _check(self) -> None:
        """Compare the counters with what the ledger says."""
        expected = np.zeros_like(self.inputs)
        for source in self.sources:
            documents = (
                np.arange(len(source.lengths)) if source.selected is None else source.selected
            )
            mark_tokens(source.starts[documents], source.lengths[documents], expected)
        # Each selected token once, unless it is unread or was passed over.
        expected -= self._marked(self._unread()) + self.passed
        drawn = int(self.inputs.sum(dtype=np.int64))
        for source in self.sources:
            wrong, kind = find_difference(
                source.starts,
                source.lengths,
                expected,
                self.inputs,
                self.labels,
                not self.masked_only,
            )
            if wrong >= 0:
                what, count, wanted = (
                    ("an input", self.inputs[wrong], expected[wrong])
                    if kind == 0
                    else ("a label", self.labels[wrong], "another number of")
                )
                self.outcome.problems.append(
                    f"clock {self.clock}: {self._name(wrong)} was {what} {count} times, "
                    f"expected: {wanted} times"
                )
        # The ledger's own account must agree with the counters.
        by_ledger = sum(self.ledger.tokens_by_source(self.clock).values())
        if by_ledger != drawn:
            self.outcome.problems.append(
                f"clock {self.clock}: {drawn} tokens were read, the ledger says {by_ledger}"
            )
        if self.inputs[0] or self.labels[0]:
            self.outcome.problems.append("padding was counted")
        self.outcome.drawn = drawn
        settings = self.ledger.open.settings
        self.log(
            f"phase {self.outcome.phases}: {settings.packing} {settings.seq_length} from "
            f"{'+'.join(name for _, name in settings.blend)}: {drawn / self.outcome.tokens:.1%} "
            "drawn, "
            f"{self.outcome.restarts} restarts so far"
        )

    def _name(self, token: int) -> str:
        """Name a token by its document and source."""
        for source in reversed(self.sources):
            if token >= source.base:
                document = int(np.searchsorted(source.starts, token, side="right")) - 1
                return (
                    f"token {token - source.starts[document]} of document {document} of "
                    f"{source.name}"
                )
        return "padding"
