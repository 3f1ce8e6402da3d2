"""What is measured on validation data at a phase's start and end and every eval_interval.

Loss at one or several sample lengths, context gain (evaluation/context_gain.py) and passkey
retrieval (evaluation/passkey.py), each through the forward path of training, without gradients.
Which documents and targets are scored follows from the settings of the phase and of the evaluation,
not from the layout.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from data.tokenizers.tokenizer import Tokenizer
from parallel.shard import reshard
from pretrain.batches import Feed
from pretrain.checkpointing.progress import ValidationScore
from pretrain.config.config import Config
from pretrain.config.load import warn
from pretrain.evaluation import context_gain, passkey
from pretrain.evaluation.lengths import ValidationBatch
from pretrain.evaluation.probe import ProbeShape
from pretrain.evaluation.validation_loss import validation_loss
from pretrain.schedule.phases import Phase
from pretrain.step import Stepper

LEAST_DOCUMENTS = 4
MOST_DOCUMENTS = 16
"""Limits of a set's documents for the context gain, unless the run names their number: as many as a
global batch has samples."""


class Evaluator:
    """Runs all evaluations of a run on one layout."""

    def __init__(self, config: Config, feed: Feed, tokenizer: Tokenizer | None):
        self.settings = config.logging
        self.seed = config.optimizer.seed
        self.feed = feed
        self.tokenizer = tokenizer
        self._documents: dict[tuple[str, int, int], list[context_gain.Document]] = {}

    def unmeasured(self, phase: Phase) -> list[str]:
        """Say why some set has no context gain in the phase, a sentence each."""
        settings = self.settings
        least = 2 * settings.context_gain_cut
        # Whether it is asked for; then what is too short for it, the phase or the documents.
        is_asked = settings.eval_context_gain and settings.eval_iters
        if not is_asked or not self.feed.corpus.validation:
            return []
        if phase.seq_length < least:
            return [
                f"context gain is not measured in phase {phase.name}: its seq_length "
                f"{phase.seq_length:,} is below 2 x context_gain_cut = {least:,}"
            ]
        return [
            f"context gain of {name} is not measured: no document of it has "
            f"2 x context_gain_cut = {least:,} tokens"
            for name in self.feed.corpus.validation
            if not self._long_documents(name, phase)
        ]

    def taken_whole(self, phase: Phase) -> list[str]:
        """Name the sets with fewer tokens than an evaluation of the phase takes, in sentences."""
        if not self.settings.eval_iters:
            return []
        # An evaluation goes once through such a set, and stops there.
        limit = self.settings.eval_iters * phase.global_batch_tokens
        found = []
        for name, blend in self.feed.corpus.validation.items():
            size = sum(stream.tokens_per_epoch for _, stream in blend)
            if size < limit:
                found.append(
                    f"validation set {name} has {size:,} tokens, and eval_iters x the batch are "
                    f"{limit:,}: each of its tokens is counted once"
                )
        return found

    def run(self, stepper: Stepper, phase: Phase) -> Iterator[dict[str, Any]]:
        """Measure everything that the settings ask for; collective over the world.

        Yields:
            Lines of validation.jsonl without their place in the run.

        Raises:
            Interrupted: somebody asked to stop; on all ranks. What was being measured gives no
                line.
        """
        try:
            yield from self._measure(stepper, phase)
        finally:
            reshard(stepper.stages)

    def _measure(self, stepper: Stepper, phase: Phase) -> Iterator[dict[str, Any]]:
        settings = self.settings
        if not settings.eval_iters or not self.feed.corpus.validation:
            return
        # Loss, gain and passkeys in turn. Each length has another pace, in which ranks ask each
        # other for signals.
        for length in sorted({*settings.eval_seq_lengths} or {phase.seq_length}):
            _expect_another_pace(stepper)
            yield from self._losses(stepper, phase, ValidationBatch.of(phase, length))
        if settings.eval_context_gain and phase.seq_length >= 2 * settings.context_gain_cut:
            _expect_another_pace(stepper)
            yield from self._context_gains(stepper, phase)
        for length in sorted({*settings.eval_passkey_lengths}):
            _expect_another_pace(stepper)
            yield from self._passkeys(stepper, phase, length)

    def _losses(
        self, stepper: Stepper, phase: Phase, shape: ValidationBatch
    ) -> Iterator[dict[str, Any]]:
        """Measure the loss of each set at one sample length."""
        layout = self.feed.layout
        opened = self.feed.validation(
            phase, shape.seq_length, shape.micro_batch_size, shape.global_batch_tokens(layout)
        )
        for name, (loader, found) in opened.items():
            # No token twice: a set that is smaller than what is asked for is taken whole.
            samples = min(self.settings.eval_iters * shape.batch_samples, found.num_samples)
            loss, targets = validation_loss(stepper, loader, samples)
            # A loss of 0 would look like a perfect model.
            if targets == 0:
                if layout.world.is_first:
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

    def _context_gains(self, stepper: Stepper, phase: Phase) -> Iterator[dict[str, Any]]:
        """Measure the context gain of each set that has documents long enough."""
        cut = self.settings.context_gain_cut
        for name in self.feed.corpus.validation:
            documents = self._long_documents(name, phase)
            if not documents:
                continue  # said at the start of the phase (`unmeasured`)
            found = context_gain.measure(
                stepper, documents, phase.seq_length, cut, self.seed, self._probe_shape(phase)
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

    def _passkeys(self, stepper: Stepper, phase: Phase, length: int) -> Iterator[dict[str, Any]]:
        """Hide and ask for passkeys in samples of one length."""
        assert self.tokenizer is not None, "lengths of passkeys are refused without a tokenizer"
        # The filler: the first source of the first set.
        blend = next(iter(self.feed.corpus.validation.values()))
        _, stream = blend[0]
        results = passkey.measure(
            stepper,
            self.tokenizer,
            stream,
            length,
            self.settings.eval_passkey_depths,
            self.settings.eval_passkey_trials,
            self.seed,
            self._probe_shape(phase),
        )
        for result in results:
            yield {"seq_length": length, "kind": "passkey", **dataclasses.asdict(result)}

    def _probe_shape(self, phase: Phase) -> ProbeShape:
        return ProbeShape(
            token_multiple=phase.layout.token_multiple,
            padding=self.feed.eod or 0,
            vocab_size=self.feed.vocab_size,
            dealing=self.feed.dealing(phase, train=False),
        )

    def _long_documents(self, name: str, phase: Phase) -> list[context_gain.Document]:
        """Choose the documents of a set for the context gain, once per length."""
        samples = ValidationBatch.of(phase, phase.seq_length).batch_samples
        within_limits = min(MOST_DOCUMENTS, max(LEAST_DOCUMENTS, samples))
        count = self.settings.context_gain_documents or within_limits
        # Looking through the lengths of a large set takes a while.
        key = name, phase.seq_length, count
        if key not in self._documents:
            self._documents[key] = context_gain.choose_documents(
                self.feed.corpus.validation[name],
                self.settings.context_gain_cut,
                phase.seq_length,
                count,
            )
        return self._documents[key]


def score_of(records: Sequence[dict[str, Any]]) -> ValidationScore | None:
    """Pick the loss of the first set at the longest length of an evaluation; None without any."""
    losses = [record for record in records if record["kind"] == "loss"]
    if not losses:
        return None
    of_first = [record for record in losses if record["set"] == losses[0]["set"]]
    longest = max(of_first, key=lambda record: record["seq_length"])
    return ValidationScore(longest["set"], longest["seq_length"], longest["valid_loss"])


def _expect_another_pace(stepper: Stepper) -> None:
    """Look for a signal at the next microbatch: those of another length take another time."""
    if stepper.stop is not None:
        stepper.stop.restart()
