"""Running RULER's tasks on a model: prompts at each length, continuations, scores."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tools.evaluation.model import LanguageModel
from tools.evaluation.ruler import (
    Sample,
    match_all,
    match_part,
    tokens_without_haystack,
    too_short,
    write_sample,
)


class RulerRun:
    """Writes and asks the samples of any task and length."""

    def __init__(self, model: LanguageModel, seed: int, samples: int, text: str | None):
        """
        Args:
            samples: of each task and length.
            text: haystack of the tasks that have one of text; None for repeated sentences.
        """
        self.model = model
        self.seed = seed
        self.samples = samples
        self.text = text

    def encode(self, prompt: str) -> list[int]:
        """Encode a prompt as the model is asked it."""
        return [*self.model.first_ids, *self.model.tokenizer.encode(prompt)]

    def check(self, names: Sequence[str], lengths: Sequence[int]) -> list[str]:
        """Name the tasks and lengths that do not fit, as `name = value: rule. Fix: ...`."""
        # The shortest length decides; a message for each longer one would say the same.
        shortest = min(lengths)
        problems = []
        for name in names:
            needed = max(self._tokens_without_haystack(name, n) for n in range(self.samples))
            if needed > shortest:
                problems.append(too_short(name, shortest, needed))
        return problems

    def _tokens_without_haystack(self, name: str, number: int) -> int:
        has_text = self.text is not None
        return tokens_without_haystack(name, number, self.seed, self.encode, has_text=has_text)

    def run(self, name: str, length: int) -> dict[str, Any]:
        """Ask all samples of a task at a length -> its record."""
        details = []
        for batch in self._batches(name, length):
            # Each its own number: a sample's score must not depend on what else is in the batch.
            outputs = self.model.continue_prompts(
                [sample.ids for sample in batch], [sample.answer_tokens for sample in batch]
            )
            details += [_judge(sample, output) for sample, output in zip(batch, outputs)]
        scores = [detail["score"] for detail in details]
        return {
            "task": name,
            "length": length,
            "score": sum(scores) / len(scores),
            "standard_error": _standard_error(scores),
            "any_answer": sum(detail["any_answer"] for detail in details) / len(details),
            "samples": details,
        }

    def _batches(self, name: str, length: int) -> Iterator[list[Sample]]:
        """Write the samples, as many together as are continued together."""
        size = max(1, self.model.batch_tokens // length)
        for first in range(0, self.samples, size):
            numbers = range(first, min(first + size, self.samples))
            yield [
                write_sample(name, length, number, self.seed, self.encode, self.text)
                for number in numbers
            ]


def _judge(sample: Sample, output: str) -> dict[str, Any]:
    """Score one continuation."""
    return {
        "number": sample.number,
        "prompt_tokens": len(sample.ids),
        "depths": sample.depths,
        "answers": sample.answers,
        "output": output,
        "score": match_all(output, sample.answers),
        "any_answer": match_part(output, sample.answers),
    }


def _standard_error(scores: list[float]) -> float | None:
    """Compute the standard error of the mean; None of a single score."""
    count = len(scores)
    if count < 2:
        return None
    mean = sum(scores) / count
    return math.sqrt(sum((score - mean) ** 2 for score in scores) / (count - 1) / count)
