"""Scores of texts on any tp x cp are those that transformers' logits give."""

import numpy as np
import pytest
import torch

from parallel.config import LayoutConfig
from parallel.layout import World, build_layout, single_process_layout
from tests.huggingface.model_folders import SHAPE, write_folder
from tools.huggingface.questions import ComparedSequence, Questions
from tools.huggingface.transformers_answers import ask_transformers
from tools.inference.open_model import open_model
from tools.inference.scores import score_texts

CPU = torch.device("cpu")
LENGTHS = (1, 9, 30, 2)
TOLERANCE = 1e-10


def texts() -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, SHAPE["vocab_size"], size=length).tolist() for length in LENGTHS]


def scores_of(load: str, layout) -> list[tuple[np.ndarray, np.ndarray]]:
    model = open_model(load, layout, precision="fp64")
    return [
        (each.log_probabilities.numpy(), each.are_likeliest.numpy())
        for each in score_texts(model, texts())
    ]


def scores_on_ranks(world: World, load: str, sizes: dict) -> list:
    return scores_of(load, build_layout(LayoutConfig(**sizes), world))


def expected_scores(folder) -> list[tuple[np.ndarray, np.ndarray]]:
    sequences = [
        ComparedSequence("", torch.tensor(text), torch.arange(len(text))) for text in texts()
    ]
    found = []
    answers = ask_transformers(folder, Questions(sequences, sequences[0].ids, new_tokens=0))
    for logits, sequence in zip(answers.double, sequences, strict=True):
        following = sequence.ids[1:]
        logs = logits[:-1].log_softmax(dim=-1)
        chosen = logs.gather(1, following[:, None])[:, 0]
        found.append((chosen.numpy(), (logs.argmax(dim=-1) == following).numpy()))
    return found


def assert_same(found, expected) -> None:
    for (logs, hits), (expected_logs, expected_hits) in zip(found, expected, strict=True):
        assert logs.shape == expected_logs.shape
        assert np.abs(logs - expected_logs).max(initial=0) < TOLERANCE
        assert (hits == expected_hits).all()


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "gemma2", "granite"])
def test_scores_are_those_of_transformers(tmp_path, kind):
    folder = write_folder(tmp_path / "hf", kind)
    assert_same(scores_of(str(folder), single_process_layout(CPU)), expected_scores(folder))


@pytest.mark.parametrize(
    "sizes",
    [
        dict(tensor_model_parallel_size=2),
        dict(context_parallel_size=2),
        dict(tensor_model_parallel_size=2, context_parallel_size=2),
        dict(
            context_parallel_size=4,
            cp_comm_type="a2a+allgather",
            hierarchical_context_parallel_sizes=[2, 2],
        ),
    ],
)
def test_scores_of_every_layout_are_those_of_transformers(pool, tmp_path, sizes):
    folder = write_folder(tmp_path / "hf", "mistral")
    count = sizes.get("tensor_model_parallel_size", 1) * sizes.get("context_parallel_size", 1)
    expected = expected_scores(folder)
    for found in pool.run(scores_on_ranks, count, str(folder), sizes):
        assert_same(found, expected)
