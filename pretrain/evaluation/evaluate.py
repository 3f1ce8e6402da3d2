"""What is measured on validation data at a phase's start and end and every eval_interval.

Loss at one or several sample lengths, context gain (evaluation/context_gain.py) and passkey retrieval
(evaluation/passkey.py), each through the forward path of training, without gradients. Which documents and
targets are scored follows from the settings of the phase and of the evaluation, not from the
layout.
"""

import dataclasses
from collections.abc import Iterator, Sequence

from data.batch import IGNORE, Batch
from data.loader import Loader
from data.tokenizers.tokenizer import Tokenizer
from parallel.layout import Layout
from parallel.shard import reshard
from pretrain.batches import Feed
from pretrain.config.config import Config, LoggingConfig
from pretrain.config.load import warn
from pretrain.evaluation import context_gain, passkey
from pretrain.evaluation.probe import microbatch_count
from pretrain.schedule.phases import Phase
from pretrain.step import Stepper

LEAST_DOCUMENTS = 4
MOST_DOCUMENTS = 16
"""Of each set for the context gain, unless the run names its number: as many as a global batch has
samples."""

MUCH_LARGER = 4
"""Times a phase's microbatch that an evaluation's may have without a warning: nothing is kept for a
backward."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The batches of a validation loss at some length."""

    seq_length: int
    micro_batch_size: int
    """Samples per microbatch: as many as the phase's microbatch has tokens for, at least one."""
    batch_samples: int
    """Samples per global batch that are counted: the phase's tokens, in whole samples."""

    @staticmethod
    def make(phase: Phase, seq_length: int) -> "Shape":
        return Shape(
            seq_length,
            max(1, phase.seq_length * phase.micro_batch_size // seq_length),
            max(1, round(phase.global_batch_tokens / seq_length)),
        )

    def global_batch_tokens(self, layout: Layout) -> int:
        """Tokens that the ranks read together: `batch_samples` or the next number above it that
        data parallelism and the pipeline schedule take."""
        unit = self.micro_batch_size * layout.dp.size
        return microbatch_count(-(-self.batch_samples // unit), layout) * unit * self.seq_length


def check(settings: LoggingConfig, tokenizer: Tokenizer | None) -> list[str]:
    """Lengths that hold no passkey trial, as `name = value: rule. Fix: ...`."""
    if settings.eval_iters == 0 or not settings.eval_passkey_lengths or tokenizer is None:
        return []
    return passkey.check_lengths(tokenizer, settings.eval_passkey_lengths)


def check_lengths(settings: LoggingConfig, phase: Phase) -> list[str]:
    """Lengths that the phase's layout cannot cut, as `name = value: rule. Fix: ...`."""
    if settings.eval_iters == 0:
        return []
    multiple = phase.layout.token_multiple
    problems = []
    for length in settings.eval_seq_lengths:
        if length < 1:
            continue  # said by the configuration's own check
        micro = Shape.make(phase, length).micro_batch_size
        if micro * length % multiple:
            problems.append(
                f"eval_seq_lengths = {length}: the {micro} x {length} tokens of a "
                f"microbatch must be a multiple of {multiple}, so that every rank gets as "
                f"many. Fix: for example {-(-length // multiple) * multiple}."
            )
    problems += [
        f"eval_passkey_lengths = {length}: must be a multiple of {multiple}, so that every "
        f"rank gets as many tokens. Fix: for example {-(-length // multiple) * multiple}."
        for length in settings.eval_passkey_lengths
        if length % multiple
    ]
    return problems


def warnings(settings: LoggingConfig, phases: Sequence[Phase]) -> list[str]:
    """Lengths whose microbatches are so much larger than the phase's that they may not fit into its
    memory."""
    found = []
    for phase in phases if settings.eval_iters else ():
        own = phase.seq_length * phase.micro_batch_size
        found += [
            f"phase {phase.name!r}: {name} = {length}: a microbatch has {length / own:.0f} times the tokens of "
            "the phase's own on each rank and may not fit into memory"
            for name in ("eval_seq_lengths", "eval_passkey_lengths")
            for length in getattr(settings, name)
            if length > MUCH_LARGER * own
        ]
    return found


class Evaluator:
    """Runs all evaluations of a run on one layout."""

    def __init__(self, config: Config, feed: Feed, tokenizer: Tokenizer | None):
        self.settings = config.logging
        self.seed = config.optimizer.seed
        self.feed = feed
        self.tokenizer = tokenizer
        self._documents: dict[tuple[str, int, int], list[context_gain.Document]] = {}

    def unmeasured(self, phase: Phase) -> list[str]:
        """Why some set has no context gain in the phase, a sentence each."""
        cut = self.settings.context_gain_cut
        if not (
            self.settings.eval_context_gain
            and self.settings.eval_iters
            and self.feed.corpus.validation
        ):
            return []
        if phase.seq_length < 2 * cut:
            return [
                f"context gain is not measured in phase {phase.name}: its seq_length {phase.seq_length:,} is below "
                f"2 x context_gain_cut = {2 * cut:,}"
            ]
        return [
            f"context gain of {name} is not measured: no document of it has 2 x context_gain_cut = {2 * cut:,} "
            "tokens"
            for name in self.feed.corpus.validation
            if not self._long_documents(name, phase)
        ]

    def taken_whole(self, phase: Phase) -> list[str]:
        """Name the sets with fewer tokens than an evaluation of the phase takes, a sentence
        each."""
        if not self.settings.eval_iters:
            return []
        limit = self.settings.eval_iters * phase.global_batch_tokens
        sizes = {
            name: sum(stream.tokens_per_epoch for _, stream in blend)
            for name, blend in self.feed.corpus.validation.items()
        }
        return [
            f"validation set {name} has {size:,} tokens, and eval_iters x the batch are "
            f"{limit:,}: each of its tokens is counted once"
            for name, size in sizes.items()
            if size < limit
        ]

    def run(self, stepper: Stepper, phase: Phase) -> Iterator[dict]:
        """Records without their place in the run; collective over the world.

        Raises:
            Interrupted: somebody asked to stop; on all ranks. What was being measured gives no
                record.
        """
        try:
            yield from self._measure(stepper, phase)
        finally:
            reshard(stepper.stages)

    def _measure(self, stepper: Stepper, phase: Phase) -> Iterator[dict]:
        settings = self.settings
        feed = self.feed
        if not settings.eval_iters or not feed.corpus.validation:
            return
        layout = {
            "token_multiple": phase.layout.token_multiple,
            "padding": feed.eod or 0,
            "vocab_size": feed.vocab_size,
        }
        for length in sorted({*settings.eval_seq_lengths} or {phase.seq_length}):
            _expect_another_pace(stepper)
            yield from self._losses(stepper, phase, Shape.make(phase, length))
        if settings.eval_context_gain and phase.seq_length >= 2 * settings.context_gain_cut:
            _expect_another_pace(stepper)
            yield from self._context_gains(stepper, phase, layout)
        stream = next(iter(feed.corpus.validation.values()))[0][1]
        for length in sorted({*settings.eval_passkey_lengths}):
            _expect_another_pace(stepper)
            for result in passkey.measure(
                stepper,
                self.tokenizer,
                stream,
                length,
                settings.eval_passkey_depths,
                settings.eval_passkey_trials,
                self.seed,
                **layout,
            ):
                yield {"seq_length": length, "kind": "passkey", **dataclasses.asdict(result)}

    def _losses(self, stepper: Stepper, phase: Phase, shape: Shape) -> Iterator[dict]:
        tokens = shape.global_batch_tokens(self.feed.layout)
        for name, (loader, found) in self.feed.validation(
            phase, shape.seq_length, shape.micro_batch_size, tokens
        ).items():
            samples = min(self.settings.eval_iters * shape.batch_samples, found.num_samples)
            loss, targets = validation_loss(stepper, loader, samples)
            # A loss of 0 would look like a perfect model.
            if targets == 0:
                if self.feed.layout.world.is_first:
                    warn(
                        f"validation set {name}: the {samples:,} samples of an evaluation hold no "
                        "target, so that it has no loss"
                    )
                continue
            yield {
                "set": name,
                "seq_length": shape.seq_length,
                "kind": "loss",
                "valid_loss": loss,
                "num_targets": targets,
            }

    def _context_gains(self, stepper: Stepper, phase: Phase, layout: dict) -> Iterator[dict]:
        cut = self.settings.context_gain_cut
        for name in self.feed.corpus.validation:
            if documents := self._long_documents(name, phase):
                found = context_gain.measure(
                    stepper, documents, phase.seq_length, cut, self.seed, **layout
                )
                yield {
                    "set": name,
                    "seq_length": phase.seq_length,
                    "kind": "context_gain",
                    "cut": cut,
                    "loss_full": found.loss_full,
                    "loss_cut": found.loss_cut,
                    "gain": found.gain,
                    "gain_low": found.gain_low,
                    "gain_high": found.gain_high,
                    "documents": found.documents,
                    "num_targets": found.num_targets,
                }

    def _long_documents(self, name: str, phase: Phase) -> list[context_gain.Document]:
        samples = Shape.make(phase, phase.seq_length).batch_samples
        count = self.settings.context_gain_documents or min(
            MOST_DOCUMENTS, max(LEAST_DOCUMENTS, samples)
        )
        key = name, phase.seq_length, count
        if key not in self._documents:
            self._documents[key] = context_gain.choose_documents(
                self.feed.corpus.validation[name],
                self.settings.context_gain_cut,
                phase.seq_length,
                count,
            )
        return self._documents[key]


def _expect_another_pace(stepper: Stepper) -> None:
    """Look for a signal at the next microbatch: those of another length take another time."""
    if stepper.stop is not None:
        stepper.stop.restart()


def validation_loss(stepper: Stepper, loader: Loader, samples: int) -> tuple[float, int]:
    """Mean loss in nats over the targets of the loader's first `samples` -> (loss, targets);
    collective.

    The last batch may hold more samples: their targets are taken out. Without any target the loss
    is 0.
    """
    size = loader.global_batch_tokens // loader.seq_length
    loss_sum = 0.0
    targets = 0
    for first in range(0, samples, size):
        microbatches = []
        for j, batch in enumerate(loader.read(first * loader.seq_length)):
            begin = first + (j * loader.dp_size + loader.dp_rank) * loader.micro_batch_size
            kept = _keep_samples(batch, samples - begin, loader)
            microbatches.append(kept.to(stepper.layout.device))
        loss, count = stepper.run(microbatches, train=False)
        loss_sum = loss_sum + loss * count
        targets = targets + count
    return loss_sum / max(1, targets), targets


def _keep_samples(batch: Batch, count: int, loader: Loader) -> Batch:
    """The microbatch with targets in its first `count` samples only."""
    if count >= loader.micro_batch_size:
        return batch
    labels = batch.labels.clone()
    at = 0
    for low, high in loader.pieces:
        kept = min(max(count * loader.seq_length - low, 0), high - low)
        labels[at + kept : at + high - low] = IGNORE
        at += high - low
    return dataclasses.replace(batch, labels=labels, num_targets=-1)
