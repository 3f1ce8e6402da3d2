"""The questions of the local tasks for lm-evaluation-harness: reading them, and writing them anew.

    python -m tools.evaluation.harness_tasks.questions

writes addition.jsonl and repeat.jsonl from a seed; text.jsonl is written by hand. The harness
imports this file by its path, from the yaml files beside it.
"""

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SEED = 20
QUESTIONS = 40
CHOICES = 4
REPEATED_WORDS = 3
WORDS = "stone river lamp garden window paper bridge cloud apple ship tower field".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen"
).split()


def read(file: str, **_: Any) -> Any:
    """Read the questions of a file in this folder, as the harness's `custom_dataset`."""
    from datasets import Dataset

    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def addition(generator: random.Random) -> list[dict[str, Any]]:
    """Write sums of two digits, with four results to choose from."""
    found = []
    for _ in range(QUESTIONS):
        first = generator.randrange(10)
        second = generator.randrange(10)
        others = [number for number in range(len(NUMBERS)) if number != first + second]
        choices = [first + second, *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        found.append(
            {
                "question": f"{NUMBERS[first].capitalize()} plus {NUMBERS[second]} is",
                "choices": [NUMBERS[choice] for choice in choices],
                "label": choices.index(first + second),
            }
        )
    return found


def repeat(generator: random.Random) -> list[dict[str, Any]]:
    """Write lists of words that are to be repeated."""
    found = []
    for _ in range(QUESTIONS):
        words = " ".join(generator.sample(WORDS, REPEATED_WORDS))
        found.append({"words": words, "question": f"{words}\n{words}\n{words}\n"})
    return found


def main() -> None:
    """Write the files of all tasks that are made from a seed."""
    for make in (addition, repeat):
        lines = [json.dumps(one) for one in make(random.Random(SEED))]
        (FOLDER / f"{make.__name__}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
