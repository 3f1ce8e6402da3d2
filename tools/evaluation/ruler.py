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
    task = TASKS[name]
    generator = Random(f"{seed} {name} {number}")
    if isinstance(task, NeedleTask):
        draft = NeedleDraft(task, generator, text)
        usual_tokens = NEEDLE_ANSWER_TOKENS
    else:
        draft = VariableDraft(task, generator)
        usual_tokens = VARIABLE_ANSWER_TOKENS
    own_tokens = len(encode(" " + ", ".join(draft.answers))) + ANSWER_SLACK
    answer_tokens = max(usual_tokens, own_tokens)

    # As much haystack as there is room for.
    room = length - answer_tokens
    filled = fill(draft.write, encode, room)
    if isinstance(draft, NeedleDraft) and draft.task.haystack == "needles":
        # A unit is a whole needle: what is left over gets repeated sentences.
        units = filled.units
        filled = fill(lambda filler: draft.write(units, filler), encode, room)
    if len(filled.ids) > room:
        raise ValueError(
            f"lengths = {length}: {name} takes {len(filled.ids) + answer_tokens:,} tokens without "
            f"any haystack. Fix: at least {2 * (len(filled.ids) + answer_tokens):,}, or leave the "
            "task out."
        )
    return Sample(number, filled.text, filled.ids, draft.answers, answer_tokens, draft.depths)


# ---------------------------------------------------------------- scores


def match_all(output: str, answers: list[str]) -> float:
    """Return the share of the answers that the output holds, in any case of letters."""
    found = output.lower()
    return sum(answer.lower() in found for answer in answers) / len(answers)


def match_part(output: str, answers: list[str]) -> float:
    """Return 1 where the output holds any of the answers, in any case of letters, else 0."""
    found = output.lower()
    return float(any(answer.lower() in found for answer in answers))
