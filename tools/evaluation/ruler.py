"""RULER's needle and variable-tracking tasks, written from a seed in tokens of a model's tokenizer.

A sample has a length: the tokens of its prompt and of the answer that it leaves room for. Sample
number n hides and asks for the same at every length, so that lengths are compared on equal terms.

Source: RULER, Hsieh et al. (arXiv 2404.06654), sections 3 and 4 and appendix B; names, numbers of
needles, values and hops, tokens of an answer and the score are those of its public code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tools.evaluation.fill import fill
from tools.evaluation.needles import NeedleDraft, NeedleTask
from tools.evaluation.variables import VariableDraft, VariableTask

TASKS: dict[str, NeedleTask | VariableTask] = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("text"),
    "niah_single_3": NeedleTask("text", value="uuid"),
    "niah_multikey_1": NeedleTask("text", keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", key="uuid", value="uuid"),
    "niah_multivalue": NeedleTask("text", values=4),
    "niah_multiquery": NeedleTask("text", keys=4, queries=4),
    "vt": VariableTask(),
}

NEEDLE_ANSWER_TOKENS = 128
VARIABLE_ANSWER_TOKENS = 30
ANSWER_SLACK = 8
"""Tokens beside the answers that a small vocabulary is given, which writes them in more tokens."""

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sample:
    """One prompt, and what a right answer names."""

    number: int
    prompt: str
    ids: list[int]
    answers: list[str]
    answer_tokens: int
    """Tokens that the model may add."""
    depths: list[float]
    """Share of the haystack before each of the sentences that hold an answer."""


def write_sample(
    name: str, length: int, number: int, seed: int, encode: Encode, text: str | None
) -> Sample:
    """Write sample `number` of a task: a pure function of its arguments.

    Args:
        length: tokens of the prompt and the answer.
        encode: gives the ids of a whole prompt.
        text: haystack of the tasks that have one of text; None for repeated sentences.

    Raises:
        ValueError: the length does not even have room for the question.
    """
    draft = _draft(name, number, seed, text)
    answer_tokens = _answer_tokens(draft, encode)

    # As much haystack as there is room for.
    room = length - answer_tokens
    filled = fill(draft.write, encode, room)
    if isinstance(draft, NeedleDraft) and draft.task.haystack == "needles":
        # A unit is a whole needle: what is left over gets repeated sentences.
        units = filled.units
        filled = fill(lambda filler: draft.write(units, filler), encode, room)
    if len(filled.ids) > room:
        raise ValueError(too_short(name, length, len(filled.ids) + answer_tokens))
    return Sample(number, filled.text, filled.ids, draft.answers, answer_tokens, draft.depths)


def tokens_without_haystack(
    name: str, number: int, seed: int, encode: Encode, *, has_text: bool
) -> int:
    """Count the tokens of a sample that has no haystack, and its answer: its shortest length.

    Args:
        has_text: the haystack of the tasks that have one of text is a text.
    """
    # None of the text is in it, whichever it is.
    draft = _draft(name, number, seed, "text" if has_text else None)
    return len(encode(draft.write(0))) + _answer_tokens(draft, encode)


def too_short(name: str, length: int, needed: int) -> str:
    """Say that a length does not have room for a task, as `name = value: rule. Fix: ...`."""
    return (
        f"lengths = {length}: {name} takes {needed:,} tokens without any haystack. Fix: at least "
        f"{needed:,} ({2 * needed:,} make half of it haystack), or --tasks with the others alone."
    )


def _draft(name: str, number: int, seed: int, text: str | None) -> NeedleDraft | VariableDraft:
    """Draw sample `number` of a task, without its haystack."""
    task = TASKS[name]
    generator = Random(f"{seed} {name} {number}")
    if isinstance(task, NeedleTask):
        return NeedleDraft(task, generator, text)
    return VariableDraft(task, generator)


def _answer_tokens(draft: NeedleDraft | VariableDraft, encode: Encode) -> int:
    """Count the tokens that the model may add to a sample."""
    is_needle = isinstance(draft, NeedleDraft)
    usual = NEEDLE_ANSWER_TOKENS if is_needle else VARIABLE_ANSWER_TOKENS
    return max(usual, len(encode(" " + ", ".join(draft.answers))) + ANSWER_SLACK)


# ---------------------------------------------------------------- scores


def match_all(output: str, answers: list[str]) -> float:
    """Return the share of the answers that the output holds, in any case of letters."""
    found = output.lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def match_part(output: str, answers: list[str]) -> float:
    """Return 1 where the output holds any of the answers, in any case of letters, else 0."""
    found = output.lower()
    return float(any(answer.lower() in found for answer in answers))
