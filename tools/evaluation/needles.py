"""Needle in a haystack, in RULER's eight forms: sentences with a secret, hidden and asked for.

A needle gives a key a value. One or several keys are asked for; the others are there to confuse.
"""

from dataclasses import dataclass
from random import Random

from tools.evaluation.haystack import Haystack, Hidden, Lines, Words, noise
from tools.evaluation.ruler_texts import (
    NEEDLE,
    NEEDLE_PROMPT,
    ONE_NEEDLE,
    SEVERAL_NEEDLES,
    draw,
    draw_others,
    join_words,
)


@dataclass(frozen=True)
class NeedleTask:
    """One of the forms: what is hidden, how often, and in what."""

    haystack: str
    """`noise`, `text` or `needles`."""
    key: str = "word"
    value: str = "number"
    keys: int = 1
    """Keys that have a needle; in a haystack of needles beside those of the haystack."""
    values: int = 1
    """Needles, with a value each, of every key."""
    queries: int = 1
    """Keys that are asked for."""


class NeedleDraft:
    """One sample without its haystack: it can be written with any amount of it."""

    def __init__(self, task: NeedleTask, generator: Random, text: str | None):
        """Draw keys, values and places.

        Args:
            text: the haystack of the forms that have one of text; None for repeated sentences.
        """
        self.task = task
        taken: set[str] = set()
        keys = draw_others(task.key, task.keys, taken, generator)
        values = {}
        for key in keys:
            values[key] = draw_others(task.value, task.values, taken, generator)
        queries = generator.sample(keys, task.queries)
        self.answers = [value for key in queries for value in values[key]]
        self.hidden = [
            Hidden(generator.random(), _needle(task, key, value))
            for key in keys
            for value in values[key]
        ]
        asked = {_needle(task, key, value) for key in queries for value in values[key]}
        self.depths = [one.depth for one in self.hidden if one.text in asked]
        self._prompt = _prompt(task, queries)
        self._haystack = _haystack(task, generator.random(), taken, text)

    def write(self, units: int, filler: int = 0) -> str:
        """Write the prompt with this much haystack, and behind it some repeated sentences."""
        context = self._haystack.write(units, self.hidden)
        if filler:
            context += "\n" + noise().write(filler, [])
        return self._prompt.format(context=context)


def _needle(task: NeedleTask, key: str, value: str) -> str:
    return NEEDLE.format(kind=task.value, key=key, value=value)


def _prompt(task: NeedleTask, queries: list[str]) -> str:
    """Write all but the context, which stays to be filled in."""
    is_one = task.queries * task.values == 1
    question, beginning = ONE_NEEDLE if is_one else SEVERAL_NEEDLES
    words = {"kind": task.value, "keys": join_words(queries)}
    return NEEDLE_PROMPT.format(
        kinds=f"{task.value}s",
        context="{context}",
        question=question.format(**words),
        beginning=beginning.format(**words),
    )


def _haystack(task: NeedleTask, seed: float, taken: set[str], text: str | None) -> Haystack:
    """Make the haystack that the task's needles are hidden in."""
    if task.haystack == "needles":
        return Lines(_OtherNeedles(task, seed, taken))
    if task.haystack == "text" and text is not None:
        return Words(text)
    return noise()


class _OtherNeedles:
    """Gives needles by number, none with a key or value of those that are asked for."""

    def __init__(self, task: NeedleTask, seed: float, taken: set[str]):
        self.task = task
        self.taken = frozenset(taken)
        self.generator = Random(seed)
        self.made: list[str] = []

    def __call__(self, number: int) -> str:
        # They are the same for any number of units.
        while len(self.made) <= number:
            key = self._draw(self.task.key)
            self.made.append(_needle(self.task, key, self._draw(self.task.value)))
        return self.made[number]

    def _draw(self, kind: str) -> str:
        while True:
            one = draw(kind, self.generator)
            if one not in self.taken:
                return one
