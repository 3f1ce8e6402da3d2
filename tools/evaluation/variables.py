"""RULER's variable tracking: a chain of assignments in a haystack, whose names are asked for.

A solved example stands before the text, as in RULER, so that a model without instruction tuning
sees what an answer looks like.
"""

from dataclasses import dataclass
from random import Random

from tools.evaluation.haystack import Hidden, noise
from tools.evaluation.ruler_texts import (
    FIRST_ASSIGNMENT,
    HIGHEST_VALUE,
    LOWEST_VALUE,
    NEXT_ASSIGNMENT,
    VARIABLES_PROMPT,
    draw_names,
)

EXAMPLE_UNITS = 10
"""Sentences of the haystack of the solved example."""


@dataclass(frozen=True)
class VariableTask:
    """How long the chain is."""

    hops: int = 4
    """Assignments after the first one, each of the name before it."""


class VariableDraft:
    """One sample without its haystack: it can be written with any amount of it."""

    def __init__(self, task: VariableTask, generator: Random):
        taken: set[str] = set()
        example = _Chain(task, generator, taken)
        chain = _Chain(task, generator, taken)
        self.answers = chain.names
        self.depths = [one.depth for one in chain.hidden]
        self._chain = chain
        self._example = f"{example.write(EXAMPLE_UNITS)} {', '.join(example.names)}\n\n"

    def write(self, units: int) -> str:
        """Write the example, and the prompt with this much haystack."""
        return self._example + self._chain.write(units)


class _Chain:
    """Names that all get one value: the first by itself, each other one through the one before."""

    def __init__(self, task: VariableTask, generator: Random, taken: set[str]):
        """Draw names that are not in `taken`, a value, and places in order."""
        self.names = draw_names(task.hops + 1, taken, generator)
        self.value = draw_value(taken, generator)
        lines = [FIRST_ASSIGNMENT.format(name=self.names[0], value=self.value)]
        for source, name in zip(self.names, self.names[1:]):
            lines.append(NEXT_ASSIGNMENT.format(name=name, source=source))
        depths = sorted(generator.random() for _ in lines)
        self.hidden = [Hidden(depth, line) for depth, line in zip(depths, lines)]

    def write(self, units: int) -> str:
        return VARIABLES_PROMPT.format(
            context=noise().write(units, self.hidden), value=self.value, count=len(self.names)
        )


def draw_value(taken: set[str], generator: Random) -> str:
    """Draw a value that is not in `taken`; add it to it."""
    while True:
        value = str(generator.randint(LOWEST_VALUE, HIGHEST_VALUE))
        if value not in taken:
            taken.add(value)
            return value
