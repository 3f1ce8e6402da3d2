"""The trainer's long-context probes on an opened model: loss by length, context gain, passkey."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from data.first_pass import FirstPass
from data.loader import Loader
from data.sources import Blend
from parallel.context import token_pieces
from pretrain.evaluation import context_gain, passkey
from pretrain.evaluation.probe import ProbeShape
from pretrain.evaluation.validation_loss import validation_loss
from pretrain.step import Stepper
from tools.inference.open_model import OpenModel

MICRO_BATCH_TOKENS = 8192
"""Tokens of a microbatch of short samples."""


@dataclass(frozen=True)
class ProbeSettings:
    """What the probes measure, under the names of the trainer's flags."""

    loss_tokens: int
    """Tokens of data whose loss is measured, the same ones at each length."""
    context_gain_cut: int
    context_gain_documents: int
    eval_passkey_depths: list[float]
    eval_passkey_trials: int
    seed: int


class Probes:
    """Runs the probes on one model and one blend of documents; collective over the layout."""

    def __init__(self, model: OpenModel, blend: Blend, settings: ProbeSettings):
        layout = model.layout
        self.layout = layout
        self.blend = blend
        self.tokenizer = model.tokenizer
        self.settings = settings
        self.vocab_size = model.vocab_size
        self.eod = self.tokenizer.eod if self.tokenizer is not None else None
        # Only its forward path is used: nothing is sharded or updated.
        self.stepper = Stepper(
            [model.stage], layout, model.config.hidden_size, model.dtype, "optim"
        )
        self.shape = ProbeShape(
            token_multiple=layout.token_multiple,
            padding=self.eod or 0,
            vocab_size=model.vocab_size,
        )

    def run(
        self, names: Sequence[str], lengths: Sequence[int], note: Callable[[str], None]
    ) -> Iterator[dict[str, Any]]:
        """Measure the named probes at all lengths.

        Args:
            note: is told of what cannot be measured on these documents.

        Yields:
            A record for each probe and length, of a passkey for each depth.
        """
        with torch.no_grad():
            for length in lengths:
                if "loss" in names:
                    yield self._loss(length)
                if "context_gain" in names:
                    yield from self._context_gain(length, note)
                if "passkey" in names:
                    yield from self._passkey(length)

    def _loss(self, length: int) -> dict[str, Any]:
        """Measure the mean loss in samples of one length."""
        samples = FirstPass(self.blend, length)
        micro_batch_size = max(1, MICRO_BATCH_TOKENS // length)
        tokens = micro_batch_size * length
        loader = Loader(
            samples,
            micro_batch_size=micro_batch_size,
            global_batch_tokens=tokens,
            dp_rank=0,
            dp_size=1,
            pieces=token_pieces(tokens, self.layout),
            eod=self.eod,
            vocab_size=self.vocab_size,
            prefetch=False,
        )
        count = min(max(1, self.settings.loss_tokens // length), samples.num_samples)
        loss, targets = validation_loss(self.stepper, loader, count)
        if targets == 0:
            raise ValueError(
                f"data_path: the first {count * length:,} tokens hold no target. Fix: other data."
            )
        return {"task": "loss", "length": length, "loss": loss, "num_targets": targets}

    def _context_gain(self, length: int, note: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """Measure what the context beyond the cut is worth, where documents are long enough."""
        cut = self.settings.context_gain_cut
        if length < 2 * cut:
            note(
                f"context gain at {length:,} is not measured: it needs 2 x context_gain_cut = "
                f"{2 * cut:,} tokens"
            )
            return
        documents = context_gain.choose_documents(
            self.blend, cut, length, self.settings.context_gain_documents
        )
        if not documents:
            note(
                f"context gain at {length:,} is not measured: no document has "
                f"2 x context_gain_cut = {2 * cut:,} tokens"
            )
            return
        found = context_gain.measure(
            self.stepper, documents, length, cut, self.settings.seed, self.shape
        )
        record = {"task": "context_gain", "length": length, "cut": cut, "gain": found.gain}
        yield record | asdict(found)

    def _passkey(self, length: int) -> Iterator[dict[str, Any]]:
        """Hide a number in the first source's documents and ask for it."""
        assert self.tokenizer is not None, "passkeys are refused without a tokenizer"
        _, stream = self.blend[0]
        results = passkey.measure(
            self.stepper,
            self.tokenizer,
            stream,
            length,
            self.settings.eval_passkey_depths,
            self.settings.eval_passkey_trials,
            self.settings.seed,
            self.shape,
        )
        for result in results:
            yield {"task": "passkey", "length": length} | asdict(result)
