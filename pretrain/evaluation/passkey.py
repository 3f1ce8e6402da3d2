"""Passkey retrieval: a random number hidden in real text, asked for at the end.

A trial is filler, a sentence with the number at some depth of it, more filler, the question and the
answer; the answer's tokens are the targets (teacher forcing), and the trial counts as solved when
the model gives each of them its largest logit. All depths of a trial share its number and filler.

Source of the task: Mohtashami and Jaggi (arXiv 2305.16300), section 4.2.
"""

from dataclasses import dataclass

import numpy as np

from data.excerpts import Excerpt
from data.stream import DocumentStream
from data.tokenizers.tokenizer import Tokenizer
from pretrain.evaluation.passkey_texts import HIGHEST_KEY, LOWEST_KEY, write_texts
from pretrain.evaluation.probe import ProbeShape, score_probes
from pretrain.step import Stepper


@dataclass(frozen=True)
class Passkey:
    """The result of one depth at one length."""

    depth: float
    accuracy: float
    """Share of the trials whose every answer token got the model's largest logit."""
    answer_loss: float
    """Nats per answer token, mean over all trials' tokens."""
    trials: int


def write_trial(
    tokenizer: Tokenizer,
    stream: DocumentStream,
    length: int,
    depths: list[float],
    seed: int,
    trial: int,
) -> list[Excerpt]:
    """Write one trial at each depth, `length` tokens each: a pure function of its arguments."""
    # All depths share the number and the filler, so that only the place of the number differs.
    generator = np.random.default_rng([seed, length, trial])
    texts = write_texts(tokenizer, int(generator.integers(LOWEST_KEY, HIGHEST_KEY + 1)))
    start = stream.document_start(int(generator.integers(stream.tokens_per_epoch)))
    filler_tokens = length - len(texts.sentence) - len(texts.question)
    filler = _read_filler(stream, start, filler_tokens, tokenizer.eod)
    answer = np.array([[length - texts.answer_tokens, length]])
    excerpts = []
    for depth in depths:
        place = round(depth * len(filler))
        # Views, put together only when they are read: at 1M tokens each depth would keep 8 MB.
        parts = (filler[:place], texts.sentence, filler[place:], texts.question)

        def read(first: int, count: int, parts: tuple[np.ndarray, ...] = parts) -> np.ndarray:
            return np.concatenate(parts)[first : first + count]

        excerpts.append(Excerpt(read, 0, length, answer))
    return excerpts


def _read_filler(stream: DocumentStream, start: int, count: int, eod: int | None) -> np.ndarray:
    """Read tokens of the stream from `start` on, without the ends of documents.

    After an end of a document a model pays no attention to what was before it.
    """
    parts = []
    needed = count
    end = start + stream.tokens_per_epoch + count
    while needed:
        ids = stream.read(start, needed)
        start += needed
        parts.append(ids[ids != eod] if eod is not None else ids)
        needed -= len(parts[-1])
        # A whole epoch without a token to keep.
        if start > end and needed == count:
            raise ValueError(
                "eval_passkey_lengths: the validation documents hold nothing but ends of "
                "documents. Fix: other validation data, or leave it out."
            )
    return np.concatenate(parts)


def measure(
    stepper: Stepper,
    tokenizer: Tokenizer,
    stream: DocumentStream,
    length: int,
    depths: list[float],
    trials: int,
    seed: int,
    shape: ProbeShape,
) -> list[Passkey]:
    """Run all trials of one length; collective over the world.

    Returns:
        The result of each depth.
    """
    written = [
        write_trial(tokenizer, stream, length, depths, seed, trial) for trial in range(trials)
    ]
    # All trials of the first depth, then all of the second ...
    probes = [[trial[number]] for number in range(len(depths)) for trial in written]
    scores = score_probes(stepper, probes, length, shape)
    by_depth = (len(depths), trials)
    loss_sums = scores.loss_sums.reshape(by_depth)
    targets = scores.num_targets.reshape(by_depth)
    is_solved = (scores.num_correct == scores.num_targets).reshape(by_depth)
    return [
        Passkey(
            depth,
            accuracy=float(is_solved[i].mean()),
            answer_loss=float(loss_sums[i].sum() / targets[i].sum()),
            trials=trials,
        )
        for i, depth in enumerate(depths)
    ]
