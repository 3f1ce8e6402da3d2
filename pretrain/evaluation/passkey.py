"""Passkey retrieval: a random number hidden in real text, asked for at the end.

A trial is filler, a sentence with the number at some depth of it, more filler, the question and the
answer; the answer's tokens are the targets (teacher forcing), and the trial counts as solved when
each of them is the model's first choice. All depths of a trial share its number and filler.

Source of the task: Mohtashami and Jaggi (arXiv 2305.16300), section 4.2.
"""

from dataclasses import dataclass

import numpy as np

from data.excerpts import Excerpt
from data.stream import DocumentStream
from data.tokenizers.tokenizer import Tokenizer
from pretrain.evaluation.probe import score_probes
from pretrain.step import Stepper

SENTENCE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One depth of one length."""

    depth: float
    accuracy: float
    """Share of the trials whose every answer token was the model's first choice."""
    answer_loss: float
    """Nats per answer token, mean over all trials' tokens."""
    trials: int


def write_texts(tokenizer: Tokenizer, key: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(sentence, question with the answer, how many of the latter's last tokens are the answer), as
    ids.

    The answer begins where the ids with and without it part, since a tokenizer may join letters
    over its beginning.

    Raises:
        ValueError: the tokenizer has no ids for the text.
    """
    sentence, question, asked = (
        np.array(tokenizer.encode(text), dtype=np.int64)
        for text in (SENTENCE.format(key=key), QUESTION, f"{QUESTION} {key}")
    )
    shared = min(len(question), len(asked) - 1)
    parts = np.flatnonzero(question[:shared] != asked[:shared])
    return sentence, asked, len(asked) - (int(parts[0]) if len(parts) else shared)


def check_lengths(tokenizer: Tokenizer, lengths: list[int]) -> list[str]:
    """The lengths that leave too little filler, or a tokenizer that cannot write the texts, each
    with rule and fix."""
    try:
        sentence, asked, _ = write_texts(tokenizer, 99999)
    except ValueError as error:
        return [
            f"eval_passkey_lengths = {' '.join(map(str, lengths))}: the tokenizer cannot write the question "
            f"({error}). Fix: leave it out, or another tokenizer."
        ]
    least = 2 * (len(sentence) + len(asked))
    return [
        f"eval_passkey_lengths = {length}: half of it must hold the hidden sentence and the question, "
        f"{least // 2} tokens. Fix: at least {least}."
        for length in lengths
        if length < least
    ]


def write_trial(
    tokenizer: Tokenizer,
    stream: DocumentStream,
    length: int,
    depths: list[float],
    seed: int,
    trial: int,
) -> list[Excerpt]:
    """One trial at each depth, `length` tokens each: a pure function of its arguments."""
    generator = np.random.default_rng([seed, length, trial])
    sentence, asked, answer = write_texts(tokenizer, int(generator.integers(10000, 100000)))
    start = stream.document_start(int(generator.integers(stream.tokens_per_epoch)))
    filler = _filler(stream, start, length - len(sentence) - len(asked), tokenizer.eod)
    excerpts = []
    for depth in depths:
        place = round(depth * len(filler))
        parts = (
            filler[:place],
            sentence,
            filler[place:],
            asked,
        )  # views: at 1M tokens each depth would keep 8 MB
        excerpts.append(
            Excerpt(
                lambda first, count, parts=parts: np.concatenate(parts)[first : first + count],
                0,
                length,
                np.array([[length - answer, length]]),
            )
        )
    return excerpts


def _filler(stream: DocumentStream, start: int, count: int, eod: int | None) -> np.ndarray:
    """Tokens of the stream from `start` on, without the ends of documents: after one a model starts
    afresh."""
    parts = []
    needed = count
    end = start + stream.tokens_per_epoch + count
    while needed:
        ids = stream.read(start, needed)
        start += needed
        parts.append(ids[ids != eod] if eod is not None else ids)
        needed -= len(parts[-1])
        if start > end and needed == count:
            raise ValueError(
                "eval_passkey_lengths: the validation documents hold nothing but ends of documents. "
                "Fix: other validation data, or leave it out."
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
    **layout,
) -> list[Passkey]:
    """All trials of one length -> the result of each depth; collective over the world.

    Args:
        layout: what `score_probes` asks for besides.
    """
    written = [
        write_trial(tokenizer, stream, length, depths, seed, trial) for trial in range(trials)
    ]
    probes = [[trial[number]] for number in range(len(depths)) for trial in written]
    scores = score_probes(stepper, probes, length, **layout)
    sums, targets, hits = (
        values.reshape(len(depths), trials)
        for values in (scores.loss_sums, scores.num_targets, scores.first_choices)
    )
    return [
        Passkey(
            depth,
            float((hits[i] == targets[i]).mean()),
            float(sums[i].sum() / targets[i].sum()),
            trials,
        )
        for i, depth in enumerate(depths)
    ]
